"""The usage code of a card: how three libraries encode texts as the model was trained. A test runs each block."""

import json
from pathlib import Path

from gritlm.models.embedder import PROJECTION_FOLDER
from gritlm.models.text import TextContract
from gritlm.models.tokenizer import LOADER_OPTIONS

QUERIES = ["who wrote it"]
PASSAGES = ["She did.", "It rained."]

_POOLING = {
    "mean": ["vectors = (states * pooled[:, :, None]).sum(1) / pooled.sum(1, keepdim=True)"],
    "weightedmean": [
        "weights = pooled * torch.arange(1, pooled.shape[1] + 1)",
        "vectors = (states * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True)",
    ],
    "lasttoken": ['vectors = states[torch.arange(len(texts)), batch["attention_mask"].sum(1) - 1]'],
    "cls": ["vectors = states[torch.arange(len(texts)), pooled.argmax(1)]"],
}
_SHORT = """\
from {0} import {1}

model = {1}({folder})
queries = model.{2}({queries})
passages = model.{3}({passages})
print({4})"""
_TRANSFORMERS = """\
import torch
from transformers import AutoModel, AutoTokenizer
{imports}
tokenizer = AutoTokenizer.from_pretrained({folder}, {options})
model = AutoModel.from_pretrained({folder}).eval()
{dense}

def encode(texts, prompt, max_length):
    texts = [prompt + text for text in texts]
    batch = tokenizer(texts, max_length=max_length, truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state.float()
    pooled = batch["attention_mask"].clone()
    {steps}


queries = encode({queries}, {query_prompt}, {query_max_len})
passages = encode({passages}, {document_prompt}, {passage_max_len})
print(queries @ passages.T)"""


def usage(folder: Path, name: str) -> dict[str, str]:
    """Library -> Python code that encodes `QUERIES` and `PASSAGES` and prints their scores.

    Args:
        folder: the model folder.
        name: what loads the model: "." in its folder, or its name on the hub.
    """
    names = {"folder": literal(name), "queries": literal(QUERIES), "passages": literal(PASSAGES)}
    calls = ("encode_query", "encode_document", "model.similarity(queries, passages)")
    own_calls = ("encode_queries", "encode_corpus", "queries @ passages.T")
    return {
        "sentence-transformers": _SHORT.format("sentence_transformers", "SentenceTransformer", *calls, **names),
        "transformers": _with_transformers(folder, name, names),
        "gritlm": _SHORT.format("gritlm", "GritLM", *own_calls, **names),
    }


def literal(value: object) -> str:
    """A string, or a list of strings, as Python writes it; without the backtick that would end a code block."""
    return json.dumps(value, ensure_ascii=False).replace("`", "\\x60")


def _with_transformers(folder: Path, name: str, names: dict[str, str]) -> str:
    contract, imports, dense, steps = TextContract.load(folder), "", "", []
    if not contract.pool_instruction:
        less = " - 1" if contract.append_eos else ""
        steps += ["if prompt:  # its tokens are not pooled"]
        steps += [f"    pooled[:, : len(tokenizer(prompt).input_ids){less}] = 0"]
    steps += _POOLING[contract.pooling_method]
    if (folder / PROJECTION_FOLDER).is_dir():
        path = literal(f"{PROJECTION_FOLDER}/model.safetensors")
        imports = "from safetensors.torch import load_file\n"
        if name != ".":
            imports = "from huggingface_hub import hf_hub_download\n" + imports
            path = f"hf_hub_download({literal(name)}, {path})"
        dense = f"dense = load_file({path})\n"
        steps += ['vectors = torch.nn.functional.linear(vectors, dense["linear.weight"], dense["linear.bias"])']
    steps += ["return torch.nn.functional.normalize(vectors, dim=1)" if contract.normalized else "return vectors"]
    return _TRANSFORMERS.format(
        imports=imports,
        dense=dense,
        steps="\n    ".join(steps),
        options=", ".join(f"{key}={literal(value)}" for key, value in LOADER_OPTIONS.items()),
        query_prompt=literal(contract.prompts.get("query", "")),
        document_prompt=literal(contract.prompts.get("document", "")),
        query_max_len=contract.query_max_len,
        passage_max_len=contract.passage_max_len,
        **names,
    )
