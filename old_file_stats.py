"""Statistics of a training file, gathered in one pass by several processes. `gritlm check-data` reports them."""

import json
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gritlm.curation.overlap import EvaluationTexts
from gritlm.data.parallel import in_order
from gritlm.data.records import label_of
from gritlm.data.rows import Block, decode, parse_row, read_blocks, unread_columns
from gritlm.errors import UserError
from gritlm.models.text import Text

SAMPLED = 20_000  # rows per file whose lengths and scripts are measured
CountUnits = Callable[[list[Text]], list[int]]  # the length of each text, in tokens or characters


def count_characters(texts: list[Text]) -> list[int]:
    return [len(text.instruction) + len(text.text) for text in texts]


def _integers() -> array:
    return array("q")


@dataclass
class FileStats:
    """Statistics of one block or file. An array has one entry per row, `positive_ids` one per positive."""

    bad: list[tuple[int, str]] = field(default_factory=list)  # line, message
    leaked: list[tuple[int, str]] = field(default_factory=list)  # line, exact or near
    repeated_positives: list[tuple[int, int]] = field(default_factory=list)  # line, negatives that repeat a positive
    revealing: array = field(default_factory=_integers)  # lines whose instructions tell positives from negatives
    lines: array = field(default_factory=_integers)
    row_keys: array = field(default_factory=_integers)
    query_ids: array = field(default_factory=_integers)
    positive_counts: array = field(default_factory=_integers)
    positive_ids: array = field(default_factory=_integers)
    negative_counts: array = field(default_factory=_integers)
    query_lengths: array = field(default_factory=_integers)
    passage_lengths: array = field(default_factory=_integers)
    instructions: Counter[str] = field(default_factory=Counter)
    passage_instructions: Counter[str] = field(default_factory=Counter)
    positive_labels: Counter[str] = field(default_factory=Counter)
    negative_labels: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)  # keys that are no field of a row
    scripts: Counter[str] = field(default_factory=Counter)

    def add(self, other: "FileStats") -> None:
        for name, value in vars(other).items():
            getattr(self, name).update(value) if isinstance(value, Counter) else getattr(self, name).extend(value)


class BlockReader:
    """Gathers the statistics of a block of a file. It may run in any process."""

    def __init__(self, count_units: CountUnits, evaluation: EvaluationTexts | None):
        self.count_units, self.evaluation = count_units, evaluation

    def __call__(self, path: Path, block: Block, sample_every: int) -> FileStats:
        stats, sample = FileStats(), []
        for number, raw in block:
            try:
                row = parse_row(decode(path, number, raw), f"{path}:{number}")
            except UserError as error:
                stats.bad.append((number, str(error)))
                continue
            stats.lines.append(number)
            stats.query_ids.append(row["query_id"])
            stats.row_keys.append(_row_key(row))
            stats.positive_counts.append(len(row["pos_id"]))
            stats.positive_ids.extend(row["pos_id"])
            stats.negative_counts.append(len(row["neg_id"]))
            stats.instructions[row["query"]["instruction"]] += 1
            for name in ("pos", "neg"):
                stats.passage_instructions.update(row[name]["instruction"])
            stats.unread.update(json.loads(row["unread"] or "[]"))
            if row["neg_id"] and {*row["pos"]["instruction"]}.isdisjoint(row["neg"]["instruction"]):
                stats.revealing.append(number)
            if row["dropped_negatives"]:
                stats.repeated_positives.append((number, row["dropped_negatives"]))
            if self.evaluation and (match := self.evaluation.find(row["query"]["text"])):
                stats.leaked.append((number, match))
            if number % sample_every == 0:
                sample.append(row)
        self._measure(sample, stats)
        return stats

    def _measure(self, rows: list[dict], stats: FileStats) -> None:
        queries = [Text(**row["query"]) for row in rows]
        passages = [
            Text(*pair)
            for row in rows
            for name in ("pos", "neg")
            for pair in list(zip(row[name]["instruction"], row[name]["text"], strict=True))[:8]
        ]
        stats.query_lengths.extend(self.count_units(queries))
        stats.passage_lengths.extend(self.count_units(passages))
        for row in (row for row in rows if row["neg_id"]):
            stats.positive_labels.update(map(label_of, row["pos"]["text"]))
            stats.negative_labels.update(map(label_of, row["neg"]["text"]))
        for text in (*queries, *passages[:1000]):
            stats.scripts.update(scripts_of(text.text[:200]))


def _row_key(row: dict) -> int:
    """A hash that is equal for rows with the same query, positives and negatives in any order."""
    passages = ({*zip(row[name]["instruction"], row[f"{name}_id"], strict=True)} for name in ("pos", "neg"))
    return hash((row["query_id"], *map(frozenset, passages)))


def scripts_of(text: str) -> set[str]:
    """The writing systems of a text, approximated by the first word of its letters' Unicode names."""
    return {unicodedata.name(letter, "?").split()[0] for letter in set(text) if letter.isalpha()}


def read_file_stats(path: Path, reader: BlockReader, processes: int) -> tuple[FileStats, str]:
    """The statistics of a file, and the error that ended the reading, or ""."""
    stats, problem = FileStats(), ""

    def blocks() -> Iterator[tuple[Path, Block, int]]:
        nonlocal problem
        sample_every = 0
        try:
            for block in read_blocks(path):
                sample_every = sample_every or _sampling_interval(path, block)
                yield path, block, sample_every
        except UserError as error:
            problem = str(error)

    with tqdm(desc=f"checking {path.name}", unit=" rows", delay=2) as progress:
        for part in in_order(reader, blocks(), processes):
            stats.add(part)
            progress.update(len(part.lines))
    if stats.lines:
        stats.unread.update(dict.fromkeys(unread_columns(path), len(stats.lines)))
    return stats, problem


def _sampling_interval(path: Path, block: Block) -> int:
    """Every how many rows one is measured, estimated from the first block of a file."""
    size = path.stat().st_size
    block_size = sum(len(raw) for _, raw in block if isinstance(raw, bytes))
    rows = len(block) * size / block_size if block_size else size / 1000  # a parquet row: about 1 kB
    return max(1, round(rows / SAMPLED))


def repeated_texts(stats: FileStats) -> tuple[int, int]:
    """The number of rows that repeat an earlier row's query, and of positives of more than one query."""
    queries = np.asarray(stats.query_ids)
    positives, counts = np.asarray(stats.positive_ids), np.asarray(stats.positive_counts)
    pairs = np.unique(np.stack([positives, np.repeat(queries, counts)], axis=1), axis=0)
    _, queries_of_positive = np.unique(pairs[:, 0], return_counts=True)
    return len(queries) - len(np.unique(queries)), int((queries_of_positive > 1).sum())


def find_duplicates(files: list[FileStats]) -> list[np.ndarray]:
    """The lines of each file that repeat an earlier row of it or of an earlier file."""
    keys = np.concatenate([np.asarray(stats.row_keys, dtype=np.int64) for stats in files])
    _, first = np.unique(keys, return_index=True)
    repeated = np.ones(len(keys), dtype=bool)
    repeated[first] = False
    ends = np.cumsum([len(stats.row_keys) for stats in files])[:-1]
    parts = np.split(repeated, ends)
    return [np.asarray(stats.lines, dtype=np.int64)[part] for stats, part in zip(files, parts, strict=True)]
