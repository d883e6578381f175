"""`GritLM.encode`: its options, those of the original GritLM class included, and its model's checks on load."""

import threading

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import INSTRUCTION, WORDS, make_model_folder
from transformers import AutoModel

from gritlm import GritLM, gritlm
from gritlm.errors import UserError
from gritlm.models.folder import load_model_folder
from gritlm.models.probe import AttentionError
from gritlm.models.text import CONTRACT_FILE, TextContract

TEXTS = [" ".join(WORDS[i : i + 1 + i % 7]) for i in range(20)]
PROMPTS = {"query": INSTRUCTION, "document": "Passage: "}


@pytest.fixture(scope="module")
def folder(qwen3, tmp_path_factory):
    limits = {"query_max_len": 24, "passage_max_len": 48}
    folder = tmp_path_factory.mktemp("served")
    make_model_folder(qwen3, folder, prompts=PROMPTS, **limits)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return GritLM(folder)


def close(a, b) -> bool:
    return np.allclose(a, b, atol=1e-5)


@pytest.fixture
def chunk_sizes(model, monkeypatch) -> list[int]:
    """The number of tokens in each chunk that is encoded."""
    sizes, forward = [], model.model.forward

    def counting(**chunk):
        sizes.append(len(chunk["input_ids"]))
        return forward(**chunk)

    monkeypatch.setattr(model.model, "forward", counting)
    return sizes


def test_one_text_many_and_none(model):
    one, many = model.encode("river stone"), model.encode(["river stone", "stone"])
    assert one.shape == (32,) and many.shape == (2, 32) and model.encode([]).shape == (0, 32)
    assert one.dtype == many.dtype == np.float32
    assert close(many[0], one) and not close(many[1], one)


def test_a_tensor_on_the_cpu_on_request(model):
    tensor = model.encode(["river"], convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
    assert np.array_equal(tensor.numpy(), model.encode(["river"]))


def test_chunk_tokens_and_batch_size_bound_a_chunk_and_change_no_vector(model, chunk_sizes):
    wanted = model.encode(TEXTS)
    assert len(chunk_sizes) == 1
    for options, limit in (
        ({"chunk_tokens": 20}, 20),
        ({"batch_size": 1}, 48),
        ({"batch_size": 2, "max_length": 16}, 32),
        ({"batch_size": 1, "chunk_tokens": 20}, 20),
    ):
        chunk_sizes.clear()
        assert close(model.encode(TEXTS, **options), wanted)
        assert limit // 2 < max(chunk_sizes) <= limit, options


def test_several_devices_share_the_texts(model, folder):
    several, calls = GritLM(folder, device=["cpu", "cpu"]), []
    for number, replica in enumerate(several._replicas):
        replica.register_forward_hook(lambda *_, number=number: calls.append((number, threading.get_ident())))
    vectors = several.encode(TEXTS, chunk_tokens=20)
    assert close(vectors, model.encode(TEXTS))
    assert len(set(calls)) == 2 and {number for number, _ in calls} == {0, 1}, "a thread for each device"
    assert threading.get_ident() not in {thread for _, thread in calls}


def test_max_length_includes_the_instruction(model):
    long = " ".join(WORDS)
    assert close(model.encode(long), model.encode(long, max_length=48)), "the contract's passage limit"
    assert not close(model.encode(long), model.encode(long, max_length=20))
    with pytest.raises(UserError, match="max_length 4 leaves no room"):
        model.encode(long, instruction=INSTRUCTION, max_length=4)


def test_the_instruction_is_read_and_pooled_only_on_request(model, qwen3, tmp_path):
    plain, instructed = model.encode(TEXTS), model.encode(TEXTS, instruction=INSTRUCTION)
    pooled = model.encode(TEXTS, instruction=INSTRUCTION, embed_instruction=True)
    assert close(pooled, model.encode([INSTRUCTION + text for text in TEXTS]))
    assert close(instructed, model.encode(TEXTS, instruction=INSTRUCTION, embed_instruction=False))
    assert not close(plain, instructed) and not close(instructed, pooled)
    with pytest.raises(UserError, match="'Query:' can share a token"):
        model.encode("river stone", instruction="Query:")

    make_model_folder(qwen3, tmp_path, passage_max_len=48, pool_instruction=True)
    pools = GritLM(tmp_path)
    assert close(pools.encode(TEXTS, instruction=INSTRUCTION), pooled), "the contract's choice"
    assert close(pools.encode(TEXTS, instruction=INSTRUCTION, embed_instruction=False), instructed)


def test_recast_changes_nothing(model):
    assert np.array_equal(model.encode(TEXTS, recast=True), model.encode(TEXTS))


def test_unknown_options_are_an_error(model):
    for encode in (model.encode, model.encode_queries, model.encode_corpus):
        with pytest.raises(TypeError, match="get_cache"):
            encode(["river"], get_cache=True)


def test_queries_and_passages_have_their_own_instruction_and_limit(model):
    long = [" ".join(WORDS), "river"]
    assert close(model.encode_queries(long), model.encode(long, instruction=INSTRUCTION, max_length=24))
    assert close(model.encode_corpus(long), model.encode(long, instruction="Passage: ", max_length=48))
    options = {"instruction": "Ask: ", "max_length": 12, "embed_instruction": True, "batch_size": 3, "recast": True}
    wanted = model.encode(long, **options)
    for encode in (model.encode_queries, model.encode_corpus):
        found = encode(long, convert_to_tensor=True, **options)
        assert isinstance(found, torch.Tensor) and close(found, wanted)
        assert not close(encode(long), wanted), "control: without the options"


def test_a_passage_may_have_a_title(model):
    passages = [{"title": "river", "text": "stone"}, {"text": "snow"}, "a quiet engine"]
    wanted = model.encode_corpus(["river stone", "snow", "a quiet engine"])
    assert close(model.encode_corpus(passages), wanted)
    assert close(model.encode_corpus(passages[0]), wanted[:1])
    assert close(model.encode_corpus("river stone"), wanted[0])


def test_the_forms_of_a_corpus_give_the_vectors_of_its_passages(model):
    wanted = model.encode_corpus(["river stone", "snow", "moss"])
    by_id = {"d1": {"title": "river", "text": "stone"}, "d2": {"text": "snow"}, "d3": {"title": "moss", "text": None}}
    columns = {"title": ["river", "", "moss"], "text": ["stone", "snow", None]}
    for corpus, keys in ((by_id, ["d1", "d2", "d3"]), (columns, ["title", "text"])):
        assert close(model.encode_corpus(corpus), wanted)
        found = model.encode_corpus(keys)
        assert len(found) != len(wanted) or not close(found, wanted), "control: the keys"
    assert not close(model.encode_corpus(["moss None"]), wanted[2:]), "control: None as a word"


def test_texts_in_a_series_an_array_or_a_generator(model):
    wanted = model.encode(["river", "snow"])
    for collect in (pd.Series, np.array, tuple, iter):
        for encode in (model.encode, model.encode_queries, model.encode_corpus):
            assert close(encode(collect(["river", "snow"]), instruction=""), wanted)
            assert not close(encode(collect(["snow", "river"]), instruction=""), wanted), "control: the other order"


def test_what_holds_no_texts_is_refused(model):
    frame = pd.DataFrame({"text": ["river", "stone", "snow"], "id": ["1", "2", "3"]})
    for encode in (model.encode, model.encode_queries, model.encode_corpus):
        with pytest.raises(UserError, match="found DataFrame, wanted a string or a list"):
            encode(frame)
        assert encode(frame["text"]).shape == (3, 32), "control: one column"
        with pytest.raises(UserError, match=r"\[2\]: found None, wanted a string"):
            encode(["river", "stone", None])
    queries = {"q1": "what purrs", "q2": "what barks"}
    for encode in (model.encode, model.encode_queries):
        with pytest.raises(UserError, match=r"found dict, wanted a string or a list \(of \{id: text\} its values"):
            encode(queries)
        assert encode(queries.values()).shape == (2, 32), "control: its values"


def test_a_large_corpus_is_tokenised_in_parts(model, monkeypatch):
    wanted = model.encode(TEXTS)
    monkeypatch.setattr(gritlm, "TEXTS_AT_ONCE", 7)
    assert close(model.encode(TEXTS), wanted)


def test_a_model_that_attends_to_padding_is_refused_on_load(folder, monkeypatch):
    def load(*args):
        embedder, text_tokenizer = load_model_folder(*args)
        forward = embedder.backbone.forward

        def without_mask(attention_mask=None, packing=None, **inputs):
            return forward(**inputs, packing=packing, attention_mask=attention_mask if packing else None)

        embedder.backbone.forward = without_mask
        return embedder, text_tokenizer

    monkeypatch.setattr(gritlm, "load_model_folder", load)
    with pytest.raises(AttentionError, match="padding changes a text's states"):
        GritLM(folder)


def test_rotary_frequencies_stay_float32_in_half_precision(qwen3):
    """As in every other loader. Rounded frequencies would turn distant tokens by the wrong angle."""
    ours = GritLM(qwen3, TextContract(), dtype=torch.bfloat16).model.backbone
    theirs = AutoModel.from_pretrained(qwen3, dtype=torch.bfloat16)
    for found, wanted in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert found.dtype == wanted.dtype == torch.bfloat16
    buffers = dict(theirs.named_buffers())
    assert buffers and all(torch.equal(buffers[name], value) for name, value in ours.named_buffers())
    assert {value.dtype for value in buffers.values()} == {torch.float32}


def test_a_bare_backbone_needs_a_contract(qwen3):
    with pytest.raises(UserError, match=f"found no {CONTRACT_FILE}"):
        GritLM(qwen3)
    assert GritLM(qwen3, TextContract()).encode(["river"]).shape == (1, 32)


def test_a_model_folder_takes_no_other_contract(folder):
    """Its weights were trained with the contract that it has."""
    with pytest.raises(UserError, match=f"found {CONTRACT_FILE} and the argument contract"):
        GritLM(folder, TextContract(pooling_method="lasttoken"))
