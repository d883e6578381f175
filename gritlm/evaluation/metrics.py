"""Metrics of one query's ranking, as trec_eval defines them. Grades are linear gains; above 0 is relevant."""

from collections.abc import Callable

import numpy as np

DEPTH = 100  # ranked passages that a metric may look at
_DISCOUNT = 1 / np.log2(np.arange(2, DEPTH + 2))

# (the grades of the ranked passages, best first, 0 if not judged; all positive grades, largest first) -> value.
Metric = Callable[[np.ndarray, np.ndarray], float]


def _recall(count: int) -> Metric:
    return lambda ranked, ideal: (ranked[:count] > 0).sum() / len(ideal)


def _ndcg(ranked: np.ndarray, ideal: np.ndarray) -> float:
    """Järvelin & Kekäläinen (2002). The ideal ranking has all judged passages, those missing from the corpus too."""
    return _dcg(ranked) / _dcg(ideal)


def _dcg(grades: np.ndarray) -> float:
    top = np.maximum(grades[:10], 0)
    return float(top @ _DISCOUNT[: len(top)])


def _reciprocal_rank(ranked: np.ndarray, ideal: np.ndarray) -> float:
    hits = ranked[:10] > 0
    return 1 / (1 + hits.argmax()) if hits.any() else 0.0


def _average_precision(ranked: np.ndarray, ideal: np.ndarray) -> float:
    places = np.flatnonzero(ranked[:100] > 0)
    return float((np.arange(1, len(places) + 1) / (places + 1)).sum() / len(ideal))


METRICS: dict[str, Metric] = {
    "ndcg@10": _ndcg,
    "recall@1": _recall(1),
    "recall@10": _recall(10),
    "recall@100": _recall(100),
    "mrr@10": _reciprocal_rank,
    "map@100": _average_precision,
}


def query_metrics(ranked: np.ndarray, ideal: np.ndarray) -> dict[str, float]:
    """Every metric of one query; 0 where no passage is relevant."""
    return {name: float(metric(ranked, ideal)) if len(ideal) else 0.0 for name, metric in METRICS.items()}
