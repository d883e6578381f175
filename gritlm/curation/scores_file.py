"""Scores of a cross-encoder or an LLM judge, from files of one pair a line, or of rows with scores in step."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gritlm.curation.rules import RowScores
from gritlm.data.folders import find_files
from gritlm.data.records import Record
from gritlm.data.rows import decode, read_blocks, text_id
from gritlm.errors import UserError

WANTED = (
    'wanted {"query", "passage", "score"} a line, or rows with "scores": {"pos": [...], "neg": [...]} or '
    "pos_scores and neg_scores"
)

ROUNDING = 1e-3  # between two scores of one pair


class PairScores:
    """The score of each pair of a query and a passage in a file or a folder.

    Raises:
        UserError: a row has another form, a score is no finite number, or two scores of a pair differ by more than
            rounding.
    """

    def __init__(self, path: str):
        self.path = path
        self.scores: dict[int, float] = {}
        for where, row in raw_rows(file for files in find_files(path).values() for file in files):
            for key, score in _pairs(row, where):
                other = self.scores.setdefault(key, score)
                # The same pair in two batches of a model differs by the rounding of float32, or of float16.
                if not math.isclose(score, other, rel_tol=ROUNDING, abs_tol=ROUNDING):
                    raise UserError(f"{where}: found the score {score}, before {other}, wanted one")

    def of(self, record: Record, where: str) -> RowScores:
        """The scores of a row.

        Raises:
            UserError: a pair of the row has no score.
        """
        found: dict[str, list[float]] = {"pos": [], "neg": []}
        for side, texts in (("pos", record.positives), ("neg", record.negatives)):
            for number, passage in enumerate(texts):
                if (score := self.scores.get(_key(record.query.text, passage.text))) is None:
                    raise UserError(
                        f"--scores {self.path}: found no score of {where}: {side}[{number}] "
                        f"({record.query.text[:40]!r} and {passage.text[:40]!r}), wanted one for each pair"
                    )
                found[side].append(score)
        return RowScores(np.array(found["pos"]), np.array(found["neg"]))


def raw_rows(files: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a data set as they are in its files, with the columns that training does not read."""
    for file in files:
        for block in read_blocks(file, columns=None):
            yield from ((f"{file}:{number}", decode(file, number, raw)) for number, raw in block)


def _key(query: Any, passage: Any) -> int:
    query, passage = (text[1] if isinstance(text, list) and len(text) == 2 else text for text in (query, passage))
    if not (isinstance(query, str) and isinstance(passage, str)):
        raise UserError(f"found {str(query)[:40]!r} and {str(passage)[:40]!r}, wanted texts or [instruction, text]")
    return text_id(f"{query.rstrip()}\n{passage}")


def _pairs(row: Any, where: str) -> Iterator[tuple[int, float]]:
    """The keys and scores of a row. A null is a pair without a score, as mine writes it for a kept negative."""
    if not isinstance(row, dict) or "query" not in row:
        raise UserError(f"{where}: found no query, {WANTED}")
    own = row.get("scores") or {"pos": row.get("pos_scores"), "neg": row.get("neg_scores") or []}
    sides = {side: (row.get(side), own.get(side) if isinstance(own, dict) else None) for side in ("pos", "neg")}
    if "passage" in row and "score" in row:
        sides = {"passage": ([row["passage"]], [row["score"]])}
    for side, (texts, scores) in sides.items():
        if not isinstance(texts, list) or not isinstance(scores, list):
            raise UserError(f"{where}: {side}: found no scores of it, {WANTED}")
        if len(texts) != len(scores):
            raise UserError(f"{where}: {side}: found {len(scores)} scores of {len(texts)} passages, wanted one each")
        for text, score in zip(texts, scores, strict=True):
            if score is None:
                continue
            if isinstance(score, bool) or not isinstance(score, int | float) or not np.isfinite(score):
                raise UserError(f"{where}: {side}: found the score {score!r}, wanted a finite number")
            try:
                yield _key(row["query"], text), float(score)
            except UserError as error:
                raise UserError(f"{where}: {side}: {error}") from error
