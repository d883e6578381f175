"""What the base says becomes the run's settings where no flag is given; the prompts come from the data."""

import json
from collections import Counter

import pytest
from helpers import INSTRUCTION, make_model_folder, train_flags

from gritlm.data.records import load_records
from gritlm.errors import UserError
from gritlm.models.base import BaseSettings
from gritlm.training.arguments import ModelArguments, fixed_flags, papers_values
from gritlm.training.checkpoints import differing
from gritlm.training.flag_checks import check_base_settings, parse
from gritlm.training.run_folder import run_settings_of
from gritlm.training.setup import build_text_tokenizer, describe_base, main_instruction

PAPER = {"attn": "bb", "pooling_method": "mean", "normalized": True, "projection": None, "pool_instruction": False}
PAPER |= {"append_eos": False, "query_max_len": 512, "passage_max_len": 512}
OTHERS = {"attn": "cc", "pooling_method": "lasttoken", "normalized": False, "projection": 8, "pool_instruction": True}
OTHERS |= {"append_eos": True, "query_max_len": 24, "passage_max_len": 48}


def write(path, instructions, passages=("", "")):
    """One row for each query instruction; the passages' instructions are those of positives and negatives."""
    of_positive, of_negative = passages
    with open(path, "w") as out:
        for number, instruction in enumerate(instructions):
            row = {"query": [instruction, f"river {number}"], "pos": [[of_positive, f"stone {number}"]]}
            out.write(json.dumps(row | {"neg": [[of_negative, f"snow {number}"]]}) + "\n")
    return path


@pytest.fixture
def run_of(tmp_path):
    """The flags of a run on a base: `run_of(base, data, pooling_method="cls")`. The lengths are not given."""

    def make(base, data, **more):
        flags = train_flags(base, data, tmp_path / "out", tmp_path / "cache", chunk_tokens=1024)
        pairs = [pair for pair in zip(flags[::2], flags[1::2], strict=True) if not pair[0].endswith("_max_len")]
        given = [(f"--{name}", str(value)) for name, value in more.items()]
        return parse([word for pair in (*pairs, *given) for word in pair])

    return make


@pytest.fixture(scope="module")
def embedding_model(qwen3, tmp_path_factory):
    """A folder of this project in which nothing is as in the paper."""
    folder = tmp_path_factory.mktemp("embedding_model")
    make_model_folder(qwen3, folder, prompts={"query": "Q: ", "nq": "N: "}, **OTHERS)
    return folder


def test_an_open_flag_is_the_bases_or_the_papers_and_a_given_one_wins(run_of, qwen3, embedding_model, data):
    assert papers_values() == PAPER
    plain = run_of(qwen3, data).flags()
    continued = run_of(embedding_model, data).flags()
    assert {name: plain[name] for name in PAPER} == PAPER
    assert {name: continued[name] for name in OTHERS} == OTHERS
    flags = run_of(embedding_model, data, **PAPER | {"projection": 0}).flags()
    assert {name: flags[name] for name in PAPER} == PAPER


def test_a_switch_needs_no_value(qwen3, data, tmp_path):
    flags = train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache")
    given = parse([*flags, "--append_eos", "--no_normalized"]).flags()
    assert (given["append_eos"], given["normalized"], given["pool_instruction"]) == (True, False, False)


def test_the_line_names_both_and_the_way_back_to_the_paper(run_of, qwen3, embedding_model, data):
    run = run_of(embedding_model, data, pooling_method="mean")
    contract = build_text_tokenizer(run, load_records(data, run.data.data_cache)).contract
    (line,) = describe_base(run, contract)
    base, _, rest = line.partition(" -> this run: ")
    now, _, paper = rest.partition("; the paper's recipe: ")
    assert base.startswith("base: attn cc, pooling_method lasttoken, normalized False, projection 8, ")
    assert base.endswith("prompts query 'Q: ', nq 'N: '")
    assert now.startswith("attn cc, pooling_method mean, normalized False, projection 8, ")
    assert now.endswith(f"prompts hard {INSTRUCTION!r}, plain {INSTRUCTION!r}, query {INSTRUCTION!r}")
    flags = "--attn bb --normalized True --projection 0 --query_max_len 512 --passage_max_len 512"
    assert paper == f"{flags} --pool_instruction False --append_eos False"
    plain = run_of(qwen3, data)
    assert describe_base(plain, contract) == [], "control: a plain base says nothing"


def test_an_old_runs_settings_compare_equal(run_of, qwen3, data):
    """run.json of 0.1.0 has every value explicitly; a run of today has them settled."""
    run = run_of(qwen3, data)
    settings = run_settings_of(run, load_records(data, run.data.data_cache), 1)
    old = settings | PAPER
    assert differing(old, settings) == ""
    assert differing(old | {"attn": "cc"}, settings) == "attn was 'cc', now 'bb'"
    assert "query_prompt" not in fixed_flags(), "the prompt of the folder may be named when a run resumes"


SETTINGS = BaseSettings(projection=8)
UNUSABLE = BaseSettings(unusable={"projection": "two of them", "pooling_method": "max"})
TAKEN_UP = [
    (SETTINGS, {}, ""),
    (SETTINGS, {"projection": 8}, ""),
    (SETTINGS, {"projection": 0}, ""),
    (SETTINGS, {"projection": 9, "reset_weight": True}, ""),
    (SETTINGS, {"projection": 9}, "found a projection of width 8, wanted --projection 9; .* --projection 0 drops it"),
    (UNUSABLE, {}, "found max pooling, wanted mean, .*; --pooling_method names another"),
    (UNUSABLE, {"pooling_method": "mean"}, "found two of them, wanted one linear layer .*; --projection 0 drops it"),
    (UNUSABLE, {"pooling_method": "mean", "projection": 0}, ""),
]


@pytest.mark.parametrize(("base", "given", "message"), TAKEN_UP)
def test_a_base_is_taken_up_or_a_flag_decides(base, given, message):
    model = ModelArguments("some/model", **given)
    if not message:
        return check_base_settings(model, base)
    with pytest.raises(UserError, match=message):
        check_base_settings(model, base)


# ---- prompts


def test_nine_texts_of_ten_decide():
    assert main_instruction(Counter({"a": 9, "b": 1})) == "a"
    assert main_instruction(Counter({"a": 89, "b": 11})) is None
    assert main_instruction(Counter({"": 10, "b": 1})) == ""


def prompts(run_of, base, path, **more) -> dict[str, str]:
    run = run_of(base, path, **more)
    return build_text_tokenizer(run, load_records(path, run.data.data_cache)).contract.prompts


def test_a_stray_row_does_not_take_the_prompts_away(run_of, qwen3, tmp_path):
    path = write(tmp_path / "d.jsonl", [INSTRUCTION] * 19 + [""], passages=("P: ", "P: "))
    with open(path, "a") as out:
        out.write(json.dumps({"query": [INSTRUCTION, "x"], "pos": ["y"], "neg": []}) + "\n")
    assert prompts(run_of, qwen3, path) == {"d": INSTRUCTION, "query": INSTRUCTION, "document": "P: "}
    write(path, [INSTRUCTION] * 17 + [""] * 3, passages=("P: ", ""))
    assert prompts(run_of, qwen3, path) == {"query": "", "document": ""}, "control: too many"


def test_a_flag_names_the_query_prompt(run_of, qwen3, tmp_path):
    path = write(tmp_path / "d.jsonl", ["A: "] * 10 + ["B: "] * 10)
    assert prompts(run_of, qwen3, path, query_prompt="B: ") == {"query": "B: ", "document": ""}
    write(path, ["A: "] * 20)
    assert prompts(run_of, qwen3, path, query_prompt="") == {"d": "A: ", "query": "", "document": ""}
    with pytest.raises(UserError, match="'B:' can share a token"):
        prompts(run_of, qwen3, path, query_prompt="B:")
