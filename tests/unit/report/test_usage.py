"""Contracts that are rare in training; tests/smoke/test_served_forms.py runs the code for the others."""

import numpy as np
import pytest
from helpers import INSTRUCTION, make_model_folder

from gritlm import GritLM
from gritlm.report.usage import PASSAGES, QUERIES, usage

QUOTES = 'Say "it\'s" `so`:\n\n```\n '
CONTRACTS = {
    "projection": {"projection": 12, "prompts": {"query": INSTRUCTION}},
    "pooled": {"pool_instruction": True, "prompts": {"query": INSTRUCTION, "document": "Passage: "}},
    "not normalised": {"normalized": False, "pooling_method": "cls", "prompts": {"query": INSTRUCTION}},
    "quotes": {"append_eos": True, "pooling_method": "lasttoken", "prompts": {"query": QUOTES}},
    "no prompts": {"attn": "cc", "query_max_len": 4, "passage_max_len": 3},
}


@pytest.mark.parametrize("contract", CONTRACTS)
def test_the_code_gives_gritlms_vectors(qwen3, tmp_path, monkeypatch, contract):
    make_model_folder(qwen3, tmp_path, **CONTRACTS[contract])
    model = GritLM(tmp_path)
    wanted = [model.encode_queries(QUERIES), model.encode_corpus(PASSAGES)]
    monkeypatch.chdir(tmp_path)
    for library, code in usage(tmp_path, ".").items():
        assert "```" not in code
        names: dict = {}
        exec(code, names)
        for side, vectors in zip(("queries", "passages"), wanted, strict=True):
            if library == "sentence-transformers" and contract == "no prompts" and side == "passages":
                continue  # it has one limit for both sides
            assert np.abs(np.asarray(names[side]) - vectors).max() < 2e-6 * max(1, np.abs(vectors).max()), library
        if library == "transformers" and "prompts" in CONTRACTS[contract]:
            other = np.asarray(names["encode"](QUERIES, "Other: ", 512))
            assert np.abs(other - wanted[0]).max() > 1e-3, "control: the prompt makes no difference"


def test_a_model_of_the_hub_is_loaded_by_its_name(qwen3, tmp_path):
    make_model_folder(qwen3, tmp_path, projection=12)
    code = usage(tmp_path, "me/mine")["transformers"]
    assert 'hf_hub_download("me/mine", "2_Dense/model.safetensors")' in code
    compile(code, "card", "exec")
    assert all('("me/mine"' in text and '"."' not in text for text in usage(tmp_path, "me/mine").values())
