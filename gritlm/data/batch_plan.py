"""Which rows form global batch k: a pure function of (seed, epoch, step), the same for any number of ranks.

A batch holds rows of one data set. The rows left over from all sets are shuffled into mixed batches. Rows left over
from those are not used in this epoch. No query and no positive appears twice in a batch.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gritlm.data.held_out import NOTHING, HeldOut
from gritlm.data.mined_batches import MinedBatches
from gritlm.data.no_repeats import PostponedRows, RowTexts
from gritlm.errors import UserError

MIXED = "(mixed)"
VERSION = 2  # raise it with every change that gives other batches for the same seed
_ORDER, _CAP, _DRAW, _SPARE, HELD_OUT, CORPUS, _LOSS, _MORE = range(8)  # each purpose has its random stream


@dataclass(frozen=True)
class PlannedBatch:
    """One global batch: `rows` are (data set number, row number) in order; `dataset` is a name, or MIXED."""

    dataset: str
    rows: list[tuple[int, int]]


@dataclass(frozen=True)
class _Epoch:
    datasets: np.ndarray  # (steps,): number of the batch's data set, -1 for a mixed batch
    batches: np.ndarray  # (steps, batch size): rows, numbered through all sets
    reused: int  # places filled with rows used before


class Plan:
    """The order of training.

    Args:
        names, sizes: name and number of rows of each data set.
        global_batch_size: queries per batch.
        seed: seed of every draw.
        max_per_dataset: use at most this many rows of each set, the same rows in every epoch.
        num_samples: rows per epoch by data set, all rows by default; may exceed the size of the set (rows repeat).
        temperature: sample data sets in proportion to size ** (1 / temperature). The epoch keeps its length.
        row_texts: ids of the queries and positives of all sets' rows, in order. None: a batch may repeat them.
        never_mixed: data sets whose rows are in no mixed batch.
        mined: the order in which near rows meet in a batch. None: batches are random.
        held_out: rows that are in no batch, and texts that are no negative in any.
    Raises:
        UserError: there are fewer rows than one batch needs.
    """

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        global_batch_size: int,
        seed: int,
        max_per_dataset: int | None = None,
        num_samples: Mapping[str, int] | None = None,
        temperature: float = 1.0,
        row_texts: RowTexts | None = None,
        held_out: HeldOut = NOTHING,
        never_mixed: Collection[str] = (),
        mined: MinedBatches | None = None,
    ):
        self.names, self.sizes, self.seed = list(names), list(sizes), seed
        self.batch_size, self.row_texts = global_batch_size, row_texts
        self.first_row = np.cumsum([0, *self.sizes])
        self.held_out, self.mined = held_out, mined
        parts = np.split(held_out.rows, np.searchsorted(held_out.rows, self.first_row[1:-1]))
        self.held_rows = [part - first for part, first in zip(parts, self.first_row[:-1], strict=True)]
        left = [size - len(held) for size, held in zip(self.sizes, self.held_rows, strict=True)]
        self.available = [rows if max_per_dataset is None else min(rows, max_per_dataset) for rows in left]
        self.epoch_sizes = epoch_sizes(self.names, self.available, num_samples or {}, temperature)
        self.full_batches = [rows // global_batch_size for rows in self.epoch_sizes]
        self.mixes = [name not in never_mixed for name in self.names]
        self.mixed_batches = self._mixed_with(global_batch_size)
        self.steps_per_epoch = self.steps_with(global_batch_size)
        if not self.steps_per_epoch:
            raise UserError(
                f"--global_batch_size {global_batch_size} is larger than the data: found {sum(self.epoch_sizes)} rows; "
                "lower it"
            )
        self._latest: tuple[int, _Epoch] | None = None

    @property
    def used(self) -> tuple[int, ...]:
        """The numbers of the data sets that give rows to an epoch."""
        return tuple(number for number, rows in enumerate(self.epoch_sizes) if rows)

    def training_rows(self, number: int) -> np.ndarray:
        """The rows of a data set that are not held out."""
        return np.delete(np.arange(self.sizes[number]), self.held_rows[number])

    def steps_with(self, global_batch_size: int) -> int:
        """The steps of an epoch with another batch size."""
        full = sum(rows // global_batch_size for rows in self.epoch_sizes)
        return full + self._mixed_with(global_batch_size)

    def _mixed_with(self, global_batch_size: int) -> int:
        left = (rows % global_batch_size for rows, mixes in zip(self.epoch_sizes, self.mixes, strict=True) if mixes)
        return sum(left) // global_batch_size

    def datasets(self, epoch: int) -> list[str]:
        """The data set of each batch of an epoch, or MIXED."""
        return [self.names[number] if number >= 0 else MIXED for number in self._epoch(epoch).datasets.tolist()]

    def query_ids(self, epoch: int, step: int) -> np.ndarray:
        """The ids of a batch's whole queries. Needs `row_texts`."""
        assert self.row_texts is not None
        return self.row_texts.ids[self.row_texts.starts[self._epoch(epoch).batches[step]]]

    def batch(self, epoch: int, step: int) -> PlannedBatch:
        """Global batch `step` (from 0) of `epoch` (from 0)."""
        planned = self._epoch(epoch)
        dataset, rows = planned.datasets[step], planned.batches[step]
        sets = np.searchsorted(self.first_row, rows, side="right") - 1
        pairs = zip(sets.tolist(), (rows - self.first_row[sets]).tolist(), strict=True)
        return PlannedBatch(self.names[dataset] if dataset >= 0 else MIXED, list(pairs))

    def draw(
        self, epoch: int, step: int, dataset: int, row: int, positives: int, negatives: int, wanted: int
    ) -> tuple[int, list[int]]:
        """The positive and at most `wanted` different negatives that a row contributes to a batch, by their numbers."""
        rng = np.random.default_rng((self.seed, _DRAW, epoch, step, dataset, row))
        positive = int(rng.integers(positives))
        return positive, [int(i) for i in rng.permutation(negatives)[:wanted]]

    def draw_more(self, place: tuple[int, int, int, int], positives: int, first: int, most: int) -> list[int]:
        """At most `most` of a row's positives, by their numbers, beside the `first` that was drawn.

        Args:
            place: epoch, step, data set and row.
        """
        others = [number for number in range(positives) if number != first] if most else []
        if not others:
            return []
        rng = np.random.default_rng((self.seed, _MORE, *place))
        return [others[i] for i in rng.permutation(len(others))[:most]]

    def loss_seed(self, epoch: int, step: int) -> int:
        """The seed of what a loss draws in a step, such as random directions."""
        return int(np.random.default_rng((self.seed, _LOSS, epoch, step)).integers(2**31))

    def _epoch(self, epoch: int) -> _Epoch:
        if self._latest is None or self._latest[0] != epoch:
            self._latest = epoch, self._make_epoch(epoch)
        return self._latest[1]

    def _make_epoch(self, epoch: int) -> _Epoch:
        datasets: list[int] = []
        batches, leftovers, reused = [], [], 0
        for number, (available, wanted) in enumerate(zip(self.available, self.epoch_sizes, strict=True)):
            rows = self.training_rows(number)
            if available < len(rows):
                rows = np.random.default_rng((self.seed, _CAP, number)).permutation(rows)[:available]
            rows = self.first_row[number] + rows
            rng = np.random.default_rng((self.seed, _ORDER, epoch, number))
            passes = [self._shuffled(rows, number, rng) for _ in range(-(-wanted // max(available, 1)))]
            order = np.concatenate([rows[:0], *passes])[:wanted]
            full, left, again = self._group(order, self.full_batches[number], (epoch, number), spare=order)
            batches.append(full)
            datasets += [number] * len(full)
            leftovers.append(left if self.mixes[number] else left[:0])
            reused += again
        rng = np.random.default_rng((self.seed, _ORDER, epoch, len(self.names)))
        left = rng.permutation(np.concatenate(leftovers))
        spare = np.concatenate([full.ravel() for full in batches])
        mixed, _, again = self._group(left, self.mixed_batches, (epoch, len(self.names)), spare)
        all_batches = np.concatenate([*batches, mixed])
        order = rng.permutation(len(all_batches))
        return _Epoch(np.array(datasets + [-1] * len(mixed))[order], all_batches[order], reused + again)

    def _shuffled(self, rows: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
        """The rows of a data set in random order, or in clusters in random order."""
        rows, places = rng.permutation(rows), self.mined.places[number] if self.mined else None
        if self.mined is None or places is None:
            return rows
        return self.mined.shuffled(rows, places[rows - self.first_row[number]], self.row_texts, rng)

    def _group(
        self, rows: np.ndarray, count: int, key: tuple[int, int], spare: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Group rows, in order, into `count` batches without repeats.

        A row that repeats a text of its batch is postponed to a later batch. When the rows run out, `spare` rows fill
        the batch. When `spare` cannot fill the first batch, there are too few texts, and repeats are allowed.

        Returns:
            the batches, the rows left over, and the number of places filled from `spare`.
        """
        size, position, reused, turn = self.batch_size, 0, 0, 0
        plain = rows[: count * size].reshape(count, size), rows[count * size :], 0
        if self.row_texts is None:
            return plain
        batches = np.empty((count, size), dtype=np.int64)
        postponed, spares = PostponedRows(self.row_texts), None
        for number in range(count):
            batch = postponed.take(size)
            while len(batch) < size and position < len(rows):
                ahead = rows[position : position + max(size - len(batch), size // 4)]
                batch, read, repeating = self._extend(self.row_texts, batch, ahead)
                postponed.put_all(repeating, batch)
                position += read
            if (missing := size - len(batch)) > 0:
                if spares is None:  # one row for each text
                    spares = np.random.default_rng((self.seed, _SPARE, *key)).permutation(np.unique(spare))
                    spares = spares[self.row_texts.rows_without_repeats(spares)]
                batch, turn = self._reuse(self.row_texts, batch, spares, turn)
                reused += missing - (size - len(batch))
            if len(batch) < size and number == 0:
                return plain
            batches[number, : len(batch)] = batch
            for place in range(len(batch), size):
                batches[number, place] = postponed.take(1)[0]
        return batches, np.concatenate([postponed.rest(), rows[position:]]), reused

    def _extend(self, texts: RowTexts, batch: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
        """The batch extended by rows that repeat no text; the number of rows read; those of them that repeat one."""
        wanted = self.batch_size - len(batch)
        fresh = texts.rows_without_repeats(np.concatenate([batch, rows]))[len(batch) :]
        fresh = np.flatnonzero(fresh)[:wanted]
        read = int(fresh[-1]) + 1 if len(fresh) == wanted else len(rows)
        return np.concatenate([batch, rows[fresh]]), read, np.delete(rows[:read], fresh)

    def _reuse(self, texts: RowTexts, batch: np.ndarray, spares: np.ndarray, turn: int) -> tuple[np.ndarray, int]:
        """The batch extended by spare rows, from number `turn` on and at most once round; and the next turn."""
        seen = 0
        while len(batch) < self.batch_size and seen < len(spares):
            some = np.take(spares, np.arange(turn, turn + min(self.batch_size, len(spares))), mode="wrap")
            batch, read, _ = self._extend(texts, batch, some)
            turn, seen = (turn + read) % len(spares), seen + read
        return batch, turn

    def batches_with_repeats(self, epoch: int) -> int:
        """The number of batches in which a query or a positive appears twice because there are too few."""
        if self.row_texts is None:
            return 0
        return sum(not self.row_texts.rows_without_repeats(rows).all() for rows in self._epoch(epoch).batches)

    def describe(self, ranks: int) -> list[str]:
        """A summary for the screen: batches of each data set, rows not used, repeats."""
        lines = [f"plan: {self.steps_per_epoch} steps an epoch of {self.batch_size} queries on {ranks} rank(s)"]
        parts = zip(
            *(self.names, self.sizes, self.held_rows, self.available, self.epoch_sizes, self.full_batches), strict=True
        )
        for name, size, held, available, wanted, full in parts:
            taken = f", {len(held)} held out" if len(held) else ""
            taken += "" if wanted == available == size - len(held) else f", {wanted} taken per epoch"
            taken += f" ({wanted / available:.2f} times each)" if wanted > available else ""
            lines.append(f"  {name}: {size} rows{taken}, {full} batches, {wanted % self.batch_size} rows left over")
        shares = zip(self.names, self.epoch_sizes, self.full_batches, self.mixes, strict=True)
        never = [name for name, rows, full, mixes in shares if not full and not (rows and mixes and self.mixed_batches)]
        planned = self._epoch(0)
        unused = sum(map(min, self.available, self.epoch_sizes)) - len(np.unique(planned.batches))
        lines.append(f"  left over: {self.mixed_batches} mixed batches, {unused} rows not used in this epoch")
        if never:
            lines.append(f"  data sets of which no row is used in any epoch: {', '.join(never)}")
        if planned.reused:
            lines.append(
                f"  {planned.reused} places are filled with rows used before: every row left would repeat a query or a "
                "positive of the batch"
            )
        if repeating := self.batches_with_repeats(0):
            lines.append(f"  {repeating} batches hold a query or a positive twice: there are too few different ones")
        return lines


def epoch_sizes(
    names: list[str], available: list[int], num_samples: Mapping[str, int], temperature: float
) -> list[int]:
    """Rows per epoch of each data set."""
    wanted = [num_samples.get(name, count) for name, count in zip(names, available, strict=True)]
    if temperature == 1.0 or not any(wanted):
        return wanted
    weights = np.array(wanted, dtype=float) ** (1 / temperature)
    return [int(share) for share in sum(wanted) * weights / weights.sum()]
