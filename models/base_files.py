"""The files of a base model: JSON, and the headers of safetensors. Reads no weight."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import MODEL_MAPPING, PreTrainedConfig

from gritlm.errors import UserError, one_line
from gritlm.models.families import is_converted, meta_model, model_class
from gritlm.models.hub import CONFIG, DECODER, base_of, model_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MANIFEST = "checkpoint.json"  # in a checkpoint: lists its files, and those of the model folder in it
LFS_POINTER = b"version https://git-lfs"


@dataclass
class Base:
    """A base model's config, and its files, which are read when a check first needs them.

    Args:
        reset_weight: weights are not read.
        download: fetch the weights of a model on the hub. Otherwise those in the local cache are used.
    """

    name: str
    config: PreTrainedConfig
    trust_remote_code: bool = False
    reset_weight: bool = False
    download: bool = False

    def path(self, file: str) -> Path | None:
        return find_file(self.name, file, DECODER if self.download and not self.reset_weight else CONFIG)

    @property
    def all_here(self) -> bool:
        """Whether a file that is not found does not exist."""
        return self.download or Path(self.name).is_dir()

    @cached_property
    def expected(self) -> dict[str, list[int]]:
        """The shape of each weight of the model that the config describes.

        Empty if it runs code from its folder, or if transformers saves its weights in another form.
        """
        if self.trust_remote_code and getattr(self.config, "auto_map", None):
            return {}
        weights = meta_model(self.config).state_dict()  # raises where no model can be built
        return {} if is_converted(self.config) else {name: list(value.shape) for name, value in weights.items()}

    @cached_property
    def weight_files(self) -> list[Path]:
        """The one file, or all shards. Empty if they are not in the local cache, or not read."""
        if self.reset_weight:
            return []
        if single := self.path(WEIGHTS):
            return [single]
        if not (index := self.path(INDEX)):
            return []
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        paths = {shard: self.path(shard) for shard in shards}
        absent = [shard for shard, path in paths.items() if path is None]
        if absent and self.all_here:
            raise UserError(f"{index}: found no {', '.join(absent)} beside it, wanted every shard that it names")
        return [] if absent else [path for path in paths.values() if path]

    @cached_property
    def tensors(self) -> dict[str, tuple[str, list[int]]]:
        """The dtype and the shape of each saved tensor, by its name in the backbone.

        Without the language-model head, and what old versions saved: rotary frequencies and position numbers.
        """
        known = type(self.config) in MODEL_MAPPING
        prefix = f"{model_class(self.config).base_model_prefix if known else 'model'}."
        tensors: dict[str, tuple[str, list[int]]] = {}
        for path in self.weight_files:
            for name, value in read_header(path).items():
                own = name.removeprefix(prefix).replace("LayerNorm.gamma", "LayerNorm.weight")
                tensors[own.replace("LayerNorm.beta", "LayerNorm.bias")] = value
        endings = ("rotary_emb.inv_freq", "embeddings.position_ids")
        return {n: value for n, value in tensors.items() if not n.startswith("lm_head.") and not n.endswith(endings)}

    @property
    def unread(self) -> list[str]:
        """The saved tensors that the model does not have."""
        return [name for name in self.tensors if name not in self.expected] if self.expected else []

    @property
    def fingerprint(self) -> str:
        """A hash that tells a model's weights from another's, its adapters' included. Empty if they are not here.

        It is made of the names and shapes of the tensors, and of the two ends of each.
        """
        digest, name = hashlib.sha256(), self.name
        files = self.weight_files
        if not files:
            return ""
        while (base := base_of(name)) != name:
            files, name = [*files, *filter(None, [find_file(name, "adapter_model.safetensors", DECODER)])], base
        for path in files:
            with safe_open(path, "pt") as file:
                for key in sorted(file.keys()):
                    part = file.get_slice(key)
                    shape = part.get_shape()
                    digest.update(f"{key} {part.get_dtype()} {shape}".encode())
                    for end in (part[:1], part[shape[0] - 1 :]) if shape else ():
                        digest.update(end.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def in_backbone(self, name: str) -> bool:
        return name.split(".")[0] in {expected.split(".")[0] for expected in self.expected}


def find_file(name_or_path: str, file: str, files: tuple[str, ...] = CONFIG) -> Path | None:
    """A file of a model, or None. What an adapter's folder does not hold is its base's.

    Args:
        files: the patterns that are downloaded for a model on the hub.
    """
    path = Path(model_folder(name_or_path, files)) / file
    if path.is_file():
        return path
    base = base_of(name_or_path)
    return find_file(base, file, files) if base != name_or_path else None


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises UserError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise unreadable(path, "a whole JSON file", error) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: found a JSON {type(content).__name__}, wanted an object")
    return content


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """The dtype and the shape of each tensor of a safetensors file. Raises UserError, also if the file is cut short."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (value.get_dtype(), value.get_shape()) for name, value in slices.items()}
    except SafetensorError as error:
        raise unreadable(path, "a whole safetensors file", error) from error


def find_damaged_file(folder: Path, sizes: dict[str, int]) -> str:
    """What is wrong with one of the files of a list, such as that of a checkpoint; "" where all are whole.

    Args:
        sizes: bytes of each file, by its path in the folder.
    """
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != size:
            return f"{name} is cut short: found {found} bytes, wanted {size}"
        try:  # a disk may lose a file's bytes and keep its size
            if path.suffix == ".safetensors":
                read_header(path)
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except (UserError, ValueError) as error:
            return f"{name} is damaged ({error})"
    return ""


def unreadable(path: Path, wanted: str, error: Exception) -> UserError:
    """The error for a file that cannot be parsed."""
    refuse_lfs_pointer(path)
    size = path.stat().st_size
    return UserError(f"{path}: found {size} bytes that cannot be read ({one_line(error)}), wanted {wanted}")


def refuse_lfs_pointer(path: Path) -> None:
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path}: found a git-lfs pointer, wanted the file itself: run git lfs pull")
