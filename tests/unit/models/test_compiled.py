"""torch.compile of the layers: the same numbers, one compilation for any packing, and plain layers where it fails."""

import pytest
import torch
from helpers import NEEDS_A_COMPILER, flat_gradient, make_embedder, relative
from torch._dynamo.utils import counters
from transformers import AttentionInterface

from gritlm.models.attention import packed_attention
from gritlm.models.chunks import ChunkConfig, make_chunks
from gritlm.models.compiled import compile_layers, uncompile_layers
from gritlm.models.tokenizer import Tokens

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Forget compiled graphs before a test, and put back the attention that `compile_layers` replaces."""
    torch._dynamo.reset()
    yield
    AttentionInterface.register("packed", packed_attention)


def pack(lengths) -> dict:
    texts = [Tokens(torch.randint(1, 600, (length,)).tolist(), 0) for length in lengths]
    (chunk,), _ = make_chunks(texts, ChunkConfig(1000, deduplicate=False), 0)
    return chunk


def run(model, chunk: dict) -> torch.Tensor:
    """The vectors without and with a graph, and the gradient of all weights, as one vector."""
    model.zero_grad()
    with torch.no_grad():
        without_graph = model(**chunk)
    vectors = model(**chunk)
    (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
    return torch.cat([without_graph.flatten(), vectors.detach().flatten(), flat_gradient(model)])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.long, NEEDS_A_COMPILER])])
def test_any_packing_gives_the_same_numbers_and_only_the_first_compiles(qwen3, backend):
    model = make_embedder(qwen3).train()
    assert compile_layers(model, CPU, backend=backend) == ""
    assert all(layer._compiled_call_impl is not None for layer in model.backbone.layers)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for lengths in [(9, 9, 4), (12, 7, 3, 3, 1), (5,), (6, 6)]:
        chunk = pack(lengths)
        compiled = run(model, chunk)
        assert counters["stats"]["unique_graphs"] == graphs
        with torch.compiler.set_stance("force_eager"):
            assert relative(compiled, run(model, chunk)) < 1e-5
    uncompile_layers(model)
    assert all(layer._compiled_call_impl is None for layer in model.backbone.layers)


def test_control_with_attention_in_the_graph_another_packing_compiles_again(qwen3):
    model, graphs = make_embedder(qwen3), []
    for layer in model.backbone.layers:
        layer.compile(dynamic=True, backend="eager")
    for lengths in [(9, 9, 4), (12, 7, 3, 3, 1)]:
        with torch.no_grad():
            model(**pack(lengths))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] < graphs[1]


@pytest.mark.parametrize("fault", ["fails", "differs"])
def test_a_compiler_that_fails_or_gives_other_numbers_leaves_the_layers_plain(qwen3, fault):
    def backend(graph, inputs):
        if fault == "fails":
            raise RuntimeError("no compiler here")
        return lambda *args: tuple(x * 1.1 if torch.is_tensor(x) else x for x in graph(*args))

    model = make_embedder(qwen3)
    problem = compile_layers(model, CPU, backend=backend)
    assert ("no compiler here" in problem) if fault == "fails" else ("differ from plain ones by" in problem)
    assert all(layer._compiled_call_impl is None for layer in model.backbone.layers)
