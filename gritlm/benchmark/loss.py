"""`gritlm benchmark loss`: InfoNCE alone, forward and backward, tiled and dense, against float64.

Shape suffixes: B queries, P passages, D width; b: the queries of one block.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gritlm.benchmark.workload import measure, memory_in_use
from gritlm.errors import UserError
from gritlm.training.losses import logsumexp_over

TEMPERATURE = 0.02
DENSE_LIMIT = 4e9  # bytes of the float32 matrix of scores


def tiled_info_nce(queries_BD: Tensor, passages_PD: Tensor, positive_B: Tensor) -> Tensor:
    """InfoNCE as the objective computes it, tile by tile."""
    own_B = (queries_BD * passages_PD[positive_B]).sum(1)

    def masked(b: slice, p: slice) -> Tensor:
        return positive_B[b, None] == torch.arange(p.start, p.stop, device=positive_B.device)

    return F.softplus(logsumexp_over(queries_BD, passages_PD, own_B, TEMPERATURE, masked))


def dense_info_nce(queries_BD: Tensor, passages_PD: Tensor, positive_B: Tensor) -> Tensor:
    """InfoNCE as cross entropy of the whole matrix of scores."""
    return F.cross_entropy(queries_BD @ passages_PD.T / TEMPERATURE, positive_B, reduction="none")


def in_float64(queries_BD: Tensor, passages_PD: Tensor, positive_B: Tensor) -> list[Tensor]:
    """The mean loss and its gradients for queries and passages, computed in float64 a block of queries at a time."""
    q_BD, p_PD = (x.detach().double().requires_grad_() for x in (queries_BD, passages_PD))
    total = q_BD.detach().new_zeros(())
    for q_bD, positive_b in zip(q_BD.split(256), positive_B.split(256), strict=True):
        loss = F.cross_entropy(q_bD @ p_PD.T / TEMPERATURE, positive_b, reduction="sum") / len(q_BD)
        loss.backward()
        total += loss.detach()
    assert q_BD.grad is not None and p_PD.grad is not None
    return [total, q_BD.grad, p_PD.grad]


def random_vectors(queries: int, passages: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Unit vectors that require gradients; passage i is the positive of query i, and the loss is about 1."""
    generator = torch.Generator().manual_seed(0)
    q_BD = torch.randn(queries, width, generator=generator)
    p_PD = torch.randn(passages, width, generator=generator)
    p_PD[:queries] += 0.35 * q_BD
    q_BD, p_PD = (F.normalize(x, dim=1).to(device).requires_grad_() for x in (q_BD, p_PD))
    return q_BD, p_PD


def measure_loss(args: argparse.Namespace) -> dict[str, Any]:
    """Time both forms in turn. A dense matrix that is too large is left out, and so are the errors."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    passages = args.passages or 4 * args.queries
    if passages < args.queries:
        raise UserError(f"--passages {passages}: wanted at least one for each of the {args.queries} queries")
    print(f"InfoNCE of {args.queries} queries x {passages} passages x {args.width}, float32, forward and backward")
    vectors = random_vectors(args.queries, passages, args.width, device)
    positive_B = torch.arange(args.queries, device=device)
    losses, exact = {"tiled": tiled_info_nce}, None
    if 4 * args.queries * passages < DENSE_LIMIT:
        losses["dense"] = dense_info_nce
        exact = in_float64(*vectors, positive_B)
    figures: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in losses}
    warmups = int(args.rounds > 1)
    for number in range(args.rounds + warmups):
        for name, loss in losses.items():
            found, seconds, peak = forward_and_backward(loss, vectors, positive_B)
            figures[name]["peak_gb"] = peak / 1e9
            if number >= warmups:
                figures[name]["seconds"].append(seconds)
            if exact:
                pairs = zip(found, exact, strict=True)
                figures[name]["errors"] = [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
    for name, figure in figures.items():
        line = f"  {name}: {statistics.median(figure['seconds']):.2f} s, peak +{figure['peak_gb']:.3f} GB"
        if exact:
            parts = zip(("loss", "queries' gradient", "passages' gradient"), figure["errors"], strict=True)
            line += "; relative error against float64: " + ", ".join(f"{part} {error:.0e}" for part, error in parts)
        print(line)
    return figures


def forward_and_backward(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], vectors: tuple[Tensor, Tensor], positive_B: Tensor
) -> tuple[list[Tensor], float, float]:
    """The mean loss and its gradients, the seconds, and the peak memory in bytes above what was in use."""

    def run() -> list[Tensor]:
        value = loss(*vectors, positive_B).mean()
        return [value.detach(), *torch.autograd.grad(value, vectors)]

    before = memory_in_use(positive_B.device)
    found, seconds, peak = measure(run, positive_B.device)
    return found, seconds, peak - before
