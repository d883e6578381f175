"""Which rows form global batch k: a pure function of (seed, epoch, step), the same for any number of ranks.

A batch holds rows of one data set; what is left over of all sets is shuffled into mixed batches, and what does not
fill one of those waits for another epoch (a new draw). No query and no positive stands twice in a batch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gritlm.data.no_repeats import PostponedRows, RowTexts
from gritlm.errors import UserError

MIXED = "(mixed)"
VERSION = 2  # raised by whatever gives other batches for the same seed
_ORDER, _CAP, _DRAW, _SPARE = 0, 1, 2, 3  # purposes of a random stream, so that no two share one


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
        num_samples: data set -> rows that an epoch takes of it, more than it has included; others give all they have.
        temperature: above 1 an epoch as long takes of each set in proportion to its size to the power 1 / temperature.
        documents: of all sets' rows, one set after the other; None: batches may repeat a query or a positive.
    Raises:
        UserError: when there are fewer rows than one batch needs, or `num_samples` names a set that is not there.
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
        documents: RowTexts | None = None,
    ):
        self.names, self.sizes, self.seed = list(names), list(sizes), seed
        self.batch_size, self.documents = global_batch_size, documents
        self.first_row = np.cumsum([0, *self.sizes])
        self.available = [min(size, max_per_dataset or size) for size in self.sizes]
        self.used = shares(self.names, self.available, num_samples or {}, temperature)
        self.full = [used // global_batch_size for used in self.used]
        self.mixed = sum(used % global_batch_size for used in self.used) // global_batch_size
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
        datasets, batches, _ = self._latest[1]
        rows = batches[step]
        sets = np.searchsorted(self.first_row, rows, side="right") - 1
        name = self.names[datasets[step]] if datasets[step] >= 0 else MIXED
        return PlannedBatch(name, list(zip(sets.tolist(), (rows - self.first_row[sets]).tolist(), strict=True)))

    def draw(
        self, epoch: int, step: int, dataset: int, row: int, positives: int, negatives: int, wanted: int
    ) -> tuple[int, list[int]]:
        """Which positive, and which (at most `wanted`, none twice) negatives, a row contributes to a batch."""
        rng = np.random.default_rng((self.seed, _DRAW, epoch, step, dataset, row))
        positive = int(rng.integers(positives))
        return positive, [int(i) for i in rng.permutation(negatives)[:wanted]]

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Per step: its data set's number (-1: mixed), and its rows, counted over all sets; how many rows stand in."""
        datasets, batches, leftovers, stood_in = [], [], [], 0
        for number, (size, available, used) in enumerate(zip(self.sizes, self.available, self.used, strict=True)):
            rows = np.arange(size)
            if available < size:
                rows = np.random.default_rng((self.seed, _CAP, number)).permutation(size)[:available]
            rng = np.random.default_rng((self.seed, _ORDER, epoch, number))
            passes = [rng.permutation(rows) for _ in range(-(-used // max(available, 1)))]
            order = self.first_row[number] + np.concatenate([rows[:0], *passes])[:used]
            own, left, others = self._spread(order, self.full[number], (epoch, number), spare=order)
            stood_in += others
            batches.append(own)
            datasets += [number] * len(own)
            leftovers.append(left)
        rng = np.random.default_rng((self.seed, _ORDER, epoch, len(self.names)))
        left = rng.permutation(np.concatenate(leftovers))
        spare = np.concatenate([own.ravel() for own in batches])
        mixed, _, others = self._spread(left, self.mixed, (epoch, len(self.names)), spare)
        batches = np.concatenate([*batches, mixed])
        order = rng.permutation(len(batches))
        return np.array(datasets + [-1] * len(mixed))[order], batches[order], stood_in + others

    def _spread(
        self, rows: np.ndarray, count: int, key: tuple[int, int], spare: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """`count` batches from rows in order, the rows left, and how many of `spare` stand in for others.

        A row that repeats a document waits for a later batch. Where too few rows without a repeated document are left,
        `spare` rows stand in for them; where there are too few documents to fill a batch, the rows come as they are.
        """
        size = self.batch_size
        plain = rows[: count * size].reshape(count, size), rows[count * size :], 0
        if self.documents is None:
            return plain
        batches, position, stood_in = np.empty((count, size), dtype=np.int64), 0, 0
        waiting, others, turn = PostponedRows(self.documents), None, 0
        for number in range(count):
            batch = waiting.take(size)
            while len(batch) < size and position < len(rows):
                ahead = rows[position : position + max(size - len(batch), size // 4)]
                batch, read, repeating = self._extend(batch, ahead)
                waiting.put_all(repeating, batch)
                position += read
            if len(batch) < size and others is None:  # of spare rows that share a document, one
                others = np.random.default_rng((self.seed, _SPARE, *key)).permutation(np.unique(spare))
                others = others[self.documents.rows_without_repeats(others)]
            looked = 0
            while len(batch) < size and looked < len(others):
                some = others.take(np.arange(turn, turn + min(size, len(others))), mode="wrap")
                stood_in -= len(batch)
                batch, read, _ = self._extend(batch, some)
                stood_in += len(batch)
                turn, looked = (turn + read) % len(others), looked + read
            if len(batch) < size and number == 0:
                return plain
            batches[number, : len(batch)] = batch
            for place in range(len(batch), size):
                batches[number, place] = waiting.take(1)[0]
        return batches, np.concatenate([waiting.rest(), rows[position:]]), stood_in

    def _extend(self, batch: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
        """A batch with those of the rows, in order, that repeat no document; how many were read; those that do."""
        wanted = self.batch_size - len(batch)
        fresh = np.flatnonzero(self.documents.rows_without_repeats(np.concatenate([batch, rows]))[len(batch) :])[
            :wanted
        ]
        read = int(fresh[-1]) + 1 if len(fresh) == wanted else len(rows)
        return np.concatenate([batch, rows[fresh]]), read, np.delete(rows[:read], fresh)

    def repeating(self, epoch: int) -> int:
        """How many batches of an epoch hold a query or a positive twice, for want of documents."""
        self.batch(epoch, 0)
        batches = self._latest[1][1]
        return sum(not self.documents.rows_without_repeats(rows).all() for rows in batches) if self.documents else 0

    def describe(self, ranks: int, group_size: int, cross_device: bool = True) -> str:
        """What a run of this plan sees, for people: batches per data set, what is left over, negatives per query."""
        lines = [f"plan: {self.steps_per_epoch} steps an epoch of {self.batch_size} queries on {ranks} rank(s)"]
        parts = zip(self.names, self.sizes, self.available, self.used, self.full, strict=True)
        for name, size, available, used, full in parts:
            takes = "" if used == available == size else f", {used} taken an epoch"
            takes += f" ({used / available:.2f} times each)" if used > available else ""
            left = used % self.batch_size
            lines.append(f"  {name}: {full} batches of its own, {left} rows left over; rows {size}{takes}")
        self.batch(0, 0)
        _, batches, stood_in = self._latest[1]
        left_out = sum(map(min, self.available, self.used)) - len(np.unique(batches))
        lines.append(f"  left over: {self.mixed} mixed batches, {left_out} rows left out of this epoch")
        if stood_in:
            lines.append(
                f"  {stood_in} places are filled by rows that have had their turn: a query or a positive stands once "
                "in a batch, and some have more rows than there are batches"
            )
        if repeating := self.repeating(0):
            lines.append(f"  {repeating} batches hold a query or a positive twice: there are too few different ones")
        local = self.batch_size // ranks
        hard, in_batch = group_size - 1, (local - 1) * group_size
        others = (self.batch_size - local) * group_size if cross_device else 0
        lines.append(
            f"  each query sees up to {hard + in_batch + others} negatives: {hard} hard, {in_batch} in-batch, "
            f"{others} from other ranks"
        )
        return "\n".join(lines)


def shares(names: list[str], available: list[int], num_samples: Mapping[str, int], temperature: float) -> list[int]:
    """Rows that an epoch takes of each data set."""
    for name in num_samples:
        if name not in names:
            raise UserError(f"--num_samples: found data set {name!r}, wanted some of {', '.join(names)}")
    wanted = [num_samples.get(name, count) for name, count in zip(names, available, strict=True)]
    if temperature == 1.0 or not any(wanted):
        return wanted
    weights = np.array(wanted, dtype=float) ** (1 / temperature)
    return [int(share) for share in sum(wanted) * weights / weights.sum()]


def read_num_samples(path: str | None) -> dict[str, int]:
    """A JSON object, data set -> rows an epoch, as GritLM has it.

    Raises:
        UserError: it is not one.
    """
    if not path:
        return {}
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--num_samples {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--num_samples {path}: no JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"--num_samples {path}: found {type(found).__name__}, wanted an object of data set: rows")
    for name, rows in found.items():
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
            raise UserError(f"--num_samples {path}: {name}: found {rows!r}, wanted a number of rows")
    return found
