"""Time, memory and machine use of a training step, and, in the same process, of a peer doing the same work.

No network: a model by name from its config with random weights, texts from the machine's own Python or a file.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import AutoModel, Qwen2Config, Qwen3Config, set_seed
from transformers import __version__ as transformers_version

from gritlm.data.collator import BatchBuilder, Chunking, TextContract, TextEncoder, load_tokenizer, to_device
from gritlm.data.plan import Plan
from gritlm.data.records import RecordSet, load_records
from gritlm.engines import SingleEngine
from gritlm.errors import UserError, quieten, run_verb
from gritlm.gradcache import ActivationMemory, two_pass_step
from gritlm.model_folder import save_model_folder
from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.embedder import Embedder
from gritlm.objective import ContrastiveBatch, Objective
from gritlm.quickstart import build_tokenizer, collect

EXAMPLES = """examples:
  gritlm benchmark --compare sentence-transformers
  gritlm benchmark --attn_implementation packed sdpa --activation_memory 0 8 --rounds 3
  gritlm benchmark --model qwen3-0.6b --queries 2048 --bf16 --chunk_tokens 65536 --activation_memory 0 auto
  gritlm benchmark --lengths uniform:256 --compare sentence-transformers --json out.json"""

TEMPERATURE = 0.05
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
MODELS = {
    "tiny": (Qwen3Config, (256, 768, 4, 8, 4), {"head_dim": 32, "vocab_size": 8192}),
    "qwen2.5-0.5b": (Qwen2Config, (896, 4864, 24, 14, 2), {"vocab_size": 151936}),
    "qwen2.5-1.5b": (Qwen2Config, (1536, 8960, 28, 12, 2), {"vocab_size": 151936}),
    "qwen3-0.6b": (Qwen3Config, (1024, 3072, 28, 16, 8), {"head_dim": 128, "vocab_size": 151936}),
    "qwen3-1.7b": (Qwen3Config, (2048, 6144, 28, 16, 8), {"head_dim": 128, "vocab_size": 151936}),
    "qwen3-4b": (Qwen3Config, (2560, 9728, 36, 32, 8), {"head_dim": 128, "vocab_size": 151936}),
}
PEER_SETTINGS = [{"mini_batch_size": size} for size in (4, 8, 16, 32)]
PEER_SETTINGS += [{"mini_batch_num_tokens": tokens} for tokens in (2048, 8192)]


# ---- the work


@dataclass
class Task:
    """The same model and texts for every side."""

    folder: Path
    records: RecordSet
    encoder: TextEncoder
    plan: Plan
    group: int
    device: torch.device
    bf16: bool

    def builder(self, chunking: Chunking) -> BatchBuilder:
        return BatchBuilder(self.plan, [self.records], self.encoder, self.group, chunking)

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
    encoder = TextEncoder(load_tokenizer(str(folder / "model"), contract), contract)
    plan = Plan([records.name], [len(records)], args.queries, seed=0)
    return Task(folder, records, encoder, plan, args.group, device, args.bf16)


def build_model(folder: Path, name: str, texts: list[str]) -> None:
    config_class, sizes, more = MODELS[name]
    build_tokenizer(folder, texts, 8192)
    config = config_class(**dict(zip(SIZES, sizes, strict=True)), **more, max_position_embeddings=32768)
    set_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)


# ---- the sides


@dataclass
class Side:
    """One way to do the work: `step` leaves the gradient in `model` and returns the loss."""

    model: torch.nn.Module
    step: Callable[[], torch.Tensor]
    seconds: list[float] = field(default_factory=list)
    parts: Counter = field(default_factory=Counter)
    peak: float = 0.0
    loss: float = 0.0

    def gradient(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten().cpu() for p in self.model.parameters()])


def our_side(task: Task, embedder: Embedder, chunking: Chunking, memory: str) -> Side:
    """One step as the trainer takes it, tokenisation included."""
    builder, engine, objective = task.builder(chunking), SingleEngine(embedder), Objective(TEMPERATURE)
    activation_memory = ActivationMemory(memory, task.device)
    forward = embedder.forward
    if task.bf16:
        embedder.forward = torch.autocast(task.device.type, torch.bfloat16)(forward)

    def step() -> torch.Tensor:
        embedder.zero_grad()
        last = time.perf_counter()

        def mark(part: str) -> None:
            nonlocal last
            synchronize(task.device)
            now = time.perf_counter()
            side.parts[part] += now - last
            last = now

        batch = builder[0, 0]
        layout = ContrastiveBatch(**to_device(batch["layout"], task.device))
        chunks = [to_device(chunk, task.device) for chunk in batch["chunks"]]
        mark("data")
        return two_pass_step(engine, chunks, lambda vectors: objective(vectors, layout), mark, activation_memory).loss

    side = Side(embedder, step)
    return side


def peer_side(task: Task, **options) -> Side:
    """The same batch through sentence-transformers' CachedMultipleNegativesRankingLoss, tokenisation included."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

    model = SentenceTransformer(str(task.folder / "served"), device=str(task.device))
    loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, **options)
    columns: list[list[str]] = [[] for _ in range(1 + task.group)]
    for dataset, row in task.plan.batch(0, 0).rows:
        record = task.records[row]
        _, draw = task.plan.draw(0, 0, dataset, row, 1, len(record.negatives), task.group - 1)
        texts = [record.query, record.positives[0], *(record.negatives[i] for i in draw)]
        for column, text in zip(columns, texts, strict=True):
            column.append(text.text)

    def step() -> torch.Tensor:
        model.zero_grad()
        with task.autocast():
            value = loss([to_device(model.preprocess(column), task.device) for column in columns], None)
        value.backward()
        return value.detach()

    return Side(model, step)


# ---- measuring


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


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


def measure(side: Side, device: torch.device, count: bool) -> None:
    """Take a step; write it down where `count`."""
    reset_peak(device)
    synchronize(device)
    started = time.perf_counter()
    loss = side.step()
    synchronize(device)
    taken = time.perf_counter() - started
    side.loss = loss.item()
    if count:
        side.seconds.append(taken)
        side.peak = max(side.peak, read_peak(device))
    else:
        side.parts.clear()


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


# ---- the verb


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gritlm benchmark",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--lengths", default="stdlib", help="stdlib (default), uniform:N tokens, or a file of rows")
    parser.add_argument("--queries", type=int, default=64, help="default 64")
    parser.add_argument("--group", type=int, default=4, help="passages per query, default 4")
    parser.add_argument("--max_len", type=int, default=512, help="tokens, default 512")
    parser.add_argument("--chunk_tokens", type=int, default=4096, help="default 4096")
    parser.add_argument("--attn_implementation", nargs="+", default=["packed"], help="one or more, default packed")
    parser.add_argument(
        "--activation_memory", nargs="+", default=["0"], help="GB kept, auto or 0; one or more, default 0"
    )
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, default 5; medians are reported")
    parser.add_argument("--compare", choices=("sentence-transformers",), help="time the peer, at its best setting")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args(argv)
    if args.queries < 2 or args.group < 1 or args.rounds < 1:
        raise UserError("wanted at least 2 --queries, 1 passage a --group, and 1 of --rounds")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    quieten()
    with tempfile.TemporaryDirectory() as name:
        task = make_task(Path(name), args)
        report = run(task, args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def run(task: Task, args: argparse.Namespace) -> dict:
    sides: dict[str, Side] = {}
    for implementation in args.attn_implementation:
        embedder = task.embedder(implementation)
        if args.gradient_checkpointing:
            embedder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        chunking = Chunking(args.chunk_tokens, embedder.packed)
        for memory in args.activation_memory:
            sides[f"gritlm {implementation}, keeps {memory}"] = our_side(task, embedder, chunking, memory)
    if args.compare:
        save_model_folder(embedder, task.encoder, task.folder / "served")
        tried = {}
        for options in PEER_SETTINGS:
            side = peer_side(task, **options)
            measure(side, task.device, count=True)
            ((option, value),) = options.items()
            tried[f"{args.compare} {option} {value}"] = side
        best = min(tried, key=lambda name: tried[name].seconds[0])
        print(
            "peer, one step each: "
            + ", ".join(f"{name.split(' ', 1)[1]} {s.seconds[0]:.1f} s" for name, s in tried.items())
        )
        sides[best] = tried[best]
        sides[best].seconds.clear()
    base = psutil.Process().memory_info().rss if task.device.type == "cpu" else torch.cuda.memory_allocated()
    for number in range(args.rounds + 2):  # two rounds warm up; auto keeps nothing in the first
        for side in sides.values():
            measure(side, task.device, count=number > 1)
    return say(task, args, sides, base)


def say(task: Task, args: argparse.Namespace, sides: dict[str, Side], base: float) -> dict:
    batch = task.builder(Chunking(args.chunk_tokens, merge=False))[0, 0]
    lengths = torch.cat([chunk["lengths"] for chunk in batch["chunks"]]).numpy()
    rate, flops = matrix_rate(task.device, args.bf16), useful_flops(task, lengths)
    device = torch.cuda.get_device_name() if task.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, transformers {transformers_version}, {device}, {platform.machine()}")
    print(
        f"{args.model}, {args.queries} queries x {args.group} passages, {len(lengths)} texts, {lengths.sum()} tokens "
        f"(median {np.median(lengths):.0f}, longest {lengths.max()}); matrix products at {rate / 1e9:.0f} GFLOP/s: "
        f"{flops / rate:.2f} s a step at best"
    )
    first = next(iter(sides.values()))
    report: dict = {"arguments": {k: str(v) for k, v in vars(args).items()}, "limit_s": flops / rate, "sides": {}}
    for name, side in sides.items():
        median = statistics.median(side.seconds)
        ratios = [b / a for a, b in zip(first.seconds, side.seconds, strict=True)]
        found = {
            "s_per_step": median,
            "tokens_per_s": int(lengths.sum() / median),
            "pairs_per_s": args.queries / median,
            "mfu": flops / median / rate,
            "peak_above_model_gb": (side.peak - base) / 1e9,
            "loss": side.loss,
            "times_the_first": statistics.median(ratios),
            "parts": {part: seconds / len(side.seconds) for part, seconds in side.parts.items()},
        }
        if side is not first and side.model is not first.model:
            ours, theirs = first.gradient(), side.gradient()
            found["gradients_differ_by"] = ((ours - theirs).norm() / theirs.norm()).item()
        report["sides"][name] = found
        print(
            f"  {name:42} {median:7.2f} s/step  {found['tokens_per_s']:8d} tokens/s  MFU {found['mfu']:4.0%}  "
            f"peak +{found['peak_above_model_gb']:.2f} GB  loss {side.loss:.6f}"
            + (f"  x{found['times_the_first']:.2f}" if side is not first else "")
            + (f"  gradients differ by {found['gradients_differ_by']:.1e}" if "gradients_differ_by" in found else "")
        )
        if side.parts:
            print("    " + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in found["parts"].items()))
    return report


if __name__ == "__main__":
    sys.exit(run_verb(main))
