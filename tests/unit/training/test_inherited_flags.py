"""Hugging Face's flags, each tried: a used one has its effect, a refused one is one line, any other changes nothing.

The runs are made once, several flags each, in one process; `ranks` is made by two.
"""

import dataclasses
import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import PartialState
from helpers import ROOT, train_flags, write_jsonl
from processes import Ranks
from safetensors.torch import load_file
from test_arguments import PINNED
from transformers import TrainerCallback, TrainingArguments

from gritlm.errors import UserError
from gritlm.training import train, trainer
from gritlm.training.flag_checks import parse
from gritlm.training.inherited_flags import FIXED, FREE, INHERITED, NO_EFFECT, REFUSED

HUGGING_FACES = {f.name: f for f in dataclasses.fields(TrainingArguments)}
ONLY_THE_PINNED = pytest.mark.skipif(transformers.__version__ != PINNED, reason="another transformers has other flags")


# ---- the table


@ONLY_THE_PINNED
def test_every_flag_has_a_row():
    assert HUGGING_FACES.keys() == INHERITED
    assert len(INHERITED) == len(FIXED) + len(FREE) + len(NO_EFFECT) + len(REFUSED), "none has two"
    assert all((NO_EFFECT | REFUSED).values()), "each has its reason"


@ONLY_THE_PINNED
def test_every_used_flag_is_tried():
    assert EFFECTS.keys() | ELSEWHERE.keys() == {*FIXED, *FREE}
    assert NOTHING.keys() == NO_EFFECT.keys()


# ---- refused


OTHER = {
    "accelerator_config": '{"split_batches": true}',
    "parallelism_config": "{}",
    "liger_kernel_config": "{}",
    "train_sampling_strategy": "group_by_length",
    "hub_strategy": "end",
    "debug": "underflow_overflow",
    "ddp_find_unused_parameters": True,
    "ddp_broadcast_buffers": True,
    "log_on_each_node": True,
    "logging_nan_inf_filter": True,
    "remove_unused_columns": True,
    "tf32": True,
}


def other_value(name: str) -> object:
    f = HUGGING_FACES[name]
    if name in OTHER:
        return OTHER[name]
    if isinstance(f.default, bool):
        return not f.default
    return f.default + 1 if isinstance(f.default, int | float) else 1


@pytest.fixture
def minimal(tmp_path) -> list[str]:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "data.jsonl").write_text("{}\n")
    paths = {"model_name_or_path": tmp_path, "train_data": tmp_path / "data.jsonl", "output_dir": tmp_path / "out"}
    return [f"--{name}={value}" for name, value in paths.items()]


@pytest.mark.parametrize("name", [name for name in REFUSED if name in HUGGING_FACES])
def test_a_refused_flag_is_one_line(minimal, name):
    with pytest.raises(UserError) as error:
        parse([*minimal, f"--{name}={other_value(name)}"])
    assert str(error.value) == f"--{name}: not supported, {REFUSED[name]}"


# ---- the runs


COMMON = {"max_steps": 4, "save_steps": 3, "learning_rate": 1e-3}
NOTHING = {
    "per_device_train_batch_size": 8,
    "average_tokens_across_devices": False,
    "do_train": True,
    "local_rank": 0,
    "use_cache": True,
    "dataloader_persistent_workers": True,
}
MIN_LR = '{"min_lr_rate": 0.5}'
RUNS: dict[str, dict[str, object]] = {
    "base": {},
    "nothing": NOTHING,
    "adam": {
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": MIN_LR,
        "warmup_steps": 2,
        "adam_beta1": 0.8,
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-5,
        "weight_decay": 0.3,
        "seed": 7,
        "full_determinism": True,
        "include_num_input_tokens_seen": "non_padding",
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": '{"use_reentrant": true}',
        "torch_compile": True,
        "torch_compile_backend": "eager",
        "torch_compile_mode": "max-autotune",
        "logging_steps": 2,
        "log_level": "info",
        "report_to": "tensorboard",
        "save_steps": 1,
        "save_total_limit": 1,
        "skip_memory_metrics": False,
    },
    "sgd": {
        "optim": "sgd",
        "optim_args": "momentum=0.5",
        "max_grad_norm": 1e-3,
        "weight_decay": 0,
        "bf16": True,
        "include_num_input_tokens_seen": "non_padding",
    },
    "epochs": {
        "max_steps": -1,
        "num_train_epochs": 1.5,
        "logging_strategy": "epoch",
        "logging_first_step": True,
        "save_strategy": "epoch",
        "save_total_limit": 9,
        "disable_tqdm": False,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": '{"every_n_layers": 2}',
        "use_cpu": False,
    },
    "evaluated": {"eval_held_out": 4, "eval_steps": 1, "eval_delay": 2, "eval_on_start": False},
    "by epoch": {"eval_held_out": 4, "eval_strategy": "epoch"},  # of 2 steps
    "again": {},  # in the folder of a run that was stopped after 2 steps of 6, every third saved and logged
}
for flags in RUNS.values():  # an older transformers lacks some
    for name in [name for name in flags if name in INHERITED and name not in HUGGING_FACES]:
        del flags[name]
STOPPED = {"max_steps": 6, "save_steps": 3, "logging_steps": 3, "include_num_input_tokens_seen": "non_padding"}
AGAIN = STOPPED | {"save_steps": 1, "logging_steps": 0.1, "save_total_limit": 9, "gradient_checkpointing": True}


class Watched(train.EmbeddingTrainer):
    """Notes what Hugging Face made of the flags."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        Watched.last = self
        self.add_callback(Stop())

    def train(self, **kwargs):
        super().train(**kwargs)
        layers = self.embedder.backbone.layers
        options = {name: value for name, value in self.optimizer.param_groups[0].items() if name != "params"}
        self.seen = {
            "optimizer": type(self.optimizer.optimizer).__name__,
            "options": {name: value for name, value in options.items() if isinstance(value, int | float | tuple)},
            "verbosity": transformers.utils.logging.get_verbosity(),
            "determinism": torch.are_deterministic_algorithms_enabled(),
            "precision": self.accelerator.mixed_precision,
            "checkpointed": [layer.gradient_checkpointing for layer in layers],
            "keywords": [getattr(layer, "_gradient_checkpointing_func", None) for layer in layers],
            "bar": any("ProgressBar" in type(callback).__name__ for callback in self.callback_handler.callbacks),
            "compiled": Watched.compiled,
            "pins": self.args.dataloader_pin_memory,
            "bucket": getattr(self.model_wrapped, "bucket_bytes", None),
        }
        self.seen["keywords"] = [getattr(function, "keywords", None) for function in self.seen["keywords"]]


class Stop(TrainerCallback):
    """A signal to this process after a step, as from a user."""

    after = 0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == Stop.after:
            os.kill(os.getpid(), signal.SIGUSR1)


def compile_layers(embedder, device, bf16, **options) -> str:
    """Compiles nothing, and notes the options: what the compiler does with them is tested in smoke/test_train.py."""
    Watched.compiled = options
    return "not compiled here"


def make_runs(model: Path, data: Path, folder: Path, runs: dict[str, dict]) -> None:
    """Make the runs in this process. What was seen goes to NAME.json, or NAME.1.json on the second rank."""
    train.EmbeddingTrainer, trainer.compile_layers, trainer.is_a_terminal = Watched, compile_layers, lambda: True
    rank = os.environ.get("RANK", "0")
    for name, more in runs.items():
        out, cache = folder / ("stopped" if name == "again" else name), folder / "cache"
        Watched.compiled, Stop.after = None, 0
        transformers.utils.logging.set_verbosity_warning()
        torch.use_deterministic_algorithms(False)
        flags = {**COMMON, **more}
        if name == "again":
            Stop.after = 1  # it is noticed in the next step
            train.main(train_flags(model, data, out, cache, **(COMMON | STOPPED)))
            flags, Stop.after = COMMON | AGAIN, 0
        train.main(train_flags(model, data, out, cache, **flags))
        (folder / f"{name}{f'.{rank}' if rank != '0' else ''}.json").write_text(json.dumps(Watched.last.seen))
    os._exit(0)  # a test of flags, not of the interpreter's shutdown


def outcome(folder: Path, name: str, rank: int = 0) -> SimpleNamespace:
    """What a run left behind."""
    out = folder / ("stopped" if name == "again" else name)
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    seen = json.loads((folder / f"{name}{f'.{rank}' if rank else ''}.json").read_text())
    return SimpleNamespace(
        **seen,
        out=out,
        weights=load_file(out / "model.safetensors"),
        log=[entry for entry in entries if "loss" in entry],
        evaluated=[entry["step"] for entry in entries if "eval_mean" in entry],
        summary=entries[-1],
        checkpoints=sorted(path.name for path in out.glob("checkpoint-*")),
        flags=json.loads((out / "run.json").read_text())["resolved"],
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_jsonl(folder / "rows.jsonl", rows=24, negatives=2, seed=1)  # 3 steps an epoch
    return folder


@pytest.fixture(scope="module")
def runs(qwen3, rows, tmp_path_factory) -> dict[str, SimpleNamespace]:
    folder = tmp_path_factory.mktemp("runs")
    done = Ranks(make_runs, qwen3, rows, folder, RUNS, TENSORBOARD_LOGGING_DIR=str(folder / "tensorboard")).wait()
    assert done.returncode == 0, done.stderr[-5000:]
    return {name: outcome(folder, name) for name in RUNS}


def same_weights(a: SimpleNamespace, b: SimpleNamespace) -> bool:
    return all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


def rates(run: SimpleNamespace) -> list[float]:
    return [entry["learning_rate"] for entry in run.log]


def distance(a: SimpleNamespace, b: dict) -> float:
    return math.sqrt(sum((a.weights[name] - b[name]).pow(2).sum().item() for name in a.weights))


def steps_logged(run: SimpleNamespace) -> list[int]:
    return [entry["step"] for entry in run.log]


# flag: (the run that has it, its effect there). No other run may show it that has not the flag: the control.
EFFECTS = {
    "output_dir": ("adam", lambda r: r.out.name == "adam"),
    "learning_rate": ("adam", lambda r: r.options["initial_lr"] == 2e-3),
    "warmup_steps": ("adam", lambda r: rates(r)[0] == 1e-3 and len(r.log) == 2),  # half of the rate at step 2
    "lr_scheduler_type": ("adam", lambda r: math.isclose(rates(r)[-1], 0.75 * r.options["initial_lr"])),
    "lr_scheduler_kwargs": ("adam", lambda r: math.isclose(rates(r)[-1], 0.75 * r.options["initial_lr"])),
    "adam_beta1": ("adam", lambda r: r.options.get("betas", [0])[0] == 0.8),
    "adam_beta2": ("adam", lambda r: r.options.get("betas", [0, 0])[1] == 0.9),
    "adam_epsilon": ("adam", lambda r: r.options.get("eps") == 1e-5),
    "weight_decay": ("adam", lambda r: r.options["weight_decay"] == 0.3),
    "seed": ("adam", lambda r: r.flags["seed"] == 7),
    "full_determinism": ("adam", lambda r: r.determinism),
    "include_num_input_tokens_seen": ("adam", lambda r: r.summary.get("num_input_tokens_seen", 0) > 100),
    "activation_checkpointing": ("adam", lambda r: r.checkpointed == [True, True]),
    "activation_checkpointing_kwargs": ("adam", lambda r: r.keywords == [{"use_reentrant": True}] * 2),
    "torch_compile": ("adam", lambda r: r.compiled is not None),
    "torch_compile_backend": ("adam", lambda r: (r.compiled or {}).get("backend") == "eager"),
    "torch_compile_mode": ("adam", lambda r: (r.compiled or {}).get("mode") == "max-autotune"),
    "logging_steps": ("adam", lambda r: steps_logged(r) == [2, 4]),
    "log_level": ("adam", lambda r: r.verbosity == 20),
    "report_to": (
        "adam",
        lambda r: bool(list((r.out.parent / "tensorboard").glob("events*"))) and r.flags["report_to"] != "none",
    ),
    "save_steps": ("adam", lambda r: r.checkpoints == ["checkpoint-4"]),
    "save_total_limit": ("adam", lambda r: r.checkpoints == ["checkpoint-4"]),
    "eval_strategy": ("by epoch", lambda r: r.evaluated == [0, 2, 4]),
    "eval_steps": ("evaluated", lambda r: 3 in r.evaluated),
    "eval_delay": ("evaluated", lambda r: r.evaluated[:1] == [2]),
    "eval_on_start": ("evaluated", lambda r: bool(r.evaluated) and 0 not in r.evaluated),
    "skip_memory_metrics": ("adam", lambda r: "train_mem_cpu_alloc_delta" in r.summary),
    "optim": ("sgd", lambda r: r.optimizer == "SGD"),
    "optim_args": ("sgd", lambda r: r.options.get("momentum") == 0.5),
    "max_grad_norm": ("sgd", lambda r: r.moved < 1e-5),
    "bf16": ("sgd", lambda r: r.precision == "bf16" and r.log[0]["loss"] != r.first_loss),
    "num_train_epochs": ("epochs", lambda r: r.summary["step"] == 5),
    "max_steps": ("base", lambda r: r.summary["step"] == 4),
    "logging_strategy": ("epochs", lambda r: steps_logged(r)[1:] == [3, 5]),
    "logging_first_step": ("epochs", lambda r: steps_logged(r) == [1, 3, 5]),
    "save_strategy": ("epochs", lambda r: r.checkpoints == ["checkpoint-1", "checkpoint-3", "checkpoint-5"]),
    "disable_tqdm": ("epochs", lambda r: r.bar),
    "gradient_checkpointing": ("epochs", lambda r: r.checkpointed.count(True) == 1),
    "gradient_checkpointing_kwargs": ("epochs", lambda r: r.checkpointed.count(True) == 1),
    "use_cpu": ("epochs", lambda r: r.pins),  # False there: then Hugging Face pins memory
}
# Flags that are tried in other tests, and where.
ELSEWHERE = {
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed"), "tests/long/test_trainer_on_engines.py"),
    "resume_from_checkpoint": "tests/unit/training/test_run_folder.py",
    "do_eval": "tests/unit/training/test_evaluation_flags.py",
    **dict.fromkeys(
        ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        "tests/smoke/test_evaluation_in_runs.py",
    ),
    "run_name": "tests/smoke/test_train.py",
    **dict.fromkeys(("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), ""),
    **dict.fromkeys(("ddp_bucket_cap_mb", "ddp_backend", "ddp_timeout", "log_level_replica"), ""),
    **dict.fromkeys(("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"), ""),
    "dataloader_multiprocessing_context": "",
}


@pytest.mark.parametrize("name", [name for name in EFFECTS if name in HUGGING_FACES])
def test_a_used_flag_has_its_effect(runs, qwen3, name):
    before = {name.removeprefix("backbone."): value for name, value in load_file(qwen3 / "model.safetensors").items()}
    for run in runs.values():
        run.first_loss = runs["base"].log[0]["loss"]
        run.moved = distance(run, before)
    chosen, effect = EFFECTS[name]
    assert effect(runs[chosen])
    if name != "max_steps":
        others = [
            run for other, run in runs.items() if other != chosen and name not in RUNS[other] and other != "again"
        ]
        assert others and not any(effect(run) for run in others), "control"


@pytest.mark.parametrize("name", NO_EFFECT)
def test_a_flag_without_effect_changes_nothing(runs, name):
    assert same_weights(runs["nothing"], runs["base"])
    assert not same_weights(runs["sgd"], runs["base"]), "control"
    for ours, theirs in zip(runs["nothing"].log, runs["base"].log, strict=True):
        timed = {"time", "tokens_per_second"} | {key for key in ours if key.startswith("time_share")}
        assert {k: v for k, v in ours.items() if k not in timed} == {k: v for k, v in theirs.items() if k not in timed}


def test_elsewhere_is_there():
    for name, place in ELSEWHERE.items():
        assert name in (ROOT / (place or "tests/unit/training/test_inherited_flags.py")).read_text()


@pytest.mark.parametrize("name", ["project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"])
def test_flags_of_a_logger_that_is_not_asked_for(minimal, name):
    with pytest.raises(UserError, match=f"--{name} mine: only --report_to trackio reads it"):
        parse([*minimal, f"--{name}=mine"])


def test_the_data_loader_has_its_flags(minimal, monkeypatch):
    def loader(*flags: str):
        args = parse([*minimal, *flags]).training
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            return train.EmbeddingTrainer.get_train_dataloader(SimpleNamespace(args=args, train_dataset=range(3)))

    given = loader(
        "--dataloader_num_workers=3",
        "--dataloader_prefetch_factor=5",
        "--dataloader_multiprocessing_context=spawn",
        "--no_dataloader_pin_memory",
    )
    plain = loader()

    def facts(loader) -> tuple:
        context = loader.multiprocessing_context
        return loader.num_workers, loader.prefetch_factor, context and context.get_start_method(), loader.pin_memory

    assert facts(given) == (3, 5, "spawn", False)
    assert facts(plain) == (2, 2, None, True)


def test_the_process_group_has_its_flags(minimal, monkeypatch):
    """Up to accelerate's state, which starts the group: on a CPU there is one backend, and no choice of a timeout."""
    asked: dict = {}

    def state(**options):
        asked.update(options)
        return PartialState(cpu=True)

    monkeypatch.setattr(transformers.training_args, "PartialState", state)
    parse([*minimal, "--ddp_backend=gloo", "--ddp_timeout=123"])
    assert (asked["backend"], asked["timeout"].total_seconds()) == ("gloo", 123)
    parse(minimal)
    assert (asked["backend"], asked["timeout"].total_seconds()) == (None, 1800), "control"


# ---- numbers in the log, on one rank, on two, after a resume


def test_the_last_entry_of_the_log(runs):
    for run in runs.values():
        last = run.summary
        steps = last["step"] - (2 if run is runs["again"] else 0)
        assert math.isclose(last["train_samples_per_second"], 8 * steps / last["train_runtime"], rel_tol=1e-2)
        assert "total_flos" not in last
    logged = [entry["loss"] for entry in runs["base"].log]
    assert math.isclose(runs["base"].summary["train_loss"], sum(logged) / len(logged), rel_tol=1e-5)


def test_a_resumed_run_has_its_new_intervals(runs):
    """Saved every 3 steps and stopped after 2; then every step. Gradient checkpointing and the limit are new, too."""
    run = runs["again"]
    assert run.checkpoints == [f"checkpoint-{step}" for step in range(1, 7)]
    assert steps_logged(run) == [3, 4, 5, 6]
    assert any(run.checkpointed)
    assert [entry["epoch"] for entry in run.log] == pytest.approx([1, 4 / 3, 5 / 3, 2])


def test_tokens_after_a_resume(runs):
    counted = {entry["step"]: entry["num_input_tokens_seen"] for entry in runs["again"].log}
    assert counted[4] == runs["sgd"].summary["num_input_tokens_seen"] > 1000, "undisturbed"


def test_two_ranks(qwen3, rows, runs, tmp_path):
    """The flags of DDP reach it; tokens and the mean loss are of all ranks, also of steps after the last log line."""
    flags = {
        "ddp_bucket_cap_mb": 1,
        "log_level_replica": "error",
        "include_num_input_tokens_seen": "non_padding",
        "logging_steps": 3,
    }
    done = Ranks(make_runs, qwen3, rows, tmp_path, {"ranks": flags}, ranks=2).wait()
    assert done.returncode == 0, done.stderr[-5000:]
    first, second = outcome(tmp_path, "ranks"), outcome(tmp_path, "ranks", 1)
    assert first.bucket == 1 << 20 and runs["base"].bucket is None
    assert (first.verbosity, second.verbosity) == (30, 40)
    alone = runs["base"].summary
    assert first.summary["num_input_tokens_seen"] == runs["sgd"].summary["num_input_tokens_seen"]
    assert math.isclose(first.summary["train_loss"], alone["train_loss"], rel_tol=1e-5)
    assert not math.isclose(first.log[0]["loss"], alone["train_loss"], rel_tol=1e-3), "control"
