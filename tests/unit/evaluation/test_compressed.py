"""Vectors that are cut and quantised: as sentence-transformers does, searched exactly, in one process and in two."""

import numpy as np
import pytest
import torch
from processes import run_ranks
from sentence_transformers import quantize_embeddings

from gritlm.distributed import all_ranks
from gritlm.evaluation import compressed
from gritlm.evaluation.compressed import BITS, FLOAT_QUERIES, Form, cut, quantise
from gritlm.evaluation.measure import measure
from gritlm.evaluation.search import nearest
from gritlm.evaluation.sets import RetrievalSet

FORMS = [Form(width, precision) for width in (24, 12) for precision in BITS]


def unit(rows: int, seed: int, width: int = 24) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def encode(texts, side, instructions) -> np.ndarray:
    corpus = unit(400, 1)
    noise = np.random.default_rng(2).standard_normal((50, 24)).astype(np.float32) * 0.25
    return corpus if side == "passage" else corpus[:50] + noise


def retrieval_set() -> RetrievalSet:
    ids = [f"{number:03}" for number in range(400)]
    names = [f"q{number}" for number in range(50)]
    return RetrievalSet("s", names, names, ids, ids, [{ids[399 - number]: 1} for number in range(50)])


def measured() -> list[dict]:
    return measure(retrieval_set(), encode, all_ranks(), FORMS).compressed


def test_the_codes_are_those_of_sentence_transformers(monkeypatch):
    monkeypatch.setattr(compressed, "TILE", 7)
    corpus, queries = unit(40, 0), unit(5, 9) * 3
    ranges = np.stack([corpus.min(axis=0), corpus.max(axis=0)])
    for vectors in (corpus, queries):
        wanted = quantize_embeddings(vectors.clip(*ranges), "int8", calibration_embeddings=corpus)
        np.testing.assert_array_equal(quantise(vectors, "int8", ranges), wanted)
    assert (queries < ranges[0]).any(), "control: no value lies beyond the ranges"
    bits = quantise(corpus, "binary", ranges)
    np.testing.assert_array_equal(np.packbits(bits > 0, axis=1), quantize_embeddings(corpus, "ubinary"))
    assert quantise(corpus, "float32", ranges) is corpus


def test_bits_are_ranked_by_their_hamming_distance():
    queries, corpus = unit(6, 3), unit(50, 4)
    ranges = np.zeros((2, 24), np.float32)
    scores, numbers = nearest(
        quantise(queries, "binary", ranges), quantise(corpus, "binary", ranges), 50, torch.device("cpu")
    )
    hamming = ((queries[:, None] > 0) != (corpus[None] > 0)).sum(-1)
    np.testing.assert_array_equal((24 - scores) / 2, np.take_along_axis(hamming, numbers, 1))
    np.testing.assert_array_equal(numbers, np.argsort(hamming, axis=1, kind="stable"))


def test_a_cut_unit_vector_is_one_again_and_others_keep_their_length():
    vectors = unit(9, 5)
    np.testing.assert_allclose(np.linalg.norm(cut(vectors, 6), axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(cut(3 * vectors, 6), 3 * vectors[:, :6])
    assert cut(vectors, 24) is not None and np.shares_memory(cut(vectors, 24), vectors)


def test_each_form_has_its_bytes_and_numbers_on_any_number_of_ranks():
    alone = measured()
    assert [form["bytes"] for form in alone] == [96, 24, 3, 48, 12, 2]
    found = {(form["width"], form["precision"]): form for form in alone}
    plain = measure(retrieval_set(), encode)
    assert found[24, "float32"]["metrics"] == found[24, "float32"][FLOAT_QUERIES] == plain.metrics
    assert plain.compressed == []
    scores = {key: form["metrics"]["ndcg@10"] for key, form in found.items()}
    assert scores[24, "binary"] < scores[24, "int8"] <= scores[24, "float32"], "control: the form has no effect"
    assert scores[12, "float32"] < scores[24, "float32"]
    assert found[24, "binary"][FLOAT_QUERIES]["ndcg@10"] > scores[24, "binary"]
    for together in run_ranks(measured):
        for one, other in zip(alone, together, strict=True):
            assert other["metrics"] == pytest.approx(one["metrics"], abs=1e-12, rel=0)
