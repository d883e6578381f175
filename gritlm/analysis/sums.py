"""Sums over the rows of a pair of layers: all that correlation, Procrustes and CKA need, in constant memory.

Products are computed in the dtype of the rows and added up in float64. float32 is exact enough: a layer is shifted by
its first mean. Shape suffixes: T rows, D and E the widths of the layers.
"""

import torch
from torch import Tensor


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
        x, y = ((rows.to(self._dtype) - shift)[order_T] for rows, shift in zip((x_TD, y_TE), self.shifts, strict=True))
        _accumulate(self.parts, _one_side("x", x, first) | _one_side("y", y, first) | _both_sides(x, y, first))
        if self._shuffle is not None:
            orders = (
                torch.randperm(first, generator=self._shuffle),
                torch.randperm(len(x) - first, generator=self._shuffle),
            )
            _accumulate(
                self._shuffled, _both_sides(x, y[torch.cat([orders[0], first + orders[1]]).to(y.device)], first)
            )
        return self

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


def _one_side(name: str, rows_TD: Tensor, first: int) -> dict[str, Tensor]:
    """The sums of one layer. The first `first` rows are of the first half."""
    rows = rows_TD.double()
    squared_T, halves = rows.square().sum(1), (rows[:first], rows[first:])
    found = {name: torch.stack([half.sum(0) for half in halves]), 2 * name.upper(): rows_TD.T @ rows_TD}
    found[2 * name] = torch.stack([half.square().sum(0) for half in halves])
    return found | {f"{2 * name}_own": squared_T @ rows, f"{2 * name}_fourth": squared_T.square().sum()}


def _both_sides(x_TD: Tensor, y_TE: Tensor, first: int) -> dict[str, Tensor]:
    """The sums of pairs of rows."""
    x, y = x_TD.double(), y_TE.double()
    x_squared_T, y_squared_T = x.square().sum(1), y.square().sum(1)
    products = torch.stack([x_TD[half].T @ y_TE[half] for half in (slice(first), slice(first, None))])
    found = {"count": torch.tensor([first, len(x) - first], device=x.device), "XY": products}
    return found | {"xy_own": y_squared_T @ x, "yx_own": x_squared_T @ y, "xy_fourth": x_squared_T @ y_squared_T}
