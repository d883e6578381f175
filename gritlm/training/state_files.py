"""The state of an optimizer, a schedule or the random generators as one safetensors file, read without unpickling."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gritlm.errors import UserError

TREE = "tree"  # the entry of the file's metadata that holds everything but the tensors


def save_state(state: Any, path: Path) -> None:
    """Write nested dicts, lists and tuples of tensors, arrays, numbers, texts and None.

    Raises:
        UserError: the state holds something else, such as a tensor of a subclass (4-bit optimizers).
    """
    tensors: dict[str, Tensor] = {}
    names: dict[Any, str] = {}  # 8-bit optimizers hold one table of values for all weights

    def packed(value: Any) -> Any:
        if isinstance(value, dict):
            return {"dict": [[packed(key), packed(part)] for key, part in value.items()]}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [packed(part) for part in value]}
        if type(value) in (Tensor, np.ndarray):
            tensor = torch.as_tensor(value).detach()
            name = names.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), str(len(names)))
            tensors[name] = tensor.cpu().contiguous()
            return {"tensor" if isinstance(value, Tensor) else "array": name}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise UserError(f"{path.name}: found a {type(value).__name__}, which no checkpoint can hold; change --optim")

    tree = json.dumps(packed(state))
    save_file(tensors, path, {TREE: tree})


def load_state(path: Path) -> Any:
    """What `save_state` wrote, with its tensors on the CPU.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return _unpacked(json.loads(file.metadata()[TREE]), file)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: the file is damaged ({error})") from error


def _unpacked(value: Any, file: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, parts),) = value.items()
    if kind == "dict":
        return {_unpacked(key, file): _unpacked(part, file) for key, part in parts}
    if kind in ("list", "tuple"):
        found = [_unpacked(part, file) for part in parts]
        return found if kind == "list" else tuple(found)
    tensor = file.get_tensor(parts)
    return tensor if kind == "tensor" else tensor.numpy()


def random_states(device: torch.device) -> dict[str, Any]:
    """The state of each global random generator of this process, and of its device's."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Set the generators to what `random_states` returned. A state of a device that is not used here is left out."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
