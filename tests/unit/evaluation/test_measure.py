"""Sets measured from vectors: each kind, its ids and values, one process against two, vectors that are broken."""

from dataclasses import asdict

import numpy as np
import pytest
from processes import run_ranks
from scipy.stats import spearmanr

from gritlm.distributed import Ranks, all_ranks
from gritlm.errors import UserError
from gritlm.evaluation.measure import measure, score, texts_of
from gritlm.evaluation.search import BLOCK
from gritlm.evaluation.sets import ClassificationSet, EvaluationSet, RetrievalSet, StsSet


def unit(rng: np.random.Generator, rows: int, width: int = 16) -> np.ndarray:
    vectors = rng.standard_normal((rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def retrieval_set(name: str, queries: int) -> RetrievalSet:
    rng = np.random.default_rng(0)
    ids = [str(number) for number in range(400)]
    grades = [{str(key): 1 + int(key) % 3 for key in rng.integers(0, 420, 3)} for _ in range(queries)]
    names = [f"q{number}" for number in range(queries)]
    return RetrievalSet(name, names, names, [f"passage {key}" for key in ids], ids, grades)


def sets() -> list[EvaluationSet]:
    texts = [f"text {number}" for number in range(90)]
    labels = [str(number % 3) for number in range(90)]
    return [
        retrieval_set("retrieval", 2 * BLOCK + 100),
        retrieval_set("less than a block", 60),
        StsSet("sts", texts, texts[::-1], [number % 5 for number in range(90)]),
        ClassificationSet("labels", texts[:60], labels[:60], texts[60:], labels[60:], "Classify: "),
    ]


def vectors_of(data: EvaluationSet) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [unit(rng, len(texts)) for texts, _, _ in texts_of(data)]


def measured() -> list[dict]:
    return [asdict(score(data, vectors_of(data), all_ranks())) for data in sets()]


def flat(result: dict) -> dict:
    numbers = {name: value for name, value in result["space"].items() if isinstance(value, float)}
    return result["metrics"] | numbers | dict(zip(result["ids"], result["values"], strict=True))


def test_two_ranks_measure_what_one_does():
    """The second rank has one block of three of the first set, and none of the second."""
    alone = measured()
    for together in run_ranks(measured):
        for one, other in zip(alone, together, strict=True):
            assert flat(other) == pytest.approx(flat(one), abs=1e-12, rel=0)
            assert one["space"].keys() == other["space"].keys()
    data = sets()[0]
    assert len(score(data, vectors_of(data), Ranks(2, 1)).values) == 100, "control: one rank without the other"


def test_sts_is_the_rank_correlation_of_the_cosine():
    data = sets()[2]
    (vectors,) = vectors_of(data)
    asked: list[tuple] = []

    def encode(*request) -> np.ndarray:
        asked.append(request)
        return vectors * np.float32(3)  # the cosine needs no unit vectors

    result = measure(data, encode)
    cosine = (vectors[:90].astype(float) * vectors[90:]).sum(1)
    assert asked == [([*data.first, *data.second], "query", None)]
    assert result.metrics["spearman"] == pytest.approx(spearmanr(cosine, data.scores).statistic)
    np.testing.assert_allclose(result.values, cosine, atol=1e-6)
    assert (result.kind, result.main, result.gold) == ("sts", "spearman", data.scores)
    assert score(data, [np.ones_like(vectors)]).metrics == {"spearman": 0.0}, "a collapsed model, not NaN"


def test_a_probe_is_trained_on_the_first_part_and_tested_on_the_second():
    data = sets()[3]
    (vectors,) = vectors_of(data)
    told = vectors.copy()
    told[range(90), np.arange(90) % 3] += 3  # the label is in the vector
    result = measure(data, lambda texts, side, instructions: told)
    assert texts_of(data) == [([*data.train_texts, *data.test_texts], "query", ["Classify: "] * 90)]
    assert result.metrics == {"accuracy": 1.0} and result.values == [1.0] * 30
    told[60:] = told[60:][::-1]  # control: the last vectors belong to other texts
    assert score(data, [told]).metrics["accuracy"] == np.mean(
        [a == b for a, b in zip(data.test_labels, data.test_labels[::-1], strict=True)]
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_is_named(value):
    for data in sets():
        vectors = vectors_of(data)
        vectors[-1][7, 3] = value
        text, side = texts_of(data)[-1][0][7], texts_of(data)[-1][1]
        with pytest.raises(UserError, match=f"{data.name}: found a {side} vector that is not finite, of '{text}'"):
            score(data, vectors)
