"""The log-sum-exp that every contrastive loss is made of. Pure maths; knows nothing of ranks, data or models.

Shape suffixes: B queries, P candidates, D width; b, p: the queries and candidates of one tile.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Mask = Callable[[slice, slice], Tensor]  # bool (b, p) of a range of queries and of candidates: true is left out
Bias = Callable[[slice, slice, Tensor], Tensor]  # (b, p) and its similarities -> float32 (b, p), added to the logits

TILE_ROWS, TILE_COLUMNS = 1024, 4096  # 16 MiB of float32 scores
EMPTY = -1e30  # the log-sum of no candidate: its exponential is 0, and gradients through it stay finite


@dataclass(frozen=True)
class Ring:
    """Blocks of candidates that go round the ranks: `shift` sends one on and returns the next."""

    hops: int
    shift: Callable[[Tensor], Tensor]


def logsumexp_over(
    queries_BD: Tensor,
    candidates_PD: Tensor,
    shift_B: Tensor,
    temperature: float,
    masked: Mask,
    ring: Ring | None = None,
    bias: Bias | None = None,
    left_out_2B: Tensor | None = None,
) -> Tensor:
    """`log sum over d of exp((s(q, d) - shift)/t)` over the candidates that the mask leaves; s is the dot product.

    With the positive's similarity as shift and the positive masked, InfoNCE is `softplus` of this, which stays exact
    where the loss is small.

    No matrix of size B x P is held. Scores are computed tile by tile, and again in the backward pass (the idea of
    Inf-CL, arXiv 2410.17243, for any mask and shift).

    Args:
        queries_BD: (B, D), any float dtype.
        candidates_PD: (P, D). With a ring: this rank's block, as long as every other block.
        shift_B: (B,), subtracted from each similarity of a query.
        masked: candidates to leave out. With a ring it counts through the blocks in the order of their arrival.
        ring: how the other blocks arrive; None where the candidates are all here.
        bias: added to the logits, after the division by t, as a constant; -inf leaves a candidate out.
        left_out_2B: int64 (2, B), to which the numbers of candidates are added that the mask and the bias leave out.
    Returns:
        float32 (B,), `EMPTY` where every candidate is masked. Differentiable once, in queries, candidates and shift.
    """
    ring = ring or Ring(1, lambda block: block)
    with torch.autocast(queries_BD.device.type, enabled=False):
        tensors = queries_BD.float(), candidates_PD.float(), shift_B.float()
        return _LogSumExpOver.apply(*tensors, temperature, masked, ring, bias, left_out_2B)


def _tiles(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


class _LogSumExpOver(torch.autograd.Function):
    """Two sweeps over the same tiles: the log-sum of each query, then the gradients."""

    @staticmethod
    def forward(ctx: Any, q_BD: Tensor, c_PD: Tensor, shift_B: Tensor, *settings: Any):
        ctx.temperature, ctx.masked, ctx.ring, ctx.bias, ctx.left_out_2B = settings
        log_sum_B = q_BD.new_full((len(q_BD),), float("-inf"))
        for b, _, _, logits_bp in _LogSumExpOver.sweep(ctx, q_BD, c_PD, shift_B, None):
            log_sum_B[b] = torch.logaddexp(log_sum_B[b], torch.logsumexp(logits_bp, dim=1))
        log_sum_B = log_sum_B.clamp(min=EMPTY)
        ctx.save_for_backward(q_BD, c_PD, shift_B, log_sum_B)
        ctx.left_out_2B = None  # counted once
        return log_sum_B

    @staticmethod
    def sweep(
        ctx: Any, q_BD: Tensor, c_PD: Tensor, shift_B: Tensor, c_grad_PD: Tensor | None
    ) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor]]:
        """Each tile: its queries, its candidates and their gradient (views), its logits with -inf where masked.

        The candidates' gradient travels with its block, and the last hop brings it home.
        """
        ring: Ring = ctx.ring
        for hop in range(ring.hops):
            c_PD = ring.shift(c_PD) if hop else c_PD
            first = hop * len(c_PD)
            for b in _tiles(len(q_BD), TILE_ROWS):
                for p in _tiles(len(c_PD), TILE_COLUMNS):
                    arrived = slice(first + p.start, first + p.stop)
                    logits_bp = q_BD[b] @ c_PD[p].T
                    bias_bp = ctx.bias(b, arrived, logits_bp) if ctx.bias else None
                    logits_bp.sub_(shift_B[b, None]).div_(ctx.temperature)
                    masked_bp = ctx.masked(b, arrived)
                    logits_bp.masked_fill_(masked_bp, float("-inf"))
                    if bias_bp is not None:
                        logits_bp.add_(bias_bp)
                    if ctx.left_out_2B is not None:
                        ctx.left_out_2B[0, b] += masked_bp.sum(1)
                        ctx.left_out_2B[1, b] += logits_bp.isneginf().sum(1) - masked_bp.sum(1)
                    yield b, c_PD[p], None if c_grad_PD is None else c_grad_PD[p], logits_bp
            if c_grad_PD is not None and ring.hops > 1:
                c_grad_PD.copy_(ring.shift(c_grad_PD))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor):
        (upstream_B,) = upstream
        q_BD, c_PD, shift_B, log_sum_B = ctx.saved_tensors
        q_grad_BD, c_grad_PD, total_B = torch.zeros_like(q_BD), torch.zeros_like(c_PD), torch.zeros_like(shift_B)
        scale_B = upstream_B / ctx.temperature
        for b, c_pD, c_grad_pD, logits_bp in _LogSumExpOver.sweep(ctx, q_BD, c_PD, shift_B, c_grad_PD):
            weights_bp = logits_bp.sub_(log_sum_B[b, None]).exp_().mul_(scale_B[b, None])
            q_grad_BD[b] += weights_bp @ c_pD
            c_grad_pD += weights_bp.T @ q_BD[b]
            total_B[b] += weights_bp.sum(1)
        return q_grad_BD, c_grad_PD, -total_B, None, None, None, None, None
