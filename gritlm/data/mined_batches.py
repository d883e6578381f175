"""Mined batches: rows with near queries meet in a batch, so that its passages are hard negatives for one another.

A recursive bisection of the query vectors orders the rows of a data set. Near queries are near in that order. An epoch
cuts it into clusters at other places, and joins random clusters to batches, as B3 does (arXiv 2505.11293).

All arithmetic is on integers below 2**24 in float32, which is exact: the order is the same on every machine.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gritlm.data.cache import open_cache
from gritlm.data.no_repeats import RowTexts
from gritlm.data.records import RecordSet
from gritlm.data.teacher_vectors import TeacherVectors
from gritlm.errors import UserError
from gritlm.files import written_aside

VERSION = 1  # raise it with every change that gives another order
UNIT, LARGEST = 512, 1024  # the norm of a vector, and its largest value
WIDTH = 512  # of a vector at most; a wider one is projected
STEEPEST = 127  # largest value of a direction
SAMPLE = 8192  # rows that decide a direction: SAMPLE * LARGEST and UNIT * STEEPEST * sqrt(WIDTH) are below 2**24
ROUNDS = 3  # of 2-means
LEAF = 16  # rows that are not bisected
BLOCK = 1 << 16  # rows read or scored together
SPREAD = 2  # clusters are drawn from so many times their size of neighbours


@dataclass(frozen=True)
class MinedBatches:
    """The place of each row in the order of its data set, int32; None for a set whose batches stay random."""

    cluster_size: int
    places: list[np.ndarray | None]
    teacher: TeacherVectors

    def shuffled(self, rows: np.ndarray, places: np.ndarray, texts: RowTexts | None, rng: np.random.Generator):
        """Rows, given in random order with the place of each, cluster by cluster: other clusters each time.

        Rows that repeat a text are in clusters apart, since no batch may hold both.
        """
        repeats = texts.earlier_uses(rows) if texts else np.zeros(len(rows), dtype=np.int64)
        rows = rows[np.lexsort((places, repeats))]
        rows = np.roll(rows, int(rng.integers(len(rows) + 1)))
        position = np.arange(len(rows))
        rows = rows[np.lexsort((rng.random(len(rows)), position // (SPREAD * self.cluster_size)))]
        turns = rng.permutation(len(rows) // self.cluster_size + 1)
        return rows[np.argsort(turns[position // self.cluster_size], kind="stable")]


def mine_batches(
    folder: str, records: Sequence[RecordSet], wanted: Sequence[bool], cluster_size: int, cache: str | None
) -> MinedBatches:
    """Order the rows of the wanted data sets. The first call computes an order; later calls read it from the cache.

    Args:
        folder: the vectors, of `gritlm encode --rows`.
        cache: the folder of the cached data.
    Raises:
        UserError: the folder lacks a text of a wanted data set, or a vector is damaged; the cache cannot be written.
    """
    teacher = TeacherVectors(folder, "--mined_batches")
    vectors, places = teacher.fingerprint(), list[np.ndarray | None]()
    for record_set, is_wanted in zip(records, wanted, strict=True):
        if not is_wanted:
            places.append(None)
            continue
        key = hashlib.sha256(f"{vectors}|{record_set.fingerprint()}|{VERSION}".encode()).hexdigest()[:16]
        file = open_cache(cache) / f"order-{key}.npy"
        order = _read(file, len(record_set))
        if order is None:
            teacher.check([record_set])
            queries = record_set.row_texts.ids[record_set.row_texts.starts[:-1]]
            order = order_by_nearness(_read_vectors(teacher, queries, record_set.name), record_set.name)
            try:
                with written_aside(file) as aside, open(aside, "wb") as stream:
                    np.save(stream, order)
            except OSError as error:
                raise UserError(f"{file}: cannot be written: {error.strerror or error}; see --data_cache") from error
        place = np.empty(len(order), dtype=np.int32)
        place[order] = np.arange(len(order), dtype=np.int32)
        places.append(place)
    return MinedBatches(cluster_size, places, teacher)


def _read(file: Path, rows: int) -> np.ndarray | None:
    """A cached order; None if there is none, or if it is damaged."""
    try:
        order = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    is_whole = order.shape == (rows,) and order.dtype == np.int32 and (np.sort(order) == np.arange(rows)).all()
    return order if is_whole else None


def _read_vectors(teacher: TeacherVectors, ids: np.ndarray, name: str) -> np.ndarray:
    """int16 (len(ids), W): vectors as whole numbers, of norm UNIT, read in the order of the file."""
    wide = teacher.width > WIDTH
    signs = np.random.default_rng(0).choice((-1, 1), (teacher.width, WIDTH)).astype(np.float32) if wide else None
    found = np.empty((len(ids), min(teacher.width, WIDTH)), dtype=np.int16)
    places = np.searchsorted(teacher.ids, ids)
    order, damaged = np.argsort(places), 0
    for rows in np.split(order, range(BLOCK, len(order), BLOCK)):
        part = np.asarray(teacher.vectors[places[rows]], dtype=np.float32)
        damaged += int((~np.isclose(np.linalg.norm(part, axis=1), 1, atol=0.01)).sum())  # nan is damaged, too
        if not damaged:
            part = np.rint(part * UNIT)
            part = part if signs is None else np.rint(part @ signs / np.sqrt(np.float32(WIDTH)))
            found[rows] = part.clip(-LARGEST, LARGEST)
    if damaged:
        raise UserError(
            f"--mined_batches {teacher.folder}: found {damaged} of {len(ids)} query vectors of {name} of another norm "
            "than 1 or not finite; run gritlm encode --rows again"
        )
    return found


def order_by_nearness(vectors: np.ndarray, name: str) -> np.ndarray:
    """Order rows so that near vectors are near in the order: bisect by balanced 2-means, then each half, and so on.

    Args:
        vectors: int16 (N, W), whole numbers up to LARGEST, of norm about UNIT. They are reordered in place.
    Returns:
        int32 (N,), row numbers.
    """
    order = np.arange(len(vectors), dtype=np.int32)
    parts = [(0, len(vectors), np.zeros(vectors.shape[1], dtype=np.float32))]
    with tqdm(total=len(vectors), desc=f"ordering {name}", unit=" rows", delay=2) as progress:
        while parts:
            start, end, above = parts.pop()
            part = vectors[start:end]
            direction = _direction(part, above)
            blocks = (part[first : first + BLOCK] for first in range(0, len(part), BLOCK))
            turn = np.argsort(np.concatenate([block.astype(np.float32) @ direction for block in blocks]), kind="stable")
            order[start:end] = order[start:end][turn]
            columns = max(64, (1 << 26) // len(part))  # all at once would double the memory
            for first in range(0, part.shape[1], columns):
                part[:, first : first + columns] = part[:, first : first + columns][turn]
            if len(part) > LEAF:
                middle = (start + end) // 2
                parts += [(middle, end, direction), (start, middle, direction)]
            else:
                progress.update(len(part))
    return order


def _direction(part: np.ndarray, above: np.ndarray) -> np.ndarray:
    """The direction between two halves of near vectors, by 2-means on a sample. It leans to `above`."""
    sample = part[:: -(-len(part) // SAMPLE)].astype(np.float32)
    start = sample[len(sample) // 2]
    direction, signs = start - sample[np.argmin(sample @ _scaled(start))], np.empty(len(sample), dtype=np.float32)
    for _ in range(ROUNDS):
        order = np.argsort(sample @ _scaled(direction), kind="stable")
        signs[order[: len(order) // 2]] = -1
        signs[order[len(order) // 2 :]] = 1
        direction = signs @ sample
    direction = _scaled(direction)
    return direction if direction @ above >= 0 else -direction  # so that the nearer ends of two halves meet


def _scaled(direction: np.ndarray) -> np.ndarray:
    """A direction as whole numbers."""
    return np.rint(direction * np.float32(STEEPEST) / max(np.abs(direction).max(), np.float32(1)))


def hardness(teacher: TeacherVectors, texts: RowTexts, batches: Sequence[np.ndarray]) -> tuple[float, float]:
    """What the in-batch negatives are like, by the first positives of some rows of batches.

    Returns:
        the mean similarity of a query to the positives of other rows, and the share above its own positive's.
    """
    found = []
    for rows in batches:
        ids = [texts.ids[texts.starts[rows] + field] for field in (0, 1)]
        queries, positives = (teacher.lookup(own.tolist()) for own in ids)
        similarities = queries @ positives.T
        others = np.logical_and(*(own[:, None] != own for own in ids))
        above = similarities > similarities.diagonal()[:, None]
        found.append([(values * others).sum() / max(1, others.sum()) for values in (similarities, above)])
    similarity, share = np.mean(found, axis=0)
    return float(similarity), float(share)
