"""Which rows form global batch k: a pure function of (seed, epoch, step), the same for any number of ranks.

A batch holds rows of one data set; what is left over of all sets is shuffled into mixed batches, and what does not
fill one of those waits for another epoch (a new draw). Both are counted in `describe`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gritlm.errors import UserError

MIXED = "(mixed)"
_ORDER, _CAP, _DRAW = 0, 1, 2  # purposes of a random stream, so that no two share one


@dataclass(frozen=True)
class PlannedBatch:
    """One global batch: `rows` are (data set number, row number), in order; `dataset` is its name, or MIXED."""

    dataset: str
    rows: list[tuple[int, int]]


class Plan:
    """The order of training.

    Args:
        names, sizes: the data sets, in order, and their number of rows.
        global_batch_size: queries per batch.
        seed: of everything drawn.
        max_per_dataset: use a fixed draw of at most so many rows of each set.
    Raises:
        UserError: when there are fewer rows than one batch needs.
    """

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        global_batch_size: int,
        seed: int,
        max_per_dataset: int | None = None,
    ):
        self.names, self.sizes, self.seed = list(names), list(sizes), seed
        self.batch_size = global_batch_size
        self.used = [min(size, max_per_dataset or size) for size in self.sizes]
        self.full = [used // global_batch_size for used in self.used]
        left = sum(used % global_batch_size for used in self.used)
        self.mixed, self.waiting = divmod(left, global_batch_size)
        self.steps_per_epoch = sum(self.full) + self.mixed
        if not self.steps_per_epoch:
            raise UserError(
                f"--global_batch_size {global_batch_size} is larger than the data: found {sum(self.used)} rows"
            )
        self._latest: tuple[int, tuple] | None = None  # the epoch last asked for; only saves time

    def batch(self, epoch: int, step: int) -> PlannedBatch:
        """Global batch `step` (from 0) of `epoch` (from 0)."""
        if self._latest is None or self._latest[0] != epoch:
            self._latest = (epoch, self._make_epoch(epoch))
        order, rows_of_set, leftovers = self._latest[1]
        dataset, start = order[step]
        window = slice(start, start + self.batch_size)
        if dataset == len(self.names):
            return PlannedBatch(MIXED, [(int(d), int(r)) for d, r in leftovers[window]])
        return PlannedBatch(self.names[dataset], [(dataset, int(row)) for row in rows_of_set[dataset][window]])

    def draw(self, epoch: int, dataset: int, row: int, positives: int, negatives: int, wanted: int) -> tuple[int, list]:
        """Which positive, and which (at most `wanted`, none twice) negatives, a row contributes in an epoch."""
        rng = np.random.default_rng((self.seed, _DRAW, epoch, dataset, row))
        positive = int(rng.integers(positives))
        return positive, [int(i) for i in rng.permutation(negatives)[:wanted]]

    def _make_epoch(self, epoch: int):
        rows_of_set, leftovers, order = [], [], []
        for number, (size, used) in enumerate(zip(self.sizes, self.used, strict=True)):
            rows = np.arange(size)
            if used < size:
                rows = np.random.default_rng((self.seed, _CAP, number)).permutation(size)[:used]
            rows = np.random.default_rng((self.seed, _ORDER, epoch, number)).permutation(rows)
            rows_of_set.append(rows)
            whole = self.full[number] * self.batch_size
            order += [(number, start) for start in range(0, whole, self.batch_size)]
            leftovers.append(np.stack([np.full(used - whole, number), rows[whole:]], axis=1))
        rng = np.random.default_rng((self.seed, _ORDER, epoch, len(self.names)))
        mixed = rng.permutation(np.concatenate(leftovers))
        order += [(len(self.names), number * self.batch_size) for number in range(self.mixed)]
        return [order[i] for i in rng.permutation(len(order))], rows_of_set, mixed

    def describe(self, ranks: int, group_size: int, cross_device: bool = True) -> str:
        """What a run of this plan sees, for people: batches per data set, what is left over, negatives per query."""
        lines = [f"plan: {self.steps_per_epoch} steps an epoch of {self.batch_size} queries on {ranks} rank(s)"]
        for name, size, used, full in zip(self.names, self.sizes, self.used, self.full, strict=True):
            lines.append(f"  {name}: {full} batches of its own, {used % self.batch_size} rows left over; rows {size}")
        lines.append(f"  left over: {self.mixed} mixed batches, {self.waiting} rows wait for another epoch's draw")
        local = self.batch_size // ranks
        hard, in_batch = group_size - 1, (local - 1) * group_size
        others = (self.batch_size - local) * group_size if cross_device else 0
        lines.append(
            f"  each query sees up to {hard + in_batch + others} negatives: {hard} hard, {in_batch} in-batch, "
            f"{others} from other ranks"
        )
        return "\n".join(lines)
