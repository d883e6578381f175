"""The health of the space against closed forms."""

import math

import numpy as np
import pytest
from scipy.special import hyp0f1

from gritlm.evaluation import space
from gritlm.evaluation.space import BINS, health, spread


def gaussian(rows: int, width: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_an_isotropic_gaussian():
    """E exp(t x.y) of uniform points on the sphere is 0F1(; D/2; t^2/4)."""
    found = spread(gaussian(2000, 16))
    assert found["uniformity"] == pytest.approx(math.log(hyp0f1(8, 4)) - 4, abs=0.01)
    assert found["effective_rank"] == pytest.approx(16, rel=0.01)
    assert found["anisotropy"] == pytest.approx(0, abs=2e-3)
    shifted = gaussian(2000, 16) + 1
    off = spread(shifted / np.linalg.norm(shifted, axis=1, keepdims=True))
    assert off["anisotropy"] > 0.4 and off["effective_rank"] < 15.5 and off["uniformity"] > -2.5, "control: a cone"


@pytest.mark.parametrize("rows", [2, 5, 700])
def test_one_repeated_vector(rows):
    found = spread(np.repeat(gaussian(1, 64), rows, axis=0))
    assert found["uniformity"] == pytest.approx(0, abs=1e-6)
    assert found["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert found["anisotropy"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("rows", [2, 64])
def test_an_orthogonal_basis(rows):
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((64, 64)))[0].astype(np.float32)[:rows]
    found = spread(basis)
    assert found["uniformity"] == pytest.approx(-4, abs=1e-6)
    assert found["effective_rank"] == pytest.approx(rows, rel=1e-6)
    assert found["anisotropy"] == pytest.approx(0, abs=1e-6)


def test_alignment_histograms_and_false_negatives():
    corpus = np.eye(12, dtype=np.float32)
    queries = np.zeros((3, 12), dtype=np.float32)
    queries[0, [0, 1, 2]] = 0.8, 0.6, 0  # passage 0 is relevant
    queries[1, [3, 4, 5]] = 0.5, 0.5, math.sqrt(0.5)  # passage 3 is; 4 and 5 score as much or more; 4 is judged
    queries[2, 6] = 1  # nothing is relevant
    positives, judged = [[0], [3], []], [{0}, {3, 4}, {6}]
    ranked = np.argsort(-(queries @ corpus.T), axis=1, kind="stable")
    found = health(queries, corpus, positives, ranked, judged)
    assert found["alignment"] == pytest.approx((2 - 2 * 0.8 + 2 - 2 * 0.5) / 2)
    assert found["suspected_false_negatives"] == pytest.approx(1 / (9 + 8)), "passage 5, of all unjudged in the top 10"
    assert sum(found["positive_similarity"]) == 2
    assert found["positive_similarity"][np.searchsorted(BINS, 0.81) - 1] == 1
    assert sum(found["negative_similarity"]) == 11 + 10 + 11
    assert health(queries, corpus, positives, ranked, [{0}, {3}, {6}])["suspected_false_negatives"] == 2 / 18, "control"


def test_samples_are_the_same_each_time(monkeypatch):
    monkeypatch.setattr(space, "SAMPLE", 50)
    queries, corpus = gaussian(200, 16), gaussian(400, 16, seed=1)
    positives = [[number] for number in range(200)]
    arguments = queries, corpus, positives, np.argsort(-queries @ corpus.T)[:, :10], [{number} for number in range(200)]
    found = health(*arguments)
    assert health(*arguments) == found
    assert sum(found["positive_similarity"]) == 50
    monkeypatch.setattr(space, "SAMPLE", 500)
    assert health(*arguments)["uniformity_passages"] != found["uniformity_passages"], "control: no sample"
    alone = health(queries[:1], corpus[:1], [[]], np.zeros((1, 1), int), [set()])
    assert alone.keys() == {"negative_similarity"}, "one vector has no pairs, no positive no alignment"
