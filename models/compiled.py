"""torch.compile for the backbone's layers: fused kernels for norms, rotary positions, gates and residuals.

The layer class is compiled once, for any number of tokens. Attention stays outside the graph, so another packing of a
row does not recompile it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from gritlm.models.attention import PACKED, packed_attention
from gritlm.models.cpu_linear import products_of, use_products
from gritlm.models.embedder import Embedder
from gritlm.models.text import TextContract
from gritlm.models.tiny import one_layer


def compile_layers(embedder: Embedder, device: torch.device, bf16: bool = False, **options: Any) -> str:
    """Compile the layers in place, after a one-layer model of the same kind has passed a test on this machine.

    Args:
        embedder: the model whose layers are compiled; it may still be on another device.
        device: where it will run.
        bf16: whether it will run under bfloat16 autocast.
        options: `torch.compile`'s, such as backend and mode.
    Returns:
        "" on success. Otherwise the layers are unchanged, and this says why: torch.compile failed, or the compiled
        layer gave other numbers.
    """
    AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))
    plain, compiled = _one_layer_model(embedder, device), _one_layer_model(embedder, device)
    compiled.load_state_dict(plain.state_dict())
    use_products(compiled, products_of(embedder))
    _compile(compiled, options)
    wanted = _vectors_and_gradient(plain, bf16)
    try:
        found = _vectors_and_gradient(compiled, bf16)
    except Exception as error:  # a compiler fails in many ways, and training can go on without one
        return f"{type(error).__name__}: {' '.join(str(error).split()[:40])}"
    difference = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True))
    if not difference <= (5e-2 if bf16 else 1e-4):
        return f"compiled layers differ from plain ones by {difference:.0e} in relative norm"
    _compile(embedder, options)
    return ""


def uncompile_layers(embedder: Embedder) -> None:
    """Run the layers as plain modules again."""
    for layer in _layers(embedder):
        layer._compiled_call_impl = None  # set by `Module.compile`; torch has no public way to undo it


def _layers(embedder: Embedder) -> Iterator[nn.Module]:
    lists = (module for module in embedder.backbone.modules() if isinstance(module, nn.ModuleList))
    return next(found for found in lists if len(found) == embedder.config.num_hidden_layers).children()


def _compile(embedder: Embedder, options: dict[str, Any]) -> None:
    for layer in _layers(embedder):
        layer.compile(dynamic=True, **options)


def _one_layer_model(embedder: Embedder, device: torch.device) -> Embedder:
    """One random layer of the same kind; mean pooling uses every token."""
    config = embedder.config
    kind = (getattr(config, "layer_types", None) or [None])[0]
    return Embedder(one_layer(config, kind, config._attn_implementation), TextContract()).to(device).train()


def _vectors_and_gradient(embedder: Embedder, bf16: bool) -> list[Tensor]:
    """Vectors of one chunk without and with a graph, and the gradient of all weights as one vector."""
    device = next(embedder.parameters()).device
    lengths = torch.tensor([9, 5, 5], device=device)
    ids = torch.arange(19, device=device)
    chunk: dict[str, Any] = {"lengths": lengths, "prompt_lengths": torch.zeros_like(lengths)}
    if embedder.packed:
        chunk |= {"input_ids": ids, "equal_length_runs": ((1, 9), (2, 5))}
    else:
        chunk["input_ids"] = ids[:9].expand(3, -1).contiguous()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                without_graph = embedder(**chunk)
            vectors = embedder(**chunk)
        loss = (vectors * torch.linspace(-1, 1, vectors.shape[1], device=device)).sum()
        gradients = torch.autograd.grad(loss, list(embedder.parameters()))
    return [without_graph, vectors.detach(), torch.cat([gradient.flatten() for gradient in gradients])]
