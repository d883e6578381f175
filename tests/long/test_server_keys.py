"""Each key that a server reads from a model folder is there, with the value that it has to have.

The servers themselves are run by scripts/serving_check.sh. vLLM 0.32, TEI 1.9.3 and llama.cpp's converter were read.
"""

import json
from pathlib import Path

import pytest
from helpers import INSTRUCTION, make_model_folder
from safetensors import safe_open
from tokenizers import Tokenizer

from gritlm.models.pooling import POOLING

pytestmark = pytest.mark.long

PORTABLE = {"pool_instruction": True, "append_eos": True, "rstrip": False}
LENGTHS = {"query_max_len": 24, "passage_max_len": 48, "prompts": {"query": INSTRUCTION, "document": "Passage: "}}
CLASSES = {"qwen2": "Qwen2Model", "qwen3": "Qwen3Model"}
MODULES = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")]


@pytest.fixture
def folder_of(tmp_path, request):
    def make(base: str, **options) -> Path:
        make_model_folder(request.getfixturevalue(base), tmp_path / "out", **LENGTHS | options)
        return tmp_path / "out"

    return make


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("attn", ["bb", "cc"])
@pytest.mark.parametrize("base", CLASSES)
def test_the_config(folder_of, base, attn):
    config = read(folder_of(base, attn=attn, **PORTABLE), "config.json")
    causal = attn == "cc"
    assert config["architectures"] == [CLASSES[base]], "vLLM and llama.cpp choose the class by it"
    assert config["model_type"] == base, "TEI"
    assert config["is_causal"] is causal, "vLLM, llama.cpp, TEI's Qwen2"
    assert config["use_bidirectional_attention"] is not causal, "TEI's Qwen3"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0, "TEI, transformers 4"
    assert (config["max_position_embeddings"], config["dtype"]) == (1024, "float32")
    assert not config.get("use_sliding_window"), "TEI refuses it"
    assert not config.get("auto_map")


@pytest.mark.parametrize("method", POOLING)
def test_pooling_projection_and_norm(folder_of, method):
    folder = folder_of("qwen3", pooling_method=method, projection=12, **PORTABLE)
    pooling = read(folder, "1_Pooling/config.json")
    switched_on = {key for key, value in pooling.items() if value is True} - {"include_prompt"}
    assert switched_on == {POOLING[method].sentence_transformers}
    assert pooling["include_prompt"] is True
    modules = [(module["path"], module["type"]) for module in read(folder, "modules.json")]
    assert modules == [(path, f"sentence_transformers.models.{kind}") for path, kind in MODULES]
    dense = read(folder, "2_Dense/config.json")
    assert (dense["in_features"], dense["out_features"], dense["bias"]) == (32, 12, True)
    assert dense["activation_function"] == "torch.nn.modules.linear.Identity", "the only such name that TEI knows"
    with safe_open(folder / "2_Dense/model.safetensors", "pt") as weights:
        assert set(weights.keys()) == {"linear.weight", "linear.bias"}


def test_control_a_paper_folder_differs(folder_of):
    folder = folder_of("qwen3")
    assert read(folder, "1_Pooling/config.json")["include_prompt"] is False
    assert [module["path"] for module in read(folder, "modules.json")] == ["", "1_Pooling", "3_Normalize"]
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("stone  ").ids[-1] != 0


@pytest.mark.parametrize("base", CLASSES)
def test_prompts_limit_and_tokenizer(folder_of, base):
    folder = folder_of(base, **PORTABLE)
    prompts = read(folder, "config_sentence_transformers.json")["prompts"]
    assert (prompts["query"], prompts["document"]) == (INSTRUCTION, "Passage: ")
    assert read(folder, "sentence_bert_config.json")["max_seq_length"] == 48
    config, tokenizer = read(folder, "tokenizer_config.json"), read(folder, "tokenizer.json")
    assert (config["model_max_length"], config["eos_token"], config["pad_token"]) == (48, *["<|endoftext|>"] * 2)
    template = tokenizer["post_processor"]["processors"][-1]
    assert [*map(list, template["single"])] == [["Sequence"], ["SpecialToken"]], "llama.cpp's add_eos_token"
    assert template["single"][-1]["SpecialToken"]["id"] == config["eos_token"]
    assert tokenizer["truncation"] is tokenizer["padding"] is None
    assert "Strip" not in json.dumps(tokenizer["normalizer"])
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(8)
    assert backend.encode("stone river " * 9).ids[-1] == 0, "the end token survives a cut"
