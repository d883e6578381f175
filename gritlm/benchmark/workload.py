"""What a benchmark is made of: the same work for every side, clocks, and the machine's own rate.

No network: a model by name from its config with random weights, texts from the machine's own Python or a file.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import AutoModel, PreTrainedConfig, Qwen2Config, Qwen3Config, set_seed

from gritlm.data.batch_plan import Plan
from gritlm.data.batches import BatchBuilder
from gritlm.data.records import RecordSet, load_records
from gritlm.data.stdlib_pairs import collect
from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.chunks import ChunkConfig
from gritlm.models.embedder import Embedder
from gritlm.models.text import TextContract
from gritlm.models.tiny import build_tokenizer
from gritlm.models.tokenizer import TextTokenizer, load_tokenizer

TEMPERATURE = 0.05
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
MODELS = {
    "tiny": (Qwen3Config, (256, 768, 4, 8, 4), {"head_dim": 32, "vocab_size": 8192}),
    "qwen2.5-0.5b": (Qwen2Config, (896, 4864, 24, 14, 2), {"vocab_size": 151936}),
    "qwen2.5-1.5b": (Qwen2Config, (1536, 8960, 28, 12, 2), {"vocab_size": 151936}),
    "qwen3-0.6b": (Qwen3Config, (1024, 3072, 28, 16, 8), {"head_dim": 128, "vocab_size": 151936}),
    "qwen3-1.7b": (Qwen3Config, (2048, 6144, 28, 16, 8), {"head_dim": 128, "vocab_size": 151936}),
    "qwen2.5-7b": (Qwen2Config, (3584, 18944, 28, 28, 4), {"vocab_size": 152064}),
    "qwen3-4b": (Qwen3Config, (2560, 9728, 36, 32, 8), {"head_dim": 128, "vocab_size": 151936}),
    "qwen3-8b": (Qwen3Config, (4096, 12288, 36, 32, 8), {"head_dim": 128, "vocab_size": 151936}),
}


# ---- the work


@dataclass
class Task:
    """The same model and texts for every side."""

    folder: Path
    records: RecordSet
    text_tokenizer: TextTokenizer
    plan: Plan
    group: int
    device: torch.device
    bf16: bool

    def builder(self, chunking: ChunkConfig) -> BatchBuilder:
        return BatchBuilder(self.plan, [self.records], self.text_tokenizer, self.group, chunking)

    def embedder(self, attn_implementation: str) -> Embedder:
        folder = str(self.folder / "model")
        return Embedder(load_backbone(folder, load_config(folder), attn_implementation)).to(self.device)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def make_task(folder: Path, args: argparse.Namespace) -> Task:
    """Queries and passages of real code or of a given file; every text stands once, so that losses can be compared."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    limit = args.max_len
    if args.lengths not in ("stdlib",) and not args.lengths.startswith("uniform:"):
        (records,) = load_records(args.lengths, folder / "cache")
        texts = [record.query.text for record in map(records.__getitem__, range(min(len(records), 2000)))]
    else:
        pairs, _ = collect(max_pairs=0)
        texts = [text for pair in pairs for text in pair]
        needed, group = 2 * args.queries, args.group
        codes = [code for _, code in pairs]
        if args.lengths.startswith("uniform:"):
            limit = int(args.lengths.split(":")[1])
            codes = ["\n".join(codes[i : i + 40]) for i in range(len(codes))]  # each longer than the limit
        summaries = codes[::-1] if args.lengths.startswith("uniform:") else [summary for summary, _ in pairs]
        stride = max(1, len(pairs) // (needed * (group + 1)))

        def text(source: list[str], number: int) -> str:
            again, place = divmod(number * stride, len(source))
            return f"{again} {source[place]}" if again else source[place]

        with open(folder / "pairs.jsonl", "w") as out:
            for row in range(needed):
                passages = [text(codes, row + part * needed) for part in range(group)]
                out.write(json.dumps({"query": text(summaries, row), "pos": passages[:1], "neg": passages[1:]}) + "\n")
        (records,) = load_records(folder / "pairs.jsonl", folder / "cache")
    build_model(folder / "model", args.model, texts)
    contract = TextContract(query_max_len=limit, passage_max_len=limit)
    text_tokenizer = TextTokenizer(load_tokenizer(str(folder / "model"), contract), contract)
    plan = Plan([records.name], [len(records)], args.queries, seed=0)
    return Task(folder, records, text_tokenizer, plan, args.group, device, args.bf16)


def model_config(name: str) -> PreTrainedConfig:
    """One of MODELS, attending both ways."""
    config_class, sizes, more = MODELS[name]
    config = config_class(**dict(zip(SIZES, sizes, strict=True)), **more, max_position_embeddings=32768)
    config.is_causal = False
    return config


def build_model(folder: Path, name: str, texts: list[str]) -> None:
    build_tokenizer(folder, texts, 8192)
    set_seed(0)
    AutoModel.from_config(model_config(name)).save_pretrained(folder)


# ---- measuring


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory_in_use(device: torch.device) -> int:
    """Bytes: allocated on the device, or this process's resident ones."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else psutil.Process().memory_info().rss


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew


def read_peak(device: torch.device) -> float:
    """Bytes: allocated on the device at the most, or this process's high-water mark."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def matrix_rate(device: torch.device, bf16: bool) -> float:
    """Floating-point operations a second of a large square matrix product, the best of some."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best = float("inf")
    for _ in range(6):
        synchronize(device)
        started = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def useful_flops(task: Task, lengths: np.ndarray) -> float:
    """What one forward and backward need at least: 6NT for the N non-embedding weights, and 12 for attention."""
    config = load_config(str(task.folder / "model"))
    heads = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    return 6 * weights * lengths.sum() + 12 * config.num_hidden_layers * heads * (lengths.astype(float) ** 2).sum()
