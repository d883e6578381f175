"""`gritlm benchmark predict`: the time of a chunk on a GPU, from what it computes and moves, counted without a GPU.

The model's code runs on tensors that have shapes and no data. Products and attention take the time of their arithmetic.
All other operators take the time of their memory traffic. The speeds are those of `GPUS`. Operators are not fused: the
prediction is of layers that are not compiled.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModel, PreTrainedConfig

from gritlm.benchmark.contestants import CHECKPOINTING, set_checkpointing
from gritlm.benchmark.memory import KINDS
from gritlm.benchmark.workload import model_config, useful_flops
from gritlm.errors import UserError
from gritlm.models.attention import PACKED
from gritlm.models.embedder import Embedder
from gritlm.models.text import TextContract

# Operators that only make a tensor or another view of one.
FREE = ("detach", "empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "reshape", "alias")
HOST = 30e-6  # seconds in which Python starts one kernel


class GPU(NamedTuple):
    """Speeds that programs reach: FLOP/s of bfloat16 products and of attention, bytes/s. `peak` is its datasheet's."""

    products: float
    attention: float
    memory: float
    peak: float


# Measured on an H200, see benchmarks.md; for the others the same shares of their datasheets.
GPUS = {
    "h200": GPU(743e12, 111e12, 4.2e12, 989e12),
    "h100": GPU(743e12, 111e12, 2.9e12, 989e12),
    "a100": GPU(234e12, 35e12, 1.8e12, 312e12),
    "l20": GPU(90e12, 13e12, 0.76e12, 119.5e12),
}


@dataclass
class Work:
    """Of a forward and a backward: kernels, bytes read and written, FLOPs of products and of attention."""

    kernels: int = 0
    bytes: int = 0
    products: int = 0
    attention: float = 0.0


class CountWork(TorchDispatchMode):
    """Adds up the work of all operators under it, and the bytes by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.work, self.bytes_of = Work(), Counter[str]()

    def __torch_dispatch__(
        self,
        operator: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        op: Any = operator
        name = op._schema.name.rpartition("::")[2]
        tensors = {id(t): t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}
        if op.is_view or name in FREE or not any(isinstance(t, Tensor) for t in tree_leaves(result)):
            return result
        self.work.kernels += 1
        if "attention" in name:  # arithmetic; its traffic is small beside it
            query, *_ = (t for t in tree_leaves(args) if isinstance(t, Tensor) and t.dim() == 4)
            self.work.attention += 4 * query.numel() * query.shape[2] * (2.5 if "backward" in name else 1)
            return result
        moved = sum(t.numel() * t.element_size() for t in tensors.values())
        flops = flop_registry.get(op.overloadpacket)
        if flops is not None:
            self.work.products += flops(*args, **(kwargs or {}), out_val=result)
        else:
            self.work.bytes += moved
            self.bytes_of[name] += moved
        return result


def count_work(
    config: PreTrainedConfig, tokens: int, length: int, checkpointing: str, second_forward: bool
) -> tuple[Work, Counter[str]]:
    """The work of a packed chunk of equally long texts under bfloat16 autocast, and its bytes by operator.

    Args:
        second_forward: GradCache encodes the chunk once more, without a graph.
    """
    texts = tokens // length
    with FakeTensorMode():
        backbone = AutoModel.from_config(config, dtype=torch.float32, attn_implementation=PACKED)
        model = Embedder(backbone, TextContract()).train()
        set_checkpointing(model, checkpointing)
        ids, lengths = torch.zeros(texts * length, dtype=torch.long), torch.full((texts,), length)
        with CountWork() as count:
            for graph in (False, True) if second_forward else (True,):
                with torch.set_grad_enabled(graph), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                    vectors = model(ids, lengths, torch.zeros_like(lengths), equal_length_runs=((texts, length),))
            vectors.backward(torch.zeros_like(vectors))
    return count.work, count.bytes_of


def measure_prediction(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return the work and the predicted time of a full chunk, kept or recomputed, on each GPU."""
    config = model_config(args.model)
    tokens = args.chunk_tokens // args.max_len * args.max_len
    if not tokens:
        raise UserError(f"--chunk_tokens {args.chunk_tokens}: wanted at least --max_len {args.max_len}")
    print(f"{args.model}, bf16 autocast, not compiled, a chunk of {tokens} tokens in texts of {args.max_len}")
    useful, report = useful_flops(config, torch.full((tokens // args.max_len,), args.max_len).numpy()), {}
    kinds = [(kind, name, False) for kind, name in zip(CHECKPOINTING, KINDS, strict=True)]
    for checkpointing, name, second in [*kinds, ("none", "encoded twice", True)]:
        work, bytes_of = count_work(config, tokens, args.max_len, checkpointing, second)
        report[name] = asdict(work) | {"predicted": {gpu: seconds(work, speeds) for gpu, speeds in GPUS.items()}}
        print(
            f"  {name}: {work.kernels} kernels, {work.bytes / 1e9:.0f} GB moved beside products, "
            f"{work.products / 1e12:.1f} TFLOP in products, {work.attention / 1e12:.1f} in attention"
        )
        for gpu, speeds in GPUS.items():
            taken = seconds(work, speeds)
            parts = {n: taken[n] for n in ("memory", "products", "attention")}
            print(
                f"    {gpu}: {taken['all']:.3f} s, MFU {useful / taken['all'] / speeds.peak:.0%}; "
                f"{', '.join(f'{n} {s:.3f}' for n, s in parts.items())}; starting kernels {taken['host']:.3f}"
            )
        if name == KINDS[0]:
            most = ", ".join(f"{operator} {moved / 1e9:.0f} GB" for operator, moved in bytes_of.most_common(6))
            print(f"    most bytes: {most}")
    return report


def seconds(work: Work, gpu: GPU) -> dict[str, float]:
    """The predicted time and its parts. The kernels run one after the other, while Python starts the next ones."""
    parts = {
        "memory": work.bytes / gpu.memory,
        "products": work.products / gpu.products,
        "attention": work.attention / gpu.attention,
    }
    host = work.kernels * HOST
    return parts | {"host": host, "all": max(sum(parts.values()), host)}
