"""Is one model better than another? The paired bootstrap over the queries of each evaluation set."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from gritlm.errors import UserError
from gritlm.evaluation.sets import SetResult

RESAMPLES = 2000
SIGN_FLIPS = 10_000  # the smallest p-value is 1 / (1 + this), also after Holm's correction for 131 tasks
BLOCK = 1 << 22  # numbers held at once
LEVEL = 0.05  # of the interval and of the tests
FEW = 10  # queries
TITLES = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "map@100": "MAP@100", "spearman": "Spearman"}


@dataclass(frozen=True)
class Difference:
    """One set, or the mean over sets: the metric of both models, their difference and its 95% interval.

    Attributes:
        p: for a set, the p-value of "equal models" after Holm's correction for the number of sets. None for the mean.
        outcome: better, worse, or same: of a set where p is not below 5%, of the mean where the interval has 0 in it.
    """

    name: str
    metric: str
    queries: int
    base: float
    tuned: float
    low: float
    high: float
    p: float | None
    outcome: str

    @property
    def difference(self) -> float:
        return self.tuned - self.base

    def __str__(self) -> str:
        return f"{self.base:.3f} -> {self.tuned:.3f}, {self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class Verdict:
    """The differences on each set, and of the mean over sets."""

    sets: list[Difference]
    mean: Difference

    def line(self) -> str:
        """The verdict in one line."""
        better, worse = (sum(row.outcome == outcome for row in self.sets) for outcome in ("better", "worse"))
        count = len(self.sets)
        calls = f"{better or 'none'} of {count} sets better, {worse or 'none'} worse"
        if count == 1:
            calls = self.sets[0].outcome.replace("same", "no difference at 5%")
        small = [row.name for row in self.sets if row.queries < FEW]
        few = f"; fewer than {FEW} queries, too few for an interval: {', '.join(small)}" if small else ""
        return f"{self.mean.metric} {self.mean} (95%, over queries, not seeds), {calls}{few}"

    def drops(self, most: float) -> list[str]:
        """What falls by more than `most`: sets, and the mean over sets."""
        rows = [*self.sets, self.mean] if len(self.sets) > 1 else self.sets
        fallen = [row for row in rows if -row.difference > most + 1e-12]
        return [f"{row.name}: {row.metric} fell by {-row.difference:.3f}, wanted at most {most:g}" for row in fallen]


def compare(base: list[SetResult], tuned: list[SetResult], seed: int = 0) -> Verdict:
    """Compare two models on the same sets, query by query.

    The interval of a set is the percentile interval of the paired bootstrap: both models on the same resampled queries.
    That of the mean resamples the queries within each set. A set's p-value is that of the sign-flip permutation test;
    for STS, whose Spearman is no mean, that of a t-test with the bootstrap's standard error. Holm (1979) corrects them.

    Raises:
        UserError: the models were not measured on the same sets and queries.
    """
    pairs = list(_paired(base, tuned))
    centred, p_values = zip(*(_resample(old, new, seed) for old, new in pairs), strict=True)
    sets = []
    for (old, new), draws_R, p in zip(pairs, centred, holm(list(p_values)), strict=True):
        count, before, after = len(old.ids), old.metrics[old.main], new.metrics[new.main]
        low, high = (interval(draws_R, count - 1) + after - before).tolist()
        outcome = "same" if p >= LEVEL else "better" if after > before else "worse"
        title = TITLES.get(old.main, old.main)
        sets.append(Difference(old.name, title, count, before, after, low, high, p, outcome))
    before, after = (float(np.mean([getattr(row, side) for row in sets])) for side in ("base", "tuned"))
    queries = sum(row.queries for row in sets)
    low, high = (interval(np.mean(centred, axis=0), queries - len(sets)) + after - before).tolist()
    titles = list(dict.fromkeys(row.metric for row in sets))
    title = titles[0] if len(titles) == 1 else f"mean of {', '.join(titles)}"
    outcome = "better" if low > 0 else "worse" if high < 0 else "same"
    return Verdict(sets, Difference("mean over sets", title, queries, before, after, low, high, None, outcome))


def _resample(old: SetResult, new: SetResult, seed: int) -> tuple[np.ndarray, float]:
    """The bootstrap's differences of one set, less the observed one, (R,); and the p-value."""
    count = len(old.ids)
    rng = np.random.default_rng([seed, zlib.crc32(old.name.encode())])  # whatever the other sets are
    if old.gold is None:
        difference_N1 = (np.array(new.values) - np.array(old.values))[:, None]
        draws_R = bootstrap(count, mean_of(difference_N1), rng)[:, 0] - difference_N1.mean()
        return widened(draws_R, count), float(sign_flip_p(difference_N1, rng)[0])
    before, after = (spearman_of(np.array(result.values), np.array(old.gold)) for result in (old, new))
    observed = float((after(np.ones((1, count))) - before(np.ones((1, count))))[0])
    draws_R = widened(bootstrap(count, lambda counts: after(counts) - before(counts), rng) - observed, count)
    return draws_R, _t_test(observed, draws_R, count)


def _paired(base: list[SetResult], tuned: list[SetResult]) -> Iterator[tuple[SetResult, SetResult]]:
    """The results of both models on each set, the queries in one order."""
    for results in (base, tuned):
        names = [result.name for result in results]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{twice[0]}: found two results of a set of this name, wanted one")
    others = {result.name: result for result in tuned}
    if alone := sorted({result.name for result in base} ^ others.keys()):
        raise UserError(f"{alone[0]}: found a result of one model only, wanted the same sets for both")
    if not base:
        raise UserError("found no evaluation set that both models have, wanted at least one")
    for old in base:
        new = others[old.name]
        if old.main != new.main:
            raise UserError(f"{old.name}: found {old.main} for one model and {new.main} for the other, wanted the same")
        place = {key: number for number, key in enumerate(new.ids)}
        if len(place) != len(new.ids) or len(old.ids) != len(new.ids) or place.keys() != set(old.ids):
            differing = len(place.keys() ^ set(old.ids))
            raise UserError(
                f"{old.name}: found {len(old.ids)} and {len(new.ids)} queries, {differing} of one model only, "
                "wanted the same queries for both"
            )
        order = [place[key] for key in old.ids]
        gold = new.gold and [new.gold[number] for number in order]
        if gold != old.gold:
            raise UserError(f"{old.name}: found other gold scores for one model than for the other, wanted the same")
        values = [new.values[number] for number in order]
        if not np.isfinite(np.array([*old.values, *values], float)).all():
            raise UserError(f"{old.name}: found a value that is not finite, wanted numbers")
        yield old, replace(new, ids=old.ids, values=values, gold=gold)


# ---- resampling. A resample is how often each query is in it.


def bootstrap(count: int, statistic: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """The statistic of each resample of `count` queries; it maps counts (R, N) to (R, ...)."""
    draws, step = [], max(1, BLOCK // count)
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        chosen = rng.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
        counts_RN = np.bincount(chosen.ravel(), minlength=rows * count).reshape(rows, count).astype(float)
        draws.append(statistic(counts_RN))
    return np.concatenate(draws)


def mean_of(values_NS: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The mean of each column over a resample."""
    return lambda counts_RN: counts_RN @ values_NS / len(values_NS)


def spearman_of(predicted_N: np.ndarray, gold_N: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Spearman's correlation over a resample, ties included; 0 where one side is constant."""

    def ranks(values_N: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        _, group_N = np.unique(values_N, return_inverse=True)
        order = np.argsort(group_N, kind="stable")
        starts = np.flatnonzero(np.diff(group_N[order], prepend=-1))

        def centred(counts_RN: np.ndarray) -> np.ndarray:
            sizes = np.add.reduceat(counts_RN[:, order], starts, axis=1)
            middle = sizes.cumsum(1) - (sizes - 1) / 2  # the rank of each value, ties averaged
            return middle[:, group_N] - (len(values_N) + 1) / 2

        return centred

    predicted, gold = ranks(predicted_N), ranks(gold_N)

    def correlation(counts_RN: np.ndarray) -> np.ndarray:
        x, y = predicted(counts_RN), gold(counts_RN)
        norm = np.sqrt((counts_RN * x * x).sum(1) * (counts_RN * y * y).sum(1))
        return (counts_RN * x * y).sum(1) / np.where(norm > 0, norm, np.inf)

    return correlation


def widened(centred: np.ndarray, count: int) -> np.ndarray:
    """The bootstrap's variance of a mean is (n - 1) / n of the unbiased one."""
    return centred * np.sqrt(count / max(1, count - 1))


def interval(centred: np.ndarray, freedom: int) -> np.ndarray:
    """The 95% percentile interval of draws, along their first axis, with Student's tails for few queries.

    Hesterberg (2015), "What teachers should know about the bootstrap", section 4.3.
    """
    from scipy.stats import norm, t

    tail = float(norm.cdf(t.ppf(LEVEL / 2, max(1, freedom))))
    return np.quantile(centred, [tail, 1 - tail], axis=0)


# ---- tests


def sign_flip_p(difference_NS: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each column, the share of random signs under which the mean is at least as far from 0 as it is."""
    differing = difference_NS[(difference_NS != 0).any(1)]
    total, slack = np.abs(differing.sum(0)), 1e-12 * np.abs(differing).sum(0)
    reached, step = np.zeros(difference_NS.shape[1]), max(1, BLOCK // max(1, len(differing)))
    for start in range(0, SIGN_FLIPS, step):
        rows = min(step, SIGN_FLIPS - start)
        signs = rng.integers(2, size=(rows, len(differing)), dtype=np.int8) * 2.0 - 1.0
        reached += (np.abs(signs @ differing) >= total - slack).sum(0)
    return (1 + reached) / (1 + SIGN_FLIPS)


def _t_test(value: float, draws_R: np.ndarray, count: int) -> float:
    from scipy.stats import t

    error = draws_R.std(ddof=1)
    if not error:
        return 1.0
    return float(2 * t.sf(abs(value) / error, max(1, count - 1)))


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction: reject where the result is below the level, in the order given."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.array(p_values)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return adjusted.tolist()
