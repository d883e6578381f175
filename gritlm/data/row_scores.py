"""Scores beside the passages of a row: pos_scores and neg_scores, scores, or the score of a pair."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
        row: the decoded row.
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
