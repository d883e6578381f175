"""Health of the space: how close queries are to their positives, and how well the vectors fill the space.

Numbers of pairs are computed on a seeded sample of at most `SAMPLE` vectors of each side.
"""

import math
from typing import Any

import numpy as np

SAMPLE = 2048
BINS = np.linspace(-1, 1, 41)  # of the histograms of similarity
MARGIN = 0.95  # an unjudged passage above this share of the best positive's score may be a positive


def spread(vectors_ND: np.ndarray) -> dict[str, float]:
    """How unit vectors, at least two, fill the space.

    Returns:
        uniformity: log E exp(-2 |x - y|^2) over pairs (Wang & Isola, arXiv 2005.10242); 0 for one point, lower is
            more uniform.
        effective_rank: exp of the entropy of the normalised singular values (Roy & Vetterli, 2007), at most min(N, D).
        anisotropy: the mean cosine of pairs (Ethayarajh, arXiv 1909.00512).
    """
    vectors_ND = vectors_ND.astype(np.float64)
    count, width = vectors_ND.shape
    cosines_NN = vectors_ND @ vectors_ND.T
    gram = cosines_NN if count <= width else vectors_ND.T @ vectors_ND
    squared = np.linalg.eigvalsh(gram)
    singular = np.sqrt(squared[squared > squared[-1] * 1e-12])
    shares = singular / singular.sum()
    pairs = cosines_NN[~np.eye(count, dtype=bool)]
    return {
        "uniformity": math.log(np.exp(4 * pairs - 4).mean()),
        "effective_rank": math.exp(-(shares * np.log(shares)).sum()),
        "anisotropy": float(pairs.mean()),
    }


def health(
    queries_QD: np.ndarray,
    corpus_ND: np.ndarray,
    positives: list[list[int]],
    nearest_QK: np.ndarray,
    judged: list[set[int]],
) -> dict[str, Any]:
    """The numbers of docs/evaluation.md on the space.

    Args:
        queries_QD, corpus_ND: unit vectors.
        positives: the numbers of each query's relevant passages.
        nearest_QK: the numbers of each query's nearest passages, best first.
        judged: the numbers of each query's judged passages, and of the passage that is the query itself.
    """
    rng = np.random.default_rng(0)
    queries, passages = (
        np.sort(rng.choice(len(side), min(SAMPLE, len(side)), replace=False)) for side in (queries_QD, corpus_ND)
    )
    numbers: dict[str, Any] = {}
    for name, sample in (("queries", queries_QD[queries]), ("passages", corpus_ND[passages])):
        if len(sample) > 1:
            numbers |= {f"{key}_{name}": value for key, value in spread(sample).items()}
    positive, suspects, unjudged = [], 0, 0
    for query in queries.tolist():
        if not positives[query]:
            continue
        scores = corpus_ND[positives[query]] @ queries_QD[query]
        positive.append(scores)
        others = [number for number in nearest_QK[query, :10].tolist() if number not in judged[query]]
        suspects += int((corpus_ND[others] @ queries_QD[query] > MARGIN * scores.max()).sum())
        unjudged += len(others)
    if positive:
        similarity = np.concatenate(positive)
        numbers["alignment"] = float(2 - 2 * similarity.mean())  # E |q - p|^2 of unit vectors
        numbers["suspected_false_negatives"] = suspects / max(1, unjudged)
        numbers["positive_similarity"] = _histogram(similarity).tolist()
    negative = np.zeros(len(BINS) - 1, dtype=np.int64)
    for query in queries[:256].tolist():
        unjudged_ND = corpus_ND[passages[~np.isin(passages, list(judged[query]))]]
        negative += _histogram(unjudged_ND @ queries_QD[query])
    return numbers | {"negative_similarity": negative.tolist()}


def _histogram(similarity: np.ndarray) -> np.ndarray:
    return np.histogram(np.clip(similarity, -1, 1), BINS)[0]  # rounding may exceed 1
