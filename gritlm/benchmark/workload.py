"""What a benchmark runs on: the model and texts that all contestants share, clocks, and the speed of the machine."""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import psutil
import torch
from transformers import AutoModel, PreTrainedConfig, Qwen2Config, Qwen3Config, set_seed

from gritlm.data.batch_plan import Plan
from gritlm.data.batches import BatchBuilder
from gritlm.data.records import RecordSet, load_records
from gritlm.data.stdlib_pairs import Pair, collect
from gritlm.models.attention import PACKED
from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.chunks import ChunkConfig
from gritlm.models.cpu_linear import product
from gritlm.models.embedder import Embedder
from gritlm.models.families import head_width
from gritlm.models.folder import save_model_folder
from gritlm.models.text import TextContract
from gritlm.models.tiny import build_tokenizer
from gritlm.models.tokenizer import TextTokenizer, load_tokenizer

TEMPERATURE = 0.05
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
MODELS: dict[str, tuple[Callable[..., PreTrainedConfig], tuple[int, ...], dict[str, int]]] = {
    "tiny": (Qwen3Config, (256, 768, 4, 8, 4), {"head_dim": 32, "vocab_size": 8192}),
    "qwen2.5-0.5b": (Qwen2Config, (896, 4864, 24, 14, 2), {"vocab_size": 151936}),
    "qwen2.5-1.5b": (Qwen2Config, (1536, 8960, 28, 12, 2), {"vocab_size": 151936}),
    "qwen3-0.6b": (Qwen3Config, (1024, 3072, 28, 16, 8), {"head_dim": 128, "vocab_size": 151936}),
    "qwen3-1.7b": (Qwen3Config, (2048, 6144, 28, 16, 8), {"head_dim": 128, "vocab_size": 151936}),
    "qwen2.5-7b": (Qwen2Config, (3584, 18944, 28, 28, 4), {"vocab_size": 152064}),
    "qwen3-4b": (Qwen3Config, (2560, 9728, 36, 32, 8), {"head_dim": 128, "vocab_size": 151936}),
    "qwen3-8b": (Qwen3Config, (4096, 12288, 36, 32, 8), {"head_dim": 128, "vocab_size": 151936}),
}
T = TypeVar("T")


# ---- the model and the texts


@dataclass
class Workload:
    """What every contestant works on. Picklable.

    folder: holds the model, and what contestants write.
    group: passages per query.
    bf16: run under bfloat16 autocast.
    """

    folder: Path
    records: RecordSet
    text_tokenizer: TextTokenizer
    plan: Plan
    group: int
    device: torch.device
    bf16: bool

    @property
    def served(self) -> Path:
        """The model in the format that other libraries load, once `save_served` has run."""
        return self.folder / "served"

    def save_served(self) -> None:
        save_model_folder(self.embedder(PACKED), self.text_tokenizer, self.served)

    def config(self) -> PreTrainedConfig:
        return load_config(str(self.folder / "model"), "bb")

    def embedder(self, attn_implementation: str) -> Embedder:
        backbone = load_backbone(str(self.folder / "model"), self.config(), attn_implementation)
        return Embedder(backbone, self.text_tokenizer.contract).to(self.device)

    def builder(self, chunking: ChunkConfig) -> BatchBuilder:
        return BatchBuilder(self.plan, [self.records], self.text_tokenizer, self.group, chunking)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


@contextmanager
def make_workload(args: argparse.Namespace) -> Iterator[Workload]:
    """Build the model and the rows in a temporary folder.

    Rows of the standard library contain each text once, so that implementations with and without a mask for repeated
    texts have the same loss.
    """
    uniform = args.lengths.startswith("uniform:")
    limit = int(args.lengths.split(":")[1]) if uniform else args.max_len
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if uniform or args.lengths == "stdlib":
            pairs, _ = collect(max_pairs=0)
            write_rows(folder / "pairs.jsonl", pairs, 2 * args.queries, args.group, uniform)
            (records,) = load_records(folder / "pairs.jsonl", folder / "cache")
            texts = [text for pair in pairs for text in pair]
        else:
            (records,) = load_records(args.lengths, folder / "cache")
            rows = [records[row] for row in range(min(len(records), 2000))]
            texts = [text for row in rows for text in (row.query.text, row.positives[0].text)]
        build_model(folder / "model", args.model, texts)
        contract = TextContract(query_max_len=limit, passage_max_len=limit)
        text_tokenizer = TextTokenizer(load_tokenizer(str(folder / "model"), contract), contract)
        plan = Plan([records.name], [len(records)], args.queries, seed=0)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        yield Workload(folder, records, text_tokenizer, plan, args.group, device, args.bf16)


def write_rows(file: Path, pairs: list[Pair], rows: int, group: int, uniform: bool) -> None:
    """Write rows of a summary and `group` pieces of code, spread over the pairs. No text appears twice.

    Args:
        uniform: join many pieces of code into each text, so that truncation makes all texts equally long.
    """
    queries = [summary for summary, _ in pairs]
    passages = [code for _, code in pairs]
    if uniform:
        passages = ["\n".join(passages[i : i + 40]) for i in range(len(passages))]
        queries = passages[::-1]
    stride = max(1, len(pairs) // (rows * (group + 1)))

    def nth(texts: list[str], number: int) -> str:
        repeat, place = divmod(number * stride, len(texts))
        return f"{repeat} {texts[place]}" if repeat else texts[place]

    with open(file, "w", encoding="utf-8") as out:
        for row in range(rows):
            positive, *negatives = (nth(passages, row + part * rows) for part in range(group))
            out.write(json.dumps({"query": nth(queries, row), "pos": [positive], "neg": negatives}) + "\n")


def model_config(name: str) -> PreTrainedConfig:
    """The config of one of `MODELS`, with bidirectional attention."""
    config_class, sizes, more = MODELS[name]
    config = config_class(**dict(zip(SIZES, sizes, strict=True)), **more, max_position_embeddings=32768)
    config.is_causal = False
    return config


def build_model(folder: Path, name: str, texts: list[str]) -> None:
    """Save one of `MODELS` with random weights, and a tokenizer trained on the texts."""
    build_tokenizer(folder, texts, 8192)
    set_seed(0)
    AutoModel.from_config(model_config(name)).save_pretrained(folder)


# ---- clocks and memory


def measure(function: Callable[[], T], device: torch.device) -> tuple[T, float, float]:
    """Call the function. Returns its result, the seconds that it took, and the peak memory in bytes."""
    reset_peak(device)
    synchronize(device)
    started = time.perf_counter()
    result = function()
    synchronize(device)
    return result, time.perf_counter() - started, read_peak(device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory_in_use(device: torch.device) -> int:
    """Bytes that are allocated on the GPU, or resident in this process."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else psutil.Process().memory_info().rss


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # sets VmHWM to the memory in use now


def read_peak(device: torch.device) -> float:
    """The largest `memory_in_use` since `reset_peak`; NaN on a CPU without /proc."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    (line,) = [line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


# ---- the speed of the machine


def matrix_rate(device: torch.device, bf16: bool) -> float:
    """FLOP/s of a large square matrix product, the best of six; by oneDNN where that is faster than torch.mm."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    seconds = [measure(lambda: a @ a, device)[1] for _ in range(6)]
    if device.type == "cpu" and not bf16:
        with suppress(RuntimeError, AttributeError):  # of a torch without the operator
            seconds += [measure(lambda: product(a, a), device)[1] for _ in range(6)]
    return 2 * size**3 / min(seconds)


def useful_flops(config: PreTrainedConfig, lengths: np.ndarray) -> float:
    """FLOPs of a forward and a backward pass over texts of these lengths, nothing recomputed.

    6NT for N weights without the embeddings and T tokens, and 12 L^2 per layer, head width and text of length L for
    bidirectional attention (Kaplan et al., arXiv 2001.08361; the PaLM paper, arXiv 2204.02311, appendix B).
    """
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    attention = (
        config.num_hidden_layers * config.num_attention_heads * head_width(config) * (lengths.astype(float) ** 2).sum()
    )
    return float(6 * weights * lengths.sum() + 12 * attention)
