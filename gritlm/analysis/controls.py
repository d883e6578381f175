"""Intervals and tests over documents, and the values that unrelated models would give.

Means have percentile intervals of the bootstrap over documents. What is no mean has the interval of the jackknife over
`BLOCKS` blocks of documents: a bootstrap draws a document twice, and equal rows break CKA and neighbours.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

BLOCKS = 10
RESAMPLES = 1000
PERMUTATIONS = 200  # with the observed one
Interval = tuple[float | None, float | None]


def jackknife(value: float | None, left_out: Sequence[float | None]) -> Interval:
    """The 95% interval of a value, from its values without each block of documents (Student's t); or None, None."""
    known = [found for found in left_out if found is not None]
    if value is None or len(known) < max(2, len(left_out)):
        return None, None
    error = math.sqrt((len(known) - 1) * np.var(known))
    reach = float(stats.t.ppf(0.975, len(known) - 1)) * error
    return value - reach, value + reach


def mean_interval(values_N: np.ndarray, documents_N: np.ndarray, seed: int) -> Interval:
    """The 95% percentile interval of a mean of values when their documents are drawn again."""
    _, codes = np.unique(documents_N, return_inverse=True)
    totals, counts = np.bincount(codes, values_N), np.bincount(codes)
    rng, means = np.random.default_rng(seed), []
    for _ in range(0, RESAMPLES, 100):  # in parts: the counts of all resamples are many
        drawn = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=100)
        means.append(drawn @ totals / (drawn @ counts))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def permutation_p(statistic: Callable[[np.ndarray], float], count: int, seed: int) -> float:
    """The share of orders of `count` rows whose statistic is as large as that of the given order, itself among them."""
    rng, observed = np.random.default_rng(seed), statistic(np.arange(count))
    return (1 + sum(statistic(rng.permutation(count)) >= observed for _ in range(PERMUTATIONS - 1))) / PERMUTATIONS


def expected_jaccard(k: int, candidates: int) -> float:
    """The mean Jaccard overlap of two random sets of k among `candidates`."""
    shared = np.arange(k + 1)
    return float((stats.hypergeom.pmf(shared, candidates, k, k) * shared / (2 * k - shared)).sum())


def halves_and_blocks(documents: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """For each document, whether it is in the second half (bool), and its block (int)."""
    order = np.random.default_rng(seed).permutation(documents)
    return order % 2 == 1, order // 2 % BLOCKS
