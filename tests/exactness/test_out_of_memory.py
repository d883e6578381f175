"""A step that runs out of memory half-way gives the gradient of the undisturbed step, or says so."""

import resource

import psutil
import pytest
import torch
from helpers import flat_gradient, make_builder, make_embedder, relative
from processes import Ranks, run_ranks

from gritlm.distributed import all_ranks, all_reduce_max, rank, world_size
from gritlm.training import gradcache
from gritlm.training.arguments import ObjectiveArguments
from gritlm.training.engines import Replica, engine_for
from gritlm.training.gradcache import ActivationMemory, is_out_of_memory, two_pass_step
from gritlm.training.objective import Objective

CPU = torch.device("cpu")
ERRORS = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "allocator": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
    "library": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "interpreter": MemoryError(),
}


class Fault:
    """Raises at given calls of one place. In "pass 2" the gradients of the later layers have been added by then."""

    def __init__(self, model, place: str, calls: tuple[int, ...]):
        self.place, self.calls, self.seen = place, calls, 0
        model.backbone.layers[0].register_forward_hook(lambda layer, given, out: self.in_layer(out))

    def due(self) -> None:
        self.seen += 1
        if self.seen in self.calls:
            raise ERRORS["device"]

    def in_layer(self, states: torch.Tensor) -> torch.Tensor:
        if self.place == "pass 1":
            self.due()
        return Backward.apply(states, self) if self.place in ("pass 2", "last chunk") else states

    def at(self, place: str) -> None:
        if self.place == place:
            self.due()


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, fault):
        ctx.fault = fault
        return states.view_as(states)

    @staticmethod
    def backward(ctx, gradient):
        ctx.fault.due()
        return gradient, None


def take(
    folder,
    data,
    cache,
    memory: str,
    place: str = "",
    calls: tuple[int, ...] = (),
    steps: int = 1,
    cross_device: bool = True,
    gradients: float | None = None,
) -> tuple[torch.Tensor, float]:
    """The gradient of the last step, and the limit of kept activations that is left. `gradients`: those before it."""
    builder = make_builder(folder, data, cache, batch=16, rank=rank(), ranks=world_size(), chunk_tokens=96)
    model = make_embedder(folder).train()
    wrapped = Replica(model) if world_size() > 1 else model
    objective = Objective(ObjectiveArguments(temperature=0.05, negatives_cross_device=cross_device), all_ranks())
    kept, fault = ActivationMemory(memory, CPU), Fault(model, place, calls)
    torch.manual_seed(rank())
    for step in range(steps):
        for parameter in model.parameters():
            parameter.grad = None if gradients is None else torch.full_like(parameter, gradients)
        batch = builder[0, step]
        assert len(batch.chunks) >= 5
        if place == "last chunk" and calls:
            fault.calls = (len(batch.chunks),)

        def loss_of(vectors: torch.Tensor, batch=batch):
            fault.at("loss")
            terms = objective(vectors, batch.contrastive)
            fault.at("after the loss")
            return terms

        engine = engine_for(wrapped)
        backward = engine.backward
        engine.backward = lambda surrogates, backward=backward: (backward(surrogates), fault.at("reduction"))
        two_pass_step(engine, batch.chunks, loss_of, memory=kept)
    assert fault.seen >= max(calls, default=0), "the fault was never reached"
    return flat_gradient(model), kept.limit


@pytest.fixture
def hard(data):
    return data / "hard.jsonl"


PLACES = [("pass 1", 3), ("loss", 1), ("pass 2", 2)]


@pytest.mark.parametrize("kept", ["9", "0"])
@pytest.mark.parametrize(("place", "call"), PLACES)
def test_the_gradient_is_the_same(qwen3_dropout, hard, tmp_path, logged, place, call, kept):
    undisturbed, limit = take(qwen3_dropout, hard, tmp_path, kept)
    found, limit_after = take(qwen3_dropout, hard, tmp_path, kept, place, (call,))
    assert relative(found, undisturbed) < 1e-6
    (line,) = logged.messages
    what = f"kept activations halved to {limit_after / 1e9:.2g} GB" if kept == "9" else "the pass was repeated"
    assert line == f"out of memory: {what}; the gradient is the same"
    assert 0 < limit_after < 1e-2 * limit if kept == "9" else limit_after == 0


def test_a_gradient_from_before_the_step_stays(qwen3_dropout, hard, tmp_path):
    both = [take(qwen3_dropout, hard, tmp_path, "9", *fault, gradients=0.5)[0] for fault in ((), ("pass 2", (2,)))]
    assert relative(*both) < 1e-6


@pytest.mark.parametrize("control", ["gradients are not cleared", "dropout is drawn anew"])
def test_controls(qwen3_dropout, hard, tmp_path, monkeypatch, control):
    retried, undisturbed = gradcache.retried, take(qwen3_dropout, hard, tmp_path, "0")[0]
    if control == "gradients are not cleared":
        monkeypatch.setattr(gradcache, "retried", lambda part, undo, *rest: retried(part, lambda: None, *rest))
        place = "pass 2", (2,)
    else:
        monkeypatch.setattr(gradcache.RandomState, "restore", lambda self: None)
        place = "pass 1", (3,)
    assert relative(take(qwen3_dropout, hard, tmp_path, "0", *place)[0], undisturbed) > 1e-3


@pytest.mark.parametrize(("place", "call"), PLACES)
def test_again_with_nothing_kept_it_is_raised(qwen3, hard, tmp_path, logged, place, call):
    with pytest.raises(torch.OutOfMemoryError):
        take(qwen3, hard, tmp_path, "9", place, tuple(range(call, 99)))
    assert not logged.messages


def test_what_counts_as_out_of_memory():
    assert all(map(is_out_of_memory, ERRORS.values()))
    others = RuntimeError("shape mismatch"), ValueError("out of memory"), RuntimeError("CUDA error: device-side assert")
    assert not any(map(is_out_of_memory, others))


# where the fault is, on which ranks, whether the loss has collectives -> whether the step can go on
ON_RANKS = {
    "pass 2": ("pass 2", (1,), True, True),
    "the loss, before a collective": ("loss", (1,), True, True),
    "the loss, after a collective": ("after the loss", (0, 1), True, False),
    "the loss, without collectives": ("after the loss", (1,), False, True),
    "the last chunk": ("last chunk", (1,), True, True),
    "the reduction": ("reduction", (0, 1), True, False),
}


def on_ranks(folder, data, cache) -> dict[str, float | None]:
    """By cell, how far the second step's gradient is off; None where the error is raised."""
    errors: dict[str, float | None] = {}
    calm = {cross: take(folder, data, cache, "9", steps=2, cross_device=cross)[0] for cross in (True, False)}
    for cell, (place, ranks, cross, _) in ON_RANKS.items():
        calls = (2,) if rank() in ranks else ()
        try:
            errors[cell] = relative(take(folder, data, cache, "9", place, calls, 2, cross_device=cross)[0], calm[cross])
        except torch.OutOfMemoryError:
            errors[cell] = None
        all_reduce_max(0)
    return errors


def test_one_rank_of_two(qwen3_dropout, hard, tmp_path):
    """The other rank goes on meanwhile, to where vectors or gradients are exchanged."""
    for errors in run_ranks(on_ranks, qwen3_dropout, hard, tmp_path):
        for cell, (*_, goes_on) in ON_RANKS.items():
            assert (errors[cell] is not None) == goes_on, cell
            assert not goes_on or errors[cell] < 1e-6, cell


class Wide(torch.nn.Module):
    """A chunk's graph holds 32 MB."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 1_000_000))

    def forward(self, input_ids, lengths, prompt_lengths):
        states = self.weight
        for _ in range(8):
            states = (states + input_ids[0, 0]).sin()
        return states[: len(lengths) * 4].view(-1, 4)


def in_little_memory(room: int) -> None:
    chunk = {"lengths": torch.tensor([3, 3]), "prompt_lengths": torch.tensor([0, 0])}
    chunks = [chunk | {"input_ids": torch.full((2, 3), number)} for number in range(5)]
    found = {}
    for setting in ("0", "9"):  # the first step warms up
        if setting == "9" and room:
            resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + room * 10**6,) * 2)
        model, memory = Wide(), ActivationMemory(setting, CPU)
        two_pass_step(engine_for(model), chunks, lambda vectors: {"loss": vectors.square().sum()}, memory=memory)
        found[setting] = model.weight.grad
    print(relative(found["9"], found["0"]) < 1e-6, memory.limit < 1e9)


@pytest.mark.parametrize("room", [0, 50], ids=["no limit", "50 MB"])
def test_the_allocator_itself(room):
    """All five graphs need 160 MB, about 50 MB of which the allocator has left from the first step."""
    done = Ranks(in_little_memory, room).wait()
    assert done.stdout == f"True {room > 0}\n", done.stderr[-3000:]
