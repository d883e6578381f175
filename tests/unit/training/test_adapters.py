"""LoRA in a run: dropout that both passes share, the check that each tensor learns, and the flags."""

import logging
from importlib.util import find_spec

import pytest
import torch
from helpers import make_builder, make_embedder, train_flags
from torch import nn

from gritlm.errors import UserError
from gritlm.models.lora import make_config, match_targets
from gritlm.training.adapters import AdapterGradients, check_merged, describe_adapter
from gritlm.training.engines import engine_for
from gritlm.training.flag_checks import parse
from gritlm.training.gradcache import ActivationMemory, two_pass_step


def with_adapter(model, dropout: float, seed: int = 0):
    embedder = make_embedder(model)
    embedder.add_adapter(make_config(4, 8, dropout, match_targets(embedder.config, None)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in embedder.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.2, generator=generator)
    return embedder.train()


@pytest.fixture(scope="module")
def chunks(qwen3, data, tmp_path_factory):
    batch = make_builder(qwen3, data, tmp_path_factory.mktemp("cache"), batch=6, deduplicate=False)[0, 0]
    assert len(batch.chunks) > 4
    return batch.chunks


def gradient(model, chunks, memory: str, seed: int = 0, dropout: float = 0.5, **checkpointing) -> torch.Tensor:
    embedder = with_adapter(model, dropout)
    if checkpointing:
        embedder.activation_checkpointing_enable(activation_checkpointing_kwargs=checkpointing)
    torch.manual_seed(seed)

    def loss(vectors):
        return {"loss": (vectors @ vectors.T * torch.linspace(-1, 1, len(vectors))).logsumexp(1).sum()}

    device = torch.device("cpu")
    two_pass_step(engine_for(embedder), chunks, loss, memory=ActivationMemory(memory, device))
    assert all(p.grad is None for p in embedder.parameters() if not p.requires_grad)
    return torch.cat([p.grad.flatten() for p in embedder.parameters() if p.requires_grad])


def test_both_passes_draw_the_same_dropout(qwen3, chunks):
    """A kept graph draws once. What is recomputed, with checkpointing too, must have drawn the same."""
    kept = gradient(qwen3, chunks, "1")
    for checkpointing in ({}, {"use_reentrant": False}, {"use_reentrant": True}):
        again = gradient(qwen3, chunks, "0", **checkpointing)
        assert ((again - kept).norm() / kept.norm()).item() < 1e-5
    other = gradient(qwen3, chunks, "0", seed=1)
    assert ((other - kept).norm() / kept.norm()).item() > 0.1, "control: another draw"


def step(embedder, watch: AdapterGradients, rate: float = 1e-2) -> None:
    ids, lengths = torch.arange(12), torch.tensor([7, 5])
    embedder.zero_grad()
    vectors = embedder(ids, lengths, torch.zeros_like(lengths), ((1, 7), (1, 5)))
    (vectors[0] @ vectors[1]).backward()
    watch.check(embedder, rate)
    with torch.no_grad():
        for p in embedder.parameters():
            if p.grad is not None:
                p -= rate * p.grad


def fresh(model):
    embedder = make_embedder(model)
    embedder.add_adapter(make_config(4, 8, 0.0, ["v_proj", "up_proj"]))
    return embedder.train()


def test_each_tensor_must_learn(qwen3, caplog):
    embedder = fresh(qwen3)
    watch = AdapterGradients(embedder)
    for rate in (0.0, 0.0, 0.0):  # a warm-up begins at 0
        step(embedder, watch, rate)
    assert watch.steps == 0
    step(embedder, watch)
    assert {name.split(".lora_")[1][0] for name in watch.waiting} == {"A"}, "lora_A waits for lora_B"
    step(embedder, watch)
    assert not watch.waiting
    step(embedder, watch)

    embedder = fresh(qwen3)
    embedder.backbone.layers[1].mlp.up_proj.lora_B["default"].register_forward_hook(lambda m, i, out: out * 0)
    watch = AdapterGradients(embedder)
    step(embedder, watch)
    step(embedder, watch)
    with pytest.raises(
        UserError, match=r"layers\.1\.mlp\.up_proj\.lora_A.* and 1 more had a gradient of 0 in .* 3 steps"
    ):
        step(embedder, watch)

    embedder = fresh(qwen3)
    embedder.backbone.layers[1].mlp.up_proj.lora_B["default"].register_forward_hook(lambda m, i, out: out.detach())
    watch = AdapterGradients(embedder)
    with caplog.at_level(logging.WARNING, "gritlm"):
        for _ in range(3):
            step(embedder, watch)
    assert "no gradient can reach" in caplog.text and "layers.1.mlp.up_proj.lora_B" in caplog.text


def test_a_wrong_merge_is_seen(caplog):
    base, change = torch.randn(64, 8, dtype=torch.float64), 1e-3 * torch.randn(64, 8, dtype=torch.float64)
    check_merged(base + change, base + change * (1 + 1e-5), base)
    with pytest.raises(UserError, match="changes no vector of 64 probe texts"):
        check_merged(base, base + change, base)
    with pytest.raises(UserError, match=r"the merged model has cosine 0\.\d+ with the adapter"):
        check_merged(base, base + nn.functional.normalize(torch.randn(64, 8)), base)


REFUSED = {
    "both": (["--lora", "--qlora"], "--lora and --qlora: choose one"),
    "no adapter": (["--lora_r", "8", "--keep_adapter"], r"--lora_r, --keep_adapter: has no effect without --lora"),
    "random weights": (["--lora", "--reset_weight"], "--reset_weight with --lora: an adapter on random weights"),
    "rank 0": (["--lora", "--lora_r", "0"], "--lora_r: found 0, wanted a number above 0"),
    "rank -1": (["--lora", "--lora_r", "-1"], "--lora_r: found -1, wanted a number above 0"),
    "dropout": (["--lora", "--lora_dropout", "1"], "--lora_dropout: found 1.0, wanted a number from 0 to below 1"),
    "continue": (["--lora", "--continue_adapter"], "--continue_adapter: found no adapter in --model_name_or_path"),
    "own settings": (["--lora", "--continue_adapter", "--lora_r", "4"], "--continue_adapter: found --lora_r, wanted"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_flags_that_contradict_are_refused(qwen3, data, tmp_path, case):
    flags, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        parse([*train_flags(qwen3, data, tmp_path / "out", tmp_path), *flags])


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_qlora_names_what_it_needs(qwen3, data, tmp_path):
    with pytest.raises(UserError, match="--qlora: bitsandbytes is not installed"):
        parse([*train_flags(qwen3, data, tmp_path / "out", tmp_path), "--qlora"])


def test_the_start_says_what_is_trained(qwen3, data, tmp_path):
    flags = train_flags(qwen3, data, tmp_path / "out", tmp_path)
    config = make_embedder(qwen3).config
    assert describe_adapter(parse(flags), config) == []
    (line,) = describe_adapter(parse([*flags, "--lora", "--lora_target_modules", "v_proj"]), config)
    assert line == (
        "adapter: LoRA, rank 16, alpha 32, dropout 0.1, on v_proj: 1,536 weights are trained, 4.06% of the "
        "backbone's 37,824"
    )
    with pytest.raises(UserError, match="--lora_target_modules: found 'wq', wanted names of linear layers"):
        describe_adapter(parse([*flags, "--lora", "--lora_target_modules", "wq"]), config)
