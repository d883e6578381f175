"""What a training step takes of a GPU's memory, counted without one: its own code, run on tensors that have no data."""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModel, PreTrainedConfig

from gritlm.models.attention import PACKED
from gritlm.models.embedder import Embedder


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operators under it return, while they live, and the most at any time; of
    those that are known before, and of views of them, none.

    What a kernel takes for itself while it equal_length_runs is not seen, nor what an allocator loses between tensors.
    """

    def __init__(self, *known: Tensor):
        super().__init__()
        self.now = self.peak = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, result)
        return result

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)
        return tensor

    def _gone(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Footprint:
    """Bytes. weights: all in float32. kept: what a chunk holds between its forward and its backward. peak: the most
    that its forward and backward take beyond the weights and their gradient."""

    weights: int
    kept: int
    peak: int


def chunk_footprint(
    config: PreTrainedConfig, tokens: int, length: int, bf16: bool = False, gradient_checkpointing: bool = False
) -> Footprint:
    """A chunk of texts of `length` tokens each, through a model of this config, packed, not compiled.

    Args:
        tokens: of the chunk, whole texts: a multiple of `length`.
        bf16: under bfloat16 autocast.
    """
    with FakeTensorMode():
        model = Embedder(AutoModel.from_config(config, dtype=torch.float32, attn_implementation=PACKED)).train()
        if gradient_checkpointing:
            model.activation_checkpointing_enable()
        return count_chunk(model, tokens // length, length, bf16)


def count_chunk(model: Embedder, texts: int, length: int, bf16: bool = False) -> Footprint:
    """One forward and backward of `model`, on tensors with data or without; leaves it no gradient."""
    weights = list(model.parameters())
    # Their gradient is there from the first chunk on: another's is added, and gone.
    hooks = [w.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None)) for w in weights]
    ids, lengths = torch.zeros(texts * length, dtype=torch.long), torch.full((texts,), length)
    with LiveBytes(*weights) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            vectors = model(ids, lengths, torch.zeros_like(lengths), equal_length_runs=((texts, length),))
        kept = live.now
        vectors.backward(torch.zeros_like(vectors))
    for hook in hooks:
        hook.remove()
    return Footprint(sum(weight.nbytes for weight in weights), kept, live.peak)
