"""Neighbours, probes, shape and intervals, against scikit-learn, scikit-dimension, brute force and closed forms."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from gritlm.analysis.controls import expected_jaccard, halves_and_blocks, jackknife, mean_interval, permutation_p
from gritlm.analysis.function import probe
from gritlm.analysis.geometry import Neighbours
from gritlm.analysis.shape import alignment, shape, two_nn, two_nn_ratios

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


def draw(count: int, width: int) -> np.ndarray:
    return RNG.standard_normal((count, width)).astype(np.float32)


# ---- neighbours


def test_the_overlap_is_that_of_scikit_learns_neighbours():
    x = draw(300, 12)
    y, every = x + 0.5 * draw(300, 12), np.arange(300)
    found = Neighbours(x, y, every, [5, 10], CPU).by_k(2, 0)
    lists = []
    for side in (x, y):
        lists.append(NearestNeighbors(n_neighbors=11, metric="cosine").fit(side).kneighbors(side)[1][:, 1:])
    for k in (5, 10):
        pairs = [(set(a[:k]), set(b[:k])) for a, b in zip(*lists, strict=True)]
        row = found[str(k)]
        assert row["value"] == pytest.approx(np.mean([len(a & b) / len(a | b) for a, b in pairs]), abs=1e-3)
        assert row["low"] < row["value"] < row["high"] and row["floor"] < row["low"]
    mutual = Neighbours(x, y, every, [5], CPU).by_k(2, 0, mutual=True)["5"]
    assert mutual["value"] == pytest.approx(
        np.mean([len(set(a[:5]) & set(b[:5])) / 5 for a, b in zip(*lists, strict=True)]), abs=1e-3
    )


def test_tokens_of_one_document_are_no_neighbours():
    documents = np.repeat(np.arange(30), 4)
    x = np.repeat(draw(30, 8), 4, axis=0) + 0.01 * draw(120, 8)
    near = Neighbours(x, x, documents, [3], CPU)
    assert (documents[near.a] != documents[:, None]).all()
    alone = Neighbours(x, x, np.arange(120), [3], CPU)
    assert (documents[alone.a] == documents[:, None]).all(), "control: without it they are all neighbours"


def test_equal_rows_are_counted_once():
    x = draw(40, 6)
    repeated = np.concatenate([x, x[:15]])
    found = Neighbours(repeated, np.concatenate([x, draw(15, 6)]), np.arange(55), [5], CPU)
    assert list(found.kept) == list(range(40)) and found.by_k(0, 0)["5"]["equal"] == 15
    few = Neighbours(repeated, repeated, np.arange(55), [45], CPU).by_k(0, 0)["45"]
    assert few["value"] is None and "found 39 other rows that differ, wanted the 45 of --k" in few["why"]


def test_by_label_each_label_counts_the_same():
    x = draw(100, 5)
    y, labels = x.copy(), np.array(["good"] * 80 + ["bad"] * 20)
    y[80:] = draw(20, 5)
    row = Neighbours(x, y, np.arange(100), [5], CPU).by_k(0, 0, labels=labels)["5"]
    assert row["by_label"]["good"] > row["by_label"]["bad"] + 0.2
    assert row["value"] == pytest.approx(np.mean([*row["by_label"].values()]))
    assert row["low"] < row["value"] < row["high"]


def test_chance_gives_its_floor_and_no_small_p():
    x, y = draw(200, 10), draw(200, 10)
    one = Neighbours(x, y, np.arange(200), [10], CPU)
    row = one.by_k(0, 0)["10"]
    assert row["floor"] == pytest.approx(expected_jaccard(10, 199)) == pytest.approx(row["value"], abs=0.01)
    sets = [(set(RNG.permutation(199)[:10]), set(RNG.permutation(199)[:10])) for _ in range(3000)]
    assert row["floor"] == pytest.approx(np.mean([len(a & b) / len(a | b) for a, b in sets]), abs=0.002)
    assert one.p_value(0) > 0.02 and Neighbours(x, x + draw(200, 10), np.arange(200), [10], CPU).p_value(0) == 1 / 200


# ---- probes


def labelled(kind: str, count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    x = draw(count, 8)
    score = x[:, 0] + 0.5 * x[:, 1]
    return x, np.where(score > 0, "yes", "no") if kind == "words" else score.astype(np.float64)


@pytest.mark.parametrize("kind", ["words", "floats"])
def test_a_probe_reads_the_same_space_and_a_turned_one_after_the_map(kind):
    x, labels = labelled(kind)
    halves, blocks = halves_and_blocks(400, 0)
    turned = x @ np.linalg.qr(draw(8, 8))[0] * 2 + 1
    same, other = (probe(x, y, labels, halves, blocks, 0) for y in (x, turned))
    assert same["value"] == same["on_a"] == same["on_b"] > 0.9 and same["low"] <= same["value"] <= same["high"]
    assert other["value"] < 0.8 and other["mapped"] == pytest.approx(other["on_a"], abs=0.02), "a turn moves it"
    wider = probe(x, np.concatenate([turned, 1e-3 * draw(400, 3)], axis=1), labels, halves, blocks, 0)
    assert wider["value"] == pytest.approx(same["on_a"], abs=0.05) and wider["dimensions"] == 8
    if kind == "words":
        scaler = StandardScaler().fit(x[~halves])
        model = LogisticRegression(max_iter=200, tol=1e-3).fit(scaler.transform(x[~halves]), labels[~halves])
        assert same["on_a"] == pytest.approx(model.score(scaler.transform(x[halves]), labels[halves]), abs=0.01)
        assert same["floor"] < 0.65


def test_a_probe_of_one_label_says_why():
    x, _ = labelled("words", 60)
    row = probe(x, x, np.array(["yes"] * 60), *halves_and_blocks(60, 0), 0)
    assert row["value"] is None and "found one label" in row["why"]


# ---- shape


def dimension(rows: np.ndarray) -> float:
    return two_nn(two_nn_ratios(torch.from_numpy(rows), torch.arange(len(rows)))) or 0.0


def test_the_intrinsic_dimension_is_that_of_the_sheet():
    sheet = draw(2000, 5) @ draw(5, 60) + 300
    assert dimension(sheet) == pytest.approx(5, abs=0.5)
    repeated = np.concatenate([sheet[:1000], sheet[:300] + 1e-5 * draw(300, 60)])
    assert abs(dimension(repeated) - 5) > 0.8, "control: rows that are nearly equal break it"


def test_the_intrinsic_dimension_is_scikit_dimensions():
    estimators = pytest.importorskip("skdim").id
    sheet = draw(2000, 5) @ draw(5, 60) + 300
    assert dimension(sheet) == pytest.approx(estimators.TwoNN(discard_fraction=0.1).fit_transform(sheet), rel=0.05)


def test_equal_states_leave_the_shape_as_it_is():
    x, every = draw(200, 6), np.arange(200)
    documents = np.concatenate([every, every[:60]])
    blocks = documents % 10
    once, twice = (
        shape(rows, own, own % 10, None, CPU) for rows, own in ((x, every), (np.concatenate([x, x[:60]]), documents))
    )
    for name, row in once.items():
        assert twice[name]["value"] == row["value"] and twice[name]["equal"] == 60
        assert name == "alignment" or row["low"] < row["value"] < row["high"]
    assert "--label_column" in once["alignment"]["why"] and len(blocks) == 260


def test_alignment_is_the_mean_over_all_pairs():
    unit = draw(40, 6)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    groups = np.arange(40) % 7
    pairs = [
        ((unit[i] - unit[j]) ** 2).sum() for i in range(40) for j in range(40) if i != j and groups[i] == groups[j]
    ]
    assert alignment(unit.astype(np.float64), groups) == pytest.approx(np.mean(pairs), rel=1e-5)
    assert alignment(unit, np.arange(40)) is None


# ---- controls


def test_intervals_of_a_mean_are_those_of_the_textbook():
    values = RNG.standard_normal(500)
    error = values.std(ddof=1) / np.sqrt(500)
    low, high = mean_interval(values, np.arange(500), 0)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    blocks = np.arange(500) % 10
    low, high = jackknife(values.mean(), [values[blocks != block].mean() for block in range(10)])
    means = np.array([values[blocks == block].mean() for block in range(10)])
    assert (high - low) / 2 == pytest.approx(2.262 * means.std(ddof=1) / np.sqrt(10), rel=1e-3)
    copies = mean_interval(np.repeat(values[:50], 10), np.repeat(np.arange(50), 10), 0)
    alone = mean_interval(np.repeat(values[:50], 10), np.arange(500), 0)
    assert copies[1] - copies[0] > 2 * (alone[1] - alone[0]), "control: ten copies are one document"
    assert jackknife(1.0, [1.0, None]) == (None, None)


def test_a_permutation_test_counts_the_given_order():
    assert permutation_p(lambda order: float((order == np.arange(8)).all()), 8, 0) == 1 / 200
    assert permutation_p(lambda order: 0.0, 8, 0) == 1.0


def test_halves_and_blocks_are_balanced():
    halves, blocks = halves_and_blocks(200, 3)
    counts = [(halves & (blocks == block)).sum() for block in range(10)]
    assert halves.sum() == 100 and set(counts) == {10}
    assert (halves_and_blocks(200, 4)[0] != halves).any()
