"""Retrieval metrics against values worked out by hand."""

import math

import torch

from gritlm.evaluation.metrics import retrieval_metrics


def test_retrieval_metrics_by_hand():
    corpus = torch.eye(12).numpy()
    queries = torch.zeros(2, 12)
    queries[0, [3, 5]] = torch.tensor([1.0, 0.9])  # relevant 5 comes second
    queries[1] = torch.linspace(1, 0, 12)  # relevant 11 comes last, 0 first
    found = retrieval_metrics(queries.numpy(), corpus, [{5}, {0, 11}])
    assert math.isclose(found["recall@1"], (0 + 0.5) / 2)
    assert math.isclose(found["recall@10"], (1 + 0.5) / 2)
    assert math.isclose(found["mrr@10"], (1 / 2 + 1) / 2)
    ideal = 1 + 1 / math.log2(3)
    assert math.isclose(found["ndcg@10"], (1 / math.log2(3) + 1 / ideal) / 2)
