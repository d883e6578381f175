"""Optimizers, precision and averages through the command line: resumed after kill -9, published, and refused."""

import json
import re
import shutil

import pytest
import torch
from helpers import DEEPSPEED, DRIVER, ROOT, log_of, run, train_flags
from safetensors.torch import load_file
from transformers import dynamic_module_utils

from gritlm.errors import UserError
from gritlm.training import plan
from gritlm.training.checkpoints import OPTIMIZER, TRAINED_WEIGHTS
from gritlm.training.flag_checks import parse
from gritlm.training.state_files import load_state

MUON = {"use_muon": True, "projection": 16, "projection_learning_rate": 3e-3, "ema_decay": 0.9}
BFLOAT16 = {"bf16": True, "bf16_weights": True, "use_muon": True}
AVERAGED = {"bf16": True, "bf16_weights": True, "ema_decay": 0.9, "eval_held_out": 4, "eval_steps": 5}
LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("tuning", "ranks"),
    [
        (MUON, 1),
        pytest.param(BFLOAT16, 2, marks=LONG),
        pytest.param(AVERAGED, 1, marks=LONG),
    ],
)
def test_killed_and_resumed_is_undisturbed(qwen3_dropout, data, tmp_path, tuning, ranks):
    """Bit for bit: what is published, what is trained, and the optimizer's state."""

    def go(name: str, fault: str):
        more = {"max_steps": 5} | tuning
        return run(
            DRIVER,
            tmp_path / f"{name}-rows",
            fault,
            *train_flags(qwen3_dropout, data, tmp_path / name, tmp_path / "cache", **more),
            ranks=ranks,
        )

    done = go("whole", "-")
    assert done.returncode == 0, done.stderr[-3000:]
    assert go("cut", "kill:4").returncode != 0
    resumed = go("cut", "-")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resuming from" in resumed.stdout and "checkpoint-3" in resumed.stdout
    folders = [tmp_path / name for name in ("whole", "cut")]
    published = [load_file(folder / "model.safetensors") for folder in folders]
    assert all(torch.equal(value, published[1][name]) for name, value in published[0].items())
    dtype = torch.bfloat16 if tuning is BFLOAT16 else torch.float32
    assert {value.dtype for value in published[0].values()} == {dtype}
    assert json.loads((folders[0] / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    states = [load_state(folder / "checkpoint-5" / OPTIMIZER)["state"] for folder in folders]
    for one, other in zip(*[state.values() for state in states], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        assert one.keys() == {"momentum_buffer"} or one.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(value.dtype == torch.float32 for value in one.values())
    logs = [[entry["loss"] for entry in log_of(folder)] for folder in folders]
    assert logs[0] == logs[1]

    if "ema_decay" in tuning:
        trained = [load_state(folder / "checkpoint-5" / TRAINED_WEIGHTS) for folder in folders]
        assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))
        average = load_file(folders[0] / "checkpoint-5" / "model.safetensors")
        assert all(torch.equal(average[name], published[0][name]) for name in average), "what is published"
        assert not any(torch.equal(value.float(), average["norm.weight"]) for value in trained[0]), (
            "is not what is trained"
        )
    if "projection_learning_rate" in tuning:
        rates = [(entry["learning_rate"], entry["learning_rate/projection"]) for entry in log_of(folders[1])]
        assert all(other == pytest.approx(3 * one) for one, other in rates) and max(rates)[0] == 1e-3
        assert (
            "Muon: 14 matrices, 18,432 weights; AdamW: backbone.embed_tokens.weight, projection.weight" in done.stdout
        )
    if "bf16_weights" in tuning:
        assert re.search(r"bfloat16 weights: [\d.]+% stood still in the first 4 steps", done.stdout)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["fsdp2", *(["zero3"] if DEEPSPEED else [])])
def test_on_sharding_engines(qwen3, data, tmp_path, engine):
    """The weights are DDP's: with Muon where it runs, and with a rate of its own for the projection; resumed too."""
    tuning = {"projection": 16, "projection_learning_rate": 3e-3} | ({"use_muon": True} if engine == "fsdp2" else {})
    file = ROOT / "scripts" / "parallel" / f"{engine}.json"

    def go(name: str, on: list, fault: str = "-"):
        flags = train_flags(qwen3, data, tmp_path / name, tmp_path / "cache", **tuning, max_steps=4)
        if on:
            at = flags.index("--use_cpu")
            del flags[at : at + 2]
        return run(DRIVER, tmp_path / f"rows-{name}", fault, *flags, *on, ranks=2)

    flags = ["--fsdp", "--fsdp_config", file] if engine == "fsdp2" else ["--deepspeed", file]
    assert go("ddp", []).returncode == 0
    for name, fault in (("whole", "-"), ("cut", "kill:4"), ("cut", "-")):
        done = go(name, flags, fault)
        assert (done.returncode == 0) == (fault == "-"), done.stderr[-3000:]
    assert "resuming from" in done.stdout
    ddp, whole, cut = (
        {n: w for path in (folder, folder / "2_Dense") for n, w in load_file(path / "model.safetensors").items()}
        for folder in (tmp_path / name for name in ("ddp", "whole", "cut"))
    )
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    base = load_file(qwen3 / "model.safetensors")
    for name in base:
        assert (whole[name] - ddp[name]).norm() <= 1e-3 * (ddp[name] - base[name]).norm(), name
    assert torch.allclose(whole["linear.weight"], ddp["linear.weight"], atol=1e-6)


REFUSED = {
    "another optimizer": (
        {"use_muon": True, "optim": "sgd"},
        "--optim sgd: found --use_muon or --bf16_weights, which go with adamw_torch and adamw_torch_fused only",
    ),
    "Muon under ZeRO": ({"use_muon": True, "deepspeed": "ZERO"}, "--use_muon with --deepspeed: not supported"),
    "bfloat16 under FSDP": (
        {"bf16_weights": True, "bf16": True, "fsdp": True},
        "--bf16_weights with --deepspeed or --fsdp",
    ),
    "an average under FSDP": (
        {"ema_decay": 0.9, "fsdp": True},
        "--ema_decay with --deepspeed or --fsdp: not supported",
    ),
    "an average of everything": ({"ema_decay": 1}, "--ema_decay: found 1.0, wanted a number above 0 and below 1"),
    "an iteration of nothing": ({"muon_iteration": "bfloat16"}, "--muon_iteration bfloat16 without --use_muon"),
    "bfloat16 weights in float32 products": (
        {"bf16_weights": True},
        "--bf16_weights without --bf16: wanted",
    ),
    "no rate": (
        {"projection": 8, "projection_learning_rate": 0},
        "--projection_learning_rate: found 0.0, wanted",
    ),
    "fp16": ({"fp16": True}, "--fp16: not supported, use --bf16"),
    "a state that no checkpoint holds": ({"optim": "adamw_torch_4bit"}, "--optim adamw_torch_4bit: not supported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_one_line(qwen3, data, tmp_path, name):
    change, message = REFUSED[name]
    if change.get("deepspeed"):
        change = change | {"deepspeed": ROOT / "scripts" / "parallel" / "zero2.json"}
    with pytest.raises(UserError, match=re.escape(message)) as error:
        parse(train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache", **change))
    assert "\n" not in str(error.value)


def test_a_plan_lists_the_matrices_and_misses_the_layer(qwen3, data, tmp_path):
    flags = train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache")
    done = run("-m", "gritlm", "plan", *flags, "--use_muon", "--muon_iteration", "bfloat16")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Muon: 14 matrices, 18,432 weights; AdamW: embed_tokens.weight, 9 vectors, 19,392 weights" in done.stdout
    assert "Muon: iterates in bfloat16, so the run depends on the number of GPUs" in done.stdout
    done = run("-m", "gritlm", "plan", *flags, "--projection_learning_rate", "1e-3")
    assert done.returncode == 2
    assert "--projection_learning_rate 0.001: found no projection to train, wanted --projection" in done.stderr


def test_a_plan_lists_the_matrices_of_an_adapter_on_a_base_with_its_own_code(
    qwen3, data, tmp_path, monkeypatch, capsys
):
    """transformers knows such a base only once it was built."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    base = shutil.copytree(qwen3, tmp_path / "base")
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | own))
    (base / "own.py").write_text(
        "from transformers import Qwen3Config, Qwen3Model\n\n\n"
        "class OwnConfig(Qwen3Config):\n    model_type = 'own'\n\n\n"
        "class OwnModel(Qwen3Model):\n    config_class = OwnConfig\n"
    )
    for lora, line in ((True, "Muon: 28 matrices"), (False, "Muon: its matrices are listed at the start of the run")):
        flags = {"trust_remote_code": True, "use_muon": True, "lora": lora}
        assert plan.main(train_flags(base, data, tmp_path / "out", tmp_path / "cache", **flags)) == 0
        assert line in capsys.readouterr().out
