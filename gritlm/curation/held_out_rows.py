"""Rows that `prepare` holds out for evaluation, with no copy of them in train. They are written as a BEIR folder."""

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gritlm.curation.near_copies import NearCopies
from gritlm.curation.row_spool import RowSpool, keep_negatives, text_of, to_line
from gritlm.data.held_out import LARGEST_GROUP, hold_out
from gritlm.data.parallel import in_order
from gritlm.data.rows import text_id

BLOCK = 500  # rows that a process looks through at once
FEW = 20_000  # so few rows are not worth a second process
COPY = ("exact", "near")
NO_COPIES = np.zeros((0, 3), dtype=np.int64)  # row, number of its negative or ROW, held-out row
ROW = -1  # in place of the number of a negative: the row's query or a positive


@dataclass
class HeldOutRows:
    """The rows that are held out, by number, and the copies of their queries and positives in the other rows."""

    rows: dict[int, dict] = field(default_factory=dict)
    copies: np.ndarray = field(default_factory=lambda: NO_COPIES)
    dropped_rows: int = 0
    dropped_negatives: int = 0

    def train_lines(self, spool: RowSpool) -> Iterator[tuple[bytes, int, int]]:
        """The lines of the other rows without any copy, each with its number of positives and of negatives."""
        copied = np.zeros(len(spool), dtype=bool)
        copied[self.copies[:, 0]] = True
        self.dropped_rows = self.dropped_negatives = 0
        for number, (line, positives, negatives) in enumerate(spool.lines()):
            if number in self.rows:
                continue
            if copied[number]:
                first, end = np.searchsorted(self.copies[:, 0], [number, number + 1])
                dropped = set(self.copies[first:end, 1].tolist())
                if ROW in dropped:
                    self.dropped_rows += 1
                    continue
                row = json.loads(line)
                keep_negatives(row, [place for place in range(negatives) if place not in dropped])
                line, negatives = to_line(row), len(row["neg"])
                self.dropped_negatives += len(dropped)
            yield line, positives, negatives


def choose_held_out(spool: RowSpool, wanted: int, seed: int) -> HeldOutRows:
    """Choose at most `wanted` rows as training does, and find the copies of their texts in all other rows.

    A row is not held out if more than a tenth of `wanted` others have a copy of its query or of a positive.
    """
    held = HeldOutRows()
    numbers = set(hold_out(spool.row_texts(), [len(spool)], [wanted], seed).rows.tolist()) if wanted else set()
    if not numbers:
        return held
    held.rows = {number: json.loads(line) for number, (line, *_) in enumerate(spool.lines()) if number in numbers}
    unseen = np.ones(len(spool), dtype=bool)
    while unseen.any() and held.rows:
        unseen[list(held.rows)] = False
        held.copies = np.concatenate([held.copies, _find_copies(spool, held.rows, unseen)])
        copied = np.unique(held.copies[held.copies[:, 1] == ROW][:, [0, 2]], axis=0)[:, 1]
        owners, counts = np.unique(copied, return_counts=True)
        crowded = {number: held.rows[number] for number in owners[counts > max(1, wanted * LARGEST_GROUP)].tolist()}
        index = NearCopies(text for _, text in _texts_of(crowded))
        # Copies of these would be crowded in turn.
        others = [number for number, text in _texts_of(held.rows) if index.find(text).kind in COPY] if crowded else []
        for number in others:
            held.rows.pop(number, None)
        unseen[:] = False
        unseen[others] = True
        unseen[held.copies[np.isin(held.copies[:, 2], others), 0]] = True  # it may also copy another row
        held.copies = held.copies[~unseen[held.copies[:, 0]]]
    held.copies = held.copies[np.argsort(held.copies[:, 0], kind="stable")]
    return held


def _texts_of(rows: dict[int, dict]) -> list[tuple[int, str]]:
    """The queries and positives of rows, each after the number of its row."""
    return [(number, text_of(value)) for number, row in rows.items() for value in (row["query"], *row["pos"])]


def _find_copies(spool: RowSpool, held: dict[int, dict], wanted: np.ndarray) -> np.ndarray:
    """Copies of held-out texts in the rows wanted: row, number of the negative or ROW, held-out row."""
    texts = _texts_of(held)
    index = NearCopies(text for _, text in texts)

    def look_up(block: list[tuple[int, bytes]]) -> list[tuple[int, int, int]]:
        places: list[tuple[int, int]] = []
        found: list[str] = []
        for number, row in ((number, json.loads(line)) for number, line in block):
            places += [(number, ROW)] * (1 + len(row["pos"])) + [(number, place) for place in range(len(row["neg"]))]
            found += map(text_of, (row["query"], *row["pos"], *row["neg"]))
        matches = zip(places, index.find_all(found), strict=True)
        return [(*place, texts[match.number][0]) for place, match in matches if match.kind in COPY]

    lines = ((number, line) for number, (line, *_) in enumerate(spool.lines()) if wanted[number])
    blocks = iter(lambda: list(itertools.islice(lines, BLOCK)), [])
    processes = (os.cpu_count() or 1) if np.count_nonzero(wanted) > FEW else 1
    copies = [np.reshape(found, (-1, 3)) for found in in_order(look_up, ((block,) for block in blocks), processes)]
    return np.concatenate([NO_COPIES, *copies]).astype(np.int64)


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    with open(path, "wb") as out:
        out.writelines(map(to_line, rows))


def write_held_out(folder: Path, rows: Iterable[dict]) -> None:
    """Write rows as a BEIR folder, without their instructions. Their positives and negatives are the corpus."""
    queries: dict[int, dict[str, str]] = {}  # text id -> line
    corpus: dict[int, dict[str, str]] = {}
    qrels: dict[str, None] = {}  # ordered, without repeats

    def add(lines: dict[int, dict[str, str]], letter: str, text: str, **columns: str) -> str:
        line = {"_id": f"{letter}{len(lines)}", **columns, "text": text}
        return lines.setdefault(text_id(text), line)["_id"]

    for row in rows:
        query = add(queries, "q", text_of(row["query"]))
        for name in ("pos", "neg"):
            for text in row[name]:
                passage = add(corpus, "d", text_of(text), title="")
                if name == "pos":
                    qrels[f"{query}\t{passage}\t1"] = None
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "queries.jsonl", queries.values())
    write_jsonl(folder / "corpus.jsonl", corpus.values())
    lines = "\n".join(["query-id\tcorpus-id\tscore", *qrels]) + "\n"
    (folder / "qrels" / "test.tsv").write_text(lines, encoding="utf-8")
