"""torch.compile for the backbone's layers: norms, rotary positions, gates and residuals in fused kernels.

One layer class is compiled once, for any number of tokens; attention stays outside, so that how a row is packed never
makes it compile again.
"""

import copy

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModel

from gritlm.models.attention import PACKED, packed_attention
from gritlm.models.embedder import Embedder


def compile_layers(embedder: Embedder, device: torch.device, bf16: bool = False, **options) -> str:
    """Compile the layers in place, once a small model of the same layers has shown that it works on this machine.

    Args:
        embedder: its backbone's layers are compiled; it need not be on its device yet.
        device: where it will run.
        bf16: it will run under bfloat16 autocast.
        options: of `torch.compile`: backend, mode.
    Returns:
        "", or why the layers were left as they are: torch.compile failed, or gave other numbers.
    """
    AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))
    plain, compiled = _small(embedder, device), _small(embedder, device)
    compiled.load_state_dict(plain.state_dict())
    _compile(compiled, options)
    wanted = _vectors_and_gradient(plain, bf16)
    try:
        found = _vectors_and_gradient(compiled, bf16)
    except Exception as error:  # compilers fail in many ways, and the layers run without
        return f"{type(error).__name__}: {' '.join(str(error).split()[:40])}"
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True))
    if not error <= (5e-2 if bf16 else 1e-4):
        return f"compiled layers differ from plain ones by {error:.0e} in relative norm"
    _compile(embedder, options)
    return ""


def uncompile_layers(embedder: Embedder) -> None:
    for layer in embedder.backbone.layers:
        layer._compiled_call_impl = None  # what `Module.compile` sets; torch has no public way back


def _compile(embedder: Embedder, options: dict) -> None:
    for layer in embedder.backbone.layers:
        layer.compile(dynamic=True, **options)


def _small(embedder: Embedder, device: torch.device) -> Embedder:
    """The same, with random weights, one layer and a small vocabulary."""
    config = copy.deepcopy(embedder.config)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 64, None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with torch.random.fork_rng(devices=[]):
        backbone = AutoModel.from_config(config, dtype=torch.float32, attn_implementation=config._attn_implementation)
    return Embedder(backbone).to(device).train()


def _vectors_and_gradient(embedder: Embedder, bf16: bool) -> list[Tensor]:
    device = next(embedder.parameters()).device
    lengths = torch.tensor([9, 5, 5], device=device)
    ids = torch.arange(19, device=device)
    chunk = {"lengths": lengths, "prompt_lengths": torch.zeros_like(lengths)}
    if embedder.packed:
        chunk |= {"input_ids": ids, "equal_length_runs": ((1, 9), (2, 5))}
    else:
        chunk["input_ids"] = ids[:9].expand(3, -1).contiguous()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                first = embedder(**chunk)
            vectors = embedder(**chunk)
        (vectors * torch.linspace(-1, 1, vectors.shape[1], device=device)).sum().backward()
    return [first, vectors.detach(), torch.cat([p.grad.flatten() for p in embedder.parameters()])]
