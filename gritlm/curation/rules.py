"""The rules by which mine chooses negatives, and filter rows. A margin is below the lowest-scored positive."""

import argparse
from collections import Counter
from dataclasses import dataclass

import numpy as np

KNOWN = "known positive, own negative, the query"


def choose(
    args: argparse.Namespace,
    row: int,
    scores: np.ndarray,
    excluded: np.ndarray,
    lowest_positive: float,
    removed: Counter[str],
    wanted: int,
) -> np.ndarray:
    """The places of a query's negatives among its nearest passages, by the flags of `gritlm mine`.

    Args:
        row: the query's number, for the random draw.
        scores: of the candidates, best first.
        excluded: bool per candidate: is known not to be a negative.
        lowest_positive: the score of the lowest-scored positive.
        removed: counts the candidates that each rule removes.
        wanted: how many to choose.
    """
    left = ~excluded
    removed[KNOWN] += int(excluded.sum())
    limits = {
        "absolute_margin": lambda margin: scores + margin > lowest_positive,
        "relative_margin": lambda share: scores > lowest_positive - abs(lowest_positive) * share,
        "max_score": lambda most: scores > most,
        "min_score": lambda least: scores < least,
    }
    for name, beyond in limits.items():
        if (value := getattr(args, name)) is not None:
            removed[name] += int((left & beyond(value)).sum())
            left &= ~beyond(value)
    places = np.flatnonzero(left)
    removed["range_min"] += len(places[: args.range_min])
    places = places[args.range_min : args.range_max]
    if args.sampling_strategy == "random" and len(places) > wanted:
        places = np.sort(np.random.default_rng((args.seed, row)).choice(places, wanted, replace=False))
    removed["not needed"] += len(places[wanted:])
    return places[:wanted]


def number(text: str) -> float:
    """The value of a flag."""
    try:
        if np.isfinite(value := float(text)):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"found {text!r}, wanted a number")


def share_or_none(text: str) -> float | None:
    """The value of --relative_margin; none for no such rule."""
    if text != "none" and number(text) >= 1:
        raise argparse.ArgumentTypeError(f"found {text}, wanted a share below 1, such as 0.05, or none")
    return None if text == "none" else number(text)


# ---- rules of filter


@dataclass
class RowScores:
    """The scores of a row's query with its positives and negatives, and its positive's place among all passages."""

    positives: np.ndarray
    negatives: np.ndarray
    rank: float = np.inf  # of the lowest-scored positive, from 1, the other positives not counted; inf: not near

    @property
    def positive(self) -> float:
        return float(self.positives.min())


@dataclass
class Verdict:
    """What becomes of a row: the rule that drops it ("": none), and its negatives by number."""

    dropped_by: str
    value: float  # that the rule looked at
    suspected: list[int]  # negatives that may be positives
    kept: list[int]  # negatives that stay
    margin: float  # positive less best negative that stays; infinite without negatives


@dataclass
class RowRules:
    """Which rows stay in a data set, and what becomes of suspected false negatives. None: no such rule."""

    relative_margin: float | None
    false_negatives: str  # remove, relabel, keep
    max_false_negatives: float | None
    min_positive: float | None
    max_rank: int | None
    min_margin: float | None

    def judge(self, scores: RowScores) -> Verdict:
        positive, negatives = scores.positive, scores.negatives
        limit = np.inf if self.relative_margin is None else positive - abs(positive) * self.relative_margin
        suspected = np.flatnonzero(negatives > limit)
        kept = np.arange(len(negatives))
        if self.false_negatives != "keep":
            kept = np.setdiff1d(kept, suspected)
        margin = positive - float(negatives[kept].max()) if len(kept) else np.inf
        share = len(suspected) / max(len(negatives), 1)
        tests = (
            ("max_false_negatives", share, self.max_false_negatives is not None and share > self.max_false_negatives),
            ("min_positive", positive, self.min_positive is not None and positive < self.min_positive),
            ("max_rank", scores.rank, self.max_rank is not None and scores.rank > self.max_rank),
            ("min_margin", margin, self.min_margin is not None and margin < self.min_margin),
        )
        rule, value = next(((name, value) for name, value, fails in tests if fails), ("", 0.0))
        return Verdict(rule, value, suspected.tolist(), kept.tolist(), margin)
