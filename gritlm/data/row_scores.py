"""Scores beside the passages of a row: pos_scores and neg_scores, scores, or the score of a pair."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gritlm.errors import UserError

SCORE_KEYS = ("pos_scores", "neg_scores", "scores", "score")


class RowScores(NamedTuple):
    """A score of each positive and of each negative, nan where there is none. is_pair: it is the score of a pair."""

    positives: list[float]
    negatives: list[float]
    is_pair: bool


def parse_scores(row: dict, positives: int, negatives: int, where: str) -> RowScores | None:
    """Read a row's scores; None if it has none.

    `{"pos_scores": [...], "neg_scores": [...]}`, `{"scores": {"pos": [...], "neg": [...]}}` as `gritlm mine` writes
    them, or `{"score": 0.8}`, how alike the query and the one positive are. An empty list, or null, is no score.

    Args:
        positives, negatives: how many of each it has.
        where: file:line, the start of every message.
    Raises:
        UserError: a score is no number, there are not as many as passages, or there are two forms of them.
    """
    found = [key for key in ("scores", "score") if row.get(key) is not None]
    found += ["pos_scores and neg_scores"] * bool(row.get("pos_scores") or row.get("neg_scores"))
    if len(found) > 1:
        raise UserError(f"{where}: found {' beside '.join(found)}, wanted one kind of scores")
    if not found:
        return None
    if found == ["score"]:
        if (positives, negatives) != (1, 0):
            passages = f"{positives} positives and {negatives} negatives"
            raise UserError(
                f"{where}: score: found {passages}, wanted one positive, whose score it is, and no negative"
            )
        return RowScores([_number(row["score"], where, "score")], [], True)
    scores = row["scores"] if found == ["scores"] else {"pos": row.get("pos_scores"), "neg": row.get("neg_scores")}
    name: Callable[[str], str] = (lambda side: f"scores.{side}") if found == ["scores"] else (lambda s: f"{s}_scores")
    if not isinstance(scores, dict) or not scores or not scores.keys() <= {"pos", "neg"}:
        raise UserError(f'{where}: scores: found {scores!r:.40}, wanted {{"pos": [...], "neg": [...]}}')
    return RowScores(
        _numbers(scores.get("pos"), positives, where, name("pos")),
        _numbers(scores.get("neg"), negatives, where, name("neg")),
        False,
    )


def _numbers(values: Any, count: int, where: str, field: str) -> list[float]:
    if values is None or values == []:
        return [math.nan] * count
    if not isinstance(values, list) or len(values) != count:
        found = f"a list of {len(values)}" if isinstance(values, list) else f"{values!r:.40}"
        raise UserError(f"{where}: {field}: found {found}, wanted {count} scores, one of each passage")
    return [
        math.nan if value is None else _number(value, where, f"{field}[{number}]")
        for number, value in enumerate(values)
    ]


def _number(value: Any, where: str, field: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"{where}: {field}: found {value!r:.40}, wanted a number")
    return number


# ---- a data set's scores


def count_scores(table: pa.Table) -> tuple[np.ndarray, np.ndarray, int]:
    """int64 (rows with scores,): how many positives and how many negatives have one; the different ones of positives.

    A negative that another row has as a positive of the same query is none. The table is a data set's cached form.
    """
    table = table.select(["query_id", "pos_id", "neg_id", "pos_score", "neg_score"])
    scored = table.filter(pc.is_valid(table["pos_score"]))
    (rows, positive_scores), (_, negative_scores) = _flat(scored, "pos_score"), _flat(scored, "neg_score")
    known_of, known = _flat(table, "pos_id")
    negatives_of, negatives = _flat(scored, "neg_id")
    queries = (part["query_id"].to_numpy() for part in (table, scored))
    # A hash of query and passage: the number is odd, so that no bit is lost.
    pairs = [
        query[of] * 0x5851F42D4C957F2D ^ ids
        for query, of, ids in zip(queries, (known_of, negatives_of), (known, negatives), strict=True)
    ]
    counted = np.isfinite(negative_scores) & ~np.isin(pairs[1], pairs[0])
    finite = np.isfinite(positive_scores)
    counts = [np.bincount(of, minlength=len(scored)) for of in (rows[finite], negatives_of[counted])]
    return counts[0], counts[1], len(np.unique(positive_scores[finite]))


def _flat(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The row of each entry of a column of lists, and the entry."""
    lists = table[name].combine_chunks()
    rows, entries = pc.list_parent_indices(lists), pc.list_flatten(lists)
    return rows.to_numpy(zero_copy_only=False), entries.to_numpy(zero_copy_only=False)
