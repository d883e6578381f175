"""Retrieval metrics on vectors: recall@k, MRR@10, nDCG@10. Pure; where the vectors come from is the caller's."""

import numpy as np


def retrieval_metrics(queries: np.ndarray, corpus: np.ndarray, relevant: list[set[int]]) -> dict[str, float]:
    """Mean over queries, by dot product, ties in corpus order. Binary relevance (Järvelin & Kekäläinen 2002 for nDCG).

    Args:
        queries: float32 (Q, D).
        corpus: float32 (C, D).
        relevant: per query, the indices of the relevant corpus rows; none may be empty.
    Returns:
        {"recall@1", "recall@10", "mrr@10", "ndcg@10"}, each in [0, 1].
    """
    totals = dict.fromkeys(("recall@1", "recall@10", "mrr@10", "ndcg@10"), 0.0)
    discount = 1 / np.log2(np.arange(2, 12))
    for start in range(0, len(queries), 1024):
        scores = queries[start : start + 1024] @ corpus.T
        ranked = np.argsort(-scores, axis=1, kind="stable")[:, :10]
        for row, wanted in zip(ranked, relevant[start : start + 1024], strict=True):
            hits = np.isin(row, list(wanted))
            totals["recall@1"] += hits[:1].sum() / len(wanted)
            totals["recall@10"] += hits.sum() / len(wanted)
            totals["mrr@10"] += 1 / (1 + hits.argmax()) if hits.any() else 0.0
            totals["ndcg@10"] += (hits * discount[: len(hits)]).sum() / discount[: len(wanted)].sum()
    return {name: float(total / len(queries)) for name, total in totals.items()}
