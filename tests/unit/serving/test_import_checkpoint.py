"""`gritlm import`: an old checkpoint's weights give its vectors, and nothing in a pickle is run."""

import json
import os
import pickle
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModel, AutoTokenizer

from gritlm import GritLM
from gritlm.cli import run_verb
from gritlm.serving.import_checkpoint import main

PROMPT = "Find the answer: "
QUERIES, TEXTS = ["river", "stone engine"], ["quiet snow", "日本語", "def f(x):\n    return x"]


@pytest.fixture
def old(qwen3, tmp_path) -> Path:
    """What gritlm-re writes: the base's config and tokenizer, and a pickle of a module that holds the model."""
    folder = tmp_path / "old"
    shutil.copytree(qwen3, folder)
    (folder / "model.safetensors").unlink()
    (folder / "training_args.bin").write_bytes(pickle.dumps(Namespace(pooling_method="mean")))
    torch.save(state_of(qwen3), folder / "pytorch_model.bin")
    return folder


def state_of(model: Path) -> dict[str, torch.Tensor]:
    found = load_file(model / "model.safetensors")
    torch.manual_seed(1)
    state = {f"model.{name}": (w + 0.05 * torch.randn_like(w)).bfloat16() for name, w in found.items()}
    return state | {"sigreg.t": torch.linspace(0, 3, 17)}


def their_vectors(base: Path, state: dict[str, torch.Tensor], texts: list[str], prompt: str, method="mean"):
    """The original's encode, dense and padded: no causal mask, a projection of each token, the prompt not pooled.

    But for one token: it also counts the space at the prompt's end, which is a part of the next token.
    """
    config = AutoConfig.from_pretrained(base)
    config.is_causal = False
    model = AutoModel.from_config(config).eval()
    model.load_state_dict({n.removeprefix("model."): w.float() for n, w in state.items() if n.startswith("model.")})
    tokenizer = AutoTokenizer.from_pretrained(base)
    batch = tokenizer([prompt + text for text in texts], padding=True, padding_side="right", return_tensors="pt")
    mask = batch["attention_mask"].clone()
    mask[:, : len(tokenizer(prompt.rstrip()).input_ids) if prompt else 0] = 0
    with torch.no_grad():
        states = model(**batch).last_hidden_state
        if "projection.weight" in state:
            states = states @ state["projection.weight"].float().T + state["projection.bias"].float()
        if method == "weightedmean":
            mask = mask * mask.cumsum(1)
        vectors = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(vectors, dim=1).numpy()


def run(capsys, *words: object) -> tuple[int, str]:
    code = run_verb(main, [str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_the_vectors_are_those_of_the_old_model(old, qwen3, tmp_path, capsys):
    code, said = run(capsys, old, tmp_path / "out", "--query_prompt", PROMPT)
    assert code == 0 and "taken as trained with attn bb, mean pooling, normalised, at most (512, 512)" in said
    assert "gritlm-re left the token behind a prompt that ends in white space out" in said
    state = state_of(qwen3)
    queries = their_vectors(qwen3, state, QUERIES, PROMPT)
    passages = their_vectors(qwen3, state, TEXTS, "")
    model, served = GritLM(tmp_path / "out"), SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert np.abs(model.encode_queries(QUERIES) - queries).max() < 1e-5
    assert np.abs(model.encode_corpus(TEXTS) - passages).max() < 1e-5
    assert np.abs(served.encode_query(QUERIES).astype(float) - queries).max() < 1e-2, "bfloat16 there"
    causal = tmp_path / "causal"
    code, said = run(capsys, old, causal, "--attn", "cc")
    assert code == 0 and "gritlm-re left" not in said
    assert np.abs(GritLM(causal).encode_corpus(TEXTS) - passages).max() > 1e-3, "control"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all((weights[n.removeprefix("model.")] == w).all() for n, w in state.items() if n.startswith("model."))
    assert "imported from the checkpoint old of gritlm-re" in (tmp_path / "out" / "README.md").read_text()
    assert not list((tmp_path / "out").glob("*.bin"))


def test_shards_a_projection_and_another_pooling(old, qwen3, tmp_path, capsys):
    """Saved under FSDP: in a folder of its own, under wrappers' names, in shards. Control: mean pooling differs."""
    state = state_of(qwen3) | {"projection.weight": torch.randn(8, 32), "projection.bias": torch.randn(8)}
    (old / "pytorch_model.bin").unlink()
    (old / "full_state_dict").mkdir()
    wrapped = {name.replace("model.", "model._fsdp_wrapped_module.", 1): weight for name, weight in state.items()}
    names = [sorted(wrapped)[:5], sorted(wrapped)[5:]]
    shards = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    for shard, part in zip(shards, names, strict=True):
        torch.save({name: wrapped[name] for name in part}, old / "full_state_dict" / shard)
    index = {"weight_map": {name: shard for shard, part in zip(shards, names, strict=True) for name in part}}
    (old / "full_state_dict" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert run(capsys, old, tmp_path / "out", "--pooling_method", "weightedmean")[0] == 0
    found = GritLM(tmp_path / "out").encode_corpus(TEXTS)
    assert found.shape == (3, 8)
    assert np.abs(found - their_vectors(qwen3, state, TEXTS, "", "weightedmean")).max() < 1e-5
    assert np.abs(found - their_vectors(qwen3, state, TEXTS, "")).max() > 1e-3, "control"
    (old / "full_state_dict" / shards[1]).unlink()
    code, said = run(capsys, old, tmp_path / "other")
    assert code == 2 and f"found no {shards[1]} beside it, wanted every shard" in said


class Code:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(old, qwen3, tmp_path, capsys):
    """In each form that torch.load reads, beside whole weights or alone. Control: torch.load runs it."""
    mark, weights = tmp_path / "mark", state_of(qwen3)
    for new in (True, False):
        torch.save(weights | {"more": Code(mark)}, old / "pytorch_model.bin", _use_new_zipfile_serialization=new)
        code, said = run(capsys, old, tmp_path / "out")
        assert code == 2 and len(said.splitlines()) == 1
        assert "pytorch_model.bin: found posix.mkdir in it, wanted tensors alone; nothing in it was run" in said
        assert not mark.exists()
    for protocol in (0, 2, 5):
        (old / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Code(mark)}, protocol))
        code, said = run(capsys, old, tmp_path / "out")
        assert code == 2 and len(said.splitlines()) == 1 and not mark.exists()
    torch.save({"more": Code(mark)}, old / "pytorch_model.bin")
    torch.load(old / "pytorch_model.bin", weights_only=False)
    assert mark.exists(), "control"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mark", "old"]


def spoiled(change):
    def spoil(folder: Path) -> None:
        state = torch.load(folder / "pytorch_model.bin", weights_only=True)
        change(state)
        torch.save(state, folder / "pytorch_model.bin")

    return spoil


def drop(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:5000])


NORM = "model.norm.weight"
SPOILED = {
    "no config": (drop("config.json"), "found no config.json there"),
    "no tokenizer": (drop("tokenizer.json"), "found no tokenizer.json"),
    "no weights": (drop("pytorch_model.bin"), "found no pytorch_model.bin or model.safetensors, nor their shards"),
    "cut short": (cut, "found 5000 bytes that cannot be read"),
    "a pointer": (
        lambda f: (f / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "found a git-lfs pointer",
    ),
    "a weight is missing": (spoiled(lambda s: s.pop(NORM)), "'backbone.norm.weight' of shape none, wanted [32]"),
    "a weight too many": (
        spoiled(lambda s: s.update({"model.extra": torch.ones(2)})),
        "'backbone.extra' of shape [2] in torch.float32, wanted none",
    ),
    "another shape": (spoiled(lambda s: s.update({NORM: torch.ones(3)})), "of shape [3] in torch.float32, wanted [32]"),
    "integers": (spoiled(lambda s: s.update({NORM: torch.ones(32).int()})), "of shape [32] in torch.int32"),
    "not finite": (spoiled(lambda s: s.update({NORM: torch.full((32,), torch.nan)})), "that is not finite"),
    "numbers": (spoiled(lambda s: s.update(step=7)), "found something else than tensors by name"),
    "an adapter": (
        spoiled(lambda s: s.update({"model.base_model.model.layers.0.q.lora_A.weight": torch.ones(1)})),
        "lora_A.weight', wanted it merged",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_missing_or_wrong_is_one_line(old, tmp_path, capsys, name):
    spoil, wanted = SPOILED[name]
    spoil(old)
    code, said = run(capsys, old, tmp_path / "out")
    assert code == 2 and len(said.splitlines()) == 1 and wanted in said, said
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_flags_that_do_not_fit_are_one_line(old, tmp_path, capsys):
    for words, wanted in (
        (["--query_max_len", "0"], "found (0, 512), wanted numbers above 0"),
        (["--query_prompt", "Query:"], "'Query:' can share a token with the text behind it"),
        (["--query_prompt", "Query: ", "--query_max_len", "2"], "leaves no room behind"),
        (["--pooling_method", "lasttoken"], "invalid choice: 'lasttoken'"),
    ):
        code, said = run(capsys, old, tmp_path / "out", *words)
        assert code == 2 and len(said.splitlines()) == 1 and wanted in said
    (tmp_path / "out").mkdir()
    code, said = run(capsys, old, tmp_path / "out")
    assert code == 2 and "out exists; nothing is overwritten" in said


def test_safetensors_of_the_old_trainer(old, qwen3, tmp_path, capsys):
    """Where the Trainer saved safetensors, the keys have the same prefix."""
    (old / "pytorch_model.bin").unlink()
    save_file(state_of(qwen3), old / "model.safetensors")
    assert run(capsys, old, tmp_path / "out")[0] == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert (weights["norm.weight"] == state_of(qwen3)[NORM]).all()
