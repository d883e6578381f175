"""Training goes on from an embedding model: at a learning rate of zero its vectors stay what they were."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import INSTRUCTION, WORDS, make_builder, make_embedder, make_model_folder, train_flags, write_jsonl
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from gritlm import GritLM
from gritlm.errors import UserError
from gritlm.models.chunks import ChunkConfig, make_chunks
from gritlm.models.text import Text
from gritlm.models.tiny import END
from gritlm.training.train import main

ONCE = {"learning_rate": 0, "max_steps": 1, "save_strategy": "no", "chunk_tokens": 1024}
PROBES = [*WORDS, " ".join(WORDS)]
PROMPT = "Instruct: Find the answer\nQuery:"


@pytest.fixture(scope="module")
def ours(qwen3, tmp_path_factory):
    """A model folder of this project; nothing in it is the paper's."""
    folder = tmp_path_factory.mktemp("ours")
    contract = {"pooling_method": "weightedmean", "append_eos": True, "query_max_len": 24}
    make_model_folder(qwen3, folder, attn="cc", projection=8, **contract)
    return folder


@pytest.fixture(scope="module")
def theirs(qwen3, tmp_path_factory):
    """A folder that sentence-transformers wrote: causal, last token, a linear layer without bias, a limit."""
    folder = tmp_path_factory.mktemp("theirs")
    modules = [Transformer(str(qwen3), processor_kwargs={"model_max_length": 24}), Pooling(32, "lasttoken")]
    modules += [Dense(32, 8, bias=False, activation_function=torch.nn.Identity()), Normalize()]
    SentenceTransformer(modules=modules, prompts={"query": "Q: "}, device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="module")
def qwen3_embedding(qwen3, tmp_path_factory):
    """Qwen3-Embedding's form: causal, last token, an end token after each text, a pooled prompt without white space."""
    base = shutil.copytree(qwen3, tmp_path_factory.mktemp("base") / "model")
    path = base / "tokenizer.json"
    end = {"id": END, "ids": [0], "tokens": [END]}
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": END, "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    around = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {END: end}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": around}))
    modules = [Transformer(str(base)), Pooling(32, "lasttoken"), Normalize()]
    folder = tmp_path_factory.mktemp("embedding")
    SentenceTransformer(modules=modules, prompts={"query": PROMPT, "document": ""}, device="cpu").save(str(folder))
    return folder


def go_on(base, data, out, **more) -> int:
    flags = train_flags(base, data, out, out.parent / "cache", **ONCE | more)
    open_lengths = [(a, b) for a, b in zip(flags[::2], flags[1::2], strict=True) if not a.endswith("_max_len")]
    return main([word for pair in open_lengths for word in pair])


@pytest.mark.parametrize("name", ["ours", "theirs"])
def test_the_vectors_stay_what_they_were(request, data, tmp_path, capfd, name):
    base = request.getfixturevalue(name)
    assert go_on(base, data, tmp_path / "out") == 0
    (line,) = [line for line in capfd.readouterr().out.splitlines() if " -> this run: " in line]
    assert "base: attn cc, pooling_method " in line and "projection 8" in line
    before = SentenceTransformer(str(base), device="cpu").encode(PROBES, prompt="")
    after = GritLM(tmp_path / "out").encode(PROBES)
    assert np.abs(before - after).max() < 1e-5
    flags = json.loads((tmp_path / "out" / "run.json").read_text())["flags"]
    assert (flags["attn"], flags["projection"], flags["query_max_len"]) == ("cc", 8, 24)


def test_control_another_pooling_or_projection_gives_other_vectors(ours, data, tmp_path, capfd):
    before = GritLM(ours).encode(PROBES)
    assert go_on(ours, data, tmp_path / "pooled", pooling_method="lasttoken") == 0
    assert np.abs(GritLM(tmp_path / "pooled").encode(PROBES) - before).max() > 1e-2
    assert go_on(ours, data, tmp_path / "dropped", projection=0) == 0
    assert GritLM(tmp_path / "dropped").encode(PROBES).shape[1] == 32
    assert "projection 8, " in (said := capfd.readouterr().out) and "projection None, " in said
    assert not (tmp_path / "dropped" / "2_Dense").exists()


def test_the_prompt_of_the_folder_is_the_one_that_was_trained(qwen3, data, tmp_path, capfd):
    """One row without an instruction does not take it away; too many do, in a warning, and a flag names one."""
    folder = shutil.copytree(data, tmp_path / "data")
    (folder / "plain.jsonl").unlink()
    rows = (folder / "hard.jsonl").read_text().splitlines()
    bare = [json.dumps(json.loads(row) | {"query": f"bare {n}"}) for n, row in enumerate(rows)]

    def prompt_after(name: str, without: int, **more) -> str:
        (folder / "hard.jsonl").write_text("\n".join([*bare[:without], *rows[without:]]))
        assert go_on(qwen3, folder, tmp_path / name, **more) == 0
        served = json.loads((tmp_path / name / "config_sentence_transformers.json").read_text())
        return served["prompts"]["query"]

    assert prompt_after("one", 1) == INSTRUCTION
    assert "the model gets no query prompt" not in capfd.readouterr().out
    assert prompt_after("many", 24) == ""
    warning = r"the model gets no query prompt: .* \(60\.0% none, 40\.0% 'Instruct: .*'\); --query_prompt names one"
    assert re.search(warning, capfd.readouterr().out)
    assert prompt_after("named", 24, query_prompt=INSTRUCTION) == INSTRUCTION


def test_a_second_stage_of_qwen3_embedding(qwen3_embedding, tmp_path, capfd):
    """The trainer's, GritLM's and sentence-transformers' vectors of 64 texts agree, and the prompt is kept."""
    write_jsonl(tmp_path / "rows.jsonl", rows=24, negatives=2, seed=3)
    rows = (tmp_path / "rows.jsonl").read_text().replace(json.dumps(INSTRUCTION), json.dumps(PROMPT))
    (tmp_path / "rows.jsonl").write_text(rows)
    more = {"learning_rate": 1e-2, "max_steps": 2, "save_steps": 2, "save_strategy": "steps"}
    assert go_on(qwen3_embedding, tmp_path / "rows.jsonl", tmp_path / "out", **more) == 0
    out, probes = tmp_path / "out", [*PROBES, *(" ".join(WORDS[i : i + 9]) for i in range(64 - len(PROBES)))]
    served, model = SentenceTransformer(str(out), device="cpu"), GritLM(out)
    assert len(probes) == 64 and served.prompts["query"] == PROMPT and model.contract.append_eos
    embedder = make_embedder(qwen3_embedding, attn="cc", pooling_method="lasttoken").eval()
    embedder.load_weights(out / "checkpoint-2")
    text = {"append_eos": True, "pool_instruction": True}
    builder = make_builder(qwen3_embedding, tmp_path / "rows.jsonl", tmp_path / "cache", **text)
    tokens = builder.text_tokenizer([Text(PROMPT, text) for text in probes], 512)
    chunks, row_of_text = make_chunks(tokens, ChunkConfig(512), 0)
    with torch.no_grad():
        trained = torch.cat([embedder(**chunk) for chunk in chunks])[row_of_text].numpy()
    for vectors in (model.encode_queries(probes), served.encode_query(probes)):
        assert (vectors * trained).sum(1).min() > 0.99999
    before = SentenceTransformer(str(qwen3_embedding), device="cpu").encode_query(probes)
    assert (before * trained).sum(1).min() < 0.999, "control: nothing was trained"
    assert (model.encode(probes) * trained).sum(1).min() < 0.999, "control: the prompt has no effect"
    assert "is in no row" not in capfd.readouterr().out


def test_a_prompt_of_the_base_that_the_rows_lack_is_named(qwen3_embedding, tmp_path, capfd):
    rows = [json.dumps({"query": f"q {n}", "pos": [f"p {n}"], "neg": []}) for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    assert go_on(qwen3_embedding, tmp_path / "rows.jsonl", tmp_path / "out") == 0
    said = capfd.readouterr().out
    assert f"base: its query prompt {PROMPT!r} is in no row, and the model gets none; gritlm prepare" in said


def test_two_dense_layers_are_refused_by_name(qwen3, data, tmp_path, capfd):
    """EmbeddingGemma's form."""
    modules = [Transformer(str(qwen3)), Pooling(32, "mean")]
    modules += [Dense(32, 64, bias=False), Dense(64, 32, bias=False), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "gemma"))
    with pytest.raises(UserError, match="the modules Transformer, Pooling, Dense, Dense, Normalize, wanted one linear"):
        go_on(tmp_path / "gemma", data, tmp_path / "out")
