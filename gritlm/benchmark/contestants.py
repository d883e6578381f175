"""Ways to take one training step, each in a process of its own, where they take turns."""

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gritlm.benchmark.workload import TEMPERATURE, Task, memory_in_use, read_peak, reset_peak, synchronize
from gritlm.cli import quieten
from gritlm.errors import UserError
from gritlm.models.chunks import ChunkConfig, to_device
from gritlm.models.compiled import compile_layers
from gritlm.training.engines import Engine
from gritlm.training.gradcache import ActivationMemory, two_pass_step
from gritlm.training.objective import ContrastiveBatch, Objective


@dataclass
class Work:
    """A way to do the task: a step leaves the gradient in `model` and returns the loss."""

    model: torch.nn.Module
    settings: dict[str, Callable[[], torch.Tensor]]  # steps to choose from; the first stands
    device: torch.device
    parts: Counter = field(default_factory=Counter)  # seconds of a step's parts
    base: int = 0  # bytes before the first step

    def __post_init__(self):
        self.step = next(iter(self.settings.values()))

    def gradient(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten().cpu() for p in self.model.parameters()])


@dataclass(frozen=True)
class OurStep:
    """A step as the trainer takes it, tokenisation included."""

    attn_implementation: str
    activation_memory: str
    chunk_tokens: int
    gradient_checkpointing: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        compiled = ", compiled" if self.compiled else ""
        return f"gritlm {self.attn_implementation}{compiled}, keeps {self.activation_memory}"

    def __call__(self, task: Task) -> Work:
        embedder = task.embedder(self.attn_implementation)
        if self.gradient_checkpointing:
            embedder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.compiled and (problem := compile_layers(embedder, task.device, task.bf16)):
            raise UserError(f"--torch_compile: {problem}")
        if task.bf16:
            embedder.forward = torch.autocast(task.device.type, torch.bfloat16, cache_enabled=False)(embedder.forward)
        builder = task.builder(ChunkConfig(self.chunk_tokens, embedder.packed))
        engine, objective = Engine(embedder), Objective(TEMPERATURE)
        memory = ActivationMemory(self.activation_memory, task.device)

        def step() -> torch.Tensor:
            embedder.zero_grad()
            last = time.perf_counter()

            def mark(part: str) -> None:
                nonlocal last
                synchronize(task.device)
                now = time.perf_counter()
                work.parts[part] += now - last
                last = now

            batch = builder[0, 0]
            contrastive = ContrastiveBatch(**to_device(batch["contrastive"], task.device))
            chunks = [to_device(chunk, task.device) for chunk in batch["chunks"]]
            mark("data")
            return two_pass_step(engine, chunks, lambda vectors: objective(vectors, contrastive), mark, memory)

        work = Work(embedder, {"": step}, task.device)
        return work


@dataclass
class Turn:
    """One step: seconds in all and by part, bytes at the most beyond what the model took, the loss."""

    seconds: float
    parts: dict[str, float]
    peak: float
    loss: float


class Side:
    """A way to do the task in a process of its own, so that its time and its memory are of nothing else.

    Args:
        build: called there with the task; what it returns stays there.
    """

    def __init__(self, name: str, build: Callable[[Task], Work], task: Task):
        self.name = name
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._built = self._pool.submit(_build, build, task)
        self.turns: list[Turn] = []
        self.differs = 0.0  # of its gradient from the first side's, in relative norm

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(work, *args)`, there."""
        return self._wait(self._pool.submit(_ask, function, args))

    def wait_until_built(self) -> None:
        self._wait(self._built)

    def _wait(self, future: Future) -> Any:
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise UserError(f"{self.name}: its process was killed: out of memory?") from error

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _build(build: Callable[[Task], Work], task: Task) -> None:
    global _work
    quieten()
    _work = build(task)
    _work.base = memory_in_use(task.device)


def _ask(function: Callable[..., Any], args: tuple) -> Any:
    return function(_work, *args)


def take_turn(work: Work) -> Turn:
    work.parts.clear()
    reset_peak(work.device)
    synchronize(work.device)
    started = time.perf_counter()
    loss = work.step()
    synchronize(work.device)
    seconds = time.perf_counter() - started
    turn = Turn(seconds, dict(work.parts), read_peak(work.device) - work.base, loss.item())
    if work.device.type == "cuda":
        torch.cuda.empty_cache()  # the other sides are on the same device
    return turn


def choose_fastest(work: Work) -> tuple[str, dict[str, float]]:
    """One turn at each setting, after one to warm up; the fastest stays. Its name, and all their seconds."""
    seconds = {}
    for name in [next(iter(work.settings)), *work.settings]:
        work.step = work.settings[name]
        try:
            seconds[name] = take_turn(work).seconds
        except torch.OutOfMemoryError:
            seconds[name] = float("inf")
    best = min(seconds, key=seconds.__getitem__)
    work.step = work.settings[best]
    return best, seconds


def save_gradient(work: Work, file: Path) -> None:
    torch.save(work.gradient(), file)


def difference(work: Work, file: Path) -> float:
    """Of this gradient from the saved one, in relative norm."""
    wanted = torch.load(file)
    return ((work.gradient() - wanted).norm() / wanted.norm()).item()
