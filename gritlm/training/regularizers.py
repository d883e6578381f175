"""Regularisers over all vectors of a global batch: SIGReg and the spread-out term. Pure maths.

Shape suffixes: N vectors, D width, M random directions.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

DIRECTIONS = 256
KNOTS = 17  # points of the characteristic function, from 0 to 3


def gaussian_distance(vectors_ND: Tensor, seed: int, everywhere: Callable[[Tensor], Tensor]) -> Tensor:
    """SIGReg: how far random projections are from a standard normal distribution (LeJEPA, arXiv 2511.08544).

    `n * mean over directions a of sum_k w_k exp(-t_k^2/2) |phi_a(t_k) - exp(-t_k^2/2)|^2`, where phi_a is the
    characteristic function of the projections on a, and the w_k are those of the trapezoidal rule over [-3, 3].

    Args:
        vectors_ND: this rank's vectors, whose projections should have variance 1.
        seed: of the directions, equal on all ranks.
        everywhere: (1, X) of this rank -> (ranks, X), with gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    directions_DM = torch.randn(vectors_ND.shape[1], DIRECTIONS, generator=generator).to(vectors_ND)
    projected_NM = vectors_ND @ (directions_DM / directions_DM.norm(dim=0))
    step = 3 / (KNOTS - 1)

    def sums(projected_NM: Tensor, knot: float) -> Tensor:
        angle_NM = projected_NM * knot
        return torch.cat([angle_NM.cos().sum(0), angle_NM.sin().sum(0)])

    # The cosines of one knot at a time: the backward pass computes them again.
    local = [checkpoint(sums, projected_NM, number * step, use_reentrant=False) for number in range(KNOTS)]
    count = projected_NM.new_full((1,), len(projected_NM))
    total = everywhere(torch.cat([*local, count])[None]).sum(0)
    mean_K2M, count = (total[:-1] / total[-1]).view(KNOTS, 2, -1), total[-1]
    normal_K = torch.tensor([math.exp(-0.5 * (number * step) ** 2) for number in range(KNOTS)]).to(mean_K2M)
    distance_KM = (mean_K2M[:, 0] - normal_K[:, None]).square() + mean_K2M[:, 1].square()
    half_M = torch.trapezoid(normal_K[:, None] * distance_KM, dx=step, dim=0)  # over [0, 3]
    return 2 * count * half_M.mean()


def spread(vectors_ND: Tensor) -> Tensor:
    """The spread-out regulariser of unit vectors (Zhang et al., arXiv 1708.06320): `M1^2 + max(0, M2 - 1/D)`.

    M1 and M2 are the means of the similarity of two different vectors, and of its square.
    """
    count, width = vectors_ND.shape
    pairs = max(count * (count - 1), 1)
    norms_N = vectors_ND.square().sum(1)
    gram = vectors_ND.T @ vectors_ND if width < count else vectors_ND @ vectors_ND.T
    mean = (vectors_ND.sum(0).square().sum() - norms_N.sum()) / pairs
    second = (gram.square().sum() - norms_N.square().sum()) / pairs
    return mean.square() + torch.relu(second - 1 / width)
