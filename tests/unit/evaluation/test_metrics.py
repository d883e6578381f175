"""Retrieval metrics against pytrec_eval, and against values worked out by hand."""

import math

import numpy as np
import pytest
import pytrec_eval
import torch

from gritlm.evaluation.measure import RANKED, rank_values, score
from gritlm.evaluation.metrics import DEPTH, METRICS, query_metrics
from gritlm.evaluation.search import nearest
from gritlm.evaluation.sets import RetrievalSet, own_passages

TREC = {
    "ndcg@10": "ndcg_cut_10",
    "recall@1": "recall_1",
    "recall@10": "recall_10",
    "recall@100": "recall_100",
    "mrr@10": "recip_rank",
    "map@100": "map_cut_100",
}


def graded_set(rng: np.random.Generator, passages: int, queries: int = 12) -> RetrievalSet:
    """Grades from -1 to 3; judged passages that the corpus lacks; the last query has no relevant passage."""
    ids = [f"d{number}" for number in rng.permutation(passages + 5)]  # as strings, d9 comes after d10
    grades = [{key: int(rng.integers(-1, 4)) for key in rng.choice(ids, 6, replace=False)} for _ in range(queries)]
    grades = [grade | {ids[0]: 3} for grade in grades[:-1]] + [dict.fromkeys(grades[-1], 0)]
    ids = ids[:passages]
    texts = [f"passage {key}" for key in ids]
    names = [f"q{number}" for number in range(queries)]
    return RetrievalSet("graded", [f"query {name}" for name in names], names, texts, ids, grades)


def tied_vectors(rng: np.random.Generator, rows: int) -> np.ndarray:
    return rng.integers(-1, 2, (rows, 4)).astype(np.float32)  # products are small integers


def trec_values(data: RetrievalSet, scores_QN: np.ndarray, left_out: dict[int, int]) -> dict[str, list[float]]:
    qrels = dict(zip(data.query_ids, data.grades, strict=True))
    run = {
        name: {
            key: float(score) for n, (key, score) in enumerate(zip(data.corpus_ids, row, strict=True)) if n != skipped
        }
        for name, row, skipped in zip(data.query_ids, scores_QN, map(left_out.get, range(len(scores_QN))), strict=True)
    }
    measures = {"ndcg_cut.10", "recall.1,10,100", "recip_rank", "map_cut.100"}
    found = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    values = {ours: [found[name][trec] for name in data.query_ids] for ours, trec in TREC.items()}
    values["mrr@10"] = [value if value > 1 / 10.5 else 0.0 for value in values["mrr@10"]]  # trec_eval has no cut
    return values


@pytest.mark.parametrize("passages", [7, 60, 400])
def test_every_metric_is_that_of_trec_eval(passages):
    """Graded, with ties, judged passages missing, fewer passages than ranks, and a query without a relevant one."""
    wrong = {"ties": 0.0, "missing": 0.0, "gain": 0.0}
    for seed in range(8):
        rng = np.random.default_rng(seed)
        data = graded_set(rng, passages)
        queries, corpus = tied_vectors(rng, len(data.queries)), tied_vectors(rng, passages)
        wanted = trec_values(data, queries @ corpus.T, {})
        numbers = nearest(queries, corpus, RANKED, torch.device("cpu"))[1]
        found = rank_values(data, numbers)
        assert found.keys() == METRICS.keys() == wanted.keys()
        for name in METRICS:
            np.testing.assert_allclose(found[name], wanted[name], atol=1e-6, err_msg=name)
            assert found[name][-1] == 0, "no passage is relevant"
        assert found["recall@100"].any()
        result = score(data, [queries, corpus])
        assert result.values == found["ndcg@10"].tolist() and result.main == "ndcg@10"
        assert result.metrics == {name: pytest.approx(np.mean(wanted[name])) for name in METRICS}

        # controls: ties the other way, an ideal ranking of the corpus alone, exponential gain
        backwards = passages - 1 - nearest(queries, corpus[::-1].copy(), RANKED, torch.device("cpu"))[1]
        grades = [{key: grade for key, grade in grade.items() if key in data.corpus_ids} for grade in data.grades]
        names = data.query_ids
        present = RetrievalSet("", data.queries, names, data.corpus, data.corpus_ids, grades)
        gains = [{key: 2 ** max(grade, 0) - 1 for key, grade in grade.items()} for grade in data.grades]
        exponential = RetrievalSet("", data.queries, names, data.corpus, data.corpus_ids, gains)
        variants = (("ties", data, backwards), ("missing", present, numbers), ("gain", exponential, numbers))
        for name, other, ranking in variants:
            wrong[name] += abs(rank_values(other, ranking)["ndcg@10"] - wanted["ndcg@10"]).max()
    assert min(wrong.values()) > 0.01, wrong


def test_the_passage_that_is_the_query_is_left_out():
    """As in ArguAna and Quora: equal ids, the query's text in the passage's. Where it is judged relevant it counts."""
    texts = {"a": "to be  or not", "b": "is it so?", "c": "yes", "d": "another"}
    grades = [{"c": 1}, {"d": 1}, {"c": 2, "x": 1}]
    corpus = [f"Title {text.replace('  ', ' ')}" for text in texts.values()]
    data = RetrievalSet("argue", [texts["a"], texts["b"], texts["c"]], ["a", "b", "c"], corpus, [*texts], grades)
    assert data.corpus_ids == ["d", "c", "b", "a"], "in the order of trec_eval's ties"
    left_out = own_passages(data)
    assert left_out == {0: 3, 1: 2}, "c is judged"
    scores = np.float32([[0, 1, 2, 9], [1, 0, 9, 2], [0, 9, 1, 2]])
    found = rank_values(data, np.argsort(-scores, kind="stable"))
    for name, values in trec_values(data, scores, left_out).items():
        np.testing.assert_allclose(found[name], values, atol=1e-6, err_msg=name)
    assert (found["ndcg@10"] != trec_values(data, scores, {})["ndcg@10"]).any(), "control"
    other = RetrievalSet("ids by chance", ["x y", "z", "yes"], ["a", "b", "c"], data.corpus, data.corpus_ids, grades)
    assert own_passages(other) == {}, "most of the equal ids name different texts"


def test_the_query_itself_does_not_take_the_last_place():
    """The metrics look at 100 passages that are not the query."""
    ids = [f"{number:03}" for number in range(150)]
    data = RetrievalSet("", ["text 000"], ["000"], [f"text {key}" for key in ids], ids, [{"100": 1}])
    order = [data.corpus_ids.index(key) for key in ids]
    assert rank_values(data, np.array([order[:RANKED]]))["recall@100"] == 1
    assert rank_values(data, np.array([order[:DEPTH]]))["recall@100"] == 0, "control: one rank fewer"


def test_metrics_by_hand():
    ranked, ideal = np.array([0.0, 2, 0, 1, -1]), np.array([3.0, 2, 1])
    found = query_metrics(ranked, ideal)
    log = [1 / math.log2(place + 1) for place in range(1, 6)]
    assert found["ndcg@10"] == pytest.approx((2 * log[1] + log[3]) / (3 * log[0] + 2 * log[1] + log[2]))
    assert (found["recall@1"], found["recall@10"], found["mrr@10"]) == (0, pytest.approx(2 / 3), 1 / 2)
    assert found["map@100"] == pytest.approx((1 / 2 + 2 / 4) / 3)
