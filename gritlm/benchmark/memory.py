"""`gritlm benchmark memory`: the GPU memory of a chunk, counted without a GPU.

The model's code runs on tensors that have shapes and no data, and the bytes of the live tensors are added up.
"""

import argparse
import math
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModel, PreTrainedConfig

from gritlm.benchmark.contestants import CHECKPOINTING, set_checkpointing
from gritlm.benchmark.workload import model_config
from gritlm.errors import UserError
from gritlm.models.attention import PACKED, varlen_backward_bytes
from gritlm.models.embedder import Embedder
from gritlm.models.lora import linear_layers, make_config, match_targets, quantised_bytes
from gritlm.models.text import TextContract
from gritlm.training.arguments import TuningArguments

KINDS = ("as it is", "selective checkpointing", "gradient checkpointing")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors that operators under it returned: `now`, and the `peak`.

    The tensors in `known` and their views are not counted. Not seen: the working memory of a kernel other than
    attention's, and what an allocator loses between tensors.

    Args:
        attention_work: bytes that the backward of attention allocates while it runs.
    """

    def __init__(self, *known: Tensor, attention_work: int = 0):
        super().__init__()
        self.now = self.peak = 0
        self.attention_work = attention_work
        self._live = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self,
        operator: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, result)
        name = operator.__name__
        if name.startswith("_scaled_dot_product") and "_backward" in name:
            self.peak = max(self.peak, self.now + self.attention_work)
        return result

    def _add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._live:
            self._live.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)
        return tensor

    def _remove(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Footprint:
    """Bytes.

    weights: all of them, in float32, or the frozen matrices in 4 bits.
    trained: those of them that have a gradient.
    kept: held by a chunk between its forward and its backward.
    peak: the most that its forward and backward need beyond the weights and their gradient.
    """

    weights: int
    trained: int
    kept: int
    peak: int


def chunk_footprint(
    config: PreTrainedConfig,
    tokens: int,
    length: int,
    bf16: bool = False,
    checkpointing: str = "none",
    adapter: str | None = None,
) -> Footprint:
    """The footprint of a packed chunk of equally long texts, with a model of this config that is not compiled.

    Args:
        tokens: in the chunk, a multiple of `length`.
        length: tokens of each text.
        bf16: run under bfloat16 autocast.
        checkpointing: one of CHECKPOINTING.
        adapter: "lora", or "qlora" whose matrices are made float one at a time; None trains all weights.
    """
    with FakeTensorMode():
        backbone = AutoModel.from_config(config, dtype=torch.float32, attn_implementation=PACKED)
        model = Embedder(backbone, TextContract()).train()
        if adapter:
            endings, _ = match_targets(linear_layers(config), None)
            model.add_adapter(make_config(TuningArguments.lora_r, 1, TuningArguments.lora_dropout, endings))
        set_checkpointing(model, checkpointing)
        found = count_chunk(model, tokens // length, length, bf16)
    if adapter != "qlora":
        return found
    matrices = [math.prod(shape) for shape in linear_layers(config).values()]
    saved = sum(4 * count - quantised_bytes(count) for count in matrices)
    return replace(found, weights=found.weights - saved, peak=found.peak + (2 if bf16 else 4) * max(matrices))


def count_chunk(model: Embedder, texts: int, length: int, bf16: bool = False) -> Footprint:
    """Count one forward and backward of the model, whose tensors may have data or not. Its gradient is dropped."""
    weights = list(model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]

    def drop_gradient(weight: Tensor) -> None:
        weight.grad = None

    # In training the gradient exists before all chunks but the first. A chunk's own is added to it, then freed.
    hooks = [weight.register_post_accumulate_grad_hook(drop_gradient) for weight in trained]
    ids, lengths = torch.zeros(texts * length, dtype=torch.long), torch.full((texts,), length)
    work = varlen_backward_bytes(model.config, texts * length, texts) if bf16 else 0
    with LiveBytes(*weights, attention_work=work) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            vectors = model(ids, lengths, torch.zeros_like(lengths), equal_length_runs=((texts, length),))
        kept = live.now
        vectors.backward(torch.zeros_like(vectors))
    for hook in hooks:
        hook.remove()
    return Footprint(sum(p.nbytes for p in weights), sum(p.nbytes for p in trained), kept, live.peak)


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return the footprint of a full chunk, for each kind of checkpointing."""
    config = model_config(args.model)
    tokens = args.chunk_tokens // args.max_len * args.max_len
    if not tokens:
        raise UserError(
            f"--chunk_tokens {args.chunk_tokens} holds not even one text of --max_len {args.max_len} tokens"
        )
    print(f"{args.model}, {'bf16 autocast' if args.bf16 else 'float32'}, texts of {args.max_len} tokens, packed")
    footprints = {
        name: chunk_footprint(config, tokens, args.max_len, args.bf16, checkpointing, args.adapter)
        for name, checkpointing in zip(KINDS, CHECKPOINTING, strict=True)
    }
    weights, trained = (size / 1e9 for size in (footprints["as it is"].weights, footprints["as it is"].trained))
    form = "with 4-bit matrices" if args.adapter == "qlora" else "in float32"
    print(f"  weights, AdamW's moments, gradient, {form}: {weights + 3 * trained:.1f} GB, on one GPU or with DDP")
    print(
        f"  with FSDP2 or ZeRO-3: {weights + 2 * trained:.1f} GB divided by the GPUs, and on each the whole gradient, "
        f"{trained:.1f} GB, until the last chunk (with --sync_each_chunk yes: divided, too)"
    )
    if args.adapter:
        print(f"  of these, the adapter's: {4 * trained:.2f} GB")
    for name, found in footprints.items():
        print(
            f"  a chunk of {tokens} tokens, {name}: +{found.peak / 1e9:.1f} GB; "
            f"kept for its backward: {found.kept / tokens / 1e6:.2f} MB a token"
        )
    return {name: asdict(found) for name, found in footprints.items()}
