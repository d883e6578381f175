"""The trainer, GritLM, sentence-transformers and transformers give a text the same vector."""

import shutil

import numpy as np
import pytest
import torch
from helpers import INSTRUCTION, WORDS, make_builder, make_embedder, train_flags
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from gritlm import GritLM
from gritlm.models.chunks import ChunkConfig, make_chunks
from gritlm.models.text import Text
from gritlm.training.train import main

# One-word queries, other scripts, odd white space, code, longer than the limit: 64 in all.
PROBES = [
    *WORDS[:24],
    *(
        "w",
        "7",
        "(",
        ".",
        "é",
        "中文",
        "日本語 テキスト",
        "привет мир",
        "مرحبا",
        "🙂",
        "a\nb",
        "\tx",
        " lead",
        "trail ",
        "x  y",
        "()",
    ),
    *(" ".join(WORDS[i : i + 2 * i + 2]) for i in range(12)),
    *(" ".join(WORDS * n) for n in (1, 2, 5, 20)),
    *(
        "def f(x):\n    return x",
        "SELECT * FROM t;",
        "<|im_start|>user",
        "a <|endoftext|> b",
        "http://x.y/z?q=1",
        "50 % \u2028 off",
    ),
    *("A" * 300, "-" * 90),
]
# Name: what the model has (attn, projection), and its text contract.
MODELS = {
    "recipe": ({}, {}),
    "lasttoken": ({"attn": "cc"}, {"pooling_method": "lasttoken", "append_eos": True}),
    "weightedmean": ({"projection": 16}, {"pooling_method": "weightedmean"}),
    "cls": ({}, {"pooling_method": "cls", "normalized": False, "pool_instruction": True}),
}


@pytest.fixture(scope="module")
def trained(qwen3, data, tmp_path_factory):
    """The folder of a model by name, trained when a test first asks for it."""
    folders = {}

    def folder_of(name: str):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "out"
            model, contract = MODELS[name]
            flags = model | contract | {"max_steps": 2, "save_steps": 2, "query_max_len": 48}
            assert main(train_flags(qwen3, data, folders[name], tmp_path_factory.getbasetemp() / "cache", **flags)) == 0
        return folders[name]

    return folder_of


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def by_hand(folder, texts: list[str], instruction: str) -> np.ndarray:
    """Mean pooling without the instruction, as a user of transformers would write it."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(
        [instruction + text for text in texts], padding=True, truncation=True, max_length=48, return_tensors="pt"
    )
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch.attention_mask.clone()
    mask[:, : len(tokenizer(instruction).input_ids)] = 0
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean, dim=1).numpy()


def by_the_trainer(base_model, checkpoint, data, cache, model: dict, contract: dict) -> np.ndarray:
    """The trainer's own model and text path, with the weights of a checkpoint."""
    embedder = make_embedder(base_model, **model, **contract).eval()
    embedder.load_weights(checkpoint)
    text_tokenizer = make_builder(base_model, data, cache, **contract).text_tokenizer
    texts = text_tokenizer([Text(INSTRUCTION, text) for text in PROBES], 48)
    chunks, row_of_text = make_chunks(texts, ChunkConfig(512), 0)
    with torch.no_grad():
        return torch.cat([embedder(**chunk) for chunk in chunks])[row_of_text].numpy()


@pytest.mark.parametrize("name", MODELS)
def test_every_loader_gives_the_trainers_vectors(trained, qwen3, data, tmp_path, name):
    folder = trained(name)
    assert len(PROBES) == 64
    ours = GritLM(folder).encode(PROBES, instruction=INSTRUCTION)
    assert np.isfinite(ours).all()
    assert (np.linalg.norm(ours, axis=1) > 1e-3).all()
    served = SentenceTransformer(str(folder), device="cpu")
    assert served.prompts["query"] == served.prompts["plain"] == INSTRUCTION
    vectors = {
        "the trainer": by_the_trainer(qwen3, folder / "checkpoint-2", data, tmp_path, *MODELS[name]),
        "sentence-transformers": served.encode(PROBES, prompt_name="query"),
    }
    if name == "recipe":
        vectors["transformers"] = by_hand(folder, PROBES, INSTRUCTION)
    for loader, theirs in vectors.items():
        assert cosine(ours, theirs).min() >= 0.9999, (loader, PROBES[cosine(ours, theirs).argmin()])
        assert np.abs(np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1) - 1).max() < 1e-3
    assert cosine(ours, np.roll(ours, 1, axis=0)).min() < 0.99, "control: all texts have one vector"


def test_control_the_untrained_model_gives_other_vectors(trained, qwen3):
    model = GritLM(trained("recipe"))
    untrained = GritLM(qwen3, model.contract)
    assert cosine(model.encode(PROBES), untrained.encode(PROBES)).min() < 0.999


def test_queries_and_passages_have_their_own_prompt_in_every_loader(trained):
    folder = trained("recipe")
    model, served = GritLM(folder), SentenceTransformer(str(folder), device="cpu")
    queries, passages = model.encode_queries(PROBES), model.encode_corpus(PROBES)
    assert np.abs(served.encode_query(PROBES) - queries).max() < 1e-5
    assert np.abs(served.encode_document(PROBES) - passages).max() < 1e-5
    assert np.abs(queries - passages).max() > 1e-2, "control: the prompt has no effect"


def test_control_the_base_models_tokenizer_gives_other_vectors(trained, qwen3, tmp_path):
    """sentence-transformers then takes a one-word query for a part of the prompt and returns a zero vector."""
    folder = trained("recipe")
    stock = shutil.copytree(folder, tmp_path / "stock", ignore=shutil.ignore_patterns("checkpoint-*"))
    AutoTokenizer.from_pretrained(qwen3).save_pretrained(stock)
    theirs = SentenceTransformer(str(stock), device="cpu").encode(["river"], prompt_name="query")
    ours = GritLM(folder).encode(["river"], instruction=INSTRUCTION)
    assert abs((theirs * ours).sum()) < 0.9


@pytest.mark.parametrize("name", ["recipe", "lasttoken"])
def test_an_empty_text_has_a_vector(trained, name):
    """With an end token sentence-transformers gives the same one. Without one it has nothing to pool."""
    model, empty = GritLM(trained(name)), ["", " \n", "river"]
    for instruction in ("", INSTRUCTION):
        vectors = model.encode(empty, instruction=instruction)
        assert np.isfinite(vectors).all()
        assert (np.linalg.norm(vectors, axis=1) > 1e-3).all()
        if model.contract.append_eos:
            theirs = SentenceTransformer(str(trained(name)), device="cpu").encode(empty, prompt=instruction)
            assert cosine(vectors, theirs).min() > 0.9999


def test_a_checkpoint_is_a_model_folder(trained):
    folder = trained("recipe")
    vectors = [GritLM(place).encode(PROBES[:8]) for place in (folder, folder / "checkpoint-2")]
    assert np.array_equal(*vectors)
