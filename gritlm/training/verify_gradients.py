"""Exact gradients on this very machine: many ranks, on any engine, in any chunks, against one process without any.

Random texts; the model's own weights (random ones with --reset_weight True), its first layers; float32. Three SGD
steps: the loss, the gradient and the updated weights of each are compared, as a relative error in norm.
"""

import argparse
import importlib.util
import math
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import HfArgumentParser

from gritlm.cli import exit_rank, quieten, run_verb
from gritlm.data.batches import build_contrastive_batch
from gritlm.distributed import (
    all_reduce_max,
    all_reduce_sum,
    destroy_process_group,
    gather_objects,
    init_process_group,
    rank,
    world_size,
)
from gritlm.errors import UserError
from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.chunks import ChunkConfig, to_device
from gritlm.models.compiled import compile_layers
from gritlm.models.embedder import Embedder
from gritlm.models.tokenizer import Tokens
from gritlm.training.arguments import ModelArguments, flag
from gritlm.training.engines import engine_for, is_deepspeed, whole_weights, wrap_model
from gritlm.training.gradcache import ActivationMemory, two_pass_step
from gritlm.training.objective import ContrastiveBatch, Objective, mask_candidates

ENGINES = ("plain", "ddp", "fsdp2", "zero1", "zero2", "zero3")
STEPS, RATE, TEMPERATURE = 3, 1e-2, 0.05

EXAMPLES = """examples:
  gritlm verify-gradients --model_name_or_path Qwen/Qwen3-0.6B --ranks 8 --engines ddp fsdp2
  torchrun --nnodes 2 ... -m gritlm verify-gradients --model_name_or_path Qwen/Qwen3-0.6B      many nodes"""


@dataclass
class VerifyArguments:
    """What is compared."""

    ranks: int | None = flag(None, "Processes to start on this machine. None: one per GPU, or 2. Not under torchrun.")
    engines: list[str] | None = flag(None, "Some of plain ddp fsdp2 zero1 zero2 zero3. None: all installed.")
    num_layers: int | None = flag(2, "Use only the model's first layers; 0 for all.")
    queries: int = flag(4, "Queries on each rank.")
    max_len: int = flag(64, "Longest text in tokens.")
    activation_memory: str = flag("0", "GB of activations that pass 1 keeps for pass 2, as in training.")
    torch_compile: bool = flag(False, "Compile the layers; not with zero1, zero2, zero3.")
    tolerance: float = flag(1e-5, "Largest relative error that counts as equal.")


@dataclass
class Cell:
    """One line of the table: the largest relative error of three steps, against one process."""

    engine: str
    ranks: int
    chunks: int
    hard_negatives: bool
    loss: float
    gradient: float
    weights: float

    @property
    def worst(self) -> float:
        errors = (self.loss, self.gradient, self.weights)
        return max(error if math.isfinite(error) else math.inf for error in errors)


# ---- the work: the same global batch, whole or in slices


@dataclass
class RandomTexts:
    """The texts of one global batch: token lists of long-tailed lengths, and hashes, some texts standing twice."""

    queries: list[Tokens]
    groups: list[list[Tokens]]
    ids: list[list[int]]

    @classmethod
    def draw(cls, step: int, queries: int, group: int, longest: int, vocabulary: int) -> "RandomTexts":
        generator = torch.Generator().manual_seed(step)

        def text() -> Tokens:
            length = 1 + int((longest - 1) * torch.rand((), generator=generator) ** 3)
            return Tokens(torch.randint(0, vocabulary, (length,), generator=generator).tolist(), 0)

        groups = [[text() for _ in range(group)] for _ in range(queries)]
        ids = [[query * group + number for number in range(group)] for query in range(queries)]
        for query in range(1, queries, 3):  # the positive of the query before stands among this one's passages
            groups[query][-1], ids[query][-1] = groups[query - 1][0], ids[query - 1][0]
        return cls([text() for _ in range(queries)], groups, ids)

    def batch(self, rows: slice, chunking: ChunkConfig) -> tuple[list, ContrastiveBatch]:
        groups, ids = self.groups[rows], self.ids[rows]
        passages = [passage for group in groups for passage in group]
        chunks, contrastive = build_contrastive_batch(
            self.queries[rows] + passages,
            list(range(len(passages))),
            [number for group in ids for number in group],
            [group[:1] for group in ids],
            chunking,
            pad_id=0,
        )
        return chunks, ContrastiveBatch(**contrastive)


def one_process(model: nn.Module, batches: list[RandomTexts], device: torch.device) -> Iterator[tuple]:
    """Loss, gradient and weights after each of the SGD steps: no chunks, no ranks, one graph."""
    for texts in batches:
        (chunk,), contrastive = texts.batch(slice(None), ChunkConfig(10**12, packed=False, deduplicate=False))
        vectors = model(**to_device(chunk, device))
        queries, passages = vectors[contrastive.text_of_query_B], vectors[contrastive.text_of_slot_S]
        positive = torch.arange(len(queries), device=device) * (len(passages) // len(queries))
        used = torch.ones(len(passages), dtype=torch.bool, device=device)
        masked = mask_candidates(contrastive.id_of_slot_S.to(device), used, contrastive.known_positives_BK.to(device))
        masked[torch.arange(len(queries)), positive] = False
        scores = (queries.float() @ passages.float().T / TEMPERATURE).masked_fill(masked, float("-inf"))
        loss = torch.nn.functional.cross_entropy(scores, positive)
        model.zero_grad()
        loss.backward()
        gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
        yield loss.detach(), gradient, {name: p.detach().clone() for name, p in model.named_parameters()}


def on_an_engine(
    model: nn.Module,
    engine_name: str,
    batches: list[RandomTexts],
    chunking: ChunkConfig,
    memory: ActivationMemory,
    device: torch.device,
) -> Iterator[tuple]:
    """The same three steps through the two-pass step, on this rank's slice; also the number of chunks."""
    sgd = torch.optim.SGD(model.parameters(), lr=RATE)
    wrapped, sgd = wrap_model(model, sgd, engine_name, device)
    engine, objective = engine_for(wrapped), Objective(TEMPERATURE)
    share = len(batches[0].queries) // world_size()
    for texts in batches:
        chunks, contrastive = texts.batch(slice(rank() * share, (rank() + 1) * share), chunking)
        chunks = [to_device(chunk, device) for chunk in chunks]
        contrastive = ContrastiveBatch(**{name: value.to(device) for name, value in vars(contrastive).items()})
        loss = two_pass_step(
            engine, chunks, lambda vectors, contrastive=contrastive: objective(vectors, contrastive), memory=memory
        )
        gradient = {name: whole_gradient(wrapped, p) for name, p in model.named_parameters()}
        if is_deepspeed(wrapped):
            engine.step()
        else:
            sgd.step()
            sgd.zero_grad()
        weights = whole_weights(wrapped)
        weights = dict(model.named_parameters()) if weights is None else weights
        yield all_reduce_sum(loss), gradient, {n: w.detach().clone() for n, w in weights.items()}, len(chunks)


def whole_gradient(wrapped: nn.Module, parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient as the optimizer sees it, put together from the ranks' shards where it is sharded."""
    if is_deepspeed(wrapped):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter).clone()
    gradient = parameter.grad
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()


def relative_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """`|found - wanted| / |wanted|` over all tensors as one vector; 0 where nothing was found here."""
    if not found:
        return 0.0
    pairs = [(found[name].to(wanted[name].device), wanted[name]) for name in wanted]
    difference = torch.stack([(a.double() - b.double()).norm() for a, b in pairs]).norm()
    return (difference / torch.stack([b.double().norm() for _, b in pairs]).norm()).item()


def compare(build, engine: str, hard: bool, many_chunks: bool, args: VerifyArguments, device) -> Cell:
    """One cell of the table. All ranks must call it; all get the same answer.

    Args:
        build: makes the embedder, the same on every call and rank.
        hard: two hard negatives a query, or none.
        many_chunks: one chunk a rank, or as small ones as possible.
    """
    reference, model = build().to(device), build().to(device)
    problem = compile_layers(model, device) if args.torch_compile else ""
    if all_reduce_max(len(problem))[0]:
        raise UserError(f"--torch_compile: {problem or 'fails on another rank'}")
    total = args.queries * world_size()
    vocabulary = reference.config.vocab_size
    batches = [RandomTexts.draw(step, total, 3 if hard else 1, args.max_len, vocabulary) for step in range(STEPS)]
    errors, chunks = [], 1
    chunking = ChunkConfig(args.max_len if many_chunks else 10**12, model.packed)
    memory = ActivationMemory(args.activation_memory, device)
    steps = on_an_engine(model, engine, batches, chunking, memory, device)
    for wanted, found in zip(one_process(reference, batches, device), steps, strict=True):
        loss, gradient, weights, chunks = found
        errors.append(
            (
                ((loss - wanted[0]).abs() / wanted[0]).item(),
                relative_error(gradient, wanted[1]),
                relative_error(weights, wanted[2]),
            )
        )
    everywhere = [error for errors_of_rank in gather_objects(errors) for error in errors_of_rank]
    loss, gradient, weights = (max(column) for column in zip(*everywhere, strict=True))
    return Cell(engine, world_size(), max(gather_objects(chunks)), hard, loss, gradient, weights)


# ---- the verb


def available(compiled: bool) -> list[str]:
    engines = ["plain"] if world_size() == 1 else []
    engines += ["ddp", "fsdp2"]
    return engines + (["zero1", "zero2", "zero3"] if importlib.util.find_spec("deepspeed") and not compiled else [])


def parse(argv: list[str]) -> tuple[ModelArguments, VerifyArguments]:
    parser = HfArgumentParser(
        (ModelArguments, VerifyArguments),
        prog="gritlm verify-gradients",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model_args, args = parser.parse_args_into_dataclasses(args=argv)
    if not model_args.model_name_or_path:
        raise UserError("--model_name_or_path is missing")
    for engine in args.engines or ():
        if engine not in ENGINES:
            raise UserError(f"--engines: found {engine!r}, wanted some of {', '.join(ENGINES)}")
        if engine == "plain" and wanted_ranks(args) > 1:
            raise UserError("--engines plain: wanted --ranks 1, one process alone")
        if engine.startswith("zero") and args.torch_compile:
            raise UserError(f"--torch_compile with --engines {engine}: not supported")
        if engine.startswith("zero") and not importlib.util.find_spec("deepspeed"):
            raise UserError(f"--engines {engine}: DeepSpeed is not installed (pip install deepspeed)")
    return model_args, args


def wanted_ranks(args: VerifyArguments) -> int:
    return int(os.environ.get("WORLD_SIZE") or args.ranks or torch.cuda.device_count() or 2)


def main(argv: list[str]) -> int:
    model_args, args = parse(argv)
    load_config(model_args.model_name_or_path, model_args.attn, model_args.trust_remote_code)
    if "RANK" in os.environ:  # under torchrun
        return int(verify(model_args, args) > 0)
    ranks = wanted_ranks(args)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = torch.multiprocessing.get_context("spawn").Value("i", 0)
    torch.multiprocessing.spawn(_rank_main, (ranks, port, argv, code), nprocs=ranks)
    return code.value


def _rank_main(index: int, ranks: int, port: int, argv: list[str], code) -> None:
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    code.value = run_verb(lambda argv: int(verify(*parse(argv)) > 0), argv)
    exit_rank(0)


def verify(model_args: ModelArguments, args: VerifyArguments) -> int:
    """Print the table, a line as each cell is done; how many cells are wrong. All ranks call it."""
    quieten()
    device = init_process_group()
    config = load_config(model_args.model_name_or_path, model_args.attn, model_args.trust_remote_code)
    config.num_hidden_layers = args.num_layers or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]

    def build() -> Embedder:
        torch.manual_seed(0)
        backbone = load_backbone(
            model_args.model_name_or_path, config, model_args.attn_implementation, model_args.reset_weight
        )
        return Embedder(backbone, model_args.pooling_method, model_args.normalized, model_args.projection)

    cells = []
    for engine in args.engines or available(args.torch_compile):
        for hard in (True, False):
            for many in (False, True):
                cells.append(compare(build, engine, hard, many, args, device))
                if rank() == 0:
                    print(line(cells[-1], args.tolerance, header=len(cells) == 1), flush=True)
    wrong = sum(not cell.worst <= args.tolerance for cell in cells)
    if rank() == 0:
        print(f"{len(cells) - wrong} of {len(cells)} equal one process to {args.tolerance:g}")
    destroy_process_group()
    return wrong


def line(cell: Cell, tolerance: float, header: bool = False) -> str:
    text = f"{cell.engine:8}{cell.ranks:6}{cell.chunks:8}{'hard' if cell.hard_negatives else 'in-batch':>11}"
    text += "".join(f"{error:10.1e}" for error in (cell.loss, cell.gradient, cell.weights))
    text += "  ok" if cell.worst <= tolerance else "  WRONG"
    title = f"{'engine':8}{'ranks':>6}{'chunks':>8}{'negatives':>11}{'loss':>10}{'gradient':>10}{'weights':>10}"
    return f"{title}\n{text}" if header else text
