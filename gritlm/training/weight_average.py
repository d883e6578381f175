"""An exponential moving average of the weights, which is evaluated and published in place of the last weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of a model's trained weights, in float32.

    Args:
        decay: what a step keeps of the average. Early steps keep less, (1 + step) / (10 + step), so that a short run
            is not mostly its base.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.others = [weight.detach().to(torch.float32, copy=True) for weight in self.weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step; the first is 1."""
        weights = [weight.detach().float() for weight in self.weights]
        torch._foreach_lerp_(self.others, weights, 1 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def restore(self, weights: list[Tensor]) -> None:
        """Set the weights that are trained."""
        for weight, saved in zip(self.weights, weights, strict=True):
            weight.copy_(saved)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange: the model has the average, and `others` holds the weights that are trained."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for number, weight in enumerate(self.weights):
            weight.data, self.others[number] = self.others[number], weight.data
