"""Retrieval metrics of vectors: recall@k, MRR@10, nDCG@10."""

from collections.abc import Callable

import numpy as np

DISCOUNT = 1 / np.log2(np.arange(2, 12))

# The metrics of one query: bool (10,), which of the 10 nearest passages are relevant, and how many are in the corpus.
METRICS: dict[str, Callable[[np.ndarray, int], float]] = {
    "recall@1": lambda hits, relevant: hits[:1].sum() / relevant,
    "recall@10": lambda hits, relevant: hits.sum() / relevant,
    "mrr@10": lambda hits, relevant: 1 / (1 + hits.argmax()) if hits.any() else 0.0,
    "ndcg@10": lambda hits, relevant: (hits * DISCOUNT[: len(hits)]).sum() / DISCOUNT[:relevant].sum(),
}


def retrieval_metrics(queries: np.ndarray, corpus: np.ndarray, relevant: list[set[int]]) -> dict[str, float]:
    """Rank the corpus by dot product, ties in corpus order, and average over queries.

    Relevance is binary; nDCG is that of Järvelin & Kekäläinen (2002).

    Args:
        queries: float32 (Q, D).
        corpus: float32 (C, D).
        relevant: the indices of the relevant corpus rows of each query, at least one.
    Returns:
        The mean of each of `METRICS`, in [0, 1].
    """
    totals = dict.fromkeys(METRICS, 0.0)
    for start in range(0, len(queries), 1024):
        scores = queries[start : start + 1024] @ corpus.T
        ranked = np.argsort(-scores, axis=1, kind="stable")[:, :10]
        for row, wanted in zip(ranked, relevant[start : start + 1024], strict=True):
            hits = np.isin(row, list(wanted))
            for name, metric in METRICS.items():
                totals[name] += metric(hits, len(wanted))
    return {name: float(total / len(queries)) for name, total in totals.items()}
