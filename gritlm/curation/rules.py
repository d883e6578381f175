"""The rules that choose a query's hard negatives among its nearest passages."""

from collections import Counter
from dataclasses import dataclass

import numpy as np


@dataclass
class Rules:
    """Which of the nearest passages become negatives. A margin is below the lowest-scored positive of the query."""

    num_negatives: int
    range_min: int
    range_max: int
    relative_margin: float | None
    absolute_margin: float | None
    max_score: float | None
    min_score: float | None
    sampling_strategy: str
    seed: int

    def choose(
        self, row: int, scores: np.ndarray, excluded: np.ndarray, lowest_positive: float, removed: Counter[str]
    ) -> np.ndarray:
        """The places of a query's negatives among its candidates.

        Args:
            row: the query's number, for the random draw.
            scores: of the candidates, best first.
            excluded: bool per candidate: is known not to be a negative.
            lowest_positive: the score of the lowest-scored positive.
            removed: counts the candidates that each rule removes.
        """
        left = ~excluded
        removed["known positive, own negative, the query"] += int(excluded.sum())
        limits: dict[str, np.ndarray] = {}
        if self.absolute_margin is not None:
            limits["absolute_margin"] = scores + self.absolute_margin > lowest_positive
        if self.relative_margin is not None:
            limits["relative_margin"] = scores > lowest_positive - abs(lowest_positive) * self.relative_margin
        if self.max_score is not None:
            limits["max_score"] = scores > self.max_score
        if self.min_score is not None:
            limits["min_score"] = scores < self.min_score
        for name, beyond in limits.items():
            removed[name] += int((left & beyond).sum())
            left &= ~beyond
        places = np.flatnonzero(left)
        removed["range_min"] += len(places[: self.range_min])
        places = places[self.range_min : self.range_max]
        if self.sampling_strategy == "random" and len(places) > self.num_negatives:
            rng = np.random.default_rng((self.seed, row))
            places = np.sort(rng.choice(places, self.num_negatives, replace=False))
        removed["not needed"] += len(places[self.num_negatives :])
        return places[: self.num_negatives]
