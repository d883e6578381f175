"""Ranks: the only file that imports torch.distributed. Everything here also works with one process.

An engine says how the two-pass step talks to the wrapper around the model; other engines are further classes here.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def close() -> None:
    """Leave the process group; without it a rank's exit can hang or warn."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_gather(x: Tensor) -> Tensor:
    """Concatenate every rank's `x` (same shape) along dimension 0, in rank order. No gradient."""
    if world_size() == 1:
        return x
    out = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous())
    return out


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of every rank's `x`. No gradient."""
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # Each rank's loss depends on this rank's rows: the gradient of their sum is the sum of the slices.
        return all_reduce_sum(grad.contiguous()).chunk(world_size())[rank()]


def gather_with_gradient(x: Tensor) -> Tensor:
    """`all_gather` whose backward returns the gradient of the sum of all ranks' losses."""
    return _GatherWithGradient.apply(x) if world_size() > 1 else x


class Engine(Protocol):
    """What the two-pass step needs from the wrapper around the model."""

    model: nn.Module  # called in pass 1, without gradient
    wrapped: nn.Module  # called in pass 2, with gradient
    loss_scale: float  # the local loss times this, reduced as the engine does it, is the sum over ranks

    def reduce_gradients(self, now: bool):
        """Context of one chunk's forward and backward; gradients cross ranks only where `now` is true."""


class SingleEngine:
    """One process."""

    loss_scale = 1.0

    def __init__(self, model: nn.Module):
        self.model = self.wrapped = model

    def reduce_gradients(self, now: bool):
        return nullcontext()


class DDPEngine:
    """DistributedDataParallel: it averages over ranks, hence the scale; `no_sync` for all chunks but the last."""

    def __init__(self, wrapped: DistributedDataParallel):
        self.model, self.wrapped = wrapped.module, wrapped
        self.loss_scale = float(world_size())

    @contextmanager
    def reduce_gradients(self, now: bool) -> Iterator[None]:
        with nullcontext() if now else self.wrapped.no_sync():
            yield


def make_engine(model: nn.Module) -> Engine:
    """The engine for a model as the Trainer has wrapped it."""
    if isinstance(model, DistributedDataParallel):
        return DDPEngine(model)
    if world_size() > 1:
        raise ValueError(f"{type(model).__name__} on {world_size()} ranks: no gradient would cross them")
    return SingleEngine(model)
