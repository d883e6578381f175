"""One cell of `gritlm verify-gradients`: SGD steps of one process, the same on an engine, and their difference."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from gritlm.data.batches import ContrastiveBatch
from gritlm.distributed import Ranks, all_ranks, all_reduce_max, all_reduce_sum, gather_objects, rank, world_size
from gritlm.errors import UserError
from gritlm.models.chunks import ChunkConfig
from gritlm.models.compiled import compile_layers
from gritlm.models.embedder import Embedder
from gritlm.training.arguments import ObjectiveArguments
from gritlm.training.engines import engine_for, is_deepspeed, whole_gradient, whole_weights, wrap_model
from gritlm.training.gradcache import ActivationMemory, two_pass_step
from gritlm.training.objective import Objective, needs_projection
from gritlm.training.random_texts import TEACHER_WIDTH, RandomTexts
from gritlm.training.terms import VARIANTS

STEPS, LEARNING_RATE, TEMPERATURE = 3, 1e-2, 0.05
ROUNDING = 1e-6  # a sum of float32 numbers may be closer to the truth than this, but by chance
WHOLE_BATCH = 10**12  # tokens of a chunk that holds everything

Loss = Callable[[Tensor, ContrastiveBatch], dict[str, Tensor]]
MakeObjective = Callable[[ObjectiveArguments, Ranks], Loss]


class StepResult(NamedTuple):
    """What a step gave: the loss, the gradient, the weights after it, and the number of its chunks."""

    loss: Tensor
    gradient: dict[str, Tensor]
    weights: dict[str, Tensor]
    chunks: int


@dataclass(frozen=True)
class Case:
    """What a cell compares.

    hard: two hard negatives a query, or none.
    queries: on each rank.
    max_len: longest text in tokens.
    chunk_tokens: limit per chunk; a longer text is a chunk for itself.
    bf16: the engine computes under autocast; the reference is float32 all the same.
    temperature: of the loss, with a reference in float64; None: 0.05 or the term's own, and float32.
    """

    term: str
    hard: bool
    queries: int
    max_len: int
    chunk_tokens: int
    deduplicate: bool = True
    steps: int = STEPS
    bf16: bool = False
    temperature: float | None = None
    torch_compile: bool = False
    activation_memory: str = "0"
    sync_each_chunk: bool = False

    def batches(self, vocabulary: int) -> list[RandomTexts]:
        """The global batch of each step."""
        queries, group = self.queries * world_size(), 3 if self.hard else 1
        return [RandomTexts.draw(step, queries, group, self.max_len, vocabulary) for step in range(self.steps)]

    @property
    def learning_rate(self) -> float:
        """The loss curves as 1/t^2: with a step that is as stable, rounding grows no more from step to step."""
        return LEARNING_RATE * (self.temperature / TEMPERATURE) ** 2 if self.temperature else LEARNING_RATE

    @property
    def flags(self) -> ObjectiveArguments:
        asked = {"temperature": self.temperature} if self.temperature else {}
        return ObjectiveArguments(**{"temperature": TEMPERATURE} | VARIANTS[self.term] | asked)


@dataclass
class Cell:
    """One line of the table: the largest relative error of all steps, against one process in float32."""

    engine: str
    ranks: int
    chunks: int
    case: Case
    loss: float
    gradient: float
    weights: float

    @property
    def errors(self) -> tuple[float, ...]:
        """Under bf16 only the gradient counts: the loss is one number, which may be right by chance."""
        return (self.gradient,) if self.case.bf16 else (self.loss, self.gradient, self.weights)

    def over(self, measure: "Cell") -> float:
        """The largest error, as a multiple of that of the measure."""
        return max(own / max(one, ROUNDING) for own, one in zip(self.errors, measure.errors, strict=True))

    def line(self, verdict: str) -> str:
        negatives = "hard" if self.case.hard else "in-batch"
        text = f"{self.engine:8}{self.ranks:6}{self.chunks:8}  {self.case.term:17}{negatives:>10}"
        return text + "".join(f"{error:10.1e}" for error in (self.loss, self.gradient, self.weights)) + f"  {verdict}"


HEADER = (
    f"{'engine':8}{'ranks':>6}{'chunks':>8}  {'term':17}{'negatives':>10}{'loss':>10}{'gradient':>10}{'weights':>10}"
)


class InFloat64(TorchFunctionMode):
    """Gives float64 to all code that asks for float32, so that code written for float32 computes the reference."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda value: torch.float64 if value is torch.float32 else value, (args, kwargs or {}))
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


def one_process(
    model: Embedder,
    case: Case,
    batches: list[RandomTexts],
    device: torch.device,
    bf16: bool = False,
    packed: bool = False,
    float64: bool = False,
) -> Iterator[StepResult]:
    """SGD steps of one process: one chunk, padded or packed, one graph."""
    model = model.double() if float64 else model
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sgd: torch.optim.Optimizer = torch.optim.SGD(trained.values(), lr=case.learning_rate)
    wrapped, sgd = wrap_model(model, sgd, "plain", device, bf16)
    objective, chunking = Objective(case.flags), ChunkConfig(WHOLE_BATCH, packed, deduplicate=False)
    for texts in batches:
        with InFloat64() if float64 else nullcontext():
            (chunk,), batch = texts.batch(slice(None), chunking, device)
            loss = torch.stack(list(objective(wrapped(**chunk), batch).values())).sum()
            sgd.zero_grad()
            loss.backward()
        if unused := [name for name, p in trained.items() if p.grad is None]:
            raise UserError(f"the loss depends on no weight of {', '.join(unused)}")
        gradient = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
        sgd.step()
        yield StepResult(loss.detach(), gradient, {name: p.detach().clone() for name, p in trained.items()}, 1)


def on_an_engine(
    model: Embedder, engine_name: str, objective: Loss, case: Case, batches: list[RandomTexts], device: torch.device
) -> Iterator[StepResult]:
    """The same steps through the two-pass step, on this rank's slice."""
    of_sgd = (p for p in model.parameters() if p.requires_grad)
    sgd: torch.optim.Optimizer = torch.optim.SGD(of_sgd, lr=case.learning_rate)
    wrapped, sgd = wrap_model(model, sgd, engine_name, device, case.bf16)
    engine, memory = engine_for(wrapped, case.sync_each_chunk), ActivationMemory(case.activation_memory, device)
    chunking = ChunkConfig(case.chunk_tokens, model.packed, case.deduplicate)
    for texts in batches:
        rows = slice(rank() * case.queries, (rank() + 1) * case.queries)
        chunks, batch = texts.batch(rows, chunking, device)

        def loss_of(vectors: Tensor, batch: ContrastiveBatch = batch) -> dict[str, Tensor]:
            return objective(vectors, batch)

        terms = two_pass_step(engine, chunks, loss_of, memory=memory)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = {name: whole_gradient(wrapped, p) for name, p in trained.items()}
        gradient = {name: value for name, value in found.items() if value is not None}
        if is_deepspeed(wrapped):
            engine.step()
        else:
            sgd.step()
            sgd.zero_grad()
        weights = whole_weights(wrapped, trained_only=True)
        weights = {n: p.detach() for n, p in trained.items()} if weights is None else weights
        loss = all_reduce_sum(torch.stack(list(terms.values())).sum())
        yield StepResult(loss, gradient, {n: w.detach().clone() for n, w in weights.items()}, len(chunks))


def relative_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """`|found - wanted| / |wanted|` over all tensors as one vector; 0 where this rank holds none."""
    if not found:
        return 0.0
    pairs = [(found[name].to(wanted[name].device).double(), wanted[name].double()) for name in wanted]
    difference = torch.stack([(a - b).norm() for a, b in pairs]).norm()
    return (difference / torch.stack([b.norm() for _, b in pairs]).norm()).item()


def ready(build: Callable[[], Embedder], case: Case, device: torch.device) -> Embedder:
    """The embedder, to train on this case."""
    embedder = build()
    if needs_projection(case.flags):
        torch.manual_seed(0)
        embedder.add_teacher_projection(TEACHER_WIDTH)
    return embedder.train().to(device)


def compiled(model: Embedder, case: Case, device: torch.device) -> str:
    """Compile the layers where the case asks for it. Returns why that fails, or nothing."""
    return compile_layers(model, device, case.bf16) if case.torch_compile else ""


def errors_of(
    runs: list[Iterator[StepResult]], reference: Embedder, case: Case, batches: list[RandomTexts], device: torch.device
) -> tuple[list[list[float]], int]:
    """The errors in loss, gradient and weights of each run's steps, and the number of its chunks."""
    errors, chunks = [], 1
    truth = one_process(reference, case, batches, device, float64=case.temperature is not None)
    for wanted, *steps in zip(truth, *runs, strict=True):
        for found in steps:
            loss = ((found.loss - wanted.loss).abs() / wanted.loss.abs()).item()
            gradient = relative_error(found.gradient, wanted.gradient)
            row = [loss, gradient, relative_error(found.weights, wanted.weights)]
            errors.append([error if math.isfinite(error) else math.inf for error in row])
            chunks = found.chunks
    return errors, chunks


def compare(
    build: Callable[[], Embedder],
    engine: str,
    case: Case,
    device: torch.device,
    make_objective: MakeObjective = Objective,
) -> Cell:
    """One cell of the table. All ranks must call it; all get the same answer.

    Args:
        build: makes the embedder, the same on every call and rank.
    """
    reference, model = ready(build, case, device), ready(build, case, device)
    problem = compiled(model, case, device)
    if all_reduce_max(len(problem))[0]:
        raise UserError(f"--torch_compile: {problem or 'fails on another rank'}")
    batches = case.batches(reference.config.vocab_size)
    objective = make_objective(case.flags, all_ranks())
    run = on_an_engine(model, engine, objective, case, batches, device)
    errors, chunks = errors_of([run], reference, case, batches, device)
    everywhere = [error for errors_of_rank in gather_objects(errors) for error in errors_of_rank]
    return Cell(engine, world_size(), max(gather_objects(chunks)), case, *map(max, zip(*everywhere, strict=True)))


def one_process_alone(build: Callable[[], Embedder], case: Case, device: torch.device) -> Cell:
    """The errors of one process on the whole batch. A rank can call it by itself.

    At a low temperature, chance has a large part in them: then they are the larger ones of two processes, with padded
    and with packed texts.
    """
    reference, model = ready(build, case, device), ready(build, case, device)
    if problem := compiled(model, case, device):
        raise UserError(f"--torch_compile: {problem}")
    batches = case.batches(reference.config.vocab_size)
    runs = [one_process(model, case, batches, device, case.bf16)]
    if case.temperature and model.packed:
        runs.append(one_process(ready(build, case, device), case, batches, device, packed=True))
    errors, _ = errors_of(runs, reference, case, batches, device)
    return Cell("plain", 1, 1, case, *map(max, zip(*errors, strict=True)))
