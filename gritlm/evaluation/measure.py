"""Measure an encoder on an evaluation set: retrieval by search, STS by rank correlation, classification by a probe."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gritlm.distributed import Ranks, gather_objects
from gritlm.errors import UserError
from gritlm.evaluation.compressed import FLOAT_QUERIES, Form, cut, quantise
from gritlm.evaluation.metrics import DEPTH, METRICS, query_metrics
from gritlm.evaluation.search import BLOCK, nearest
from gritlm.evaluation.sets import (
    ClassificationSet,
    Encode,
    EvaluationSet,
    RetrievalSet,
    SetResult,
    Side,
    StsSet,
    own_passages,
)
from gritlm.evaluation.space import health

RANKED = DEPTH + 1  # passages to rank for each query: one may be the query itself

Request = tuple[list[str], Side, list[str] | None]  # the arguments of an `Encode`


def texts_of(data: EvaluationSet) -> list[Request]:
    """What to encode for a set, one request for each matrix of vectors that `score` takes."""
    if isinstance(data, RetrievalSet):
        return [(data.queries, "query", data.instructions), (data.corpus, "passage", None)]
    both = (data.first, data.second) if isinstance(data, StsSet) else (data.train_texts, data.test_texts)
    texts = [*both[0], *both[1]]
    return [(texts, "query", None if data.instruction is None else [data.instruction] * len(texts))]


def measure(data: EvaluationSet, encode: Encode, ranks: Ranks = Ranks(), forms: Sequence[Form] = ()) -> SetResult:
    """Encode a set and score it. With several ranks, all must call it; each gets the result.

    Args:
        forms: a retrieval set is also searched with its vectors in these forms.
    Raises:
        UserError: a vector is not finite.
    """
    vectors = [encode(*request) for request in texts_of(data)]
    result = score(data, vectors, ranks)
    if isinstance(data, RetrievalSet):
        result.compressed = [_compressed(data, vectors[0], vectors[1], form, ranks) for form in forms]
    return result


def score(data: EvaluationSet, vectors: Sequence[np.ndarray], ranks: Ranks = Ranks()) -> SetResult:
    """Score the vectors of `texts_of(data)`, float32 (N, D) for each request, the same on every rank."""
    for (texts, side, _), part_ND in zip(texts_of(data), vectors, strict=True):
        if not (finite := np.isfinite(part_ND.sum(axis=1))).all():
            text = texts[int(finite.argmin())]
            raise UserError(f"{data.name}: found a {side} vector that is not finite, of {text[:60]!r}; damaged model")
    if isinstance(data, RetrievalSet):
        return _retrieval(data, vectors[0], vectors[1], ranks)
    if isinstance(data, StsSet):
        return _sts(data, vectors[0])
    return _classification(data, vectors[0], ranks)


def _gather(value: Any, ranks: Ranks) -> list:
    return gather_objects(value) if ranks.size > 1 else [value]


# ---- retrieval


def _retrieval(data: RetrievalSet, queries_QD: np.ndarray, corpus_ND: np.ndarray, ranks: Ranks) -> SetResult:
    numbers_QK = _search(queries_QD, corpus_ND, ranks)
    result = rank(data, numbers_QK)
    if ranks.rank == 0:
        judged, own = _judged(data), own_passages(data)
        positives = [[number for number, grade in passages.items() if grade > 0] for passages in judged]
        known = [{*passages, own.get(query, -1)} for query, passages in enumerate(judged)]
        result.space = health(queries_QD, corpus_ND, positives, numbers_QK, known)
    result.space = _gather(result.space, ranks)[0]
    return result


def _search(queries_QD: np.ndarray, corpus_ND: np.ndarray, ranks: Ranks) -> np.ndarray:
    """The numbers of each query's nearest passages, int32 (Q, K), on every rank."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    share = BLOCK * -(-len(queries_QD) // (BLOCK * ranks.size))  # in whole blocks: the same bits on any number of ranks
    mine = queries_QD[share * ranks.rank : share * (ranks.rank + 1)]
    return np.concatenate(_gather(nearest(mine, corpus_ND, RANKED, device)[1].astype(np.int32), ranks))


def _compressed(
    data: RetrievalSet, queries_QD: np.ndarray, corpus_ND: np.ndarray, form: Form, ranks: Ranks
) -> dict[str, Any]:
    """The metrics with passages in one form, once with the queries in that form and once with float32 queries."""
    queries_QW, corpus_NW = (cut(vectors, form.width) for vectors in (queries_QD, corpus_ND))
    ranges_2W = np.stack([corpus_NW.min(axis=0), corpus_NW.max(axis=0)])
    stored_NW = quantise(corpus_NW, form.precision, ranges_2W)
    both = _search(quantise(queries_QW, form.precision, ranges_2W), stored_NW, ranks)
    passages_only = both if form.precision == "float32" else _search(queries_QW, stored_NW, ranks)
    return form.about() | {"metrics": rank(data, both).metrics, FLOAT_QUERIES: rank(data, passages_only).metrics}


def rank(data: RetrievalSet, numbers_QK: np.ndarray) -> SetResult:
    """The result of the rankings that `rank_values` takes, from vectors or not."""
    values = rank_values(data, numbers_QK)
    means = {name: float(column.mean()) for name, column in values.items()}
    return SetResult(data.name, "retrieval", "ndcg@10", means, data.query_ids, values["ndcg@10"].tolist())


def rank_values(data: RetrievalSet, numbers_QK: np.ndarray) -> dict[str, np.ndarray]:
    """Each metric of each query, float64 (Q,).

    Args:
        numbers_QK: the numbers of each query's passages in `data.corpus`, best first; `RANKED` of them, or all.
    """
    judged, own = _judged(data), own_passages(data)
    rows = []
    for query, numbers in enumerate(numbers_QK.tolist()):
        ranked = [judged[query].get(number, 0) for number in numbers if number != own.get(query)]
        ideal = sorted((grade for grade in data.grades[query].values() if grade > 0), reverse=True)
        rows.append(query_metrics(np.array(ranked[:DEPTH], float), np.array(ideal, float)))
    return {name: np.array([row[name] for row in rows]) for name in METRICS}


def _judged(data: RetrievalSet) -> list[dict[int, int]]:
    """For each query, number -> grade of the judged passages that are in the corpus."""
    wanted = {key for grades in data.grades for key in grades}
    number_of = {key: number for number, key in enumerate(data.corpus_ids) if key in wanted}
    return [{number_of[key]: grade for key, grade in grades.items() if key in number_of} for grades in data.grades]


# ---- sentence similarity, classification


def _sts(data: StsSet, vectors: np.ndarray) -> SetResult:
    from scipy.stats import spearmanr

    first_ND, second_ND = (part.astype(np.float64) for part in np.split(vectors, 2))
    norms = np.linalg.norm(first_ND, axis=1) * np.linalg.norm(second_ND, axis=1)
    similarity = (first_ND * second_ND).sum(1) / np.maximum(norms, 1e-12)
    # Equal similarities have no rank correlation: such a model has found nothing.
    spearman = float(spearmanr(similarity, data.scores).statistic) if np.ptp(similarity) else 0.0
    ids = [str(number) for number in range(len(data.first))]
    return SetResult(
        data.name, "sts", "spearman", {"spearman": spearman}, ids, similarity.tolist(), [float(s) for s in data.scores]
    )


def _classification(data: ClassificationSet, vectors: np.ndarray, ranks: Ranks) -> SetResult:
    from sklearn.linear_model import LogisticRegression

    right: list[float] = []
    train = len(data.train_texts)
    if ranks.rank == 0:  # one fit, for the other ranks too
        probe = LogisticRegression(max_iter=1000).fit(vectors[:train], data.train_labels)
        right = [float(equal) for equal in probe.predict(vectors[train:]) == np.array(data.test_labels)]
    right = _gather(right, ranks)[0]
    ids = [str(number) for number in range(len(right))]
    return SetResult(data.name, "classification", "accuracy", {"accuracy": float(np.mean(right))}, ids, right)
