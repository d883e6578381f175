"""What cannot be built says so before data and weights are read: optimizer, schedule, checkpointing, loggers."""

import dataclasses
import importlib.util
import os
import re
import sys

import pytest
from helpers import run, train_flags
from processes import Ranks
from transformers import TrainingArguments

from gritlm.errors import UserError
from gritlm.training.flag_checks import parse
from gritlm.training.rehearsal import _check_wandb, describe_schedule

WSD = "warmup_stable_decay"
ABSENT = {name for name in ("bitsandbytes", "mlflow", "optimi") if not importlib.util.find_spec(name)}
# name: (flags, what the one line says[, the package without which it is said])
BROKEN = {
    "schedule without its numbers": (
        {"lr_scheduler_type": WSD},
        f"--lr_scheduler_type {WSD} without --lr_.*decay_steps",
    ),
    "another one": (
        {"lr_scheduler_type": "cosine_with_min_lr"},
        "--lr_scheduler_type cosine_with_min_lr without.*min_lr",
    ),
    "plateau": (
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        "--lr_scheduler_type reduce_lr_on_plateau: found nothing to evaluate on",
    ),
    "no JSON": ({"lr_scheduler_kwargs": "notjson"}, "--lr_scheduler_kwargs: found 'notjson', wanted a JSON object"),
    "no object": ({"lr_scheduler_kwargs": "[1]"}, "--lr_scheduler_kwargs: found '\\[1\\]', wanted a JSON object"),
    "unknown option": ({"lr_scheduler_kwargs": '{"nope": 1}'}, "with --lr_scheduler_kwargs.*keyword argument 'nope'"),
    "option of a wrong type": ({"lr_scheduler_kwargs": '{"num_cycles": "x"}'}, "--lr_scheduler_kwargs.*to float: 'x'"),
    "no number": ({"lr_scheduler_kwargs": '{"num_cycles": NaN}'}, "--lr_scheduler_kwargs: .*NaN, which is not JSON"),
    "a root of less than nothing": (
        {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": '{"timescale": -5}'},
        "--lr_scheduler_type inverse_sqrt with --lr_scheduler_kwargs .*math domain error",
    ),
    "constant has no options": (
        {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": '{"power": 2}'},
        "--lr_scheduler_kwargs .* has no options",
    ),
    "constant has no warm-up": (
        {"lr_scheduler_type": "constant", "warmup_steps": 5},
        "--warmup_steps 5.0: .*constant_with_warmup",
    ),
    "optimizer not installed": ({"optim": "adamw_bnb_8bit"}, "--optim adamw_bnb_8bit: .*pip install", "bitsandbytes"),
    "in 4 bits": ({"optim": "adamw_torch_4bit"}, "--optim adamw_torch_4bit: not supported"),
    "grokking": ({"optim": "grokadamw"}, "--optim grokadamw: not supported"),
    "stable": ({"optim": "stable_adamw"}, "--optim stable_adamw: .*install", "optimi"),
    "steps within a backward": ({"optim": "lomo"}, "--optim lomo: not supported"),
    "low rank": ({"optim": "galore_adamw"}, "--optim galore_adamw: not supported"),
    "averaged weights": ({"optim": "schedule_free_adamw"}, "--optim schedule_free_adamw: not supported"),
    "arguments that are none": (
        {"optim_args": "nonsense"},
        "--optim_args nonsense: found 'nonsense', wanted name=value",
    ),
    "unread arguments": ({"optim": "sgd", "optim_args": "momentum=0.9,nope=1"}, "--optim sgd does not read nope"),
    "arguments of another": ({"optim_args": "momentum=0.9"}, "--optim adamw_torch_fused does not read momentum"),
    "decay goes elsewhere": ({"optim": "sgd", "optim_args": "weight_decay=0.3"}, "weight_decay; use --weight_decay"),
    "contradicting arguments": (
        {"optim": "sgd", "optim_args": "nesterov=true"},
        "--optim_args nesterov=true: Nesterov",
    ),
    "betas of another": ({"optim": "sgd", "adam_beta1": 0.8}, "--adam_beta1 0.8: --optim sgd does not read it"),
    "checkpointing": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"nope": 1}'},
        "--gradient_checkpointing_kwargs.*found 'nope', wanted some of .*use_reentrant",
    ),
    "its types": (
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": '{"use_reentrant": "maybe"}'},
        "--activation_checkpointing_kwargs.*use_reentrant: found 'maybe'",
    ),
    "its words": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"determinism_check": "x"}'},
        '--gradient_checkpointing_kwargs.*determinism_check: only read beside "use_reentrant": false',
    ),
    "options without it": (
        {"gradient_checkpointing_kwargs": '{"use_reentrant": true}'},
        "has no effect without --gradient_checkpointing",
    ),
    "compiler": ({"torch_compile_backend": "foo"}, "--torch_compile_backend foo: wanted one of .*inductor"),
    "its mode": ({"torch_compile_mode": "foo"}, "--torch_compile_mode foo: wanted one of .*max-autotune"),
    "unknown logger": ({"report_to": "wadnb"}, "--report_to wadnb: .*not supported"),
    "logger not installed": ({"report_to": "mlflow"}, "--report_to mlflow: .*pip install mlflow", "mlflow"),
    "one of several": ({"report_to": "tensorboard,wadnb"}, "--report_to tensorboard,wadnb: "),
    "login": ({"report_to": "wandb"}, "--report_to wandb: .*`wandb login`.*WANDB_MODE=offline"),
    "another's project": ({"project": "mine"}, "--project mine: only --report_to trackio.*WANDB_PROJECT"),
    "unread on a CPU": ({"ddp_timeout": 60}, "--ddp_timeout 60: has no effect with --use_cpu"),
    "two names": (
        {"gradient_checkpointing": True, "activation_checkpointing": False},
        "--gradient_checkpointing and --activation_checkpointing False",
    ),
    "tokens": (
        {"include_num_input_tokens_seen": "some"},
        "--include_num_input_tokens_seen: found 'some', wanted one of",
    ),
}


@pytest.fixture
def flags(tmp_path, monkeypatch) -> dict:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    (tmp_path / "data.jsonl").write_text("{}\n")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    return {"model_name_or_path": folder, "train_data": tmp_path / "data.jsonl", "output_dir": tmp_path / "out"}


def as_list(flags: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in (flags | {"use_cpu": True}).items()]


OF_NEWER_VERSIONS = {"activation_checkpointing", "activation_checkpointing_kwargs"} - {
    f.name for f in dataclasses.fields(TrainingArguments)
}


@pytest.mark.parametrize("name", [name for name in BROKEN if not OF_NEWER_VERSIONS & BROKEN[name][0].keys()])
def test_what_cannot_be_built_is_one_line(flags, name):
    change, message, *package = BROKEN[name]
    if not set(package) <= ABSENT:
        pytest.skip(f"{package[0]} is installed")
    with pytest.raises(UserError, match=message) as error:
        parse(as_list(flags | change))
    assert "\n" not in str(error.value)


FINE = (
    {},
    {"lr_scheduler_type": WSD, "lr_scheduler_kwargs": '{"num_decay_steps": 10}'},
    {"lr_scheduler_type": "constant"},
    {"optim": "sgd", "optim_args": "momentum=0.9"},
    {"optim": "sgd", "optim_args": "momentum=0"},
    {"optim": "adafactor"},
    {"optim": "adagrad", "optim_args": "eps=1e-6"},
    {"adam_beta1": 0.8},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"every_n_layers": 2}'},
    {"torch_compile_mode": "max-autotune"},
    {"report_to": "tensorboard"},
    {"report_to": "none"},
    {"include_num_input_tokens_seen": "non_padding"},
)


@pytest.mark.parametrize("change", FINE, ids=str)
def test_control_what_works_is_not_refused(flags, change):
    parse(as_list(flags | change))


def wandb_is_ready() -> None:
    """Prints whether wandb is ready to start. It reads its settings once in a process."""
    try:
        _check_wandb()
        print("ready")
    except ValueError as error:
        print(error)
    sys.stdout.flush()
    os._exit(0)


@pytest.mark.long
def test_wandb_with_a_login_or_without_a_network(tmp_path):
    (tmp_path / "netrc").write_text("machine wandb.example login user password x\n")
    common = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "absent"), "WANDB_BASE_URL": "https://wandb.example"}
    logins = [{"WANDB_MODE": "offline"}, {"WANDB_API_KEY": "0" * 40}, {"NETRC": str(tmp_path / "netrc")}, {}]
    said = [process.wait().stdout.strip() for process in [Ranks(wandb_is_ready, **common | login) for login in logins]]
    assert said[:3] == ["ready"] * 3
    assert "run `wandb login`" in said[3] and "WANDB_MODE=offline" in said[3]


@pytest.mark.parametrize(
    "change, steps, said",
    [
        ({"warmup_steps": 100}, 3, "--warmup_steps 100: the warm-up takes 100 steps, the run has 3; its .* 4e-07, not"),
        ({}, 1, "--warmup_steps 0.03: the warm-up takes 1 steps, the run has 1; its learning rate reaches 0, not"),
        ({"learning_rate": 0}, 100, "--learning_rate 0: no weight will change"),
        ({}, 100, ""),
        ({"warmup_steps": 0}, 1, ""),
        ({"lr_scheduler_type": "constant"}, 1, ""),
    ],
)
def test_a_rate_that_never_comes_near_its_peak(flags, change, steps, said):
    lines = describe_schedule(parse(as_list(flags | change)).training, steps)
    assert len(lines) == bool(said)
    assert all(re.search(said, line) for line in lines), lines


def test_a_plan_says_so_at_once(qwen3, data, tmp_path):
    flags = train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache")
    broken = run("-m", "gritlm", "plan", *flags, "--optim_args", "nonsense")
    assert (broken.returncode, broken.stderr.count("\n")) == (2, 1)
    long = run("-m", "gritlm", "plan", *flags, "--warmup_steps", "100")
    assert long.returncode == 0
    assert "warning: --warmup_steps 100: the warm-up takes 100 steps, the run has 6" in long.stdout
