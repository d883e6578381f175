"""Competing implementations of one training step, each in its own process, timed alternately."""

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gritlm.benchmark.workload import TEMPERATURE, Workload, measure, memory_in_use
from gritlm.cli import quieten
from gritlm.errors import UserError
from gritlm.models.chunks import ChunkConfig
from gritlm.models.compiled import compile_layers
from gritlm.models.cpu_linear import choose_products, use_products
from gritlm.models.embedder import Embedder
from gritlm.training.arguments import ObjectiveArguments
from gritlm.training.engines import Engine
from gritlm.training.gradcache import ActivationMemory, two_pass_step
from gritlm.training.meters import StepTimer
from gritlm.training.objective import Objective
from gritlm.training.terms import VARIANTS

BASELINE = "sentence-transformers"  # the library that gritlm is compared with
INFO_NCE = "info_nce"
TEACHER_WIDTH = 1024

Step = Callable[[], tuple[Tensor, Mapping[str, float]]]  # returns the loss, and the seconds of each part of the step
T = TypeVar("T")


@dataclass
class Implementation:
    """A step that is ready to run. It leaves the gradient in `model`.

    settings: the same step with different settings, by name; the first is the default.
    bytes_before: memory in use before the first step.
    """

    model: nn.Module
    settings: dict[str, Step]
    device: torch.device
    bytes_before: int = 0

    def __post_init__(self) -> None:
        self.step = next(iter(self.settings.values()))

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten().cpu() for p in self.model.parameters() if p.grad is not None])


CHECKPOINTING = ("none", "selective", "full")
Build = Callable[[Workload], Implementation]


def set_checkpointing(embedder: Embedder, kind: str) -> None:
    if kind == "selective":
        embedder.keep_products()
    elif kind == "full":
        embedder.activation_checkpointing_enable()


@dataclass(frozen=True)
class GritLMStep:
    """The trainer's step, tokenisation included, without the optimizer."""

    attn_implementation: str
    activation_memory: str
    chunk_tokens: int
    checkpointing: str = "none"
    compiled: bool = False
    term: str = INFO_NCE

    def __str__(self) -> str:
        compiled, term = ", compiled" * self.compiled, f", {self.term}" * (self.term != INFO_NCE)
        compiled += f", {self.checkpointing} checkpointing" * (self.checkpointing != "none")
        return f"gritlm {self.attn_implementation}{compiled}, keeps {self.activation_memory}{term}"

    def build(self, workload: Workload) -> Implementation:
        device = workload.device
        embedder = workload.embedder(self.attn_implementation)
        set_checkpointing(embedder, self.checkpointing)
        if self.compiled and self.checkpointing == "selective":
            raise UserError("--checkpointing selective with --torch_compile yes: no layer would be compiled")
        if device.type == "cpu" and not workload.bf16:
            use_products(embedder, choose_products(embedder)[0])
        if self.compiled and (problem := compile_layers(embedder, device, workload.bf16)):
            raise UserError(f"--torch_compile: {problem}")
        if workload.bf16:
            autocast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
            embedder.forward = autocast(embedder.forward)  # type: ignore[method-assign]
        builder = workload.builder(ChunkConfig(self.chunk_tokens, embedder.packed))
        objective = Objective(ObjectiveArguments(**{"temperature": TEMPERATURE} | VARIANTS[self.term]))
        if objective.projects:
            embedder.add_teacher_projection(TEACHER_WIDTH)
            embedder.to(device).train()
        queries, slots = workload.plan.batch_size, workload.plan.batch_size * workload.group
        scores, vectors = torch.rand(slots), F.normalize(torch.randn(queries + slots, TEACHER_WIDTH), dim=1)
        engine = Engine(embedder)
        memory = ActivationMemory(self.activation_memory, device)

        def step() -> tuple[Tensor, Mapping[str, float]]:
            embedder.zero_grad()
            timer = StepTimer(device)
            timer.mark("start")
            batch = builder[0, 0]
            if self.term != INFO_NCE:  # what a teacher may say
                batch.contrastive.scores_S = scores
                batch.contrastive.teacher_BE, batch.contrastive.teacher_SE = vectors.split([queries, slots])
            batch = batch.to(device)
            timer.mark("data")
            terms = two_pass_step(
                engine, batch.chunks, lambda vectors: objective(vectors, batch.contrastive), timer.mark, memory
            )
            return torch.stack(list(terms.values())).sum(), timer.read()

        return Implementation(embedder, {"": step}, device)


@dataclass
class Timing:
    """One step: seconds in total and by part, peak memory in bytes above the model's, and the loss."""

    seconds: float
    parts: Mapping[str, float]
    peak: float
    loss: float


class Contestant:
    """One implementation in its own process, so that its time and memory are measured alone.

    Args:
        name: for the report.
        build: called once in the process; its result stays there.
        workload: passed to `build`.
    """

    def __init__(self, name: str, build: Build, workload: Workload):
        self.name = name
        self.timings: list[Timing] = []
        self.gradient_difference: float | None = None  # from the first one's, as a relative norm; None: another loss
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._built = self._pool.submit(_build, build, workload)

    def ask(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function(implementation, *args)` in the process and return its result."""
        return self._wait(self._pool.submit(_ask, function, args))

    def wait_until_built(self) -> None:
        self._wait(self._built)

    def _wait(self, future: Future[T]) -> T:
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise UserError(f"{self.name}: its process was killed: out of memory?") from error

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


# ---- run in a contestant's process

_implementation: Implementation


def _build(build: Build, workload: Workload) -> None:
    global _implementation
    quieten()
    _implementation = build(workload)
    _implementation.bytes_before = memory_in_use(workload.device)


def _ask(function: Callable[..., T], args: tuple[Any, ...]) -> T:
    return function(_implementation, *args)


def time_step(implementation: Implementation) -> Timing:
    device = implementation.device
    (loss, parts), seconds, peak = measure(implementation.step, device)
    timing = Timing(seconds, parts, peak - implementation.bytes_before, loss.item())
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the other contestants use the same device
    return timing


def choose_fastest(implementation: Implementation) -> tuple[str, dict[str, float]]:
    """Time a step at each setting, after one step to warm up. Returns the fastest, which is kept, and all seconds."""
    seconds = {}
    for name in [next(iter(implementation.settings)), *implementation.settings]:
        implementation.step = implementation.settings[name]
        try:
            seconds[name] = time_step(implementation).seconds
        except torch.OutOfMemoryError:
            seconds[name] = float("inf")
    best = min(seconds, key=seconds.__getitem__)
    implementation.step = implementation.settings[best]
    return best, seconds


def save_gradient(implementation: Implementation, file: Path) -> None:
    torch.save(implementation.gradient(), file)


def gradient_difference(implementation: Implementation, file: Path) -> float:
    """Norm of the difference from the saved gradient, relative to the norm of the saved one."""
    saved = torch.load(file)
    return ((implementation.gradient() - saved).norm() / saved.norm()).item()
