"""Compare the gradient of many ranks, on any engine and in any chunks, with that of one process on the whole batch.

Random texts, float32, three SGD steps for each loss term. The loss, the gradient and the updated weights of each step
are compared, as a relative error in norm. Without --model_name_or_path the models are a tiny Qwen2 and a tiny Qwen3.
"""

import argparse
import importlib.util
import math
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, Qwen2Config, Qwen3Config

from gritlm.cli import exit_rank, quieten, run_verb
from gritlm.data.batches import ContrastiveBatch
from gritlm.distributed import (
    Ranks,
    all_ranks,
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
from gritlm.models.base import read_base
from gritlm.models.chunks import ChunkConfig
from gritlm.models.compiled import compile_layers
from gritlm.models.embedder import Embedder
from gritlm.models.text import TextContract
from gritlm.training.arguments import ModelArguments, ObjectiveArguments, flag, make_parser
from gritlm.training.engines import engine_for, is_deepspeed, whole_weights, wrap_model
from gritlm.training.gradcache import ActivationMemory, two_pass_step
from gritlm.training.objective import TERMS, Objective
from gritlm.training.random_texts import RandomTexts
from gritlm.training.setup import settle

ENGINES = ("plain", "ddp", "fsdp2", "zero1", "zero2", "zero3")
STEPS, LEARNING_RATE, TEMPERATURE = 3, 1e-2, 0.05
WHOLE_BATCH = 10**12  # tokens of a chunk that holds everything
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 600,
    "initializer_range": 0.1,
}

EXAMPLES = """examples:
  gritlm verify-gradients --ranks 2
  gritlm verify-gradients --model_name_or_path Qwen/Qwen3-0.6B --ranks 8 --engines ddp fsdp2
  torchrun --nnodes 2 ... -m gritlm verify-gradients --model_name_or_path Qwen/Qwen3-0.6B      many nodes"""

MakeObjective = Callable[[ObjectiveArguments, Ranks], Callable[[Tensor, ContrastiveBatch], dict[str, Tensor]]]
StepResult = tuple[Tensor, dict[str, Tensor], dict[str, Tensor], int]  # loss, gradient, weights, number of chunks


@dataclass
class VerifyArguments:
    """What is compared."""

    ranks: int | None = flag(None, "Processes to start on this machine. None: one per GPU, or 2. Not under torchrun.")
    engines: list[str] | None = flag(None, "Some of plain ddp fsdp2 zero1 zero2 zero3. None: all installed.")
    terms: list[str] | None = flag(None, f"Some of {' '.join(TERMS)}. None: all.")
    num_layers: int | None = flag(2, "Use only the model's first layers; 0 for all.")
    queries: int = flag(4, "Queries on each rank.")
    max_len: int = flag(64, "Longest text in tokens.")
    activation_memory: str = flag("0", "GB of activations kept between the two passes, as in training.")
    torch_compile: bool = flag(False, "Compile the layers; not with zero1, zero2, zero3.")
    tolerance: float = flag(1e-5, "Largest relative error that counts as equal.")


@dataclass
class Cell:
    """One line of the table: the largest relative error of three steps, against one process."""

    engine: str
    ranks: int
    chunks: int
    term: str
    hard_negatives: bool
    loss: float
    gradient: float
    weights: float

    def is_equal(self, tolerance: float) -> bool:
        return all(error <= tolerance for error in (self.loss, self.gradient, self.weights))

    def line(self, tolerance: float) -> str:
        negatives = "hard" if self.hard_negatives else "in-batch"
        text = f"{self.engine:8}{self.ranks:6}{self.chunks:8}  {self.term:12}{negatives:>10}"
        text += "".join(f"{error:10.1e}" for error in (self.loss, self.gradient, self.weights))
        return text + ("  ok" if self.is_equal(tolerance) else "  WRONG")


HEADER = (
    f"{'engine':8}{'ranks':>6}{'chunks':>8}  {'term':12}{'negatives':>10}{'loss':>10}{'gradient':>10}{'weights':>10}"
)


# ---- three steps, on one process and on an engine


def one_process(
    model: nn.Module, objective: Objective, batches: list[RandomTexts], device: torch.device
) -> Iterator[StepResult]:
    """Three SGD steps of one process: one chunk, padded, one graph."""
    sgd = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for texts in batches:
        chunks, batch = texts.batch(slice(None), ChunkConfig(WHOLE_BATCH, packed=False, deduplicate=False), device)
        (chunk,) = chunks
        loss = torch.stack(list(objective(model(**chunk), batch).values())).sum()
        sgd.zero_grad()
        loss.backward()
        gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        sgd.step()
        yield loss.detach(), gradient, {name: p.detach().clone() for name, p in model.named_parameters()}, 1


def on_an_engine(
    model: nn.Module,
    engine_name: str,
    objective: Callable[[Tensor, ContrastiveBatch], dict[str, Tensor]],
    batches: list[RandomTexts],
    chunking: ChunkConfig,
    memory: ActivationMemory,
    device: torch.device,
) -> Iterator[StepResult]:
    """The same three steps through the two-pass step, on this rank's slice."""
    wrapped, sgd = wrap_model(model, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), engine_name, device)
    engine = engine_for(wrapped)
    share = len(batches[0].queries) // world_size()
    for texts in batches:
        chunks, batch = texts.batch(slice(rank() * share, (rank() + 1) * share), chunking, device)

        def loss_of(vectors: Tensor, batch: ContrastiveBatch = batch) -> dict[str, Tensor]:
            return objective(vectors, batch)

        terms = two_pass_step(engine, chunks, loss_of, memory=memory)
        gradient = {name: whole_gradient(wrapped, p) for name, p in model.named_parameters()}
        if is_deepspeed(wrapped):
            engine.step()
        else:
            sgd.step()
            sgd.zero_grad()
        weights = whole_weights(wrapped)
        weights = dict(model.named_parameters()) if weights is None else weights
        loss = all_reduce_sum(torch.stack(list(terms.values())).sum())
        yield loss, gradient, {n: w.detach().clone() for n, w in weights.items()}, len(chunks)


def whole_gradient(wrapped: nn.Module, parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient as the optimizer sees it, gathered from the ranks' shards where it is sharded."""
    if is_deepspeed(wrapped):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter).clone()
    gradient: Any = parameter.grad
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()


def relative_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """`|found - wanted| / |wanted|` over all tensors as one vector; 0 where this rank holds none."""
    if not found:
        return 0.0
    pairs = [(found[name].to(wanted[name].device).double(), wanted[name].double()) for name in wanted]
    difference = torch.stack([(a - b).norm() for a, b in pairs]).norm()
    return (difference / torch.stack([b.norm() for _, b in pairs]).norm()).item()


def compare(
    build: Callable[[], Embedder],
    engine: str,
    term: str,
    hard: bool,
    many_chunks: bool,
    args: VerifyArguments,
    device: torch.device,
    make_objective: MakeObjective,
) -> Cell:
    """One cell of the table. All ranks must call it; all get the same answer.

    Args:
        build: makes the embedder, the same on every call and rank.
        hard: two hard negatives a query, or none.
        many_chunks: chunks as small as possible, or one on each rank.
    """
    reference, model = build().to(device), build().to(device)
    problem = compile_layers(model, device) if args.torch_compile else ""
    if all_reduce_max(len(problem))[0]:
        raise UserError(f"--torch_compile: {problem or 'fails on another rank'}")
    flags = ObjectiveArguments(temperature=TEMPERATURE, **TERMS[term].example)
    total, vocabulary = args.queries * world_size(), reference.config.vocab_size
    batches = [RandomTexts.draw(step, total, 3 if hard else 1, args.max_len, vocabulary) for step in range(STEPS)]
    chunking = ChunkConfig(args.max_len if many_chunks else WHOLE_BATCH, model.packed)
    memory = ActivationMemory(args.activation_memory, device)
    objective = make_objective(flags, all_ranks())
    steps = on_an_engine(model, engine, objective, batches, chunking, memory, device)
    errors, chunks = [], 1
    for wanted, found in zip(one_process(reference, Objective(flags), batches, device), steps, strict=True):
        loss = ((found[0] - wanted[0]).abs() / wanted[0].abs()).item()
        errors.append((loss, relative_error(found[1], wanted[1]), relative_error(found[2], wanted[2])))
        chunks = found[3]
    everywhere = [error for errors_of_rank in gather_objects(errors) for error in errors_of_rank]
    finite = [[error if math.isfinite(error) else math.inf for error in row] for row in everywhere]
    return Cell(engine, world_size(), max(gather_objects(chunks)), term, hard, *map(max, zip(*finite, strict=True)))


# ---- the verb


def available(compiled: bool) -> list[str]:
    engines = ["plain"] if world_size() == 1 else []
    engines += ["ddp", "fsdp2"]
    return engines + (["zero1", "zero2", "zero3"] if importlib.util.find_spec("deepspeed") and not compiled else [])


def parse(argv: list[str]) -> tuple[ModelArguments, VerifyArguments]:
    parser = make_parser("verify-gradients", (ModelArguments, VerifyArguments), EXAMPLES)
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    model_args, args = parser.parse_args_into_dataclasses(args=argv)
    model_args = settle(model_args, read_base(model_args.model_name_or_path))
    for term in args.terms or ():
        if term not in TERMS:
            raise UserError(f"--terms: found {term!r}, wanted some of {', '.join(TERMS)}")
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


def configs_of(model_args: ModelArguments, num_layers: int | None) -> dict[str, PreTrainedConfig]:
    """Name -> config of each model to compare on, cut to its first layers."""
    if name := model_args.model_name_or_path:
        config = load_config(name, model_args.attn, model_args.trust_remote_code)
        config.num_hidden_layers = num_layers or config.num_hidden_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        return {name: config}
    tiny: dict[str, PreTrainedConfig] = {
        "tiny Qwen2": Qwen2Config(**SIZES),
        "tiny Qwen3": Qwen3Config(**SIZES, head_dim=8),
    }
    for config in tiny.values():
        config.is_causal = model_args.attn == "cc"
    return tiny


def main(argv: list[str], make_objective: MakeObjective = Objective) -> int:
    model_args, args = parse(argv)
    configs_of(model_args, args.num_layers)
    if "RANK" in os.environ:  # under torchrun
        return int(verify(model_args, args, make_objective) > 0)
    ranks = wanted_ranks(args)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = torch.multiprocessing.get_context("spawn").Value("i", 0)
    torch.multiprocessing.spawn(_rank_main, (ranks, port, argv, code), nprocs=ranks)
    return code.value


def _rank_main(index: int, ranks: int, port: int, argv: list[str], code: Any) -> None:
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    code.value = run_verb(lambda argv: int(verify(*parse(argv), Objective) > 0), argv)
    exit_rank(0)


def verify(model_args: ModelArguments, args: VerifyArguments, make_objective: MakeObjective) -> int:
    """Print the table, one line as each cell is done. Returns the number of wrong cells. All ranks call it."""
    quieten()
    device = init_process_group()
    cells = []
    for name, config in configs_of(model_args, args.num_layers).items():

        def build(name: str = name, config: PreTrainedConfig = config) -> Embedder:
            torch.manual_seed(0)
            reset = model_args.reset_weight or not model_args.model_name_or_path
            backbone = load_backbone(name, config, model_args.attn_implementation, reset)
            contract = TextContract(pooling_method=model_args.pooling_method, normalized=model_args.normalized)
            return Embedder(backbone, contract, model_args.projection)

        if rank() == 0:
            print(f"{name}\n{HEADER}", flush=True)
        for engine in args.engines or available(args.torch_compile):
            for term in args.terms or TERMS:
                for hard, many in ((True, False), (True, True), (False, False), (False, True)):
                    cells.append(compare(build, engine, term, hard, many, args, device, make_objective))
                    if rank() == 0:
                        print(cells[-1].line(args.tolerance), flush=True)
    wrong = sum(not cell.is_equal(args.tolerance) for cell in cells)
    if rank() == 0:
        print(f"{len(cells) - wrong} of {len(cells)} equal one process to {args.tolerance:g}")
    destroy_process_group()
    return wrong
