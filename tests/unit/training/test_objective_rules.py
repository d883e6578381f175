"""Flags of the loss that contradict one another, or have no effect: of the run, and of single data sets."""

import dataclasses
import json

import pytest

from gritlm.errors import UserError
from gritlm.training.arguments import DataArguments, ObjectiveArguments
from gritlm.training.flag_checks import parse
from gritlm.training.objective_rules import DEFAULTS, NEEDS, check_objective

ON = {  # a value of each flag with which it is on, unlike its default where that is off
    **{name: 0.5 for name in DEFAULTS if name.endswith("_weight")},
    **{name: 0.0 for name in DEFAULTS if name.endswith("margin")},
    **{"debiased": True, "matryoshka_dims": [8], "in_batch_negatives": True, "negatives_cross_device": True},
    **{"train_group_size": 4, "teacher_vectors": "teacher"},
}
OFF = {"contrastive_weight": 0.0, "in_batch_negatives": False, "negatives_cross_device": False, "train_group_size": 1}
GIVEN = {
    **{"temperature": 0.5, "negatives_cross_device": False, "negatives_ring": True, "same_tower": True},
    **{"symmetric": True, "in_batch_negatives": False, "hardness_hard": 5.0, "hardness_in_batch": 9.0},
    **{"focal_gamma": 2.0, "debiased": True, "guide_margin": 0.0, "false_negative_margin": 0.1},
    **{"false_negative_relative_margin": 0.05, "tau_plus": 0.2, "max_positives": 4, "matryoshka_dims": [8]},
    **{"matryoshka_weights": [0.5], "cosent_temperature": 0.1, "teacher_temperature": 1.0, "margin_mse_scale": 20.0},
    **{"student_temperature": 1.0, "teacher_loss": "mse", "teacher_vectors": "teacher"},
}
CELLS = [(flag, needed) for flags, needed in NEEDS for flag in flags]


@pytest.fixture
def check(tmp_path):
    """`check(flags, {"a": {...}})`: the rules on data sets a and b, with the settings of single sets."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3"}')
    words = {"model_name_or_path": tmp_path / "model", "train_data": folder, "output_dir": tmp_path / "out"}
    run = parse([part for name, value in words.items() for part in (f"--{name}", str(value))] + ["--use_cpu", "True"])

    def checked(flags, settings=None, names=("a", "b")) -> None:
        (tmp_path / "n.json").write_text(json.dumps(settings or {}))
        groups = {"num_samples": str(tmp_path / "n.json")}, {}
        run.training.global_batch_size = flags.get("global_batch_size", 64)
        for name, value in flags.items():
            groups[name in ObjectiveArguments.__dataclass_fields__][name] = value
        groups[0].pop("global_batch_size", None)
        data, objective = dataclasses.replace(run.data, **groups[0]), ObjectiveArguments(**groups[1])
        check_objective(dataclasses.replace(run, data=data, objective=objective), names)

    return checked


def refusal(check, *args) -> str:
    with pytest.raises(UserError) as error:
        check(*args)
    return str(error.value)


def test_every_flag_that_depends_on_others_is_in_a_cell():
    free = {"contrastive_weight", "emb_q_only", "emb_p_only"} | {name for name in DEFAULTS if name.endswith("_weight")}
    assert {f.name for f in dataclasses.fields(ObjectiveArguments)} - free == GIVEN.keys() - {"max_positives"}
    assert {flag for flag, _ in CELLS} == GIVEN.keys() and "max_positives" in DataArguments.__dataclass_fields__


@pytest.mark.parametrize(("flag", "needed"), CELLS, ids=[f"{flag} needs {needed[0]}" for flag, needed in CELLS])
def test_a_flag_without_effect_is_refused(check, flag, needed):
    """And accepted with one of what it needs: the control."""
    spread = {"spread_out_weight": 0.5}  # so that something is trained
    off = spread | {name: OFF.get(name, DEFAULTS[name]) for name in needed}
    off |= {"teacher_vectors": "teacher"} if flag == "guide_margin" else {}
    message = refusal(check, off | {flag: GIVEN[flag]})
    assert message.startswith(f"--{flag} {GIVEN[flag]} with") and message.endswith(
        "has no effect; leave one of them out"
    )
    for name in needed:
        teacher = {"teacher_vectors": "teacher", "guide_margin": 0.0}  # both need the other
        more = teacher if {flag, name} & {"teacher_weight", "guide_margin", "teacher_vectors", "teacher_loss"} else {}
        check(spread | more | {name: ON[name], flag: GIVEN[flag]})


PAIRS = {"contrastive_weight": 0.0, "cosent_weight": 1.0}
TEACHER = {"teacher_vectors": "teacher"}
RIGHT = {
    "a teacher of one set": (TEACHER, {"a": {"teacher_weight": 1.0}}),
    "a guide of one set": (TEACHER, {"a": {"guide_margin": 0.1}}),
    "no InfoNCE, another term in each set": (
        {"contrastive_weight": 0.0},
        {name: {"cosent_weight": 1} for name in "ab"},
    ),
    "a temperature of one set's term": ({"cosent_temperature": 0.1}, {"a": PAIRS}),
    "a flag that one set cannot use": ({"hardness_hard": 5.0}, {"a": PAIRS}),
    "a wrong combination that no set has": (
        {"contrastive_weight": 0.0, "guide_margin": 0.1},
        {name: {"contrastive_weight": 1, "guide_margin": None} for name in "ab"},
    ),
    "a margin switched off": ({"false_negative_margin": 0.1}, {"a": {"false_negative_margin": None}}),
    "a set that is not used": ({}, {"a": {"rows": 0, "in_batch_negatives": False, "same_tower": True}}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_single_sets_may_say(check, name):
    check(*RIGHT[name])


WRONG = {
    "no such set": ({}, {"c": {"temperature": 0.1}}, "--num_samples: found data set 'c', wanted some of a, b"),
    "no such set, rows": ({}, {"c": 5}, "--num_samples: found data set 'c'"),
    "a teacher of no set": (TEACHER, {"a": {"temperature": 0.1}}, "--teacher_vectors teacher without --teacher_weight"),
    "no term in one set": (
        {"contrastive_weight": 0.0},
        {"a": {"cosent_weight": 1}},
        "n.json: b: --contrastive_weight 0",
    ),
    "no effect there": (
        {},
        {"a": PAIRS | {"focal_gamma": 2}},
        "n.json: a: --focal_gamma 2 with --contrastive_weight 0.0",
    ),
    "no effect anywhere": (
        {"focal_gamma": 2.0},
        dict.fromkeys("ab", PAIRS),
        "--focal_gamma 2.0 with --contrastive_weight",
    ),
    "out of range": ({}, {"a": {"temperature": 0}}, "n.json: a: --temperature: found 0, wanted a number above 0"),
    "two that contradict": (
        {"same_tower": True},
        {"a": {"in_batch_negatives": False}},
        "a: --in_batch_negatives False",
    ),
    "no vectors": ({}, {"a": {"guide_margin": 0.1}}, "a: --teacher_weight and --guide_margin: found no --teacher"),
    "one pair a batch": ({"global_batch_size": 1}, {"a": PAIRS}, "--global_batch_size 1: found --cosent_weight"),
    "null for a number": ({}, {"a": {"temperature": None}}, "a: temperature: found None, wanted a number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_settings_of_a_data_set_are_checked_like_flags(check, name):
    flags, settings, message = WRONG[name]
    assert message in refusal(check, flags, settings)
