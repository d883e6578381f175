"""Selective activation checkpointing: a layer keeps the outputs of its matrix products and of its attention.

Norms, rotary positions, gates, residuals and casts lie between them. They cost little, and the backward pass computes
them again. The gradient is the same to the bit.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# Names of torch's operators whose outputs are kept, and beginnings of such names.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "_grouped_mm", "_linear_pointwise")
ATTENTION = ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "_varlen_attn", "_flash_attn")

_watchers: list[Callable[[Tensor], object]] = []


@functools.cache
def is_kept(operator: Any) -> bool:
    schema = getattr(operator, "_schema", None)
    name = schema.name.rpartition("::")[2] if schema else ""
    return name in PRODUCTS or name.startswith(ATTENTION)


def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What torch asks of each operator in a layer, in the forward and when it is recomputed."""
    if not is_kept(operator):
        return CheckpointPolicy.PREFER_RECOMPUTE
    for output in tree_leaves(context.op_output) if _watchers and not context.is_recompute else ():
        for watcher in _watchers if isinstance(output, Tensor) else ():
            watcher(output)
    return CheckpointPolicy.MUST_SAVE


def contexts() -> tuple[Any, Any]:
    """The `context_fn` of `torch.utils.checkpoint.checkpoint`. A forward without a graph has nothing to keep."""
    if not torch.is_grad_enabled():
        return nullcontext(), nullcontext()
    return create_selective_checkpoint_contexts(policy)


@contextmanager
def watching(note: Callable[[Tensor], object]) -> Iterator[None]:
    """Call `note` with each tensor that is kept so. Hooks on saved tensors do not see them."""
    _watchers.append(note)
    try:
        yield
    finally:
        _watchers.remove(note)
