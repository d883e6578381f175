"""The checked rows of `prepare`: in a temporary file, with only the ids of their texts in memory (32 bytes a pair)."""

import json
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from gritlm.data.no_repeats import RowTexts
from gritlm.data.rows import text_id

BUCKET_BYTES = 64_000_000  # of rows that wait to be merged; one bucket at a time is in memory
MOST_BUCKETS = 256  # files open at once
_encode = json.JSONEncoder(ensure_ascii=False).encode


def text_of(value: str | list[str]) -> str:
    """The text of a field without its instruction."""
    return value if isinstance(value, str) else value[1]


def to_line(row: dict) -> bytes:
    return _encode(row).encode() + b"\n"


def keep_negatives(row: dict, numbers: list[int]) -> None:
    """Keep only these negatives of a row, and their scores."""
    for name in {"neg", "neg_scores"} & row.keys():
        row[name] = [row[name][number] for number in numbers]


class RowSpool:
    """Rows in the training format. Rows with the same query and the same positives are read back as one row.

    Args:
        folder: an empty folder for temporary files.
    """

    def __init__(self, folder: Path):
        self.path = folder / "rows"
        self.repeated = self.merged = 0  # later rows that add no negative to an earlier one, and those that add some
        self._out = open(self.path, "wb")  # noqa: SIM115
        self._keys = array("q")  # of each row, a hash of its query, score and positives
        self._texts = array("q")  # the ids of its query, without the instruction, and of its positives
        self._sizes = array("I")  # their number
        self._negatives = array("I")  # the number of its negatives

    def add(self, row: dict, query_id: int, positive_ids: list[int]) -> None:
        """Add a row; `query_id` covers the instruction."""
        self._out.write(to_line(row))
        self._keys.append(hash((query_id, row.get("score"), *sorted(set(positive_ids)))))
        self._texts.append(text_id(text_of(row["query"])))
        self._texts.extend(positive_ids)
        self._sizes.append(1 + len(positive_ids))
        self._negatives.append(len(row["neg"]))

    def finish(self) -> None:
        """Find the repeated rows, once all rows are added."""
        self._out.close()
        keys = np.frombuffer(self._keys, dtype=np.int64)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        is_later = np.concatenate([[False], keys[1:] == keys[:-1]])[: len(keys)]
        self._keys = array("q")
        self._is_first = np.ones(len(order), dtype=bool)
        self._is_first[order[is_later]] = False
        # Later rows with negatives, and for each the first row of its kind, which takes them over.
        places = np.flatnonzero(is_later & (np.frombuffer(self._negatives, dtype=np.uint32) > 0)[order])
        starts = np.flatnonzero(~is_later)
        takers = order[starts[np.searchsorted(starts, places, side="right") - 1]]
        self._givers, self._takers = order[places], takers

    def __len__(self) -> int:
        """The number of distinct rows."""
        return int(np.count_nonzero(self._is_first))

    def row_texts(self) -> RowTexts:
        """The ids of the query, without its instruction, and of the positives of each distinct row."""
        sizes, ids = np.frombuffer(self._sizes, dtype=np.uint32), np.frombuffer(self._texts, dtype=np.int64)
        if not self._is_first.all():
            ids, sizes = ids[np.repeat(self._is_first, sizes)], sizes[self._is_first]
        return RowTexts(np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]), ids)

    def lines(self) -> Iterator[tuple[bytes, int, int]]:
        """The distinct rows in order, each with the negatives of all rows with its query and positives.

        Yields:
            the line, and the number of positives and of negatives in it.
        """
        self.merged, self.repeated = 0, len(self._is_first) - len(self)
        takes = np.zeros(len(self._is_first), dtype=bool)
        takes[self._takers] = True
        buckets = self._buckets()
        given: dict[int, list[bytes]] = {}
        with open(self.path, "rb") as rows:
            columns = (rows, self._is_first, takes, self._sizes, self._negatives)
            for number, (line, is_first, is_taker, texts, negatives) in enumerate(zip(*columns, strict=True)):
                if is_taker:
                    given = given or next(buckets)
                    line, negatives = self._merge(line, given.pop(number))
                if is_first:
                    yield line, texts - 1, negatives

    def _merge(self, line: bytes, given: list[bytes]) -> tuple[bytes, int]:
        row = json.loads(line)
        known = {text_id(text_of(text)) for text in row["neg"]}
        for other in map(json.loads, given):
            ids = [text_id(text_of(text)) for text in other["neg"]]
            fresh = [number for number, key in enumerate(ids) if key not in known]
            known.update(ids)
            self.merged += bool(fresh)
            self.repeated -= bool(fresh)
            if {"neg_scores"} & (row.keys() | other.keys()):
                for either in (row, other):  # null where a row has no scores
                    either.setdefault("neg_scores", [None] * len(either["neg"]))
            keep_negatives(other, fresh)
            for name in {"neg", "neg_scores"} & row.keys():
                row[name] += other[name]
        return to_line(row), len(row["neg"])

    def _buckets(self) -> Iterator[dict[int, list[bytes]]]:
        """Of each row that takes negatives, the rows that it takes them from; a bucket of such rows at a time."""
        if not len(self._takers):
            return
        in_bucket = int(BUCKET_BYTES * len(self._is_first) / self.path.stat().st_size)
        bounds = np.unique(np.sort(self._takers)[:: max(in_bucket, len(self._takers) // MOST_BUCKETS, 1)])
        order = np.argsort(self._givers)
        takers = self._takers[order]
        pending = zip(self._givers[order], takers, np.searchsorted(bounds, takers, side="right") - 1, strict=True)
        paths = [self.path.with_name(f"bucket{number}") for number in range(len(bounds))]
        with open(self.path, "rb") as rows, ExitStack() as stack:
            buckets = [stack.enter_context(open(path, "wb")) for path in paths]
            giver, taker, bucket = next(pending)
            for number, line in enumerate(rows):
                if number == giver:
                    buckets[bucket].write(b"%d " % int(taker) + line)
                    giver, taker, bucket = next(pending, (-1, -1, 0))
        for path in paths:
            given: dict[int, list[bytes]] = {}
            with open(path, "rb") as lines:
                for key, _, line in (line.partition(b" ") for line in lines):
                    given.setdefault(int(key), []).append(line)
            yield given
