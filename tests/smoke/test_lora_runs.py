"""A LoRA run: killed, resumed bit for bit, published merged; another base is refused."""

import shutil

import pytest
import torch
from helpers import DRIVER, run, train_flags
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from gritlm.gritlm import GritLM

TEXTS = ["a river", "quiet engine under snow", "7"]


@pytest.fixture(scope="module")
def runs(qwen3, data, tmp_path_factory):
    """The base, and the folders of an undisturbed run and of one that was killed and resumed."""
    root = tmp_path_factory.mktemp("lora")
    base = shutil.copytree(qwen3, root / "base")

    def go(name: str, fault: str = "-"):
        flags = train_flags(base, data, root / name, root / "cache", max_steps=5, lora_r=4, save_total_limit=0)
        return run(DRIVER, root / "rows", fault, *flags, "--lora", "--keep_adapter")

    assert go("whole").returncode == 0
    assert go("cut", "kill:4").returncode != 0
    return root, go


def test_killed_and_resumed_and_served(runs):
    root, go = runs
    base = root / "base" / "model.safetensors"
    weights = load_file(base)
    shutil.move(base, root / "kept")
    save_file(weights | {"norm.weight": weights["norm.weight"] * 1.01}, base)
    refused = go("cut")
    assert refused.returncode == 2 and "base's weights was " in refused.stderr
    shutil.move(root / "kept", base)

    resumed = go("cut")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resuming from" in resumed.stdout and "adapter merged: cosine with the adapter 1.0" in resumed.stdout
    one, other = (load_file(root / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in weights) and one.keys() == weights.keys()
    for file in ("adapter_model.safetensors", "optimizer.safetensors", "rng_state_0.safetensors"):
        first, second = ((root / name / "checkpoint-5" / file).read_bytes() for name in ("whole", "cut"))
        assert first == second
    assert not (root / "cut" / "checkpoint-5" / "model.safetensors").exists()

    assert "as LoRA of rank 4, which is merged into the base" in (root / "cut" / "README.md").read_text()
    served = SentenceTransformer(str(root / "cut"), device="cpu").encode(TEXTS)
    for place in ("cut", "cut/adapter", "cut/checkpoint-5"):
        assert abs(GritLM(root / place).encode(TEXTS) - served).max() < 1e-5
    assert abs(GritLM(root / "base", contract=GritLM(root / "cut").contract).encode(TEXTS) - served).max() > 1e-3


@pytest.mark.long
def test_an_adapter_is_gone_on_with(runs, data, tmp_path):
    """The run starts at the adapter's vectors, trains it on, and publishes the same base with it."""
    root, _ = runs
    start, go_on = root / "whole" / "adapter", [DRIVER, tmp_path / "rows", "-"]
    flags = train_flags(start, data, tmp_path / "on", tmp_path / "cache", max_steps=2)
    refused = run(*go_on, *flags, "--lora", "--continue_adapter", "--keep_adapter", "--lora_r", "4")
    assert refused.returncode == 2 and "--continue_adapter: found --lora_r, wanted none" in refused.stderr, "control"
    still = train_flags(start, data, tmp_path / "still", tmp_path / "cache", max_steps=1, learning_rate=1e-30)
    for more in (flags, still):
        done = run(*go_on, *more, "--lora", "--continue_adapter", "--keep_adapter")
        assert done.returncode == 0, done.stderr[-3000:]
        assert "adapter: LoRA, continued, rank 4" in done.stdout
    first, kept = (load_file(path / "adapter_model.safetensors") for path in (start, tmp_path / "still" / "adapter"))
    assert first.keys() == kept.keys() and all(torch.allclose(first[name], kept[name], atol=1e-7) for name in first)
    served = GritLM(tmp_path / "on").encode(TEXTS)
    assert abs(GritLM(tmp_path / "on" / "adapter").encode(TEXTS) - served).max() < 1e-5
    assert abs(GritLM(tmp_path / "still").encode(TEXTS) - GritLM(start).encode(TEXTS)).max() < 1e-5
    assert abs(GritLM(start).encode(TEXTS) - served).max() > 1e-4
