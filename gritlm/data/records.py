"""Data sets as arrays of rows, over the memory-mapped form of their files (cache.py)."""

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gritlm.data.cache import cached_form, map_table, open_cache
from gritlm.data.folders import find_files
from gritlm.data.no_repeats import RowTexts
from gritlm.data.rows import text_id
from gritlm.models.text import Text

_LABEL = re.compile(r"\s*([^\s:][^:\n]{0,30}:)")


@dataclass(frozen=True)
class Record:
    """One row. The ids are hashes made by `rows.text_id`, one for each positive and one for each negative.

    `known_positives` holds the sorted ids of the positives of all rows with this query. `positive_scores` and
    `negative_scores` have one score for each passage, nan where there is none; None if the row has no scores.
    """

    query: Text
    positives: list[Text]
    negatives: list[Text]
    query_id: int
    positive_ids: list[int]
    negative_ids: list[int]
    known_positives: list[int]
    positive_scores: list[float] | None = None
    negative_scores: list[float] | None = None


class RecordSet:
    """One memory-mapped data set: `len(records)` rows, `records[index]` is a `Record`. Processes may share it.

    Args:
        files: its files in the cached form.
    """

    def __init__(self, name: str, files: list[Path]):
        self.name, self.files = name, files
        self.table = pa.concat_tables([map_table(file) for file in files])
        self.batches = self.table.to_batches()
        self.ends = np.cumsum([len(batch) for batch in self.batches])
        self.dropped_negatives = int(np.sum(self._column("dropped_negatives")))
        negatives = (chunk.field("text") for chunk in self.table["neg"].chunks)
        self.longest_group = 1 + max(pc.max(pc.list_value_length(texts)).as_py() for texts in negatives)
        self.instruction_counts = self._count_instructions("query")
        self.passage_instruction_counts = self._count_instructions("pos") + self._count_instructions("neg")
        self.instructions = sorted(self.instruction_counts)
        self.passage_instructions = sorted(self.passage_instruction_counts)
        self.positives_by_query = self._find_positives_by_query()

    def __len__(self) -> int:
        return len(self.table)

    def __reduce__(self) -> tuple:
        return RecordSet, (self.name, self.files)  # another process maps the files, too

    def raw(self, index: int) -> dict:
        """A row in the cached form, `rows.SCHEMA`."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        batch = self.batches[number]
        (row,) = batch.slice(index - int(self.ends[number]) + len(batch), 1).to_pylist()
        return row

    def __getitem__(self, index: int) -> Record:
        row = self.raw(index)
        positives, negatives = (
            [Text(*pair) for pair in zip(row[field]["instruction"], row[field]["text"], strict=True)]
            for field in ("pos", "neg")
        )
        query_id, positive_ids, negative_ids = row["query_id"], row["pos_id"], row["neg_id"]
        known, scores = self.positives_by_query.get(query_id), row["neg_score"]
        if known:
            kept = [i for i, key in enumerate(negative_ids) if key not in known]
            negatives, negative_ids = [negatives[i] for i in kept], [negative_ids[i] for i in kept]
            scores = None if scores is None else [scores[i] for i in kept]
        ids = query_id, positive_ids, negative_ids, sorted(known or positive_ids)
        return Record(Text(**row["query"]), positives, negatives, *ids, row["pos_score"], scores)

    @functools.cached_property
    def score_errors(self) -> list[str]:
        """Why scores of rows cannot be read, a message a row."""
        return self.table["score_error"].filter(pc.not_equal(self.table["score_error"], "")).to_pylist()

    @functools.cached_property
    def scored_rows(self) -> tuple[int, int]:
        """The number of rows with scores, and of those that are scored pairs."""
        return len(self) - self.table["pos_score"].null_count, int(pc.sum(self.table["is_scored_pair"]).as_py() or 0)

    @functools.cached_property
    def row_texts(self) -> RowTexts:
        """The ids of each row's query and positives."""
        counts, positives = self._lists("pos_id")
        ids = np.insert(positives, np.cumsum(counts) - counts, self._column("query_id"))
        return RowTexts(np.concatenate([[0], np.cumsum(counts + 1)]), ids)

    @functools.cached_property
    def texts_without_instructions(self) -> RowTexts:
        """The ids of each row's query and positives, where a query's id is that of its text alone, as a passage's."""
        texts = [chunk.field("text") for chunk in self.table["query"].chunks]
        queries = (text_id(text) for chunk in texts for text in chunk.to_pylist())
        starts, ids = self.row_texts.starts, self.row_texts.ids.copy()
        ids[starts[:-1]] = np.fromiter(queries, np.int64, len(self))
        return RowTexts(starts, ids)

    def text_places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """int64, one entry a text: its id, its row, its field (0 query, 1 pos, 2 neg) and its number in the field."""
        ids, places = [self._column("query_id")], [np.zeros((3, len(self)), dtype=np.int64)]
        places[0][0] = np.arange(len(self))
        for number, name in ((1, "pos_id"), (2, "neg_id")):
            counts, texts = self._lists(name)
            ids.append(texts)
            rows = np.repeat(np.arange(len(self)), counts)
            starts = np.repeat(np.cumsum(counts) - counts, counts)
            places.append(np.stack([rows, np.full(len(rows), number), np.arange(len(rows)) - starts]))
        return np.concatenate(ids), *np.concatenate(places, axis=1)

    def positive_ids(self, row: int) -> np.ndarray:
        """The ids of a row's positives."""
        return self.row_texts.ids[self.row_texts.starts[row] + 1 : self.row_texts.starts[row + 1]]

    @property
    def most_positives(self) -> int:
        """The largest number of positives that one query has in all its rows."""
        counts = np.diff(self.row_texts.starts) - 1
        _, query = np.unique(self._column("query_id"), return_inverse=True)
        return int(np.bincount(query, weights=counts).max())

    def fingerprint(self) -> str:
        """A short hash of all rows in order. It is the same on every machine."""
        return hashlib.sha256(self._column("row_id").tobytes()).hexdigest()[:16]

    @functools.cached_property
    def unread(self) -> Counter[str]:
        """The number of rows with each key that is no field of a row."""
        found: Counter[str] = Counter()
        for keys, rows in _value_counts(self.table["unread"]).items():
            found.update(dict.fromkeys(json.loads(keys or "[]"), rows))
        return found

    @functools.cached_property
    def revealing_rows(self) -> int:
        """The number of rows whose instructions tell the positives from all negatives."""
        known = pa.array(self.passage_instructions)
        revealing = 0
        for batch in self.batches if len(known) > 1 else ():
            pairs = []  # (row, instruction) as one number
            for field in ("pos", "neg"):
                lists = batch[field].field("instruction")
                rows = np.repeat(np.arange(len(batch)), pc.list_value_length(lists).to_numpy(zero_copy_only=False))
                codes = pc.index_in(pc.list_flatten(lists), value_set=known).to_numpy(zero_copy_only=False)
                pairs.append(rows * len(known) + codes)
            shared = np.intersect1d(*pairs) // len(known)
            revealing += len(np.setdiff1d(pairs[1] // len(known), shared))
        return revealing

    def _count_instructions(self, field: str) -> Counter[str]:
        parts = [chunk.field("instruction") for chunk in self.table[field].chunks]
        return _value_counts(pa.chunked_array(parts if field == "query" else map(pc.list_flatten, parts)))

    def _column(self, name: str) -> np.ndarray:
        return self.table[name].combine_chunks().to_numpy(zero_copy_only=False)

    def _lists(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Of a column of lists of ids: the length of each list, and all ids end to end."""
        lists = pa.concat_arrays([part.cast(pa.list_(pa.int64())) for part in self.table[name].chunks])
        counts, ids = pc.list_value_length(lists), pc.list_flatten(lists)
        return counts.to_numpy(zero_copy_only=False), ids.to_numpy(zero_copy_only=False)

    @functools.cached_property
    def hidden_negatives(self) -> int:
        """The number of negatives dropped because another row has them as a positive of the same query."""
        queries, known = self._column("query_id"), self.positives_by_query
        rows = np.flatnonzero(np.isin(queries, np.array(list(known), dtype=np.int64)))
        negatives = self.table["neg_id"].take(pa.array(rows)).to_pylist()
        pairs = zip(queries[rows].tolist(), negatives, strict=True)
        return sum(key in known[query] for query, keys in pairs for key in keys)

    def _find_positives_by_query(self) -> dict[int, set[int]]:
        """The ids of all positives of each query that has several rows."""
        queries = self._column("query_id")
        values, counts = np.unique(queries, return_counts=True)
        rows = np.flatnonzero(np.isin(queries, values[counts > 1]))
        known: dict[int, set[int]] = {}
        for query, positives in zip(queries[rows], self.table["pos_id"].take(pa.array(rows)).to_pylist(), strict=True):
            known.setdefault(int(query), set()).update(positives)
        return known


def label_of(text: str) -> str:
    """A label at the start of a text, such as "passage:", or ""."""
    match = _LABEL.match(text)
    return match[1] if match else ""


def revealing_label(positives: Counter[str], negatives: Counter[str]) -> str:
    """The label of nine positives of ten that at most one negative of ten has, or the reverse; "" if there is none."""
    for many, few in ((positives, negatives), (negatives, positives)):
        if min(many.total(), few.total()) >= 10:
            label, count = many.most_common(1)[0]
            if label and 10 * count >= 9 * many.total() and 10 * few[label] <= few.total():
                return label
    return ""


def spelled_alike(instructions: Iterable[str]) -> list[list[str]]:
    """Groups of instructions that differ in white space, punctuation or case only."""
    groups: dict[str, list[str]] = {}
    for instruction in sorted(instructions):
        groups.setdefault(" ".join(re.findall(r"\w+", instruction.casefold())), []).append(instruction)
    return [group for words, group in groups.items() if words and len(group) > 1]


def load_records(train_data: str | Path, cache: str | Path | None = None) -> list[RecordSet]:
    """Load all data sets of a path, sorted by name. The first call converts each file to `cache`; later calls map it.

    Raises:
        UserError: a file or a row is bad, or `cache` cannot be written.
    """
    folder = open_cache(cache)
    sets = find_files(train_data)
    return [RecordSet(name, [cached_form(path, folder) for path in paths]) for name, paths in sets.items()]


def _value_counts(column: pa.ChunkedArray) -> Counter[str]:
    return Counter({pair["values"]: pair["counts"] for pair in pc.value_counts(column).to_pylist()})
