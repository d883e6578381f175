"""What a training file holds, gathered in one pass by several processes: the material of `gritlm check-data`."""

import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gritlm.curation.overlap import EvaluationTexts
from gritlm.data.parallel import in_order
from gritlm.data.rows import Block, decode, parse_row, read_blocks
from gritlm.errors import UserError
from gritlm.models.text import Text
from gritlm.models.tokenizer import TextTokenizer

SAMPLED = 20_000  # rows of a file whose lengths and scripts are looked at


@dataclass
class FileStats:
    """What a stretch of a file holds. Arrays have one entry a row, `pos_ids` one a positive."""

    bad: list[tuple[int, str]] = field(default_factory=list)  # line, message
    leaked: list[tuple[int, str]] = field(default_factory=list)  # line, exact or near
    repeats: list[tuple[int, int]] = field(default_factory=list)  # line, negatives that repeat a positive
    lines: array = field(default_factory=lambda: array("q"))
    row_keys: array = field(default_factory=lambda: array("q"))
    query_ids: array = field(default_factory=lambda: array("q"))
    pos_counts: array = field(default_factory=lambda: array("q"))
    pos_ids: array = field(default_factory=lambda: array("q"))
    neg_counts: array = field(default_factory=lambda: array("q"))
    query_lengths: array = field(default_factory=lambda: array("q"))
    passage_lengths: array = field(default_factory=lambda: array("q"))
    instructions: Counter = field(default_factory=Counter)
    passage_instructions: Counter = field(default_factory=Counter)
    scripts: Counter = field(default_factory=Counter)

    def add(self, other: "FileStats") -> None:
        for name, value in vars(other).items():
            getattr(self, name).update(value) if isinstance(value, Counter) else getattr(self, name).extend(value)


class BlockReader:
    """Looks at stretches of files, in any process."""

    def __init__(self, text_tokenizer: TextTokenizer | None, evaluation: EvaluationTexts | None):
        self.text_tokenizer, self.evaluation = text_tokenizer, evaluation

    def __call__(self, path: Path, block: Block, sampled_every: int) -> FileStats:
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
            stats.pos_counts.append(len(row["pos_id"]))
            stats.pos_ids.extend(row["pos_id"])
            stats.neg_counts.append(len(row["neg"]["text"]))
            stats.instructions[row["query"]["instruction"]] += 1
            for side in ("pos", "neg"):
                stats.passage_instructions.update(row[side]["instruction"])
            if row["dropped_negatives"]:
                stats.repeats.append((number, row["dropped_negatives"]))
            if self.evaluation and (how := self.evaluation.find(row["query"]["text"])):
                stats.leaked.append((number, how))
            if number % sampled_every == 0:
                sample.append(row)
        self._measure(sample, stats)
        return stats

    def _measure(self, rows: list[dict], stats: FileStats) -> None:
        queries = [Text(**row["query"]) for row in rows]
        passages = [
            Text(*pair)
            for row in rows
            for side in ("pos", "neg")
            for pair in list(zip(row[side]["instruction"], row[side]["text"], strict=True))[:8]
        ]
        for texts, lengths in ((queries, stats.query_lengths), (passages, stats.passage_lengths)):
            if self.text_tokenizer and texts:
                lengths.extend(len(tokens.ids) for tokens in self.text_tokenizer(texts, 1 << 30))
            else:
                lengths.extend(len(text.instruction) + len(text.text) for text in texts)
        for text in (*queries, *passages[:1000]):
            stats.scripts.update(scripts_of(text.text[:200]))


def _row_key(row: dict) -> int:
    """Equal for rows with the same query, the same positives and the same negatives, in any order."""
    sides = ({*zip(row[side]["instruction"], row[f"{side}_id"], strict=True)} for side in ("pos", "neg"))
    return hash((row["query_id"], *map(frozenset, sides)))


def scripts_of(text: str) -> set[str]:
    """The writing systems of a text's letters, roughly: the first word of their Unicode names."""
    return {unicodedata.name(letter, "?").split()[0] for letter in set(text) if letter.isalpha()}


def read_file_stats(path: Path, reader: BlockReader, processes: int) -> tuple[FileStats, str]:
    """All stats of a file, and what is wrong with it as a whole, if anything."""
    stats, problem = FileStats(), ""

    def stretches() -> Iterator[tuple]:
        nonlocal problem
        every = 0
        try:
            for block in read_blocks(path):
                every = every or _sampling(path, block)
                yield path, block, every
        except UserError as error:
            problem = str(error)

    with tqdm(desc=f"checking {path.name}", unit=" rows", delay=2) as progress:
        for part in in_order(reader, stretches(), processes):
            stats.add(part)
            progress.update(len(part.lines))
    return stats, problem


def _sampling(path: Path, block: Block) -> int:
    """Look at the lengths of every so manieth row, given the first stretch of a file."""
    taken = sum(len(raw) for _, raw in block if isinstance(raw, bytes))
    rows = len(block) * path.stat().st_size / max(taken, 1) if taken else 1000 * path.stat().st_size / 1e6
    return max(1, round(rows / SAMPLED))


def repeated_texts(stats: FileStats) -> tuple[int, int]:
    """Rows whose query stands in a row before, and positives that stand under more than one query."""
    queries = np.asarray(stats.query_ids)
    pairs = np.stack([np.asarray(stats.pos_ids), np.repeat(queries, np.asarray(stats.pos_counts))], axis=1)
    _, under = np.unique(np.unique(pairs, axis=0)[:, 0], return_counts=True)
    return len(queries) - len(np.unique(queries)), int((under > 1).sum())


def find_duplicates(files: list[FileStats]) -> list[np.ndarray]:
    """Per file, the lines of the rows that stand before, in it or in an earlier file."""
    keys = np.concatenate([np.asarray(stats.row_keys, dtype=np.int64) for stats in files])
    _, first = np.unique(keys, return_index=True)
    repeated = np.ones(len(keys), dtype=bool)
    repeated[first] = False
    ends = np.cumsum([len(stats.row_keys) for stats in files])[:-1]
    parts = np.split(repeated, ends)
    return [np.asarray(stats.lines, dtype=np.int64)[part] for stats, part in zip(files, parts, strict=True)]
