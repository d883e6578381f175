"""Sums over the rows of a pair of layers: all that correlation, Procrustes and CKA need, in constant memory.

Products are computed in the dtype of the rows and added up in float64. float32 is exact enough: a layer is shifted by
its first mean. Shape suffixes: T rows, D and E the widths of the layers.
"""

import functools

import torch
from torch import Tensor, nn

from gritlm.models.cpu_linear import choose_products, product_over_tokens


@functools.cache
def _onednn_is_faster(width: int, other_width: int) -> bool:
    return bool(choose_products(nn.Linear(other_width, width), ["weight gradient"])[0])


def over_rows(x_TD: Tensor, y_TE: Tensor) -> Tensor:
    """x'y, (D, E), in the dtype of the rows: by oneDNN where that is faster on this CPU."""
    float32_on_cpu = x_TD.device.type == "cpu" and x_TD.dtype == torch.float32
    if float32_on_cpu and len(x_TD) and _onednn_is_faster(x_TD.shape[1], y_TE.shape[1]):
        return product_over_tokens(x_TD, y_TE)
    return x_TD.T @ y_TE


class _Rows:
    """Rows of a layer, as they are and in float64, and their squares."""

    def __init__(self, rows_TD: Tensor):
        self.rows_TD, self.wide_TD = rows_TD, rows_TD.double()
        self.squares_TD = self.wide_TD.square()
        self.squared_T = self.squares_TD.sum(1)

    @staticmethod
    def halves(values_TD: Tensor, first: int) -> Tensor:
        """The sums over the first rows and over the others, (2, D)."""
        return torch.stack([values_TD[:first].sum(0), values_TD[first:].sum(0)])


class Sums:
    """Sums over rows x and y, float64.

    Args:
        dtype: of the products.
        shuffle: a generator: add up shuffled pairs, too, as `shuffled`. Rows of y change places within a part and half.
    Attributes:
        parts: by name; those with a leading dimension of 2 are kept by half of the documents: a map is fitted on the
            first and judged on the second. count; x, y: sums; xx, yy: squares of each dimension; XY: x'y. Over both
            halves XX, YY, and what takes a row's product with itself out of CKA.
    """

    def __init__(self, dtype: torch.dtype = torch.float64, shuffle: torch.Generator | None = None):
        self.parts: dict[str, Tensor] = {}
        self.shifts: list[Tensor] = []
        self._dtype, self._shuffle, self._shuffled = dtype, shuffle, dict[str, Tensor]()

    def add(self, x_TD: Tensor, y_TE: Tensor, second_T: Tensor) -> "Sums":
        """Add rows. `second_T`, bool: whether a row is of the second half of the documents."""
        self.shifts = self.shifts or [rows.double().mean(0).to(self._dtype) for rows in (x_TD, y_TE)]
        order_T, first = second_T.int().argsort(stable=True), int((~second_T).sum())
        x, y = (
            _Rows((rows.to(self._dtype) - shift)[order_T])
            for rows, shift in zip((x_TD, y_TE), self.shifts, strict=True)
        )
        one_side = _one_side("x", x, first) | _one_side("y", y, first)
        _accumulate(self.parts, one_side | _both_sides(x, y, first))
        if self._shuffle is not None:
            orders = (
                torch.randperm(first, generator=self._shuffle),
                torch.randperm(len(order_T) - first, generator=self._shuffle),
            )
            order_T = torch.cat([orders[0], first + orders[1]]).to(order_T.device)
            _accumulate(self._shuffled, _both_sides(x, _Rows(y.rows_TD[order_T]), first))
        return self

    def without(self, x_TD: Tensor, y_TE: Tensor, second_T: Tensor) -> "Sums":
        """The sums without these rows, which were added before."""
        left_out = Sums(self._dtype)
        left_out.shifts = self.shifts
        left_out.add(x_TD, y_TE, second_T)
        left_out.parts = {name: self.parts[name] - value for name, value in left_out.parts.items()}
        return left_out

    def total(self, name: str) -> Tensor:
        """A sum that is kept by half, over both."""
        return self.parts[name].sum(0)

    @property
    def count(self) -> int:
        return int(self.parts["count"].sum())

    @property
    def shuffled(self) -> "Sums":
        other = Sums()
        other.parts, other.shifts = self.parts | self._shuffled, self.shifts
        return other


def _accumulate(parts: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for name, value in more.items():
        parts[name] = parts[name].add_(value) if name in parts else value.double()


def _one_side(name: str, rows: _Rows, first: int) -> dict[str, Tensor]:
    """The sums of one layer. The first `first` rows are of the first half."""
    found = {name: rows.halves(rows.wide_TD, first), 2 * name: rows.halves(rows.squares_TD, first)}
    found[2 * name.upper()] = over_rows(rows.rows_TD, rows.rows_TD)
    own, fourth = rows.squared_T @ rows.wide_TD, rows.squared_T.square().sum()
    return found | {f"{2 * name}_own": own, f"{2 * name}_fourth": fourth}


def _both_sides(x: _Rows, y: _Rows, first: int) -> dict[str, Tensor]:
    """The sums of pairs of rows."""
    halves = (slice(first), slice(first, None))
    products = torch.stack([over_rows(x.rows_TD[half], y.rows_TD[half]) for half in halves])
    count = torch.tensor([first, len(x.rows_TD) - first], device=x.rows_TD.device)
    found = {"count": count, "XY": products, "xy_fourth": x.squared_T @ y.squared_T}
    return found | {"xy_own": y.squared_T @ x.wide_TD, "yx_own": x.squared_T @ y.wide_TD}
