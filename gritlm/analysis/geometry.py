"""The geometry level: CKA of all layers x all layers, and how many nearest neighbours two models share."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gritlm.analysis.controls import expected_jaccard, mean_interval, permutation_p
from gritlm.analysis.representation import NOISE, TIED, hsic
from gritlm.analysis.sums import over_rows

BLOCK_ROWS = 1024  # rows whose similarities with all are held at once
BLOCK_LAYERS = 4  # of a model, held at once


def distinct(*sides: np.ndarray) -> np.ndarray:
    """The numbers of the rows that are equal to no earlier one on any side."""
    repeated = np.zeros(len(sides[0]), bool)
    for side in sides:
        seen: dict[bytes, int] = {}
        repeated |= [seen.setdefault(row.tobytes(), number) < number for number, row in enumerate(side)]
    return np.flatnonzero(~repeated)


def nearest(rows_ND: Tensor, k: int, groups_N: Tensor) -> np.ndarray:
    """The k nearest rows by cosine of each row outside its own group, best first, int64 (N, k)."""
    unit, found = torch.nn.functional.normalize(rows_ND.float(), dim=1), []
    for start in range(0, len(unit), BLOCK_ROWS):
        similarity = unit[start : start + BLOCK_ROWS] @ unit.T
        similarity[groups_N[start : start + BLOCK_ROWS, None] == groups_N] = -torch.inf
        found.append(similarity.topk(k, dim=1).indices)
    return torch.cat(found).cpu().numpy()


def shared_N(one_NK: np.ndarray, other_NK: np.ndarray, k: int) -> np.ndarray:
    """How many of the k nearest rows two models share, int64 (N,)."""
    first = np.arange(len(one_NK))[:, None] * len(one_NK)
    return np.isin(first + one_NK[:, :k], first + other_NK[:, :k], assume_unique=True).sum(1)


class Neighbours:
    """The neighbours that two models have, of one layer.

    Args:
        groups_N: int, the document of each row: neighbours come from others.
        ks: ascending.
    Attributes:
        kept: the rows that are counted: those that are equal to no earlier one in either model.
        why: why there are none; "" if there are.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, groups_N: np.ndarray, ks: Sequence[int], device: torch.device):
        self.kept, self.ks = distinct(x, y), ks
        self.equal, self.groups = len(x) - len(self.kept), groups_N[self.kept]
        self.candidates = len(self.kept) - int(np.bincount(self.groups).max())  # of the row that has the fewest
        few = self.candidates < ks[-1]
        self.why = f"found {self.candidates} other rows that differ, wanted the {ks[-1]} of --k" if few else ""
        if not few:
            groups, sides = torch.from_numpy(self.groups).to(device), (x[self.kept], y[self.kept])
            self.a, self.b = (nearest(torch.from_numpy(side).to(device), ks[-1], groups) for side in sides)

    def shuffled(self, order: np.ndarray) -> "Neighbours":
        """The same with b's rows in another order: what is shared by chance."""
        other = copy.copy(self)
        if not self.why:
            other.b = order[self.b[np.argsort(order)]]
        return other

    def by_k(
        self, layer: int | str, seed: int, mutual: bool = False, labels: np.ndarray | None = None
    ) -> dict[str, dict]:
        """For each k a row: the mean Jaccard overlap, or with `mutual` the share of neighbours that both have.

        With labels of the rows: the mean over labels, each label's, and how often a neighbour has the row's label.
        """
        found: dict[str, dict[str, Any]] = {}
        for k in self.ks:
            row = found[str(k)] = {"layer": layer, "value": None, "low": None, "high": None, "floor": None}
            row |= {"rows": len(self.kept), "equal": self.equal} | ({"why": self.why} if self.why else {})
            if self.why:
                continue
            shared = shared_N(self.a, self.b, k)
            values = shared / k if mutual else shared / (2 * k - shared)
            row["floor"] = k / self.candidates if mutual else expected_jaccard(k, self.candidates)
            if labels is not None:
                own = labels[self.kept]
                names, codes, counts = np.unique(own, return_inverse=True, return_counts=True)
                means = np.bincount(codes, values) / counts
                row["by_label"] = dict(zip(map(str, names), means.tolist(), strict=True))
                for side, lists in (("a", self.a), ("b", self.b)):
                    row[f"same_label_{side}"] = float((own[lists[:, :k]] == own[:, None]).mean())
                values = values * (len(values) / len(names) / counts)[codes]
            row["value"] = float(values.mean())
            row["low"], row["high"] = mean_interval(values, self.groups, seed)
        return found

    def p_value(self, seed: int) -> float | None:
        """Of the hypothesis that the models' rows have nothing in common: rows of b are shuffled."""
        shared = lambda order: float(shared_N(self.a, self.shuffled(order).b, self.ks[-1]).mean())  # noqa: E731
        return None if self.why else permutation_p(shared, len(self.kept), seed)


def cka_p_value(x_ND: Tensor, y_NE: Tensor, seed: int) -> float:
    """The permutation test of linear CKA: documents of y are shuffled."""
    x, y = x_ND - x_ND.mean(0), y_NE - y_NE.mean(0)
    squares = lambda order: float((x.T @ y[torch.from_numpy(order).to(y.device)]).square().sum())  # noqa: E731
    return permutation_p(squares, len(x), seed)


def all_layers(a: np.ndarray, b: np.ndarray, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """CKA, unbiased and biased, and the mean correlation, of each layer of a with each of b: rows of a, by metric.

    A few layers of a and one of b are in memory. Rows are centred, so that most sums of the estimate are zero.
    """

    def centred(layer: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.from_numpy(np.array(layer)).to(device, dtype)
        mean = rows.double().mean(0)
        rows = rows - mean.to(dtype)
        squares = rows.double().square()
        spread = squares.sum(0).sqrt()
        return rows, squares.sum(1), spread.where(spread > NOISE * len(rows) ** 0.5 * mean.abs(), torch.nan)

    def both(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> tuple[float, float, Tensor]:
        products = over_rows(x[0], y[0]).double()
        squares, fourth, zero = products.square().sum(), x[1] @ y[1], products.new_zeros(1)
        unbiased = hsic(squares - fourth, zero, zero, x[1].sum(), y[1].sum(), fourth, len(x[0]))
        return unbiased, float(squares), products.diagonal()

    found: dict[str, Any] = {name: np.full((len(a), len(b)), np.nan) for name in ("cka", "cka_biased", "correlation")}
    own_b = [both(y, y) for y in map(centred, b)]
    for start in range(0, len(a), BLOCK_LAYERS):
        held = [(row, x, both(x, x)) for row, x in enumerate(map(centred, a[start : start + BLOCK_LAYERS]), start)]
        for column, y in enumerate(map(centred, b)):
            for row, x, own_a in held:
                values = both(x, y)
                for number, name in enumerate(("cka", "cka_biased")):
                    one, other = float(own_a[number]), float(own_b[column][number])
                    cell = values[number] / (one * other) ** 0.5 if one > 0 and other > 0 else np.nan
                    found[name][row, column] = cell
                if a.shape[2] == b.shape[2]:
                    found["correlation"][row, column] = float((values[2] / (x[2] * y[2])).nanmean())
    names = {"rows": list(range(len(a))), "columns": list(range(len(b))), "sampled": a.shape[1]}
    matrices = {
        name: names | {"values": [[None if v != v else v for v in row] for row in values.tolist()]}
        for name, values in found.items()
    }
    if a.shape[2] != b.shape[2]:
        matrices["correlation"] = {"why": TIED.format(a.shape[2], b.shape[2])}
    return matrices
