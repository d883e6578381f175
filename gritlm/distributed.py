"""Ranks: the collectives between them. Everything here also works with one process.

Only this file and engines.py import torch.distributed.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException as ShardsUnsaved  # noqa: F401

# torch 2.13 renamed these two.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


@dataclass(frozen=True)
class Ranks:
    """The processes that share one global batch: how many there are, and which one this is."""

    size: int = 1
    rank: int = 0


def all_ranks() -> Ranks:
    return Ranks(world_size(), rank())


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def init_process_group() -> torch.device:
    """Join the process group that torchrun describes. Returns the device of this process."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    return device


def shared_store() -> dist.TCPStore | None:
    """A new connection to the store that torchrun's ranks share; None for a single process."""
    if world_size() == 1:
        return None
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)


def ranks_on_this_host() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


_started = 0


def collectives_started() -> int:
    """How many collectives of this file this process has begun. Work that has begun none can be repeated alone."""
    return _started


def _start() -> None:
    global _started
    _started += 1


def barrier() -> None:
    if world_size() > 1:
        _start()
        dist.barrier()


def lost_a_rank(error: BaseException) -> bool:
    """Whether a collective failed because the connection to another rank is gone."""
    signs = ("Connection closed by peer", "Connection reset by peer", "remote process exited")  # gloo, gloo, NCCL
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def destroy_process_group() -> None:
    """Leave the process group. A rank that exits without it can hang or warn."""
    if dist.is_initialized():
        _cpu_group.cache_clear()  # a group with a reference left keeps its threads
        dist.destroy_process_group()


def all_gather(x: Tensor) -> Tensor:
    """Concatenate every rank's `x` (same shape) along dimension 0, in rank order. No gradient."""
    if world_size() == 1:
        return x
    out = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
    x = x.contiguous()
    _start()
    getattr(dist, _ALL_GATHER)(out, x)
    return out


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of every rank's `x`. No gradient."""
    if world_size() > 1:
        x = x.clone()
        _start()
        dist.all_reduce(x)
    return x


def all_reduce_in_place(tensors: Sequence[Tensor], at_most: int) -> None:
    """Replace each tensor by the sum of every rank's. Small ones go together, in buffers of `at_most` bytes."""
    if world_size() == 1:
        return
    groups: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not groups or tensor.nbytes > room or tensor.dtype != groups[-1][0].dtype:
            groups.append([])
            room = at_most
        groups[-1].append(tensor)
        room -= tensor.nbytes
    for group in groups:
        alone = len(group) == 1 and group[0].is_contiguous()
        buffer = group[0] if alone else torch.cat([tensor.flatten() for tensor in group])
        _start()
        dist.all_reduce(buffer)
        for tensor, part in () if alone else zip(group, buffer.split([t.numel() for t in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


def broadcast_in_place(x: Tensor) -> None:
    """Replace `x` by the first rank's."""
    if world_size() > 1:
        _start()
        dist.broadcast(x, 0)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # Each rank's loss depends on this rank's rows: the gradient of their sum is the sum of the slices.
        own = grad.new_empty(len(grad) // world_size(), *grad.shape[1:])
        _start()
        getattr(dist, _REDUCE_SCATTER)(own, grad.contiguous())
        return own


def gather_with_gradient(x: Tensor) -> Tensor:
    """`all_gather` whose backward returns the gradient of the sum of all ranks' losses."""
    return _GatherWithGradient.apply(x) if world_size() > 1 else x


def ring_shift(x: Tensor) -> Tensor:
    """Send `x` to the next rank of the ring and return the previous rank's (same shape). No gradient."""
    if world_size() == 1:
        return x
    received = torch.empty_like(x)
    send = dist.P2POp(dist.isend, x.contiguous(), (rank() + 1) % world_size())
    receive = dist.P2POp(dist.irecv, received, (rank() - 1) % world_size())
    _start()
    for transfer in dist.batch_isend_irecv([send, receive]):
        transfer.wait()
    return received


@functools.cache
def _cpu_group():
    """A gloo group for small numbers on the host, which then never wait for the device."""
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def all_reduce_max(*values: int) -> list[int]:
    """The maximum over ranks of each integer. Runs on the host; all ranks must call it."""
    if world_size() == 1:
        return list(values)
    agreed = torch.tensor(values, dtype=torch.int64)
    _start()
    dist.all_reduce(agreed, dist.ReduceOp.MAX, group=_cpu_group())
    return agreed.tolist()


def gather_objects(value) -> list:
    """Every rank's `value` (anything that pickles, small), in rank order."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    _start()
    dist.all_gather_object(values, value, group=_cpu_group())
    return values
