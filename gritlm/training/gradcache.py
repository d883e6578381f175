"""GradCache (Gao et al., arXiv 2101.06983): the exact gradient of a whole-batch loss, encoded in chunks.

Knows nothing of Hugging Face. It holds one chunk's activations, all vectors, and the graphs of the further chunks that
fit the memory budget. The other chunks are encoded a second time.
"""

import functools
import gc
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gritlm.distributed import collectives_started, rank, world_size
from gritlm.models.selective import watching
from gritlm.training.engines import Engine
from gritlm.training.host_memory import free_host_memory

Chunk = dict[str, Any]  # keyword arguments of the model
T = TypeVar("T")
log = logging.getLogger("gritlm")

# Messages of allocators and libraries, apart from torch.OutOfMemoryError.
OUT_OF_MEMORY = (
    "out of memory",  # CUDA's own calls
    "can't allocate memory",  # torch's allocator on a CPU
    "cannot allocate memory",  # the system
    "not enough memory",
    "bad_alloc",
    "alloc_failed",  # cuBLAS, cuDNN
    "allocation_failed",  # cuDNN 9
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed: on the device, on the host, or within a library."""
    if isinstance(error, RuntimeError):
        text = str(error).lower()
        return isinstance(error, torch.OutOfMemoryError) or any(sign in text for sign in OUT_OF_MEMORY)
    return isinstance(error, MemoryError)


class RandomState:
    """The random state now, on the CPU and on the device, so that a forward can be repeated."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            self.restore()
            yield


class ActivationMemory:
    """Chooses which chunks keep their graph between the passes. Changes speed and memory, never the gradient.

    Args:
        setting: "0" keeps nothing, a number is a budget in GB, "auto" takes what is free less a margin. Auto begins
            with the second step, when the optimizer has allocated its state.
        device: where the activations live.
        sharers: ranks that share a host's memory; used on a CPU only.
    Attributes:
        reserved: bytes that the backward of one layer's attention needs on a GPU.
    """

    def __init__(self, setting: str, device: torch.device, sharers: int = 1):
        self.auto, self.device, self.sharers = setting == "auto", device, sharers
        self.limit = math.inf if self.auto else float(setting) * 1e9
        self.bytes_per_token: float | None = None
        self.steps, self.budget, self.used, self.keeps, self.full = 0, 0.0, 0.0, False, False
        self.retries, self.reserved = 0, 0

    def begin(self, model: nn.Module, gradient_shards: int = 1) -> None:
        """Set the budget of a new step. `gradient_shards`: of the engine."""
        self.steps, self.used, self.keeps, self.full = self.steps + 1, 0.0, False, False
        self.budget = self.limit
        if self.auto:
            self.budget = min(self.limit, self._free(model, gradient_shards)) if self.steps > 1 else 0.0
        self.model = model

    def _free(self, model: nn.Module, gradient_shards: int) -> float:
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            gradients = sum(
                p.numel() * p.element_size() for p in model.parameters() if p.requires_grad and p.grad is None
            )
            return 0.8 * (free - gradients / gradient_shards - self.reserved)
        return 0.5 * free_host_memory() / self.sharers

    def fits(self, tokens: int, agree: Callable[[bool], bool] = bool) -> bool:
        """Whether a chunk of this many tokens may keep its graph. The first chunk is measured.

        After one that may not, none may. Pass 2 then frees every kept graph before it recomputes the first one.

        Args:
            agree: `Engine.agree`.
        """
        expected = tokens * (self.bytes_per_token or 0.0)
        self.full = self.full or not agree(self.budget > 0 and self.used + expected <= self.budget)
        if self.full:
            return False
        self.used += expected
        self.tokens, self.keeps = tokens, True
        return True

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count the bytes that a forward saves for its backward, weights excluded. Measures once, per token."""
        if self.bytes_per_token is not None:
            yield
            return
        weights = {p.untyped_storage()._cdata for p in self.model.parameters()}
        saved: dict[int, torch.UntypedStorage] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                saved[storage._cdata] = storage
            return tensor.detach()  # the tensor itself would refer back to its graph, and never be freed

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), watching(note):
            yield
        # Now, as FSDP2 has emptied the storages of the weights that it gathered.
        self.used = float(sum(storage.nbytes() for storage in saved.values()))
        self.bytes_per_token = self.used / self.tokens

    def back_off(self) -> str:
        """Out of memory: keep no more in this step, and half as much in the next ones. Returns what to tell the user.

        The caller has dropped the kept graphs.
        """
        self.retries += 1
        said = "the pass was repeated" if self.retries == 1 else ""
        if self.keeps:
            self.limit = self.used / 2
            said = f"kept activations halved to {self.limit / 1e9:.2g} GB"
        self.budget, self.used, self.keeps = 0.0, 0.0, False
        gc.collect()  # the error's traceback may have left cycles that hold activations
        torch.cuda.empty_cache()
        where = f"rank {rank()}: " if world_size() > 1 else ""
        return said and f"{where}out of memory: {said}; the gradient is the same"


def two_pass_step(
    engine: Engine,
    chunks: Sequence[Chunk],
    loss_of: Callable[[Tensor], dict[str, Tensor]],
    mark: Callable[[str], None] = lambda name: None,
    memory: ActivationMemory | None = None,
) -> dict[str, Tensor]:
    """Accumulate in the model's `.grad` the gradient of the sum of `loss_of(all vectors)`, one chunk at a time.

    Out of memory on this rank, a part of the step is run once more with no kept graph, which gives the same gradient.

    Args:
        engine: how the model is called, and when gradients cross ranks.
        chunks: the local texts; the vectors' rows are in the order of the chunks.
        loss_of: float32 (T, D) vectors with gradient -> this rank's share of each loss term, scalars by name. The loss
            that is differentiated is the sum over terms and ranks.
        mark: called with "pass_1", "loss", "pass_2" as each part ends, for timing.
        memory: which chunks keep their graph from pass 1 to pass 2; None recomputes all.
    Returns:
        This rank's share of each term, detached.
    """
    # 1. All vectors. The chunks that fit the memory budget keep their graph.
    own = len(chunks)
    idle = engine.rounds(own) - own  # chunks that this rank only joins because the others run them
    chunks = [*chunks, *[first_text(chunks[-1])] * idle]
    memory = memory or ActivationMemory("0", chunks[0]["input_ids"].device)
    gradients_before = [
        (p, None if p.grad is None else p.grad.clone()) for p in engine.model.parameters() if p.requires_grad
    ]
    memory.begin(engine.model, engine.gradient_shards)
    kept: list[Tensor | None] = []

    def drop_graphs() -> None:
        kept[:] = [None] * len(kept)

    states, vectors = retried(lambda: first_pass(engine, chunks, memory), drop_graphs, engine, memory)
    mark("pass_1")

    # 2. The loss, and its gradient with respect to the vectors.
    kept += vectors
    values = [part.detach() for part in vectors[:own]]
    del vectors

    def loss() -> tuple[dict[str, Tensor], Tensor]:
        vectors_TD = torch.cat(values).float().requires_grad_()
        terms = loss_of(vectors_TD)
        (gradient_TD,) = torch.autograd.grad(torch.stack(list(terms.values())).sum() * engine.loss_scale, vectors_TD)
        return {name: share.detach() for name, share in terms.items()}, gradient_TD

    terms, gradient_TD = retried(loss, drop_graphs, engine, memory)
    mark("loss")

    # 3. Each chunk's graph, kept or recomputed, carries the vectors' gradient on to the weights.
    def surrogate(number: int, gradient: Tensor | float) -> Tensor:
        vector, kept[number] = kept[number], None  # so that its memory is free once it is back-propagated
        if vector is None or not vector.requires_grad:
            with states[number].replayed():
                vector = engine.wrapped(**chunks[number])
        return (vector.float() * gradient).sum()

    def start_over() -> None:
        """A backward that stopped half-way has added to some gradients."""
        drop_graphs()
        for parameter, gradient in gradients_before:
            parameter.grad = gradient

    gradients = [*gradient_TD.split([len(chunk["lengths"]) for chunk in chunks[:own]]), *[0.0] * idle]
    surrogates = [functools.partial(surrogate, *part) for part in enumerate(gradients)]
    retried(lambda: engine.backward(surrogates), start_over, engine, memory)
    mark("pass_2")
    return terms


def retried(part: Callable[[], T], undo: Callable[[], None], engine: Engine, memory: ActivationMemory) -> T:
    """Run a part of the step. Where memory runs out, undo it, keep no graph, and run it once more.

    Not where the part has begun to exchange with other ranks: they would not repeat it.
    """
    state, collectives = RandomState(memory.device), collectives_started()
    try:
        return part()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or engine.collective or collectives_started() > collectives:
            raise
    state.restore()
    undo()
    said = memory.back_off()
    result = part()
    if said:
        log.warning(said)
    return result


def first_pass(
    engine: Engine, chunks: Sequence[Chunk], memory: ActivationMemory
) -> tuple[list[RandomState], list[Tensor]]:
    """The random state before each chunk, and its vectors, with their graph where the chunk keeps it."""
    states, vectors = [], []
    for chunk in chunks:
        states.append(RandomState(chunk["input_ids"].device))
        keep = engine.keeps_graphs and memory.fits(chunk["input_ids"].numel(), engine.agree)
        with memory.watched() if keep else torch.no_grad():
            vectors.append(engine.model(**chunk))
    return states, vectors


def first_text(chunk: Chunk) -> Chunk:
    """A chunk that holds only the first text of a chunk."""
    part = {"lengths": chunk["lengths"][:1], "prompt_lengths": chunk["prompt_lengths"][:1]}
    if "equal_length_runs" not in chunk:
        return part | {"input_ids": chunk["input_ids"][:1]}
    _, length = chunk["equal_length_runs"][0]
    return part | {"input_ids": chunk["input_ids"][:length], "equal_length_runs": ((1, length),)}
