"""Linear layers by oneDNN: the values of float64, every family, and what stays plain."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import make_embedder, relative
from torch import nn
from transformers import AttentionInterface, AutoModel

from gritlm.models import cpu_linear
from gritlm.models.attention import packed_attention
from gritlm.models.compiled import _vectors_and_gradient, compile_layers
from gritlm.models.cpu_linear import (
    DIRECTIONS,
    ONEDNN,
    TORCH,
    CPULinear,
    choose_products,
    measure_products,
    products_of,
    use_products,
)
from gritlm.models.embedder import Embedder
from gritlm.models.families import FAMILIES, model_options, tiny_config
from gritlm.models.text import TextContract

CPU = torch.device("cpu")


@pytest.fixture
def any_width(monkeypatch):
    """Replace the narrow layers of tiny models, too."""
    monkeypatch.setattr(cpu_linear, "NARROW", 1)


def gradients_of(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    output = layer(x)
    return [output.detach(), *torch.autograd.grad(output, [x, *layer.parameters()], gradient)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out_width, in_width", [(64, 192), (192, 64), (80, 80)])
@pytest.mark.parametrize("directions", [DIRECTIONS, DIRECTIONS[:1], DIRECTIONS[1:2], DIRECTIONS[2:]])
@pytest.mark.parametrize("tokens", [3, 1100])
def test_values_of_float64(out_width, in_width, bias, directions, tokens):
    torch.manual_seed(0)
    layer = nn.Linear(in_width, out_width, bias)
    exact = nn.Linear(in_width, out_width, bias).double()
    exact.load_state_dict(layer.state_dict())
    names = list(layer.state_dict())
    use_products(layer, directions)
    assert type(layer) is CPULinear
    assert products_of(layer) == list(directions)
    assert list(layer.state_dict()) == names
    plain = torch.randn(1, tokens, in_width), torch.randn(1, tokens, out_width)
    transposed = [value.mT.contiguous().mT for value in plain]
    expanded = [value[:, :1].expand_as(value) for value in plain]
    for x, gradient in (plain, transposed, expanded):
        wanted = gradients_of(exact, x.double(), gradient.double())
        for a, b in zip(gradients_of(layer, x, gradient), wanted, strict=True):
            assert a.shape == b.shape
            assert relative(a.double(), b) < 1e-5  # equal rows add up with a bias of the rounding
    use_products(layer, [])
    assert type(layer) is nn.Linear


WRONG_LAYOUTS = (  # of a square layer, with the right shape
    lambda x, weight: x @ weight,
    lambda gradient, weight: gradient @ weight.t(),
    lambda gradient, x: x.t() @ gradient,
)


@pytest.mark.parametrize("direction", range(3))
def test_control_a_wrong_layout_is_noticed_and_leaves_torch(monkeypatch, direction):
    layer = nn.Linear(96, 96)
    assert measure_products(layer)[1] == ""
    monkeypatch.setattr(cpu_linear, "ONEDNN", (*ONEDNN[:direction], WRONG_LAYOUTS[direction], *ONEDNN[direction + 1 :]))
    chosen, line = choose_products(layer)
    assert chosen == []
    assert "its products differ by" in line


def test_a_torch_without_the_operator(monkeypatch):
    monkeypatch.delattr(torch.ops.mkldnn, "_linear_pointwise", raising=False)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    chosen, line = choose_products(nn.Linear(96, 96))
    assert chosen == []
    assert "oneDNN cannot be used (AttributeError" in line


def test_not_faster(monkeypatch):
    monkeypatch.setattr(cpu_linear, "ONEDNN", TORCH)
    monkeypatch.setattr(cpu_linear, "GAIN", 1000)
    chosen, line = choose_products(nn.Linear(96, 96))
    assert chosen == []
    assert line.startswith("oneDNN for nothing (its speed by torch.mm's: forward")


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_every_family(kind, any_width):
    config = tiny_config(kind)
    torch.manual_seed(0)
    backbone = AutoModel.from_config(config, dtype=torch.float32, attn_implementation="sdpa", **model_options(config))
    model = Embedder(backbone, TextContract()).train()
    plain = _vectors_and_gradient(model, bf16=False)
    use_products(model, DIRECTIONS)
    assert any(isinstance(layer, CPULinear) for layer in model.modules())
    for a, b in zip(_vectors_and_gradient(model, bf16=False), plain, strict=True):
        assert relative(a, b) < 1e-5


class Other(nn.Linear):
    """A layer of somebody else's."""


def test_what_stays_plain():
    model = nn.Sequential(nn.Linear(64, 64), Other(64, 64), nn.Linear(64, 16), nn.Linear(64, 64).bfloat16())
    use_products(model, DIRECTIONS)
    assert [type(layer) for layer in model] == [CPULinear, Other, nn.Linear, nn.Linear]
    assert choose_products(nn.Sequential(*model[1:])) == ([], "")
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0](torch.randn(70, 64)).dtype == torch.bfloat16


def test_a_frozen_layer_keeps_no_input():
    """As with torch: else a LoRA run would hold the input of each frozen matrix."""
    kept = {}
    for trained in (True, False):
        layer, saved = nn.Linear(64, 64, bias=False).requires_grad_(trained), []
        use_products(layer, DIRECTIONS)
        with torch.autograd.graph.saved_tensors_hooks(lambda value, saved=saved: saved.append(value) or value, id):
            layer(torch.randn(70, 64, requires_grad=True))
        kept[trained] = len(saved)
    assert kept == {True: 2, False: 1}


@pytest.mark.long
def test_compiled_layers_keep_the_products(qwen3, any_width):
    try:
        model = make_embedder(qwen3).train()
        plain = _vectors_and_gradient(model, bf16=False)
        use_products(model, DIRECTIONS)
        torch._dynamo.reset()
        assert compile_layers(model, CPU, backend="aot_eager") == ""
        for a, b in zip(_vectors_and_gradient(model, bf16=False), plain, strict=True):
            assert relative(a, b) < 1e-5
    finally:
        AttentionInterface.register("packed", packed_attention)


LENGTHS = """
import torch
from gritlm.models.cpu_linear import product

def resident():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) / 1024

torch.set_num_threads(1)
rows, weight = torch.randn(1100, 64), torch.randn(128, 64)
product(rows, weight)
before = resident()
for count in range(64, 1100):
    product(rows[:count], weight)
print(resident() - before)
"""


@pytest.mark.long
@pytest.mark.parametrize(("kept", "least", "most"), [(None, 0, 220), ("1024", 300, 2000)], ids=["ours", "its default"])
def test_products_of_many_lengths_keep_little_memory(kept, least, most):
    """MB. With oneDNN's own default, the control, each of 1,036 lengths keeps its compiled product."""
    env = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    env |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": kept, "LRU_CACHE_CAPACITY": kept} if kept else {}
    done = subprocess.run([sys.executable, "-c", LENGTHS], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert least <= float(done.stdout) < most
