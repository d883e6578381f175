"""What a step asks of a GPU, without one: its own code on tensors that have shapes but no data, so that whatever would
have to read a number back from the device cannot go on."""

import pytest
import torch
from helpers import make_builder, make_embedder
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import AutoModel

from gritlm.data.batches import Batch, ContrastiveBatch
from gritlm.models import attention
from gritlm.models.embedder import Embedder
from gritlm.models.text import TextContract
from gritlm.training.arguments import ObjectiveArguments
from gritlm.training.engines import Engine
from gritlm.training.gradcache import ActivationMemory, two_pass_step
from gritlm.training.monitors import FiniteWatch
from gritlm.training.objective import Objective

OBJECTIVE = Objective(ObjectiveArguments(same_tower=True))
INFO_NCE = Objective(ObjectiveArguments())


def without_data(mode: FakeTensorMode, values: dict) -> dict:
    return {name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in values.items()}


def take_step(folder, batch: Batch, bf16: bool, kept: float, attn: str = "packed", objective=None) -> Embedder:
    """As the trainer takes it, the optimizer's own step included."""
    config = make_embedder(folder).config
    memory = ActivationMemory(str(kept), torch.device("cpu"))
    memory.bytes_per_token = 1.0 if kept else None
    with FakeTensorMode() as mode:
        model = Embedder(AutoModel.from_config(config, attn_implementation=attn), TextContract()).train()
        model.forward = torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False)(model.forward)
        optimizer, watch = torch.optim.AdamW(model.parameters(), foreach=True), FiniteWatch(torch.device("cpu"))
        watch.eager = False
        chunks = [without_data(mode, chunk) for chunk in batch.chunks]
        contrastive = ContrastiveBatch(**without_data(mode, vars(batch.contrastive)))
        objective = objective or OBJECTIVE
        terms = two_pass_step(Engine(model), chunks, lambda vectors: objective(vectors, contrastive), memory=memory)
        loss = sum(terms.values())
        watch.loss(1, loss, "data", ["1"])
        watch.gradient_norm(1, torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
    return model


@pytest.fixture
def one_kernel(monkeypatch):
    """The kernel that a GPU has: it knows its output's shape without one."""
    calls = []
    original = attention._one_varlen_call
    monkeypatch.setattr(attention, "varlen_unavailable_reason", lambda *asked: "")
    monkeypatch.setattr(attention, "_one_varlen_call", lambda *call: (calls.append(1), original(*call))[1])
    return calls


@pytest.mark.parametrize(("name", "bf16", "kept"), [("qwen2", True, 0.0), ("qwen3", True, 9.0), ("qwen3", False, 0.0)])
def test_a_step_reads_nothing_back(request, data, tmp_path, one_kernel, name, bf16, kept):
    folder = request.getfixturevalue(name)
    batch = make_builder(folder, data / "hard.jsonl", tmp_path)[0, 0]
    model = take_step(folder, batch, bf16, kept)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    passes = 1 if kept else 2
    assert len(one_kernel) == passes * len(batch.chunks) * model.config.num_hidden_layers


def test_a_number_read_back_is_noticed(qwen3, data, tmp_path, one_kernel):
    """Controls: a loss that looks at its value, and a padded batch, whose texts are picked by a mask."""
    batch = make_builder(qwen3, data / "hard.jsonl", tmp_path)[0, 0]

    def looks(vectors, contrastive):
        terms = INFO_NCE(vectors, contrastive)
        return terms if terms["info_nce"].item() > 0 else {}

    with pytest.raises(DataDependentOutputException):
        take_step(qwen3, batch, False, 0.0, objective=looks)
    padded = make_builder(qwen3, data / "hard.jsonl", tmp_path, packed=False)[0, 0]
    with pytest.raises(DynamicOutputShapeException):
        take_step(qwen3, padded, False, 0.0, attn="sdpa")
