"""GradCache (Gao et al., arXiv 2101.06983): the exact gradient of a whole-batch loss, encoded in chunks.

Knows nothing of Hugging Face. Memory is that of one chunk plus all vectors; the price is a second forward pass.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from gritlm.engines import Engine

Chunk = dict[str, Tensor]  # keyword arguments of the encoder


@dataclass
class StepResult:
    """What a step leaves behind besides the gradients: the detached loss and vectors."""

    loss: Tensor
    vectors_TD: Tensor


class RandomState:
    """The random state at a moment, on the CPU and on the current device, so that a forward can be repeated."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def replayed(self):
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


def two_pass_step(
    engine: Engine,
    chunks: Sequence[Chunk],
    loss_of: Callable[[Tensor], Tensor],
    mark: Callable[[str], None] = lambda name: None,
) -> StepResult:
    """Accumulate in the model's `.grad` the gradient of `loss_of(all vectors)`, one chunk at a time.

    Args:
        engine: says how the model is called and when gradients cross ranks.
        chunks: the local texts; row order of the vectors is the order of the chunks.
        loss_of: float32 (T, D) vectors with gradient -> this rank's share of the loss, a scalar. The loss that is
            differentiated is the sum of the ranks' shares.
        mark: called with "pass_1", "loss", "pass_2" as each part ends, for timing.
    """
    # 1. All vectors, without a graph.
    idle = engine.rounds(len(chunks)) - len(chunks)  # forwards that this rank joins in only for the others' sake
    alone = {name: value[:1] for name, value in chunks[-1].items()}
    states, vectors = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(RandomState(chunk["input_ids"].device))
            vectors.append(engine.model(**chunk))
        for _ in range(idle):
            engine.model(**alone)
    mark("pass_1")

    # 2. The loss, and its gradient with respect to the vectors.
    vectors_TD = torch.cat(vectors).float().requires_grad_()
    loss = loss_of(vectors_TD)
    (gradient_TD,) = torch.autograd.grad(loss * engine.loss_scale, vectors_TD)
    mark("loss")

    # 3. Each chunk again with its graph, carrying the vectors' gradient on to the weights.
    def again(chunk: Chunk, state: RandomState, gradient: Tensor) -> Tensor:
        with state.replayed():
            return (engine.wrapped(**chunk).float() * gradient).sum()

    gradients = gradient_TD.split([len(chunk["input_ids"]) for chunk in chunks])
    nothing = torch.zeros_like(gradient_TD[:1])
    work = [functools.partial(again, alone, states[-1], nothing)] * idle
    work += [functools.partial(again, *part) for part in zip(chunks, states, gradients, strict=True)]
    engine.backward(work)
    mark("pass_2")
    return StepResult(loss.detach(), vectors_TD.detach())
