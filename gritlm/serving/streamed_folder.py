"""Write a model folder one weight at a time, so that the models it is made from need not fit in memory."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig

from gritlm.errors import UserError
from gritlm.models.base_files import WEIGHTS
from gritlm.models.embedder import PROJECTION_FOLDER, Embedder
from gritlm.models.folder import complete_model_folder
from gritlm.models.tokenizer import TextTokenizer

# safetensors' names, the widest first: each tensor of a file then begins at a multiple of its own width.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_model_folder(
    folder: Path,
    config: PreTrainedConfig,
    text_tokenizer: TextTokenizer,
    projection: int | None,
    dtype_of: Callable[[str], torch.dtype],
    read: Callable[[str], Tensor],
) -> None:
    """Write all files of a model folder but its card.

    Args:
        config: of the backbone. Its architecture and dtype are set.
        projection: the width of the projection, or None.
        dtype_of: the dtype that a weight is stored in, by its name in the embedder.
        read: a weight's values, of any dtype. Called once for each.
    Raises:
        UserError: a weight is not finite in its dtype.
    """
    with torch.device("meta"):
        embedder = Embedder(AutoModel.from_config(config), text_tokenizer.contract, projection)
    weights = {name: value.to(dtype_of(name)) for name, value in embedder.state_dict().items()}
    config.architectures, config.dtype = [type(embedder.backbone).__name__], next(iter(weights.values())).dtype
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    for part, file in (("backbone.", WEIGHTS), ("projection.", f"{PROJECTION_FOLDER}/{WEIGHTS}")):
        if names := [name for name in weights if name.startswith(part)]:
            (folder / file).parent.mkdir(exist_ok=True)
            _write_safetensors(folder / file, {name: weights[name] for name in names}, read)
    complete_model_folder(embedder, text_tokenizer, folder)


def _write_safetensors(path: Path, weights: dict[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write a safetensors file of weights of these dtypes and shapes. The library's writer wants all values at once."""
    codes, end = {dtype: code for code, dtype in DTYPES.items()}, 0
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    order = sorted(weights, key=lambda name: [*codes].index(weights[name].dtype))
    for name in order:
        value, start = weights[name], end
        end += value.element_size() * value.numel()
        key = name.removeprefix("backbone.").replace("projection.", "linear.")
        header[key] = {"dtype": codes[value.dtype], "shape": [*value.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            value = read(name).to(weights[name].dtype)
            if not value.isfinite().all():
                raise UserError(f"weight {name!r}: found a value that is not finite in {value.dtype}")
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
