"""Evaluation sets: retrieval, sentence similarity (STS) and classification, as plain texts with their answers."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
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
        corpus, corpus_ids: the passages; a title stands before its text. Sorted by id, the largest first: among equal
            scores trec_eval ranks the larger id first, and `nearest` the passage that comes first.
        grades: for each query, passage id -> grade; above 0 is relevant. An id may be missing from the corpus.
        instructions: one for each query, or None: the model's own query prompt.
        notes: what the reader of a file left out or found odd, one sentence each, to be printed.
    """

    name: str
    queries: list[str]
    query_ids: list[str]
    corpus: list[str]
    corpus_ids: list[str]
    grades: list[dict[str, int]]
    instructions: list[str] | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        order = sorted(range(len(self.corpus)), key=self.corpus_ids.__getitem__, reverse=True)
        object.__setattr__(self, "corpus", [self.corpus[i] for i in order])
        object.__setattr__(self, "corpus_ids", [self.corpus_ids[i] for i in order])


def own_passages(data: RetrievalSet) -> dict[int, int]:
    """Query -> the passage that is the query itself. It is left out of the ranking, unless it is judged relevant.

    BEIR leaves out the passage with the query's id: in ArguAna and Quora the queries are passages of the corpus. In
    other sets an equal id means nothing. Here ids count as shared if most queries whose id a passage has are in its
    text.
    """
    wanted = {key: query for query, key in enumerate(data.query_ids)}
    same = {wanted[key]: number for number, key in enumerate(data.corpus_ids) if key in wanted}
    equal = [_words(data.queries[query]) in _words(data.corpus[number]) for query, number in same.items()]
    if 2 * sum(equal) <= len(equal):
        return {}
    return {query: number for query, number in same.items() if data.grades[query].get(data.query_ids[query], 0) <= 0}


def _words(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class StsSet:
    """Pairs of texts and how similar people or a teacher found them. Both sides are encoded as queries."""

    name: str
    first: list[str]
    second: list[str]
    scores: list[float]
    instruction: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ClassificationSet:
    """Texts and labels. A logistic regression on the vectors of the first part is tested on the second."""

    name: str
    train_texts: list[str]
    train_labels: list[str]
    test_texts: list[str]
    test_labels: list[str]
    instruction: str | None = None
    notes: list[str] = field(default_factory=list)


EvaluationSet = RetrievalSet | StsSet | ClassificationSet


def fingerprint(data: EvaluationSet) -> str:
    """A short hash of a set's name, texts and answers. It is the same on every machine."""
    found = hashlib.sha256()
    for part in fields(data):
        value = getattr(data, part.name)
        for item in (value if isinstance(value, list) else [value]) if part.name != "notes" else ():
            found.update(json.dumps(item, sort_keys=True).encode() + b"\n")
    return found.hexdigest()[:16]


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
    compressed: list[dict[str, Any]] = field(default_factory=list)  # the metrics of each form, see compressed.py
