"""torch.compile of the layers: the same numbers, compiled once for any packing, and given up where it fails."""

import pytest
import torch
from helpers import NEEDS_A_COMPILER, flat_gradient, make_builder, make_embedder, relative
from torch._dynamo.utils import counters

from gritlm.models import compiled
from gritlm.models.compiled import compile_layers
from gritlm.training.engines import Engine
from gritlm.training.gradcache import ActivationMemory, two_pass_step
from gritlm.training.objective import ContrastiveBatch, Objective

CPU = torch.device("cpu")


def step(model, batch, kept: str) -> float:
    contrastive = ContrastiveBatch(**batch["contrastive"])
    model.zero_grad()
    memory = ActivationMemory(kept, CPU)
    return two_pass_step(Engine(model), batch["chunks"], lambda v: Objective(0.05)(v, contrastive), memory=memory)


@NEEDS_A_COMPILER
def test_the_same_step_without_compiling_again(qwen3, data, tmp_path):
    builder = make_builder(qwen3, data / "hard.jsonl", tmp_path)
    plain, model = make_embedder(qwen3).train(), make_embedder(qwen3).train()
    torch._dynamo.reset()
    assert compile_layers(model, CPU) == ""
    assert all(layer._compiled_call_impl is not None for layer in model.backbone.layers)
    graphs = []
    for number in range(4):
        for kept in ("0", "9"):
            batch = builder[0, number]
            wanted, found = step(plain, batch, "0"), step(model, batch, kept)
            assert abs(found - wanted) / wanted < 1e-5
            assert relative(flat_gradient(model), flat_gradient(plain)) < 1e-5
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1] == graphs[-1], "a new packing made it compile again"


@pytest.mark.parametrize("fault", ["fails", "differs"])
def test_it_goes_on_without(qwen3, fault, monkeypatch):
    """A compiler that fails, and one whose code computes something else."""

    def backend(graph, inputs):
        if fault == "fails":
            raise RuntimeError("no compiler here")
        return lambda *args: tuple(x * 1.1 if torch.is_tensor(x) else x for x in graph(*args))

    torch._dynamo.reset()
    model = make_embedder(qwen3)
    problem = compile_layers(model, CPU, backend=backend)
    assert ("no compiler here" in problem) if fault == "fails" else ("differ from plain ones by" in problem)
    assert all(layer._compiled_call_impl is None for layer in model.backbone.layers)


def test_it_can_be_taken_back(qwen3):
    model = make_embedder(qwen3)
    compiled._compile(model, {"backend": "eager"})
    compiled.uncompile_layers(model)
    assert all(layer._compiled_call_impl is None for layer in model.backbone.layers)
