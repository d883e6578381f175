"""Exact search, ties included, against a stable sort of all scores."""

import numpy as np
import pytest
import torch

from gritlm.evaluation import search
from gritlm.evaluation.search import nearest

CPU = torch.device("cpu")


def stable(scores: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(scores, numbers, 1), numbers


@pytest.mark.parametrize("tile", [1, 7, 64, 10_000])
@pytest.mark.parametrize("count", [1, 5, 63, 64, 500])
def test_ties_are_in_passage_order(monkeypatch, tile, count):
    monkeypatch.setattr(search, "BLOCK", 10)
    monkeypatch.setattr(search, "TILE_VALUES", tile * 4)
    rng = np.random.default_rng(0)
    # products are small integers of both signs, 0.0 and -0.0
    queries, corpus = (rng.integers(-1, 2, (rows, 4)).astype(np.float32) for rows in (23, 300))
    queries[0], queries[1] = 0, -0.0
    scores, numbers = nearest(queries, corpus, count, CPU)
    wanted_scores, wanted = stable(queries @ corpus.T, count)
    np.testing.assert_array_equal(numbers, wanted)
    np.testing.assert_array_equal(scores, wanted_scores)
    topk = torch.from_numpy(queries @ corpus.T).topk(min(count, 300), dim=1).indices.numpy()
    assert count == 1 or (topk != wanted).any(), "control: topk alone"


def test_scores_without_ties_and_of_all_sizes():
    rng = np.random.default_rng(1)
    queries, corpus = (rng.standard_normal((rows, 16)).astype(np.float32) * 1e3 for rows in (5, 40))
    scores, numbers = nearest(queries, corpus, 12, CPU)
    wanted_scores, wanted = stable(queries @ corpus.T, 12)
    np.testing.assert_array_equal(numbers, wanted)
    np.testing.assert_allclose(scores, wanted_scores, rtol=1e-5)
    assert (scores < 0).any() or (scores > 1).any()


def test_nothing_to_search_for():
    scores, numbers = nearest(np.zeros((0, 4), np.float32), np.eye(4, dtype=np.float32), 3, CPU)
    assert scores.shape == numbers.shape == (0, 3)
