"""The table of servers: it has an answer for every pooling and contract, and a run's lines and card say it."""

from dataclasses import replace

import pytest

from gritlm.models.pooling import POOLING
from gritlm.models.text import TextContract
from gritlm.report.servers import (
    PORTABLE_POOLING,
    SERVERS,
    Served,
    describe_servers,
    differing_texts,
    servers_table,
    why_not,
)

PAPER = TextContract(prompts={"query": "Query: ", "document": ""})
PORTABLE = replace(PAPER, pool_instruction=True, append_eos=True, rstrip=False)
CONTRACTS = {"paper": PAPER, "portable": PORTABLE}
OURS = {"sentence-transformers", "transformers", "ONNX Runtime"}
ALL = {*OURS, "vLLM", "TEI", "llama.cpp"}
# (contract, pooling) -> the servers of a bidirectional model, as serving_check.sh has found them.
GIVEN = {
    ("paper", "mean"): OURS,
    ("paper", "weightedmean"): OURS,
    ("paper", "lasttoken"): ALL,
    ("paper", "cls"): OURS,
    ("portable", "mean"): ALL,
    ("portable", "weightedmean"): OURS,
    ("portable", "lasttoken"): ALL,
    ("portable", "cls"): ALL,
}


def given(model: Served) -> set[str]:
    return {name for name, server in SERVERS.items() if not why_not(server, model)}


def test_the_table_covers_every_pooling_and_contract():
    assert {(contract, pooling) for contract in CONTRACTS for pooling in POOLING} == GIVEN.keys()


@pytest.mark.parametrize(("contract", "pooling"), GIVEN)
def test_who_serves_a_contract(contract, pooling):
    model = Served(replace(CONTRACTS[contract], pooling_method=pooling), "qwen3", causal=False, projection=False)
    assert given(model) == GIVEN[contract, pooling]
    assert given(model._replace(causal=True)) == GIVEN[contract, pooling] | {"transformers 4"}
    assert given(model._replace(projection=True)) == GIVEN[contract, pooling] - {"llama.cpp"}
    verdicts = {name: verdict for name, verdict, *_ in servers_table(model)}
    assert {name for name, verdict in verdicts.items() if verdict.startswith("yes")} == GIVEN[contract, pooling]
    assert all(checked.startswith(("run ", "read: ")) and options for _, _, options, checked in servers_table(model)), (
        "each row says how it is known, and what to set"
    )


def test_without_an_instruction_nothing_is_pooled_that_should_not_be():
    model = Served(replace(PAPER, prompts={"query": "", "document": ""}), "qwen3", causal=False, projection=False)
    assert given(model) == ALL
    passages = replace(PAPER, prompts={"query": "", "document": "Passage: "})
    assert given(model._replace(contract=passages)) == OURS, "control"


def test_a_portable_pooling_is_one_that_every_server_has():
    assert PORTABLE_POOLING == ("mean", "lasttoken", "cls")


def test_texts_that_differ_nonetheless():
    def texts(name: str, family: str = "qwen3", **changed) -> str:
        return differing_texts(
            SERVERS[name], Served(replace(PORTABLE, **changed), family, causal=False, projection=False)
        )

    assert [name for name in ALL if texts(name)] == ["llama.cpp"]
    assert texts("llama.cpp") == "longer than the limit, with the name of a special token"
    assert texts("vLLM", query_max_len=64) == "queries of more than 64 tokens"
    assert texts("vLLM", passage_max_len=64) == "passages of more than 64 tokens"
    assert (
        texts("llama.cpp", rstrip=True)
        == "ending in white space, longer than the limit, with the name of a special token"
    )
    assert texts("TEI", rstrip=True, append_eos=False) == "empty"
    assert texts("vLLM", "qwen2", rstrip=True) == "ending in white space"
    assert texts("vLLM", "qwen3", rstrip=True) == ""


def test_the_lines_at_the_start_of_a_run():
    model = Served(PAPER, "qwen3", causal=False, projection=False)
    assert describe_servers(model, "paper") == [
        "servers, contract paper: the trainer's vectors from sentence-transformers, transformers, ONNX Runtime",
        "  not from vLLM, TEI, llama.cpp (the instruction is pooled); transformers 4 (causal attention); "
        "--contract portable adds vLLM, TEI, llama.cpp; see docs/serving.md",
    ]
    lines = describe_servers(Served(PORTABLE, "qwen3", causal=False, projection=True), "portable")
    assert lines[1] == (
        "  not from llama.cpp (the projection is left out); transformers 4 (causal attention); see docs/serving.md"
    )
    assert len(describe_servers(Served(PORTABLE, "qwen3", causal=True, projection=False), "portable")) == 1
