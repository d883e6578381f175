"""Statistics of a training file, gathered in one pass by several processes. `gritlm check-data` reports them."""

import json
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from gritlm.curation.overlap import EvaluationTexts
from gritlm.data.labels import LABEL_WORDS
from gritlm.data.parallel import in_order
from gritlm.data.records import label_of
from gritlm.data.rows import Block, decode, is_parquet, parse_row, read_blocks, unread_columns
from gritlm.errors import UserError
from gritlm.models.text import Text

SAMPLED = 20_000  # rows per file whose lengths and scripts are measured
# Values of a key that tells good pairs from others, or splits, whatever its name.
FLAG_WORDS = {
    *LABEL_WORDS,
    *("0", "1", "-1", "0.0", "1.0", "-1.0", "y", "n", "t", "f", "e", "s", "c", "i", "pos", "neg", "good", "bad"),
    *("approved", "accepted", "rejected", "correct", "incorrect", "match", "no match"),
    *("train", "training", "test", "dev", "validation", "valid", "val", "eval"),
}
LONGEST_INSTRUCTION = 300  # characters, of one that stands in a list of passages
CountUnits = Callable[[list[Text]], list[int]]  # the length of each text, in tokens or characters


def count_characters(texts: list[Text]) -> list[int]:
    return [len(text.instruction) + len(text.text) for text in texts]


class Kind(NamedTuple):
    """A kind of finding on a row: the words after the number of rows, and what --fix does with such a row."""

    words: str
    fix: str  # drops, changes or keeps


LEAKS = {  # as `EvaluationTexts.find_leaks` names them
    "query": Kind("the query is in an evaluation set", "drops"),
    "query as positive": Kind("a positive is a query of an evaluation set", "drops"),
    "document": Kind("a positive is a relevant document of an evaluation set", "keeps"),  # a corpus may be shared
}
KINDS = {
    "bad": Kind("bad rows", "drops"),
    "repeat": Kind("rows equal to an earlier row", "drops"),
    **{
        f"{what}, {kind}": Kind(f"rows in which {leak.words} ({kind})", leak.fix)
        for what, leak in LEAKS.items()
        for kind in ("exact", "near")
    },
    "negative": Kind("rows with negatives that repeat a positive", "changes"),
    "revealing": Kind("rows whose instructions tell the positives from the negatives", "keeps"),
}


_integers = partial(array, "q")


@dataclass
class FileStats:
    """Statistics of one block or file. An array has one entry per row, `positive_ids` one per positive."""

    found: list[tuple[int, str, str]] = field(default_factory=list)  # line, kind, what was found
    score_errors: list[tuple[int, str]] = field(default_factory=list)  # line, why no loss can read its scores
    first_of_two: Counter[tuple[str, str]] = field(default_factory=Counter)  # see `_count_first_of_two`
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
    similar: Counter[str] = field(default_factory=Counter)  # texts like one of an evaluation set: no finding
    unread: Counter[str] = field(default_factory=Counter)  # keys that are no field of a row
    flags: Counter[tuple[str, str]] = field(default_factory=Counter)  # unread key, its value: "" blank, "?" no flag
    scripts: Counter[str] = field(default_factory=Counter)

    def add(self, other: "FileStats") -> None:
        for name, value in vars(other).items():
            getattr(self, name).update(value) if isinstance(value, Counter) else getattr(self, name).extend(value)


@dataclass
class FileReport:
    """The findings and notes on one file."""

    path: Path
    stats: FileStats
    ended: str  # the error that ended the reading, or ""
    problems: list[str]  # of the file as a whole

    @property
    def rows(self) -> int:
        """The number of rows that were read, good and bad."""
        return len(self.stats.lines) + sum(kind == "bad" for _, kind, _ in self.stats.found)


def read_block(
    count_units: CountUnits, evaluation: EvaluationTexts | None, path: Path, block: Block, sample_every: int
) -> FileStats:
    """The statistics of a block of a file. It may run in any process."""
    stats, sample, rows = FileStats(), [], []
    pairs: dict[tuple[str, str], set[str]] = {}  # field and first text -> second texts
    for number, raw in block:
        where = f"{path}:{number}"
        try:
            decoded = decode(path, number, raw)
            row = parse_row(decoded, where, with_id=False)
        except UserError as error:
            stats.found.append((number, "bad", str(error).removeprefix(f"{where}: ")))
            continue
        stats.lines.append(number)
        stats.query_ids.append(row["query_id"])
        stats.row_keys.append(_row_key(row))
        stats.positive_counts.append(len(row["pos_id"]))
        stats.positive_ids.extend(row["pos_id"])
        stats.negative_counts.append(len(row["neg_id"]))
        stats.instructions[row["query"]["instruction"]] += 1
        if row["unread"]:
            stats.unread.update(unread := json.loads(row["unread"]))
            stats.flags.update((name, flag_of(decoded[name])) for name in unread)
        for name in ("pos", "neg"):
            stats.passage_instructions.update(row[name]["instruction"])
            two = len(texts := decoded[name]) == 2 and type(texts[0]) is type(texts[1]) is str
            if two and len(texts[0]) < LONGEST_INSTRUCTION:
                pairs.setdefault((name, texts[0]), set()).add(texts[1])
        if row["neg_id"] and {*row["pos"]["instruction"]}.isdisjoint(row["neg"]["instruction"]):
            stats.found.append((number, "revealing", "the instructions tell the positives from the negatives"))
        stats.unread.update(["score"] * row["is_scored_pair"])
        if row["score_error"]:
            stats.score_errors.append((number, row["score_error"].removeprefix(f"{where}: ")))
        if count := row["dropped_negatives"]:
            message = "1 negative repeats" if count == 1 else f"{count} negatives repeat"
            stats.found.append((number, "negative", f"{message} a positive"))
        if number % sample_every == 0:
            sample.append(row)
        if evaluation:  # compares a whole block at once
            rows.append(row)
    stats.first_of_two.update({key: len(seconds) for key, seconds in pairs.items() if len(seconds) > 1})
    for index, what, kind in evaluation.find_leaks(rows) if evaluation else ():
        if kind == "similar":
            stats.similar[what] += 1
        else:
            stats.found.append((stats.lines[index], f"{what}, {kind}", f"{LEAKS[what].words} ({kind})"))
    _measure(sample, stats, count_units)
    return stats


def _measure(rows: list[dict], stats: FileStats, count_units: CountUnits) -> None:
    queries = [Text(**row["query"]) for row in rows]
    passages = [
        Text(*pair)
        for row in rows
        for name in ("pos", "neg")
        for pair in list(zip(row[name]["instruction"], row[name]["text"], strict=True))[:8]
    ]
    stats.query_lengths.extend(count_units(queries))
    stats.passage_lengths.extend(count_units(passages))
    for row in (row for row in rows if row["neg_id"]):
        stats.positive_labels.update(map(label_of, row["pos"]["text"]))
        stats.negative_labels.update(map(label_of, row["neg"]["text"]))
    for text in (*queries, *passages[:1000]):
        stats.scripts.update(scripts_of(text.text[:200]))


def flag_of(value: object) -> str:
    """A value in lower case if it is one of a label or split, "" if it is blank, "?" if it is another one.

    Of a list, its different values with commas between them.
    """
    words = set()
    for item in value[:100] if isinstance(value, list) else [value]:
        is_short = isinstance(item, str | bool | int | float) and not (isinstance(item, str) and len(item) > 30)
        word = "" if item is None else str(item).strip().casefold() if is_short else "?"
        if word and word not in FLAG_WORDS:
            return "?"
        words.add(word)
    return ",".join(sorted(words))


def flag_keys(stats: FileStats) -> list[str]:
    """The unread keys whose values are those of a label or split, at least two of them."""
    values: dict[str, Counter[str]] = {}
    for (name, value), count in stats.flags.items():
        values.setdefault(name, Counter()).update(dict.fromkeys(value.split(","), count))
    return [
        name  # as many values as rows are numbers of the rows
        for name, found in values.items()
        if "?" not in found and 2 <= len(words := {*found} - {""}) < sum(found[word] for word in words)
    ]


def _parquet_flags(path: Path) -> Counter[tuple[str, str]]:
    """`FileStats.flags` of a parquet file, whose rows are read without these columns."""
    flags: Counter[tuple[str, str]] = Counter()
    file = pq.ParquetFile(path)
    for name in unread_columns(path):
        try:
            for batch in file.iter_batches(1000, columns=[name]):
                flags.update((name, flag_of(value)) for value in batch.column(0).to_pylist())
                if flags[name, "?"]:
                    break
        except (ValueError, OverflowError, OSError, IndexError):  # no text, or a date beyond Python's: no flag
            flags[name, "?"] += 1
    return flags


def _row_key(row: dict) -> int:
    """A hash that is equal for rows with the same query, positives and negatives in any order."""
    passages = ({*zip(row[name]["instruction"], row[f"{name}_id"], strict=True)} for name in ("pos", "neg"))
    return hash((row["query_id"], *map(frozenset, passages)))


def scripts_of(text: str) -> set[str]:
    """The writing systems of a text, approximated by the first word of its letters' Unicode names."""
    return {unicodedata.name(letter, "?").split()[0] for letter in set(text) if letter.isalpha()}


def read_file_stats(
    path: Path, reader: Callable[[Path, Block, int], FileStats], processes: int
) -> tuple[FileStats, str]:
    """The statistics of a file, and the error that ended the reading, or "". `reader` reads a block of it."""
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
        stats.flags.update(_parquet_flags(path) if is_parquet(path) else {})
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


def flat_instructions(stats: FileStats) -> Iterator[str]:
    """A message for pos, and one for neg, if their lists are not passages but one [instruction, text].

    Then nearly all rows have two texts, of which the first is the same in many rows: in ten, or in a smaller file in
    two if it ends as an instruction does.
    """
    rows = len(stats.lines)
    for name in ("pos", "neg"):
        firsts = Counter({text: count for (field_, text), count in stats.first_of_two.items() if field_ == name})
        have = rows if name == "pos" else sum(map(bool, stats.negative_counts))
        if firsts and firsts.total() >= max(0.8 * have, 10 * len(firsts) if rows >= 10 else 2):
            text, count = firsts.most_common(1)[0]
            if rows >= 10 or text[-1:] in " \n\t:;,":
                yield (
                    f"{name}: found the same text first in {count} of {rows} rows, {text[:60]!r}; "
                    f"wanted [[instruction, text]], which gritlm prepare makes of it"
                )


def find_repeats(paths: list[Path], files: list[FileStats]) -> None:
    """Add a finding for each row that repeats an earlier row of its file or of an earlier file."""
    keys = np.concatenate([np.asarray(stats.row_keys, dtype=np.int64) for stats in files])
    lines = np.concatenate([np.asarray(stats.lines, dtype=np.int64) for stats in files])
    ends = np.cumsum([len(stats.row_keys) for stats in files])
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    earlier = first[group]
    repeats = np.flatnonzero(earlier != np.arange(len(keys)))
    numbers, origins = (np.searchsorted(ends, rows, side="right") for rows in (repeats, earlier[repeats]))
    for row, number, origin in zip(repeats.tolist(), numbers.tolist(), origins.tolist(), strict=True):
        line = lines[earlier[row]]
        place = f"line {line}" if number == origin else f"{paths[origin]}:{line}"
        files[number].found.append((int(lines[row]), "repeat", f"equals an earlier row ({place})"))
