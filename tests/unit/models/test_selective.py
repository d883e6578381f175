"""Selective checkpointing: the gradient is the same to the bit, fewer bytes are kept, and all of them are counted."""

import pytest
import torch
from families import build_family
from helpers import make_embedder

from gritlm.benchmark.memory import LiveBytes
from gritlm.models import selective
from gritlm.training.gradcache import ActivationMemory

LENGTHS = (31, 31, 12, 5)


def step(model, bf16: bool = False):
    """Vectors, gradients, and the bytes that a forward keeps: as a tensor mode sees them, and as the trainer counts."""
    torch.manual_seed(0)
    ids, lengths = torch.randint(2, 500, (sum(LENGTHS),)), torch.tensor(LENGTHS)
    memory = ActivationMemory("8", torch.device("cpu"))
    memory.begin(model)
    assert memory.fits(len(ids))
    model.zero_grad()
    with LiveBytes(*model.parameters()) as live, torch.autocast("cpu", enabled=bf16, cache_enabled=False):
        with memory.watched():
            vectors = model(ids, lengths, torch.zeros_like(lengths), ((2, 31), (1, 12), (1, 5)))
    kept = live.now
    vectors.pow(3).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return vectors.detach(), gradients, kept, memory.used


@pytest.mark.parametrize(("family", "bf16"), [("qwen3", False), ("qwen3", True), ("qwen3_moe", False), ("bert", False)])
def test_the_same_gradient_from_fewer_bytes(family, bf16, tmp_path):
    model = make_embedder(build_family(tmp_path, family), "bb").train()
    vectors, gradients, kept, counted = step(model, bf16)
    assert counted == pytest.approx(kept, rel=0.12)
    model.keep_products()
    again, others, fewer, fewer_counted = step(model, bf16)
    assert torch.equal(vectors, again) and all(map(torch.equal, gradients, others))
    assert fewer < 0.8 * kept
    assert counted - fewer_counted == pytest.approx(kept - fewer, rel=0.05)
    assert not selective._watchers


def test_control_a_kept_output_that_is_another_is_seen(qwen3, monkeypatch):
    """Were the outputs of products not kept but zero, or kept and not used, the comparison above would see it."""
    model = make_embedder(qwen3, "bb").train()
    *_, kept, _ = step(model)
    model.keep_products()
    monkeypatch.setattr(selective, "is_kept", lambda operator: False)
    *_, none, _ = step(model)
    monkeypatch.undo()
    _, gradients, fewer, _ = step(model)
    assert none < fewer < kept, "control: the outputs of products are what is kept"
    contexts = selective.contexts

    def spoiled():
        forward, recompute = contexts()
        call = type(recompute).__torch_dispatch__

        class Spoiled(type(recompute)):
            def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
                found = call(self, operator, types, args, kwargs)
                return found * 1.01 if selective.is_kept(operator) and isinstance(found, torch.Tensor) else found

        recompute.__class__ = Spoiled
        return forward, recompute

    monkeypatch.setattr(selective, "contexts", spoiled)
    model.keep_products()
    _, others, *_ = step(model)
    assert not all(map(torch.equal, gradients, others)), "control"
