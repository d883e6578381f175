"""GradCache (Gao et al., arXiv 2101.06983): the exact gradient of a whole-batch loss, encoded in chunks.

Knows nothing of Hugging Face. It holds one chunk's activations plus all vectors, and as many more chunks' as the memory
has room for; those that it cannot hold pay for a second forward pass.
"""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gritlm.training.engines import Engine
from gritlm.training.host_memory import free_host_memory

Chunk = dict[str, Any]  # keyword arguments of the encoder


class RandomState:
    """The random state at a moment, on the CPU and on the current device, so that a forward can be repeated."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    @contextmanager
    def replayed(self):
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            self.restore()
            yield


class ActivationMemory:
    """How much of pass 1 is kept for pass 2: exact either way, faster the more there is.

    Args:
        setting: "0" keeps nothing, a number so many GB, "auto" what is free less a margin. Auto begins with the second
            step, when the optimizer has taken what it needs.
        device: where the activations lie.
        sharers: ranks that share a host's memory; counts on a CPU only.
    """

    def __init__(self, setting: str, device: torch.device, sharers: int = 1):
        self.auto, self.device, self.sharers = setting == "auto", device, sharers
        self.limit = math.inf if self.auto else float(setting) * 1e9
        self.bytes_per_token: float | None = None
        self.steps, self.budget, self.used, self.share, self.full = 0, 0.0, 0.0, 1.0, False

    def begin(self, model: nn.Module) -> None:
        """A step begins: how much may it keep?"""
        self.steps, self.used, self.full = self.steps + 1, 0.0, False
        self.budget = self.limit
        if self.auto:
            self.budget = self._free(model) if self.steps > 1 else 0.0
        self.budget *= self.share
        self.model = model

    def _free(self, model: nn.Module) -> float:
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.grad is None)
            return 0.8 * (free - gradients)
        return 0.5 * free_host_memory() / self.sharers

    def fits(self, tokens: int) -> bool:
        """Whether a chunk of so many tokens may keep its graph; the first one is measured.

        After one that may not, none may: then pass 2 has used up all that was kept before it makes a graph again.
        """
        expected = tokens * (self.bytes_per_token or 0.0)
        self.full = self.full or self.budget <= 0 or self.used + expected > self.budget
        if self.full:
            return False
        self.used += expected
        self.tokens = tokens
        return True

    @contextmanager
    def watched(self):
        """Count what a forward saves for its backward, weights apart; once, then it is known per token."""
        if self.bytes_per_token is not None:
            yield
            return
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # the tensor itself would refer back to its graph, and never be freed

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield
        self.used = float(sum(saved.values()))
        self.bytes_per_token = self.used / self.tokens

    def back_off(self) -> None:
        """It was too much: half of it from now on."""
        self.share /= 2
        torch.cuda.empty_cache()


def two_pass_step(
    engine: Engine,
    chunks: Sequence[Chunk],
    loss_of: Callable[[Tensor], Tensor],
    mark: Callable[[str], None] = lambda name: None,
    memory: ActivationMemory | None = None,
) -> Tensor:
    """Accumulate in the model's `.grad` the gradient of `loss_of(all vectors)`, one chunk at a time.

    Args:
        engine: says how the model is called and when gradients cross ranks.
        chunks: the local texts; row order of the vectors is the order of the chunks.
        loss_of: float32 (T, D) vectors with gradient -> this rank's share of the loss, a scalar. The loss that is
            differentiated is the sum of the ranks' shares.
        mark: called with "pass_1", "loss", "pass_2" as each part ends, for timing.
        memory: how many chunks may keep their graph from pass 1 to pass 2; None: none, every one is encoded again.
    Returns:
        The loss, detached.
    """
    # 1. All vectors; as many with their graph as the memory holds.
    idle = engine.rounds(len(chunks)) - len(chunks)  # forwards that this rank joins in only for the others' sake
    alone = first_text(chunks[-1])
    memory = memory or ActivationMemory("0", chunks[0]["input_ids"].device)
    states, vectors = first_pass(engine, chunks, memory)
    with torch.no_grad():
        for _ in range(idle):
            engine.model(**alone)
    mark("pass_1")

    # 2. The loss, and its gradient with respect to the vectors.
    vectors_TD = torch.cat([part.detach() for part in vectors]).float().requires_grad_()
    loss = loss_of(vectors_TD)
    (gradient_TD,) = torch.autograd.grad(loss * engine.loss_scale, vectors_TD)
    mark("loss")

    # 3. Each chunk's graph, kept or made again, carries the vectors' gradient on to the weights.
    def surrogate(number: int, gradient: Tensor) -> Tensor:
        kept, vectors[number] = vectors[number], None  # so that its memory is free once it is back-propagated
        if not kept.requires_grad:
            with states[number].replayed():
                kept = engine.wrapped(**chunks[number])
        return (kept.float() * gradient).sum()

    def idly() -> Tensor:
        with states[-1].replayed():
            return engine.wrapped(**alone).float().sum() * 0.0

    gradients = gradient_TD.split([len(chunk["lengths"]) for chunk in chunks])
    engine.backward([idly] * idle + [functools.partial(surrogate, *part) for part in enumerate(gradients)])
    mark("pass_2")
    return loss.detach()


def first_pass(
    engine: Engine, chunks: Sequence[Chunk], memory: ActivationMemory
) -> tuple[list[RandomState], list[Tensor]]:
    """The random state before each chunk, and its vectors: with their graph where it is kept, without elsewhere."""
    start = RandomState(chunks[0]["input_ids"].device)
    memory.begin(engine.model)
    try:
        states, vectors = [], []
        for number, chunk in enumerate(chunks):
            states.append(RandomState(chunk["input_ids"].device))
            keep = engine.may_keep(number, len(chunks)) and memory.fits(chunk["input_ids"].numel())
            with memory.watched() if keep else torch.no_grad():
                vectors.append(engine.model(**chunk))
        return states, vectors
    except torch.OutOfMemoryError:
        if not memory.used:
            raise
        del vectors
    memory.back_off()
    start.restore()
    return first_pass(engine, chunks, memory)


def first_text(chunk: Chunk) -> Chunk:
    """A chunk of a chunk's first text alone."""
    part = {"lengths": chunk["lengths"][:1], "prompt_lengths": chunk["prompt_lengths"][:1]}
    if "equal_length_runs" not in chunk:
        return part | {"input_ids": chunk["input_ids"][:1]}
    _, length = chunk["equal_length_runs"][0]
    return part | {"input_ids": chunk["input_ids"][:length], "equal_length_runs": ((1, length),)}
