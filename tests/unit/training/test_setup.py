"""What the base says becomes the run's settings where no flag is given; the prompts come from the data."""

import json
from collections import Counter

import pytest
from helpers import INSTRUCTION, make_model_folder, train_flags

from gritlm.data.records import load_records
from gritlm.errors import UserError
from gritlm.models.backbone import load_config
from gritlm.models.base import BaseSettings
from gritlm.models.text import TextContract
from gritlm.training.arguments import ModelArguments, fixed_flags, papers_values
from gritlm.training.checkpoints import differing
from gritlm.training.flag_checks import check_base_settings, parse
from gritlm.training.provenance import resolved_flags
from gritlm.training.run_folder import run_settings_of
from gritlm.training.setup import build_text_tokenizer, main_instruction
from gritlm.training.start_report import contract_name, describe_base
from gritlm.training.train import build_embedder

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


# ---- --contract

TEXT = ("pooling_method", "pool_instruction", "append_eos")
CONTRACTS = {
    ("plain", None): ("mean", False, False),
    ("plain", "paper"): ("mean", False, False),
    ("plain", "portable"): ("mean", True, True),
    ("embedding", None): ("lasttoken", True, True),
    ("embedding", "paper"): ("mean", False, False),
    ("embedding", "portable"): ("lasttoken", True, True),  # a pooling that every server has
    ("weighted", None): ("weightedmean", False, False),
    ("weighted", "portable"): ("mean", True, True),
}


@pytest.fixture(scope="module")
def bases(qwen3, embedding_model, tmp_path_factory):
    weighted = tmp_path_factory.mktemp("weighted")
    make_model_folder(qwen3, weighted, pooling_method="weightedmean")
    return {"plain": qwen3, "embedding": embedding_model, "weighted": weighted}


def contract_of(run):
    return build_text_tokenizer(run, load_records(run.data.train_data, run.data.data_cache)).contract


@pytest.mark.parametrize(("base", "name"), CONTRACTS)
def test_the_contract_decides_where_no_flag_does(run_of, bases, data, base, name):
    run = run_of(bases[base], data, **({"contract": name} if name else {}))
    contract = contract_of(run)
    assert tuple(getattr(contract, field) for field in TEXT) == CONTRACTS[base, name]
    assert tuple(run.flags()[field] for field in TEXT) == CONTRACTS[base, name]
    assert contract.rstrip == (name != "portable")


def test_a_flag_beside_the_contract_that_fits_it(run_of, qwen3, data):
    run = run_of(qwen3, data, contract="portable", pooling_method="lasttoken", append_eos=True, query_max_len=24)
    assert run.flags()["pooling_method"] == "lasttoken" and contract_of(run).query_max_len == 24


def test_a_run_and_its_continuation_know_the_contract(run_of, qwen3, data, tmp_path):
    def settings(**more):
        run = run_of(qwen3, data, **more)
        return run_settings_of(run, load_records(data, run.data.data_cache), 1)

    before, after = settings(contract="portable"), settings()
    assert "contract" in differing(before, after) and "append_eos" in differing(before, after)
    assert differing(before, settings(contract="portable")) == ""
    by_hand = settings(pool_instruction=True, append_eos=True)
    assert differing(before, by_hand) == "contract was 'portable', now None", "white space differs"
    assert differing({k: v for k, v in after.items() if k != "contract"}, after) == "", (
        "a run before there was the flag"
    )
    model = make_model_folder(qwen3, tmp_path, pool_instruction=True, append_eos=True, rstrip=False)
    further = contract_of(run_of(tmp_path, data))
    assert model.contract.rstrip is further.rstrip is False and further.append_eos
    assert contract_of(run_of(tmp_path, data, contract="paper")).rstrip, "control"


@pytest.mark.parametrize("name", [None, "paper", "portable"])
@pytest.mark.parametrize("base", ["plain", "embedding", "weighted"])
def test_a_run_that_is_repeated_has_the_same_contract(run_of, bases, data, tmp_path, base, name):
    run = run_of(bases[base], data, **({"contract": name} if name else {}))
    resolved = resolved_flags(run)
    assert resolved["contract"] == name
    (tmp_path / "flags.json").write_text(json.dumps({key: value for key, value in resolved.items() if value != []}))
    again = parse([str(tmp_path / "flags.json")])
    assert contract_of(again) == contract_of(run)
    assert again.flags()["contract"] == name


def test_whose_contract_it_is(run_of, bases, data):
    assert contract_name(run_of(bases["plain"], data)) == "paper"
    assert contract_name(run_of(bases["plain"], data, contract="portable")) == "portable"
    assert contract_name(run_of(bases["plain"], data, append_eos=True)) == "of the flags"
    assert contract_name(run_of(bases["embedding"], data)) == "of the base (--contract replaces it)"


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


def test_a_new_projection_has_no_widths_of_the_base(run_of, qwen3, data, tmp_path):
    """A served folder would cut vectors to widths that were never trained, or that are above the model's."""
    base = tmp_path / "base"
    make_model_folder(qwen3, base)
    config = json.loads((base / "config.json").read_text())
    width = config["hidden_size"]
    (base / "config.json").write_text(json.dumps(config | {"matryoshka_dimensions": [width, width // 2]}))

    def widths(**flags):
        run = run_of(base, data, **flags)
        embedder = build_embedder(run, load_config(str(base), "bb"), TextContract())
        return getattr(embedder.config, "matryoshka_dimensions", None)

    assert widths(projection=8) is None and widths(reset_weight=True) is None
    assert widths(projection=8, matryoshka_dims=4) == [8, 4]
    assert widths() == [width, width // 2], "control"
