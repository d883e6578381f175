"""The verdict's interval covers, its tests err in 5% of cases, and its queries are matched by id."""

import zlib

import numpy as np
import pytest
from scipy.stats import spearmanr

from gritlm.errors import UserError
from gritlm.evaluation.sets import SetResult
from gritlm.evaluation.verdict import bootstrap, compare, holm, interval, mean_of, sign_flip_p, spearman_of, widened

QUERIES, PAIRS = 300, 2000
NDCG = np.array([0.0, 0.0, 0.0, 0.3, 0.39, 0.43, 0.5, 0.63, 1.0, 1.0, 1.0, 1.0])


@pytest.fixture(scope="module")
def equal_models() -> tuple[np.ndarray, np.ndarray]:
    """Pairs of equal models, each (queries, pairs): seven of ten queries get the same value from both."""
    rng = np.random.default_rng(0)
    first, other = rng.choice(NDCG, (2, QUERIES, PAIRS))
    return first, np.where(rng.random(first.shape) < 0.7, first, other)


def retrieval(name: str, values: np.ndarray, ids: list[str] | None = None) -> SetResult:
    ids = ids or [f"q{number}" for number in range(len(values))]
    return SetResult(name, "retrieval", "ndcg@10", {"ndcg@10": float(np.mean(values))}, ids, list(map(float, values)))


def sts(name: str, predicted: np.ndarray, gold: np.ndarray) -> SetResult:
    metrics = {"spearman": float(spearmanr(predicted, gold).statistic)}
    ids = [str(number) for number in range(len(gold))]
    return SetResult(name, "sts", "spearman", metrics, ids, predicted.tolist(), gold.tolist())


def rng_of(name: str) -> np.random.Generator:
    return np.random.default_rng([0, zlib.crc32(name.encode())])


def test_the_interval_covers_and_the_test_errs_in_5_percent_of_equal_models(equal_models):
    """Controls: an unpaired interval, and one that takes each query for two, are seen to miss."""
    base, tuned = equal_models
    differences, rng = tuned - base, rng_of("a")
    centred = widened(bootstrap(QUERIES, mean_of(differences), rng) - differences.mean(0), QUERIES)
    p_values = sign_flip_p(differences, rng)

    def coverage(draws: np.ndarray) -> float:
        low, high = interval(draws, QUERIES - 1) + differences.mean(0)
        return float(((low <= 0) & (high >= 0)).mean())

    assert 0.93 <= coverage(centred) <= 0.97
    assert 0.035 <= (p_values < 0.05).mean() <= 0.065
    assert coverage(centred / np.sqrt(2)) < 0.93, "control"
    one, two = (bootstrap(QUERIES, mean_of(side), np.random.default_rng(n)) for n, side in enumerate(equal_models))
    assert coverage((two - two.mean(0)) - (one - one.mean(0))) > 0.97, "control"
    # What `compare` says of a pair is what was counted here.
    found = compare([retrieval("a", base[:, 0])], [retrieval("a", tuned[:, 0])])
    low, high = interval(centred[:, :1], QUERIES - 1)[:, 0] + differences[:, 0].mean()
    (row,) = found.sets
    assert (row.low, row.high) == pytest.approx((low, high))
    assert row.p == pytest.approx(p_values[0], abs=0.02), "other random signs"
    # Five sets a family: one of them is called better or worse in 5% of families. Control: without the correction.
    families = p_values.reshape(-1, 5)
    called = np.mean([min(holm(family.tolist())) < 0.05 for family in families])
    assert 0.02 <= called <= 0.08
    assert (families.min(1) < 0.05).mean() > 0.15, "control"


def test_the_mean_over_sets_resamples_within_each_set(equal_models):
    base, tuned = equal_models
    sets = [[retrieval(f"s{n}", side[: 300 // (n + 1), n]) for n in range(4)] for side in (base, tuned)]
    found = compare(*sets)
    assert found.mean.difference == pytest.approx(np.mean([row.difference for row in found.sets]))
    width = np.sqrt(sum((row.high - row.low) ** 2 for row in found.sets)) / 4
    assert found.mean.high - found.mean.low == pytest.approx(width, rel=0.05)
    alone = compare(sets[0][1:2], sets[1][1:2]).sets[0]
    assert (alone.low, alone.high) == (found.sets[1].low, found.sets[1].high), "whatever the other sets are"
    assert compare(*sets, seed=1).mean.low != found.mean.low


def test_spearman_is_that_of_the_resampled_pairs():
    rng = np.random.default_rng(1)
    gold = rng.integers(0, 5, 200).astype(float)  # many ties
    good, better = (np.round(gold + scale * rng.normal(size=200), 1) for scale in (2.0, 1.0))
    counts = rng.multinomial(200, np.ones(200) / 200, size=20).astype(float)
    drawn = [np.repeat(np.arange(200), row.astype(int)) for row in counts]
    wanted = [spearmanr(good[rows], gold[rows]).statistic for rows in drawn]
    assert spearman_of(good, gold)(counts) == pytest.approx(wanted)
    assert spearman_of(np.zeros(200), gold)(counts) == pytest.approx(np.zeros(20))
    one = sts("sts", good, gold), sts("sts", better, gold)
    found = compare([one[0]], [one[1]]).sets[0]
    assert found.outcome == "better" and 0 < found.low < found.difference < found.high
    same = compare([one[0]], [one[0]])
    assert (same.sets[0].low, same.sets[0].high, same.sets[0].p) == (0, 0, 1)
    assert same.line() == (
        f"Spearman {same.mean.base:.3f} -> {same.mean.base:.3f}, +0.000 [+0.000, +0.000] "
        "(95%, over queries, not seeds), no difference at 5%"
    )


def test_better_and_worse_sets_are_counted_and_drops_named(equal_models):
    values = equal_models[0][:, 0]
    rng = np.random.default_rng(2)
    up = np.clip(values + 0.1 * rng.random(QUERIES), 0, 1)
    names = ["up", "down", "equal"]
    base = [retrieval(name, side) for name, side in zip(names, (values, up, values), strict=True)]
    tuned = [retrieval(name, side) for name, side in zip(names, (up, values, values), strict=True)]
    found = compare(base, tuned)
    assert [row.outcome for row in found.sets] == ["better", "worse", "same"]
    assert found.line().startswith("nDCG@10 0.")
    assert found.line().endswith("(95%, over queries, not seeds), 1 of 3 sets better, 1 worse")
    fall = -found.sets[1].difference
    assert found.drops(fall) == []
    assert found.drops(fall - 0.001) == [f"down: nDCG@10 fell by {fall:.3f}, wanted at most {fall - 0.001:g}"]
    mean_falls = compare(base[1:], tuned[1:]).drops(fall / 2 - 0.001)
    assert [line.split(":")[0] for line in mean_falls] == ["down", "mean over sets"]
    mixed = compare([base[0], sts("sts", values, values)], [tuned[0], sts("sts", up, values)])
    assert mixed.line().startswith("mean of nDCG@10, Spearman ")
    few = compare([retrieval("few", values[:3])], [retrieval("few", up[:3])])
    assert few.line().endswith("; fewer than 10 queries, too few for an interval: few")


def test_queries_are_matched_by_id(equal_models):
    base, tuned = (side[:, 0] for side in equal_models)
    ids = [f"q{number}" for number in range(QUERIES)]
    order = np.random.default_rng(3).permutation(QUERIES)
    straight = compare([retrieval("a", base)], [retrieval("a", tuned)])
    shuffled = retrieval("a", tuned[order], [ids[number] for number in order])
    found = compare([retrieval("a", base)], [shuffled]).mean
    assert (found.low, found.high) == pytest.approx((straight.mean.low, straight.mean.high))
    unmatched = compare([retrieval("a", base)], [retrieval("a", tuned[order])])
    assert unmatched.mean.high - unmatched.mean.low > 1.2 * (straight.mean.high - straight.mean.low), "control"


def test_results_that_do_not_fit_give_one_line(equal_models):
    values = equal_models[0][:, 0]
    a, gold = retrieval("a", values), np.arange(QUERIES, dtype=float)
    for base, tuned, message in (
        ([], [], "found no evaluation set that both models have"),
        ([a], [], "a: found a result of one model only"),
        ([a], [retrieval("b", values)], "a: found a result of one model only"),
        ([a, a], [a], "a: found two results of a set of this name"),
        ([a], [retrieval("a", values[1:])], "a: found 300 and 299 queries, 1 of one model only"),
        ([a], [retrieval("a", values, ["q1", *a.ids[1:]])], "wanted the same queries"),
        ([a], [sts("a", values, gold)], "a: found ndcg@10 for one model and spearman for the other"),
        ([sts("a", values, gold)], [sts("a", values, gold + 1)], "a: found other gold scores"),
        ([a], [retrieval("a", np.where(values == 1, np.nan, values))], "a: found a value that is not finite"),
    ):
        with pytest.raises(UserError, match=message) as error:
            compare(base, tuned)
        assert "\n" not in str(error.value)
