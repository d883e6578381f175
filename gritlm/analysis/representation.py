"""The metrics that follow from the sums of a pair of layers: correlation, Procrustes, CKA.

The dimensions of the two layers have to mean the same for correlation, H_inv and sparsity: these need equal widths, and
a rotation moves them. Procrustes' residual is what no rotation removes. CKA moves with neither.
"""

import math
from typing import Any

import torch
from torch import Tensor

from gritlm.analysis.sums import Sums

NOISE = 1e-6  # of float32: a dimension that varies less than this part of its size is constant
EDGES = torch.linspace(-1, 1, 41, dtype=torch.float64)  # of the histogram of correlations
TIED = "found widths {} and {}, wanted the same: it is tied to coordinates"


def varies(sums: Sums, side: str) -> Tensor:
    """bool (D,): whether a dimension of x or y is not constant."""
    mean_D = sums.total(side) / sums.count
    spread_D = (sums.total(2 * side) / sums.count - mean_D.square()).clamp(min=0).sqrt()
    return spread_D > NOISE * (sums.shifts["xy".index(side)].double().abs() + mean_D.abs())


def correlations(sums: Sums) -> Tensor:
    """rho_j of each dimension: the cosine of the centred columns j, float64 (D,). NaN where one is constant."""
    x, y, count = sums.total("x"), sums.total("y"), sums.count
    spread = (sums.total("xx") - x * x / count) * (sums.total("yy") - y * y / count)
    rho_D = (sums.total("XY").diagonal() - x * y / count) / spread.clamp(min=0).sqrt()
    return rho_D.clamp(-1, 1).masked_fill(~(varies(sums, "x") & varies(sums, "y")), math.nan)


class Rotation:
    """The orthogonal map of x to y (Schoenemann, 1966), fitted on the first half of the documents.

    Attributes:
        why: why there is none; "" if there is.
        live: bool (D,): without dimensions that are constant in both.
        matrix: O, the minimum of ||X O - Y||, X and Y centred. scale: s, the minimum of ||s X O - Y||.
    """

    def __init__(self, sums: Sums, check_rank: bool = False):
        self.live = varies(sums, "x") | varies(sums, "y")
        width, (first, second) = int(self.live.sum()), (int(half) for half in sums.parts["count"])
        self.why = ""
        if first <= width or not second:
            self.why = f"found {first} rows in the fitted half, wanted more than the {width} dimensions"
        elif check_rank and (rank := min(_rank(sums, "x"), _rank(sums, "y"))) < 0.99 * width - 1:
            self.why = f"found states of rank {rank}, wanted nearly the {width} dimensions: give more texts"
        if not self.why:
            self.means = [sums.parts[name][0][self.live] / first for name in "xy"]
            covariance, x_spread, _ = self._around_means(sums, 0)
            u, singular, v = torch.linalg.svd(covariance)
            self.matrix, self.scale = u @ v, float(singular.sum()) / x_spread

    def _around_means(self, sums: Sums, half: int) -> tuple[Tensor, float, float]:
        """x'y and the squares of x and y of a half, around the means of the fitted half."""
        count, (x_mean, y_mean) = sums.parts["count"][half], self.means
        x, y, xx, yy = (sums.parts[name][half][self.live] for name in ("x", "y", "xx", "yy"))
        products = sums.parts["XY"][half][self.live][:, self.live] - x[:, None] * y_mean - x_mean[:, None] * y
        x_spread = float((xx - 2 * x * x_mean + count * x_mean.square()).sum())
        y_spread = float((yy - 2 * y * y_mean + count * y_mean.square()).sum())
        return products + count * x_mean[:, None] * y_mean, x_spread, y_spread

    def residual(self, sums: Sums, scale: float) -> float | None:
        """||s X O - Y||^2 / ||Y||^2 on the second half."""
        products, x_spread, y_spread = self._around_means(sums, 1)
        left = scale * scale * x_spread - 2 * scale * float((products * self.matrix).sum()) + y_spread
        return max(0.0, left / y_spread) if y_spread else None

    def mapped(self, x_TD: Tensor, shift_D: Tensor) -> Tensor:
        """Rows of x in y's space, around the means of the fitted half, float64."""
        return ((x_TD - shift_D)[:, self.live].double() - self.means[0]) @ self.matrix


def _rank(sums: Sums, side: str) -> int:
    """The rank of the correlations of one side, without what float32 makes of zero."""
    mean = sums.total(side) / sums.count
    products = sums.parts[2 * side.upper()] / sums.count - mean[:, None] * mean
    kept = varies(sums, side)
    spread = products.diagonal()[kept].sqrt()
    return int((torch.linalg.eigvalsh(products[kept][:, kept] / spread / spread[:, None]) > 10 * NOISE).sum())


def h_inv(matrix: Tensor) -> float:
    """1 + sum p ln p / (D ln D), p the squares of O (arXiv 2601.21192): 1 of a permutation, 0 of equal entries."""
    return 1 - float(torch.special.entr(matrix.square()).sum()) / (len(matrix) * math.log(len(matrix)))


def sparsity(matrix: Tensor) -> float:
    """Hoyer's sparsity (2004), mean over rows: 1 of a permutation, 0 of equal entries."""
    root = math.sqrt(len(matrix))
    return float((root - matrix.abs().sum(1)).mean() / (root - 1))


def floors(width: int) -> dict[str, float]:
    """H_inv and sparsity of a random rotation: a model that shares nothing with the other has them."""
    root = math.sqrt(width)
    return {"h_inv": 0.7296 / math.log(width), "sparsity": root * (1 - math.sqrt(2 / math.pi)) / (root - 1)}


def reduced(x_TD: Tensor, y_TE: Tensor, second_T: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Rows of unlike widths on their first principal components (of the first half), as many as the narrower has.

    The third value says how many, and the least share of a layer's variance in them.
    """
    width, results, shares = min(x_TD.shape[1], y_TE.shape[1]), [], []
    for rows in (x_TD.double(), y_TE.double()):
        rows = rows - rows[~second_T].mean(0)
        values, vectors = torch.linalg.eigh(rows[~second_T].T @ rows[~second_T])
        results.append(rows @ vectors[:, -width:])
        shares.append(float(values[-width:].sum() / values.sum()))
    return results[0], results[1], {"dimensions": width, "variance_kept": min(shares), "rows": len(x_TD)}


def hsic(squares: Tensor, x: Tensor, y: Tensor, x_norms: Tensor, y_norms: Tensor, crossed: Tensor, n: int) -> float:
    """The unbiased estimate (Song et al., 2012) for linear kernels K and L without their diagonals.

    Args:
        squares: tr(KL). crossed: 1'KL1. x, y: sums of the rows. x_norms, y_norms: sums of their squared norms.
    """
    totals = (x @ x - x_norms) * (y @ y - y_norms) / ((n - 1) * (n - 2))
    return float((squares + totals - 2 * crossed / (n - 2)) / (n * (n - 3)))


def cka(sums: Sums, unbiased: bool = True) -> float | None:
    """Linear CKA (Kornblith et al., 2019). None where a layer does not vary, or of fewer than 4 rows."""

    def one(left: str, right: str, products: Tensor) -> float:
        x, y, both = sums.total(left), sums.total(right), left + right
        if not unbiased:
            return float((products - x[:, None] * y / sums.count).square().sum())
        own, other, fourth = (sums.parts[name] for name in (f"{both}_own", f"{both[::-1]}_own", f"{both}_fourth"))
        norms = sums.total(2 * left).sum(), sums.total(2 * right).sum()
        crossed = x @ products @ y - x @ own - y @ other + fourth
        return hsic(products.square().sum() - fourth, x, y, *norms, crossed, sums.count)

    if sums.count < 4:
        return None
    own_x, own_y = one("x", "x", sums.parts["XX"]), one("y", "y", sums.parts["YY"])
    return one("x", "y", sums.total("XY")) / math.sqrt(own_x * own_y) if own_x > 0 and own_y > 0 else None


def measure(sums: Sums, rows: tuple[Tensor, Tensor, Tensor], detail: bool = True) -> dict[str, dict[str, Any]]:
    """Each metric of a pair of layers: its value, and other numbers.

    Args:
        rows: of the sample: x_TD, y_TE, and whether a row is of the second half. For mapped cosines, and for layers of
            unlike width.
        detail: the rank, histograms, and mapped cosines: `cosines`, of the rows of the second half, a tensor.
    """
    names = ("correlation", "h_inv", "sparsity", "residual", "mapped_cosine")
    found: dict[str, dict[str, Any]] = {name: {"value": None, "rows": sums.count} for name in names}
    found |= {"cka": {"value": cka(sums)}, "cka_biased": {"value": cka(sums, unbiased=False)}}
    tied = len(sums.shifts[0]) == len(sums.shifts[1])
    if tied:
        rho_D = correlations(sums)
        known = rho_D[~rho_D.isnan()]
        found["correlation"] |= (
            {"value": float(known.mean())} if len(known) else {"why": "found no dimension that varies"}
        )
        if detail:
            counts = torch.histogram(known.cpu(), EDGES)[0].int().tolist()
            found["correlation"] |= {"constant": rho_D.isnan().nonzero()[:, 0].tolist(), "histogram": counts}
    else:
        for name in names[:3]:
            found[name]["why"] = TIED.format(*map(len, sums.shifts))
        x, y, note = reduced(*rows)
        found["residual"] |= note
        found["mapped_cosine"] |= note
        rows, sums = (x, y, rows[2]), Sums().add(x, y, rows[2])
    rotation = Rotation(sums, check_rank=detail)
    if rotation.why:
        for name in names[1 if tied else 3 :]:
            found[name]["why"] = rotation.why
        return found
    found["residual"]["value"] = rotation.residual(sums, rotation.scale)
    found["residual"]["without_scale"] = rotation.residual(sums, 1.0)
    if tied and len(rotation.matrix) > 1:
        for name, value in (("h_inv", h_inv(rotation.matrix)), ("sparsity", sparsity(rotation.matrix))):
            found[name] |= {"value": value, "floor": floors(len(rotation.matrix))[name]}
    if detail:
        x, y = (side[rows[2]] for side in rows[:2])
        y = (y - sums.shifts[1])[:, rotation.live].double() - rotation.means[1]
        cosines = torch.cosine_similarity(rotation.mapped(x, sums.shifts[0]), y, dim=1)
        found["mapped_cosine"] |= {"cosines": cosines, "value": float(cosines.mean())}
    return found
