"""Models of the Hugging Face hub: from a name to a folder of the local cache, completed from the hub if need be.

Every reader of a model gets its folder here. A name is looked up in the cache first. Only what is missing there is
asked of the hub, by one process of a node at a time.
"""

import functools
import json
from pathlib import Path
from threading import Thread
from typing import Literal

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import WeakFileLock, filter_repo_objects, validate_repo_id

from gritlm.errors import UserError, one_line

SECONDS = 3  # the hub has to answer within this time
# The files of a decoder: without its weights, and with them.
CONFIG = (
    *("config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.py"),
    *("modules.json", "*sentence*.json", "*_*/config.json", "*_Dense/model.safetensors"),
    *("text_contract.json", "adapter_config.json", "quantised_base.json", "model.safetensors.index.json"),
)
DECODER = (*CONFIG, "model.safetensors", "model-*.safetensors", "adapter_model.safetensors")
ANY_MODEL = ("*",)
OTHER_FORMATS = ("onnx/*", "openvino/*", "original/*", "*.onnx*", "*.gguf", "*.h5", "*.msgpack", "*.ot")


@functools.cache
def model_folder(name_or_path: str, files: tuple[str, ...] = CONFIG) -> str:
    """The folder of a model: its path as it is, or for a name on the hub its snapshot in the local cache.

    Args:
        files: patterns of the files that are needed. What the cache lacks of them is downloaded.
    Raises:
        UserError: something that is needed is not in the cache, and the hub does not give it.
    """
    if Path(name_or_path).exists() or not is_hub_name(name_or_path):
        return name_or_path
    missing = find_missing(name_or_path, files)
    if not missing:
        return str(snapshot(name_or_path))
    if reason := ask(name_or_path):
        if missing == ["modules.json"] and not _listing(name_or_path):  # it may be that the hub has none
            return str(snapshot(name_or_path))
        raise UserError(
            f"{name_or_path}: found no such folder, and no {missing[0]} of a model of this name in the cache "
            f"{constants.HF_HUB_CACHE}; {reason}; where there is a network, `hf download {name_or_path}` fetches it"
        )
    try:
        lock = Path(constants.HF_HUB_CACHE) / ".locks" / f"gritlm--{name_or_path.replace('/', '--')}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if find_missing(name_or_path, files):  # not yet by another rank
                snapshot_download(
                    name_or_path, allow_patterns=[*files], ignore_patterns=[*OTHER_FORMATS], endpoint=constants.ENDPOINT
                )
    except Exception as error:  # errors of the library, the hub, the network and the disk have no common class
        raise UserError(f"{name_or_path}: the download broke off: {one_line(error)[:300]}") from error
    if not (folder := snapshot(name_or_path)):
        raise UserError(f"{name_or_path}: found no config.json on the hub, wanted a model")
    return str(folder)


def base_of(name_or_path: str) -> str:
    """The base of an adapter, by its adapter_config.json. The name itself for a folder with whole weights, or none.

    Raises:
        UserError: the adapter does not say it, or the base cannot be found.
    """
    folder = Path(model_folder(name_or_path))
    path = folder / "adapter_config.json"
    if not path.is_file() or _has_one(folder, "model*.safetensors*", "pytorch_model*.bin"):
        return name_or_path
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
        if not base or not isinstance(base, str):
            raise ValueError("no name")
        found = Path(model_folder(base)).is_dir()
    except UserError as error:
        raise UserError(f"{path}: found an adapter for the base {base!r}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: found no base_model_name_or_path, wanted the adapter's base") from error
    if not found:
        raise UserError(f"{path}: found an adapter for the base {base!r}, and no such folder; write its place there")
    return base


def is_hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def snapshot(name: str) -> Path | None:
    """The folder of a model in the cache, or None. It may lack files."""
    found = (try_to_load_from_cache(name, file) for file in ("config.json", "adapter_config.json"))
    return next((Path(file).parent for file in found if isinstance(file, str)), None)


def find_missing(name: str, files: tuple[str, ...]) -> list[str]:
    """The needed files of a model that the cache lacks, or may lack where it has no list of the hub's files."""
    folder = snapshot(name)
    if not folder:
        return ["config.json"]
    if listing := _listing(name):
        wanted = filter_repo_objects(listing, allow_patterns=[*files], ignore_patterns=[*OTHER_FORMATS])
        return [file for file in wanted if not (folder / file).exists()]
    missing = [] if _has_one(folder, "tokenizer.json", "vocab*", "*.model") else ["tokenizer.json"]
    if files != CONFIG and not _has_weights(folder):
        missing.append("model.safetensors")
    return missing if knows(name, "modules.json") else [*missing, "modules.json"]


def knows(name: str, file: str) -> bool:
    """Whether the cache has a file of a model, or has noted that the hub has none."""
    return bool(_listing(name)) or try_to_load_from_cache(name, file) is not None


def _listing(name: str) -> list[str]:
    """The files that a model has on the hub, by the list that a download of a snapshot leaves in the cache."""
    folder = snapshot(name)
    if not folder:
        return []
    try:
        return list(json.loads((folder.parents[1] / "trees" / f"{folder.name}.json").read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _has_weights(folder: Path) -> bool:
    try:
        shards = json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError):
        return _has_one(folder, "model.safetensors", "pytorch_model*.bin")
    return all((folder / shard).exists() for shard in shards)


def _has_one(folder: Path, *patterns: str) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


@functools.cache
def ask(name: str, kind: Literal["model", "dataset"] = "model") -> str:
    """Why the hub does not give a model or a data set, within `SECONDS`; "" if it does."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answers: list[str] = []

    def look_up() -> None:
        try:
            HfApi(endpoint=constants.ENDPOINT).repo_info(name, repo_type=kind, timeout=SECONDS)
            answers.append("")
        except RepositoryNotFoundError:
            answers.append(f"{constants.ENDPOINT} has no such {kind}, or shows it after a login only (hf auth login)")
        except Exception as error:  # of the network, a proxy, the library
            answers.append(f"{constants.ENDPOINT}: {one_line(error)[:200]}")

    # In a thread, because looking up an address has no time limit.
    thread = Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return answers[0] if answers else f"{constants.ENDPOINT} does not answer within {SECONDS} seconds"
