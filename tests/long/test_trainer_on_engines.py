"""The real Trainer on every engine: one curve, resumed bit for bit, and on another number of ranks."""

import json
import re
import shutil

import pytest
import torch
from helpers import DEEPSPEED, DRIVER, ROOT, losses, relative, run, train_flags
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from gritlm.gritlm import GritLM

pytestmark = pytest.mark.long

PARALLEL = ROOT / "scripts" / "parallel"
ENGINES = {
    "fsdp2": ["--fsdp", "--fsdp_config", PARALLEL / "fsdp2.json"],
    "zero1": ["--deepspeed", "ZERO1"],
    "zero2": ["--deepspeed", PARALLEL / "zero2.json"],
    "zero3": ["--deepspeed", PARALLEL / "zero3.json"],
}
needs_deepspeed = pytest.mark.skipif(not DEEPSPEED, reason="no DeepSpeed, or no g++ for its CPU communication")
CASES = [pytest.param(e, marks=needs_deepspeed if e.startswith("zero") else []) for e in ENGINES]


@pytest.fixture
def go(qwen3_dropout, data, tmp_path):
    """Train into tmp_path/name on an engine ("" for DDP); dropout would tell another order of random numbers apart."""

    def go(name: str, engine: str, fault: str = "-", ranks: int = 2, model=qwen3_dropout, **more):
        flags = train_flags(model, data, tmp_path / name, tmp_path / "cache", **more)
        if engine:
            at = flags.index("--use_cpu")
            del flags[at : at + 2]
            zero1 = tmp_path / "zero1.json"
            config = json.loads((PARALLEL / "zero2.json").read_text())
            zero1.write_text(json.dumps(config | {"zero_optimization": {"stage": 1}}))
            flags += [str(zero1 if part == "ZERO1" else part) for part in ENGINES[engine]]
        return run(DRIVER, tmp_path / f"rows-{name}", fault, *flags, ranks=ranks)

    return go


def evaluations(folder) -> list[dict[str, float]]:
    """The numbers of each evaluation and its step."""
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    numbers = [{k: v for k, v in entry.items() if k == "step" or k.startswith("eval_")} for entry in entries]
    return [{k: v for k, v in entry.items() if k != "eval_seconds"} for entry in numbers if "eval_mean" in entry]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("engine", CASES)
def test_one_curve_and_resumed_bit_for_bit(go, qwen3, tmp_path, engine):
    for name, on, model in (("ddp", "", qwen3), ("same", engine, qwen3)):  # without dropout: the chunks' order differs
        done = go(name, on, model=model, eval_held_out=8)
        assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = evaluations(tmp_path / "same"), evaluations(tmp_path / "ddp")
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6), "of the base"
    assert ours[-1] == pytest.approx(theirs[-1], rel=1e-4)
    assert ours[-1] != pytest.approx(ours[0], rel=1e-2), "control: something is learnt"
    assert losses(tmp_path / "same") == pytest.approx(losses(tmp_path / "ddp"), rel=1e-4)

    more = {"eval_held_out": 8, "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    assert go("whole", engine, **more).returncode == 0
    assert go("cut", engine, "kill:4", **more).returncode != 0
    resumed = go("cut", engine, **more)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resuming from" in resumed.stdout
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert evaluations(tmp_path / "whole") == evaluations(tmp_path / "cut")
    best = min(evaluations(tmp_path / "whole")[1:], key=lambda entry: entry["eval_loss"])["step"]
    for folder in ("whole", "whole/checkpoint-6"):
        vectors = SentenceTransformer(str(tmp_path / folder), device="cpu").encode(["a river", "snow"])
        assert vectors.shape == (2, 32)
    again = weights(tmp_path / "whole" / f"checkpoint-{best}")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("engine", CASES)
def test_bf16_and_gradient_checkpointing(go, qwen3, tmp_path, engine):
    options = {"model": qwen3, "max_steps": 3, "bf16": True, "gradient_checkpointing": True, "projection": 16}
    assert go("ddp", "", **options).returncode == 0
    done = go("same", engine, "count", **options)
    assert done.returncode == 0, done.stderr[-3000:]
    off = [float(found) for found in re.findall(r"off unit length: ([\d.]+e[-+]\d+)", done.stdout)]
    assert len(off) == 2 and max(off) < 1e-6, "the vectors are float32 when they reach the loss"
    assert done.stdout.count("copies kept: False") == 2
    one, other = weights(tmp_path / "ddp"), weights(tmp_path / "same")
    assert {value.dtype for value in [*one.values(), *other.values()]} == {torch.float32}
    difference = max(((one[n] - other[n]).norm() / one[n].norm()).item() for n in one)
    assert 0 < difference < (2e-2 if engine == "fsdp2" else 1e-4)  # FSDP2 keeps the residual stream in bfloat16


@pytest.mark.parametrize("engine", [case for case in CASES if case.values[0] != "zero1"])
def test_a_gradient_summed_after_each_chunk_gives_the_same_weights(go, qwen3, tmp_path, engine):
    for name, options in {"no": {}, "yes": {}, "other": {"learning_rate": 2e-3}}.items():
        sync = "yes" if name == "yes" else "no"
        done = go(name, engine, model=qwen3, save_strategy="no", sync_each_chunk=sync, **options)
        assert done.returncode == 0, done.stderr[-3000:]
    wanted, found, other = (weights(tmp_path / name) for name in ("no", "yes", "other"))
    assert losses(tmp_path / "yes") == pytest.approx(losses(tmp_path / "no"), rel=1e-5)
    assert max(relative(found[name], weight) for name, weight in wanted.items()) < 1e-3
    assert max(relative(other[name], weight) for name, weight in wanted.items()) > 1e-2, "control"


def test_one_first_loss_of_drawn_weights_on_every_engine(go, qwen3, tmp_path):
    """Weights and projection come from the seed alone, wherever they are drawn and however they are sharded."""
    options = {"model": qwen3, "max_steps": 1, "save_strategy": "no", "reset_weight": True, "projection": 16}
    assert go("plain", "", ranks=1, **options).returncode == 0
    (wanted,) = losses(tmp_path / "plain")
    for engine in ("", "fsdp2", *(("zero2", "zero3") if DEEPSPEED else ())):
        done = go(engine or "ddp", engine, **options)
        assert done.returncode == 0, done.stderr[-3000:]
        assert losses(tmp_path / (engine or "ddp")) == pytest.approx([wanted], rel=1e-6)


@pytest.mark.parametrize(("engine", "ranks"), [("", 1), ("", 4), ("fsdp2", 4)])
def test_goes_on_with_another_number_of_ranks(go, qwen3, tmp_path, engine, ranks):
    assert go("whole", engine, model=qwen3).returncode == 0
    assert go("cut", engine, "kill:4", model=qwen3).returncode != 0
    resumed = go("cut", engine, model=qwen3, ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert f"on {ranks} rank(s)" in resumed.stdout
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


@pytest.mark.parametrize("engine", ["", *(case for case in CASES if case.values != ("zero1",))])  # zero2 is like it
def test_lora_resumed_bit_for_bit(go, qwen3, tmp_path, engine):
    """With the adapter's dropout. Checkpoints hold no frozen weight; the best step's adapter is the one published."""
    more = {"eval_held_out": 8, "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    more |= {"model": qwen3, "lora": True, "lora_r": 2, "lora_target_modules": "q_proj", "keep_adapter": True}
    more |= {"projection": 16, "save_total_limit": 0, "warmup_steps": 0}
    whole = go("whole", engine, **more)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert go("cut", engine, "kill:4", **more).returncode != 0
    resumed = go("cut", engine, **more)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resuming from" in resumed.stdout and "adapter merged" in resumed.stdout
    one, other, base = (weights(folder) for folder in (tmp_path / "whole", tmp_path / "cut", qwen3))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {name for name in one if not torch.equal(one[name], base[name])} == {n for n in one if "q_proj" in n}
    assert evaluations(tmp_path / "whole") == evaluations(tmp_path / "cut")
    base_bytes = sum(value.nbytes for value in base.values())
    for step in (3, 6):
        found = [path for path in (tmp_path / "cut" / f"checkpoint-{step}").rglob("*") if path.is_file()]
        large = [path for path in found if path.suffix in (".safetensors", ".pt", ".distcp", ".bin")]
        assert sum(path.stat().st_size for path in large) < base_bytes, [path.name for path in large]
    best = min(evaluations(tmp_path / "whole")[1:], key=lambda entry: entry["eval_loss"])["step"]
    kept, saved = (
        load_file(tmp_path / "whole" / place / "adapter_model.safetensors")
        for place in ("adapter", f"checkpoint-{best}")
    )
    assert all(torch.equal(kept[name], saved[name]) for name in saved)
    served, adapter = (GritLM(tmp_path / "whole" / place).encode(["a river", "snow"]) for place in ("", "adapter"))
    assert torch.allclose(torch.as_tensor(served), torch.as_tensor(adapter), atol=1e-5)


@needs_deepspeed
def test_what_an_engine_cannot_go_on_with_is_said(go, tmp_path):
    assert go("cut", "zero2", "kill:4").returncode != 0
    for engine, ranks, message in (
        ("zero2", 4, "DeepSpeed wrote it on 2 ranks and cannot resume it on 4; start 2 ranks"),
        ("fsdp2", 2, "it was written by the engine zero2, this run has fsdp2; use that engine"),
    ):
        done = go("cut", engine, ranks=ranks)
        assert done.returncode != 0
        assert message in done.stderr
    shard = next((tmp_path / "cut" / "checkpoint-3").rglob("*rank_1*optim_states.pt"))
    shutil.move(shard, tmp_path / "moved")
    done = go("cut", "zero2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{shard.relative_to(tmp_path / 'cut' / 'checkpoint-3')} is missing" in done.stdout
    assert "resuming from" in done.stdout and "checkpoint-1" in done.stdout
