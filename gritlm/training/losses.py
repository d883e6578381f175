"""Contrastive losses: pure maths on vectors. Knows nothing of ranks, data or models.

Shape suffixes: B queries, P candidate passages, D width, K known positives of a query; b, p: those in a tile.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Mask = Callable[[slice, slice], Tensor]  # bool (b, p) of a stretch of queries and of passages: true is left out

ROWS, COLUMNS = 1024, 4096  # of a tile: 16 MiB of scores


@dataclass
class Ring:
    """Blocks of passages that go round: `ring_shift` gives one away and returns the next."""

    hops: int
    ring_shift: Callable[[Tensor], Tensor]


def info_nce(
    queries_BD: Tensor,
    passages_PD: Tensor,
    positive_B: Tensor,
    temperature: float,
    masked: Mask | None = None,
    ring: Ring | None = None,
) -> Tensor:
    """InfoNCE of each query over all candidates (van den Oord et al., arXiv 1807.03748).

    `-log( exp(s(q, d+)/t) / sum over d of exp(s(q, d)/t) )`, s the dot product, in float32; computed as
    `log(1 + sum over d != d+ of exp((s(q, d) - s(q, d+))/t))`, which stays exact where the loss is small.

    Nothing of size B x P is ever held: tiles of the scores are made, and made again in the backward pass (the idea of
    Inf-CL, arXiv 2410.17243, for any positives and masks).

    Args:
        queries_BD: (B, D), any float dtype.
        passages_PD: (P, D).
        positive_B: int64 (B,), each query's positive as an index into the passages.
        temperature: t.
        masked: which candidates are left out of the sum; the positive never is.
        ring: the passages are the first of its blocks, all equally long; the mask counts through them as they come.
    Returns:
        float32 (B,), the loss of each query; differentiable once.
    """
    with torch.autocast(queries_BD.device.type, enabled=False):
        ring = ring or Ring(1, lambda block: block)
        return _TiledInfoNCE.apply(queries_BD.float(), passages_PD.float(), positive_B, temperature, masked, ring)


def _tiled_logits(
    q_BD: Tensor,
    block_PD: Tensor,
    hop: int,
    own_B1: Tensor,
    positive_B: Tensor,
    temperature: float,
    masked: Mask | None,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """`(s(q, d) - s(q, d+))/t` of the block that came with a hop, by tiles; -inf at the positive and where masked."""
    before = hop * len(block_PD)
    for b in _tiles(len(q_BD), ROWS):
        for p in _tiles(len(block_PD), COLUMNS):
            numbers = slice(before + p.start, before + p.stop)
            logits_bp = (q_BD[b] @ block_PD[p].T).sub_(own_B1[b]).div_(temperature)
            out_bp = positive_B[b, None] == torch.arange(numbers.start, numbers.stop, device=q_BD.device)
            if masked is not None:
                out_bp |= masked(b, numbers)
            yield b, p, logits_bp.masked_fill_(out_bp, float("-inf"))


def _tiles(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


class _TiledInfoNCE(torch.autograd.Function):
    """Two sweeps over the same tiles: the log-sum of each query, then the gradients of both sides."""

    @staticmethod
    def forward(ctx, q_BD, p_PD, positive_B, temperature, masked, ring) -> Tensor:
        own_B1 = (q_BD * p_PD[positive_B]).sum(1, keepdim=True)
        others_B = q_BD.new_full((len(q_BD),), float("-inf"))
        block_PD = p_PD
        for hop in range(ring.hops):
            block_PD = ring.ring_shift(block_PD) if hop else block_PD
            for b, _, logits_bp in _tiled_logits(q_BD, block_PD, hop, own_B1, positive_B, temperature, masked):
                others_B[b] = torch.logaddexp(others_B[b], torch.logsumexp(logits_bp, dim=1))
        losses_B = torch.nn.functional.softplus(others_B)
        ctx.save_for_backward(q_BD, p_PD, own_B1, positive_B, losses_B)
        ctx.temperature, ctx.masked, ctx.ring = temperature, masked, ring
        return losses_B

    @staticmethod
    def backward(ctx, upstream_B: Tensor):
        q_BD, p_PD, own_B1, positive_B, losses_B = ctx.saved_tensors
        temperature, ring = ctx.temperature, ctx.ring
        q_grad, p_grad = torch.zeros_like(q_BD), torch.zeros_like(p_PD)
        pull_B = torch.zeros_like(losses_B)  # what all other candidates push, the positive pulls
        block_PD = p_PD
        for hop in range(ring.hops):
            block_PD = ring.ring_shift(block_PD) if hop else block_PD
            for b, p, logits_bp in _tiled_logits(q_BD, block_PD, hop, own_B1, positive_B, temperature, ctx.masked):
                # A softmax weight, by `log(1 + sum) = loss`; the positive's own is 1 less the sum of these.
                push_bp = logits_bp.sub_(losses_B[b, None]).exp_().mul_(upstream_B[b, None] / temperature)
                q_grad[b] += push_bp @ block_PD[p]
                p_grad[p] += push_bp.T @ q_BD[b]
                pull_B[b] += push_bp.sum(1)
            p_grad = ring.ring_shift(p_grad)  # with its block, and after the last hop home
        q_grad -= pull_B[:, None] * p_PD[positive_B]
        p_grad.index_add_(0, positive_B, pull_B[:, None] * q_BD, alpha=-1)
        return q_grad, p_grad, None, None, None, None
