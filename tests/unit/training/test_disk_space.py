"""The bytes that a run is said to need are those of its real checkpoints; a folder with less room is refused."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SIZES, build_model
from helpers import DRIVER, make_embedder, run, train_flags
from transformers import AutoModel, Qwen3Config

from gritlm.models.backbone import load_config
from gritlm.training.disk_space import (
    bytes_of_checkpoints,
    check_disk_space,
    count_saves,
    disk_space,
    engine_asked_for,
    free_space,
    optimizer_state,
)
from gritlm.training.flag_checks import parse
from gritlm.training.rehearsal import build_optimizer

WIDER = {"hidden_size": 192, "intermediate_size": 384, "head_dim": 48}  # so that weights are nearly all of a checkpoint


@pytest.fixture
def run_of(qwen3, data, tmp_path):
    """The flags of a run: `run_of("--optim", "sgd", save_steps=2)`."""

    def make(*words, model=qwen3, **more):
        return parse([*train_flags(model, data, tmp_path / "out", tmp_path / "cache", **more), *words])

    return make


def shapes_of(model: Path) -> dict[str, list[int]]:
    return {name: list(weight.shape) for name, weight in make_embedder(model).backbone.state_dict().items()}


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_real_checkpoint_has_the_bytes_that_were_said(run_of, data, tmp_path):
    base = build_model(tmp_path / "base", Qwen3Config(**SIZES | WIDER))
    options = {"max_steps": 2, "save_steps": 2, "projection": 16}
    flags = train_flags(base, data, tmp_path / "out", tmp_path / "cache", **options)
    done = run(DRIVER, tmp_path / "rows", "-", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    shapes = shapes_of(base) | {"projection.weight": [16, 192], "projection.bias": [16]}
    args = run_of(model=base, **options).training
    said = disk_space(args, shapes, "ddp", 2)
    found = folder_bytes(tmp_path / "out" / "checkpoint-2")
    assert abs(said.checkpoint - found) / found < 0.02
    assert abs(said.model - found) / found > 0.5, "control: the weights alone"
    assert bytes_of_checkpoints(tmp_path / "out") == folder_bytes(tmp_path / "out" / "checkpoint-1") + found
    published = folder_bytes(tmp_path / "out") - bytes_of_checkpoints(tmp_path / "out")
    assert abs(said.model - published) / published < 0.1, "the tokenizer and the log are the rest"


OPTIMIZERS = {
    "AdamW": (["--optim", "adamw_torch"], 2.0),
    "AdamW, fused": (["--optim", "adamw_torch_fused"], 2.0),
    "SGD": (["--optim", "sgd"], 0.0),
    "SGD with momentum": (["--optim", "sgd", "--optim_args", "momentum=0.9"], 1.0),
    "Adafactor": (["--optim", "adafactor"], None),
    "Adagrad": (["--optim", "adagrad"], 1.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizers_state_is_measured(run_of, qwen3, name):
    """On two small weights, and here on a whole model."""
    words, copies = OPTIMIZERS[name]
    args = run_of(*words).training
    model = AutoModel.from_config(load_config(str(qwen3), "bb"))
    optimizer = build_optimizer(args, model)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    parts = [part for state in optimizer.state.values() for part in state.values() if isinstance(part, torch.Tensor)]
    wanted = sum(part.numel() * part.element_size() for part in parts if part.numel() > 1)
    found = optimizer_state(args, [*shapes_of(qwen3).values()])
    assert found == wanted
    weights = 4 * sum(map(math.prod, shapes_of(qwen3).values()))
    assert found == copies * weights if copies is not None else found < 0.1 * weights


def test_an_optimizer_that_cannot_step_here_makes_a_lower_bound(run_of, monkeypatch):
    args = run_of().training
    shapes = {"weight": [100, 10]}
    whole = disk_space(args, shapes, "ddp", 6)
    assert (whole.model, whole.checkpoint, whole.at_least) == (4000, 12000, False)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: 1 / 0)
    part = disk_space(args, shapes, "ddp", 6)
    assert (part.checkpoint, part.at_least) == (4000, True)
    assert str(part).startswith("at least 0.0 MB at its fullest")


def test_each_engine_stores_more_copies_of_the_weights(run_of, tmp_path):
    args = run_of().training
    shapes, engines = {"weight": [100, 10]}, ("ddp", "fsdp2", "zero2", "zero3")
    said = {name: disk_space(args, shapes, name, 6).checkpoint for name in engines}
    assert said == {"ddp": 12000, "fsdp2": 16000, "zero2": 20000, "zero3": 16000}
    zero = tmp_path / "zero.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert engine_asked_for({"deepspeed": str(zero), "fsdp": None}) == "zero3"
    assert engine_asked_for({"deepspeed": None, "fsdp": "full_shard"}) == "fsdp2"
    assert engine_asked_for({}) == "ddp"


SAVES = [  # steps, flags -> saves, kept, whether one more is written, checkpoints and models at the fullest
    (100, {"save_steps": 0.1}, 11, 2, True, 3, 0),
    (100, {"save_steps": 30}, 5, 2, True, 3, 0),
    (100, {"save_steps": 30, "save_total_limit": 5}, 5, 5, False, 5, 1),
    (100, {"save_steps": 30, "save_total_limit": 0}, 5, 5, False, 5, 1),
    (1, {"save_steps": 0.1}, 1, 1, False, 1, 1),
    (100, {"save_strategy": "epoch", "num_train_epochs": 3}, 4, 2, True, 3, 0),
    (100, {"save_strategy": "no"}, 0, 0, False, 0, 1),
]


@pytest.mark.parametrize(("steps", "flags", "saves", "kept", "writing", "checkpoints", "models"), SAVES)
def test_the_fullest_moment(run_of, steps, flags, saves, kept, writing, checkpoints, models):
    args = run_of(**flags).training
    said = disk_space(args, {"weight": [100, 10]}, "ddp", steps)
    assert (count_saves(args, steps), said.kept, said.writing) == (saves, kept, writing)
    assert said.fullest == 12000 * checkpoints + 4000 * models


def test_weight_only_copies_are_counted(run_of):
    args = run_of(merge_last=3).training
    for steps, copies in ((100, 3), (2, 2)):
        said, without = (disk_space(a, {"w": [100, 10]}, "ddp", steps) for a in (args, run_of().training))
        assert said.copies == copies and f", {copies} copies of the weights, 0.0 MB each" in str(said)
        assert said.fullest == without.fullest + 4000 * copies and "copies of" not in str(without)


def test_a_linked_copy_is_counted_once(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "weights" / "step-1").mkdir(parents=True)
    os.link(tmp_path / "checkpoint-1" / "model.safetensors", tmp_path / "weights" / "step-1" / "model.safetensors")
    assert bytes_of_checkpoints(tmp_path) == 1000
    shutil.rmtree(tmp_path / "checkpoint-1")
    assert bytes_of_checkpoints(tmp_path) == 1000


# ---- a folder with less room


@pytest.fixture
def huge(qwen3, tmp_path) -> Path:
    """A base of 8 billion weights, of which there is only the config."""
    folder = tmp_path / "huge"
    shutil.copytree(qwen3, folder)
    (folder / "model.safetensors").unlink()
    sizes = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
    Qwen3Config(**SIZES | sizes | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}).save_pretrained(
        folder
    )
    return folder


def test_a_folder_with_less_room_is_refused(huge, data, tmp_path):
    """All checkpoints of a long run of 8B: 90 TB, which this disk does not have."""
    more = {"reset_weight": True, "max_steps": 1000, "save_steps": 1, "save_total_limit": 900}
    flags = train_flags(huge, data, tmp_path / "not" / "yet", tmp_path / "cache", **more)
    for verb in ("plan", "train"):
        done = run("-m", "gritlm", verb, *flags)
        (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
        assert done.returncode == 2
        assert f"--output_dir {tmp_path / 'not' / 'yet'}: the run needs 81,8" in line
        assert " GB at its fullest (one checkpoint 90.8 GB, 900 kept, one being written), found " in line
        assert line.endswith(" free; lower --save_total_limit (now 900), or name another folder")
    assert not list(tmp_path.glob("not/yet/checkpoint-*"))


def test_what_the_folder_holds_already_is_not_needed_again(run_of, qwen3, tmp_path):
    config = load_config(str(qwen3), "bb")
    (line,) = check_disk_space(run_of(), config, 11)
    assert " of it there already" not in line
    for folder in ("checkpoint-3", ".unfinished", "set-aside-1"):
        (tmp_path / "out" / folder).mkdir(parents=True)
        (tmp_path / "out" / folder / "model.safetensors").write_bytes(bytes(10**6))
    (line,) = check_disk_space(run_of(), config, 11)
    assert ", 2.0 MB of it there already; " in line
    assert bytes_of_checkpoints(tmp_path / "out") == 2 * 10**6


def test_free_space_is_that_of_the_nearest_parent(tmp_path):
    assert abs(free_space(tmp_path / "a" / "b") - shutil.disk_usage(tmp_path).free) < 10**9
    assert free_space(tmp_path / ("x" * 5000)) is None, "it cannot be read: nothing is refused"
