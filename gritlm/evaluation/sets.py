"""Evaluation sets: retrieval, sentence similarity (STS) and classification, as plain texts with their answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Side = Literal["query", "passage"]

# (texts, side, the instruction of each text or None for the model's own) -> float32 (N, D), unit vectors.
Encode = Callable[[Sequence[str], Side, Sequence[str] | None], np.ndarray]


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, a corpus, and which passages are relevant.

    Attributes:
        name: of the set.
        queries, query_ids: the judged queries only.
        corpus, corpus_ids: the passages; a title stands before its text.
        grades: for each query, passage id -> grade; above 0 is relevant. An id may be missing from the corpus.
        instructions: one for each query, or None: the model's own query prompt.
    """

    name: str
    queries: list[str]
    query_ids: list[str]
    corpus: list[str]
    corpus_ids: list[str]
    grades: list[dict[str, int]]
    instructions: list[str] | None = None


@dataclass(frozen=True)
class StsSet:
    """Pairs of texts and how similar people or a teacher found them. Both sides are encoded as queries."""

    name: str
    first: list[str]
    second: list[str]
    scores: list[float]
    instruction: str | None = None


@dataclass(frozen=True)
class ClassificationSet:
    """Texts and labels. A logistic regression on the vectors of the first part is tested on the second."""

    name: str
    train_texts: list[str]
    train_labels: list[str]
    test_texts: list[str]
    test_labels: list[str]
    instruction: str | None = None


EvaluationSet = RetrievalSet | StsSet | ClassificationSet


@dataclass
class SetResult:
    """The numbers of one model on one set.

    Attributes:
        name, kind: of the set; retrieval, sts or classification.
        main: the metric that a verdict compares: ndcg@10, spearman or accuracy.
        metrics: each metric's value, in [0, 1], or [-1, 1] for spearman.
        ids: of the queries, pairs or test texts.
        values: the main metric of each id; for STS the predicted similarity, because spearman is no mean.
        gold: for STS the score of each pair, else None.
    """

    name: str
    kind: str
    main: str
    metrics: dict[str, float]
    ids: list[str]
    values: list[float]
    gold: list[float] | None = None
    space: dict[str, Any] = field(default_factory=dict)  # health of the space, see space.py
