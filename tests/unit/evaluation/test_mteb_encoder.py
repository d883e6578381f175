import mteb
import numpy as np
import pytest
from helpers import INSTRUCTION, make_model_folder
from local_tasks import Classification, Reranking, Retrieval, Sts
from mteb._create_dataloaders import _retrieval_texts
from mteb.models import EncoderProtocol, ModelMeta, SearchProtocol
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer

from gritlm.evaluation.measure import measure
from gritlm.evaluation.mteb_encoder import MtebEncoder, passage_texts
from gritlm.evaluation.sets import RetrievalSet
from gritlm.evaluation.vector_cache import VectorCache
from gritlm.gritlm import GritLM

PROMPTS = {"query": INSTRUCTION, "document": "passage: "}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, qwen3):
    path = tmp_path_factory.mktemp("model")
    make_model_folder(qwen3, path, query_max_len=64, passage_max_len=64, prompts=PROMPTS)
    return path


class Watched(GritLM):
    """Notes what it is asked to encode."""

    def encode(self, texts, instruction="", max_length=None, **options):
        self.asked.append((list(texts), instruction, max_length))
        return super().encode(texts, instruction, max_length, **options)


@pytest.fixture(scope="module")
def model(folder):
    return Watched(folder)


def encoder_of(model, instruct=None, **options) -> MtebEncoder:
    model.asked = []
    meta = ModelMeta.create_empty({"name": "gritlm/test", "revision": "1"})
    own = lambda task, side, subset: INSTRUCTION if side == "query" else ""  # noqa: E731
    return MtebEncoder(model, meta, instruct or own, **options)


def scores(model, task) -> dict:
    done = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    return {
        key: value
        for key, value in done.task_results[0].scores["test"][0].items()
        if isinstance(value, float) and value == value
    }


class OnlyEncoder:
    """The encoder without its own search: mteb's wrapper then searches."""

    def __init__(self, inner):
        self.inner, self.mteb_model_meta = inner, inner.mteb_model_meta

    def encode(self, inputs, **options):
        return self.inner.encode(inputs, **options)

    def similarity(self, a, b):
        return self.inner.similarity(a, b)

    def similarity_pairwise(self, a, b):
        return self.inner.similarity_pairwise(a, b)


@pytest.mark.parametrize("task", [Retrieval, Reranking, Sts, Classification])
def test_scores_are_those_of_sentence_transformers_and_of_mtebs_search(folder, model, task):
    ours = encoder_of(model)
    assert isinstance(ours, EncoderProtocol) and isinstance(ours, SearchProtocol)
    found = scores(ours, task())
    # A task without sides has no prompt type, for which mteb's wrapper takes a prompt by the task's name.
    prompts = {"query": INSTRUCTION, "document": "passage: ", "STS": INSTRUCTION, "Classification": INSTRUCTION}
    theirs = SentenceTransformerEncoderWrapper(SentenceTransformer(str(folder), device="cpu"), model_prompts=prompts)
    assert found == pytest.approx(scores(theirs, task()), abs=1e-4)
    assert found == pytest.approx(scores(OnlyEncoder(ours), task()), abs=1e-6)
    other = scores(encoder_of(model, lambda task, side, subset: "harbour: "), task())
    assert other != pytest.approx(found, abs=1e-4), "control: another instruction is seen"


def test_ndcg_is_that_of_our_own_measure(model):
    task, ours = Retrieval(), encoder_of(model)
    task.load_data()
    data = task.dataset["default"]["test"]
    queries, corpus = data["queries"], data["corpus"]
    grades = [data["relevant_docs"][key] for key in queries["id"]]
    own = RetrievalSet("x", queries["text"][:], queries["id"][:], passage_texts(corpus), corpus["id"][:], grades)
    prompts = {"query": INSTRUCTION, "passage": "passage: "}
    result = measure(own, lambda texts, side, _: ours.vectors(texts, prompts[side], 64))
    found = scores(ours, task)
    assert result.metrics["ndcg@10"] == pytest.approx(found["ndcg_at_10"], abs=1e-4)
    assert result.metrics["map@100"] == pytest.approx(found["map_at_100"], abs=1e-4)


def test_texts_of_passages_are_mtebs(model):
    task = Retrieval()
    task.load_data()
    corpus = task.dataset["default"]["test"]["corpus"]
    assert passage_texts(corpus) == list(_retrieval_texts(corpus, PromptType.document))
    assert passage_texts(corpus.remove_columns("title")) == [text.strip() for text in corpus["text"]]


def test_equal_texts_are_encoded_once_in_a_call_and_with_a_cache_in_all(model, tmp_path):
    texts = ["river stone", "quiet engine", "river stone"] * 3
    plain = encoder_of(model)
    vectors = plain.vectors(texts, "", 64)
    assert [asked for asked, _, _ in model.asked] == [["river stone", "quiet engine"]]
    assert np.array_equal(vectors, model.encode(texts, "", 64))
    plain.vectors(texts, "", 64)
    assert len(model.asked) == 3, "control: without a cache a second call encodes again"
    cached = encoder_of(model, cache=VectorCache(tmp_path, 32, 10**6))
    for _ in range(2):
        assert np.array_equal(cached.vectors(texts, "", 64), vectors)
    again = encoder_of(model, cache=VectorCache(tmp_path, 32, 10**6))
    assert np.array_equal(again.vectors([*texts, "new"], "", 64)[:9], vectors)
    assert [asked for asked, _, _ in model.asked] == [["new"]]
    for instruction, limit in ((INSTRUCTION, 64), ("", 32)):  # these give other vectors
        again.vectors(["river stone"], instruction, limit)
    assert len(model.asked) == 3


def test_sides_instructions_and_limits(model):
    ours = encoder_of(model, query_max_len=20, passage_max_len=40)
    scores(ours, Retrieval())
    scores(ours, Sts())
    assert [(instruction, limit) for _, instruction, limit in model.asked] == [
        (INSTRUCTION, 20),
        ("passage: ", 40),  # the contract's
        (INSTRUCTION, 40),
        (INSTRUCTION, 40),
    ]
    given = encoder_of(model, lambda task, side, subset: f"{task.name} {side} {subset}: ")
    scores(given, Retrieval())
    assert [instruction for _, instruction, _ in model.asked] == [
        "LocalRetrieval query default: ",
        "LocalRetrieval passage default: ",
    ]


def test_a_vector_that_is_not_finite_fails_the_task(folder):
    broken = Watched(folder)
    next(broken.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        encoder_of(broken).vectors(["river"], "", 64)
