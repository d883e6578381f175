"""Time, memory and machine use of a training step, of the loss alone, or of encoding; and of a peer doing the same.
Or, with `memory`, what a step takes of a GPU's memory, counted without one.

No network: a model by name from its config with random weights, texts from the machine's own Python or a file. Each way
to take a step has a process of its own, and they take turns. Rounds that are not counted come first.
"""

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import __version__ as transformers_version

from gritlm.benchmark.contestants import OurStep, Side, Work, choose_fastest, difference, save_gradient, take_turn
from gritlm.benchmark.memory import chunk_footprint
from gritlm.benchmark.workload import (
    MODELS,
    Task,
    make_task,
    matrix_rate,
    memory_in_use,
    model_config,
    read_peak,
    reset_peak,
    synchronize,
    useful_flops,
)
from gritlm.cli import quieten, verb_parser
from gritlm.errors import UserError
from gritlm.files import written_aside
from gritlm.gritlm import GritLM
from gritlm.models.chunks import ChunkConfig
from gritlm.models.folder import save_model_folder
from gritlm.training.losses import info_nce

PEER = "sentence-transformers"
EXAMPLES = """examples:
  gritlm benchmark --compare sentence-transformers
  gritlm benchmark --attn_implementation packed sdpa --activation_memory 0 8 --rounds 3
  gritlm benchmark --model qwen3-0.6b --queries 2048 --bf16 --chunk_tokens 65536 --activation_memory 0 auto
  gritlm benchmark --lengths uniform:256 --compare sentence-transformers --json out.json
  gritlm benchmark loss --queries 8192 --passages 32768 --width 256
  gritlm benchmark encode --compare sentence-transformers
  gritlm benchmark memory --model qwen3-4b --bf16 --chunk_tokens 16384"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = verb_parser("benchmark", __doc__, EXAMPLES)
    parser.add_argument("what", nargs="?", choices=("step", "loss", "encode", "memory"), default="step")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--lengths", default="stdlib", help="stdlib (default), uniform:N tokens, or a file of rows")
    parser.add_argument("--queries", type=int, default=64, help="default 64; encode: texts are 10 times as many")
    parser.add_argument("--group", type=int, default=4, help="passages per query, default 4")
    parser.add_argument("--passages", type=int, help="loss: default 4 times the queries")
    parser.add_argument("--width", type=int, default=256, help="loss: of a vector, default 256")
    parser.add_argument("--max_len", type=int, default=512, help="tokens, default 512")
    parser.add_argument("--chunk_tokens", type=int, default=4096, help="default 4096")
    parser.add_argument("--attn_implementation", nargs="+", default=["packed"], help="one or more, default packed")
    parser.add_argument(
        "--activation_memory", nargs="+", default=["0"], help="GB kept, auto or 0; one or more, default 0"
    )
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--torch_compile", nargs="+", choices=("no", "yes"), default=["no"], help="default no")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, default 5; medians are reported")
    parser.add_argument("--compare", choices=(PEER,), help="time the peer, at its best setting")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args(argv)
    if args.queries < 2 or args.group < 1 or args.rounds < 1:
        raise UserError("wanted at least 2 --queries, 1 passage a --group, and 1 of --rounds")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    quieten()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, transformers {transformers_version}, {device}, {platform.machine()}")
    with tempfile.TemporaryDirectory() as folder:
        report = {"step": steps, "loss": losses, "encode": encoding, "memory": memory}[args.what](Path(folder), args)
    if args.json:
        report["arguments"] = {name: str(value) for name, value in vars(args).items()}
        with written_aside(args.json) as aside:
            aside.write_text(json.dumps(report, indent=2) + "\n")
    return 0


# ---- a training step


def steps(folder: Path, args: argparse.Namespace) -> dict:
    task = make_task(folder, args)
    builds: dict[str, Callable[[Task], Work]] = {}
    ways = itertools.product(args.attn_implementation, args.activation_memory, args.torch_compile)
    for attn_implementation, memory, compiled in ways:
        way = OurStep(attn_implementation, memory, args.chunk_tokens, args.gradient_checkpointing, compiled == "yes")
        builds[str(way)] = way
    if args.compare:
        from gritlm.benchmark import sentence_transformers as peer

        save_model_folder(task.embedder("packed"), task.text_tokenizer, folder / "served")
        builds[PEER] = peer.step
    with ExitStack() as stack:
        sides = [stack.enter_context(closing(Side(name, build, task))) for name, build in builds.items()]
        return compare(task, args, sides)


def compare(task: Task, args: argparse.Namespace, sides: list[Side]) -> dict:
    """Rounds of a turn a side; the machine's own rate is the median of one reading a round."""
    for side in sides:
        side.wait_until_built()
    if args.compare:
        best, seconds = sides[-1].ask(choose_fastest)
        sides[-1].name += f" {best}"
        print(f"{PEER}, one step each: {', '.join(f'{name} {taken:.1f} s' for name, taken in seconds.items())}")
    for side in sides:  # auto keeps nothing in the first step
        side.ask(take_turn)
    rates = []
    for number in range(args.rounds + 1):
        rates.append(matrix_rate(task.device, args.bf16))
        for side in sides:
            turn = side.ask(take_turn)
            if number:
                side.turns.append(turn)
    first, *others = sides
    first.ask(save_gradient, task.folder / "gradient")
    for side in others:
        side.differs = side.ask(difference, task.folder / "gradient")
    return say(task, args, sides, statistics.median(rates))


def say(task: Task, args: argparse.Namespace, sides: list[Side], rate: float) -> dict:
    """Print a line a side, and return the report."""
    batch = task.builder(ChunkConfig(args.chunk_tokens, deduplicate=False))[0, 0]
    lengths = torch.cat([chunk["lengths"] for chunk in batch["chunks"]]).numpy()
    flops = useful_flops(task, lengths)
    print(
        f"{args.model}, {args.queries} queries x {args.group} passages, {len(lengths)} texts, {lengths.sum()} tokens "
        f"(median {np.median(lengths):.0f}, longest {lengths.max()}); matrix products at {rate / 1e9:.0f} GFLOP/s: "
        f"{flops / rate:.2f} s a step at best"
    )
    report: dict = {"limit_s": flops / rate, "sides": {}}
    for side in sides:
        median = statistics.median(turn.seconds for turn in side.turns)
        parts = side.turns[0].parts
        found = {
            "s_per_step": median,
            "tokens_per_s": int(lengths.sum() / median),
            "pairs_per_s": args.queries / median,
            "mfu": flops / median / rate,
            "peak_above_model_gb": max(turn.peak for turn in side.turns) / 1e9,
            "loss": side.turns[-1].loss,
            "parts": {part: statistics.median(turn.parts[part] for turn in side.turns) for part in parts},
        }
        line = (
            f"  {side.name:42} {median:7.2f} s/step  {found['tokens_per_s']:8d} tokens/s  MFU {found['mfu']:4.0%}  "
            f"peak +{found['peak_above_model_gb']:.2f} GB  loss {found['loss']:.6f}"
        )
        if side is not sides[0]:
            pairs = zip(sides[0].turns, side.turns, strict=True)
            found["times_the_first"] = statistics.median(turn.seconds / first.seconds for first, turn in pairs)
            found["gradients_differ_by"] = side.differs
            line += f"  x{found['times_the_first']:.2f}  gradients differ by {side.differs:.1e}"
        report["sides"][side.name] = found
        print(line)
        if parts:
            print("    " + ", ".join(f"{part} {taken:.2f} s" for part, taken in found["parts"].items()))
    return report


# ---- the loss alone


def dense_info_nce(queries_BD: Tensor, passages_PD: Tensor, positive_B: Tensor, temperature: float) -> Tensor:
    """What everybody writes: all scores at once."""
    return torch.nn.functional.cross_entropy(queries_BD @ passages_PD.T / temperature, positive_B, reduction="none")


def in_float64(queries_BD: Tensor, passages_PD: Tensor, positive_B: Tensor, temperature: float) -> list[Tensor]:
    """The truth, some queries at a time: the mean loss, and its gradients."""
    q_BD, p_PD = queries_BD.detach().double(), passages_PD.detach().double()
    losses, q_grads, p_grad = [], [], torch.zeros_like(p_PD)
    for q_bD, positive_b in zip(q_BD.split(256), positive_B.split(256), strict=True):
        scores_bP = q_bD @ p_PD.T / temperature
        losses.append(torch.nn.functional.cross_entropy(scores_bP, positive_b, reduction="none"))
        slope_bP = scores_bP.softmax(1)
        slope_bP[torch.arange(len(q_bD)), positive_b] -= 1
        q_grads.append(slope_bP @ p_PD)
        p_grad += slope_bP.T @ q_bD
    scale = 1 / (temperature * len(q_BD))
    return [torch.cat(losses).mean(), torch.cat(q_grads) * scale, p_grad * scale]


def losses(folder: Path, args: argparse.Namespace) -> dict:
    """Tiled against dense, forward and backward; both against float64. The dense one only where it fits easily."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    passages, temperature = args.passages or 4 * args.queries, 0.02
    if passages < args.queries:
        raise UserError(f"--passages {passages}: wanted at least one for each of the {args.queries} queries")
    generator = torch.Generator().manual_seed(0)
    q_BD = torch.randn(args.queries, args.width, generator=generator)
    p_PD = torch.randn(passages, args.width, generator=generator)
    p_PD[: len(q_BD)] += 0.35 * q_BD  # a loss of about 1
    q_BD, p_PD = (torch.nn.functional.normalize(x, dim=1).to(device).requires_grad_() for x in (q_BD, p_PD))
    positive_B = torch.arange(len(q_BD), device=device)
    ways = {"tiled": info_nce}
    if args.queries * passages * 4 < 4e9:
        ways["dense"] = dense_info_nce
        truth = in_float64(q_BD, p_PD, positive_B, temperature)
    report: dict = {name: {"seconds": []} for name in ways}
    print(f"InfoNCE of {args.queries} queries x {passages} passages x {args.width}, float32, forward and backward")
    for number in range(args.rounds + 1):
        for name, way in ways.items():
            q_BD.grad = p_PD.grad = None
            base = memory_in_use(device)
            reset_peak(device)
            synchronize(device)
            started = time.perf_counter()
            value = way(q_BD, p_PD, positive_B, temperature).mean()
            value.backward()
            synchronize(device)
            taken, found = time.perf_counter() - started, report[name]
            found["peak_gb"] = (read_peak(device) - base) / 1e9
            if number or args.rounds == 1:
                found["seconds"].append(taken)
            if len(ways) > 1:
                pairs = zip([value.detach(), q_BD.grad, p_PD.grad], truth, strict=True)
                found["errors"] = [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
        if args.rounds == 1:
            break
    for name, found in report.items():
        errors = "".join(
            f", {what} {error:.0e}"
            for what, error in zip(("loss", "queries' gradient", "passages'"), found.get("errors", ()), strict=False)
        )
        print(
            f"  {name}: {statistics.median(found['seconds']):.2f} s, peak +{found['peak_gb']:.3f} GB"
            + (f"; relative error against float64: {errors[2:]}" if errors else "")
        )
    return report


# ---- encoding


def encoding(folder: Path, args: argparse.Namespace) -> dict:
    """Texts a second of `GritLM.encode`, and of the peer's at the best of its batch sizes."""
    task = make_task(folder, args)
    embedder = task.embedder("packed")
    save_model_folder(embedder, task.text_tokenizer, folder / "served")
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    ours = GritLM(folder / "served", dtype=dtype, device=str(task.device))
    texts = [text.text for row in range(len(task.records)) for text in task.records[row].positives]
    texts = texts[: 10 * args.queries]
    ways = {"gritlm": lambda: ours.encode(texts, chunk_tokens=args.chunk_tokens, convert_to_tensor=True)}
    if args.compare:
        from gritlm.benchmark import sentence_transformers as peer

        theirs = peer.encoder(folder / "served", dtype, task.device)
        for options in peer.ENCODE_SETTINGS:
            name = " ".join(map(str, (PEER, *next(iter(options.items())))))
            ways[name] = lambda options=options: theirs(texts, **options)
    vectors, seconds = {}, {name: [] for name in ways}
    for number in range(args.rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            vectors[name] = way()
            if number:
                seconds[name].append(time.perf_counter() - started)
    tokens = sum(
        len(ids) for ids in task.text_tokenizer.tokenizer(texts, truncation=True, max_length=args.max_len).input_ids
    )
    print(f"{args.model}, {len(texts)} texts, {tokens} tokens, {dtype}")
    report: dict = {}
    for name in ways:
        median = statistics.median(seconds[name])
        cosine = (vectors[name] * vectors["gritlm"]).sum(1).min().item()
        report[name] = {"seconds": median, "texts_per_s": len(texts) / median, "least_cosine": cosine}
        print(
            f"  {name:42} {len(texts) / median:8.1f} texts/s  {tokens / median:8.0f} tokens/s  cosine >= {cosine:.6f}"
        )
    return report


# ---- memory


def memory(folder: Path, args: argparse.Namespace) -> dict:
    """What a chunk takes on a GPU, with gradient checkpointing and without; no GPU is needed."""
    config = model_config(args.model)
    tokens = args.chunk_tokens // args.max_len * args.max_len
    if not tokens:
        raise UserError(
            f"--chunk_tokens {args.chunk_tokens} holds not even one text of --max_len {args.max_len} tokens"
        )
    print(f"{args.model}, {'bf16 autocast' if args.bf16 else 'float32'}, texts of {args.max_len} tokens, packed")
    report: dict = {}
    for checkpointing in (False, True):
        counted = chunk_footprint(config, tokens, args.max_len, args.bf16, checkpointing)
        name = "gradient checkpointing" if checkpointing else "as it is"
        report[name] = asdict(counted)
        if not checkpointing:
            state = counted.weights / 1e9
            print(
                f"  weights, AdamW's moments, gradient, in float32: {4 * state:.1f} GB; {5 * state:.1f} with DDP, "
                "which copies the gradient"
            )
        print(
            f"  a chunk of {tokens} tokens, {name}: +{counted.peak / 1e9:.1f} GB; "
            f"kept for its backward: {counted.kept / tokens / 1e6:.2f} MB a token"
        )
    return report
