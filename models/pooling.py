"""Pooling: token states to one vector per text. Pure functions of packed states.

Shape suffixes: N texts, T tokens of all texts end to end, D width. The formulas are those of sentence-transformers'
`Pooling`, which loads the saved folder; so positions count from the text's first token, instruction included.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Pooling(NamedTuple):
    """A row of `POOLING`.

    vectors: states_TD, lengths_N, prompt_lengths_N -> (N, D), as in `pool`.
    sentence_transformers: the key of the method in sentence-transformers' pooling config.
    """

    vectors: Callable[[Tensor, Tensor, Tensor], Tensor]
    sentence_transformers: str


def mean(states_TD: Tensor, lengths_N: Tensor, prompt_lengths_N: Tensor) -> Tensor:
    return _weighted(states_TD, lengths_N, pooled_T(lengths_N, prompt_lengths_N, len(states_TD)).float())


def weightedmean(states_TD: Tensor, lengths_N: Tensor, prompt_lengths_N: Tensor) -> Tensor:
    """Each token weighted by its position from 1 (SGPT, arXiv 2202.08904)."""
    total = len(states_TD)
    weights_T = pooled_T(lengths_N, prompt_lengths_N, total) * (positions(lengths_N, total) + 1.0)
    return _weighted(states_TD, lengths_N, weights_T)


def lasttoken(states_TD: Tensor, lengths_N: Tensor, prompt_lengths_N: Tensor) -> Tensor:
    return states_TD[lengths_N.cumsum(0) - 1]


def cls(states_TD: Tensor, lengths_N: Tensor, prompt_lengths_N: Tensor) -> Tensor:
    """The first pooled token."""
    return states_TD[lengths_N.cumsum(0) - lengths_N + prompt_lengths_N]


POOLING = {
    "mean": Pooling(mean, "pooling_mode_mean_tokens"),
    "weightedmean": Pooling(weightedmean, "pooling_mode_weightedmean_tokens"),
    "lasttoken": Pooling(lasttoken, "pooling_mode_lasttoken"),
    "cls": Pooling(cls, "pooling_mode_cls_token"),
}


def pool(states_TD: Tensor, lengths_N: Tensor, prompt_lengths_N: Tensor, method: str) -> Tensor:
    """One float32 vector per text.

    Args:
        states_TD: token states, any float dtype, texts end to end.
        lengths_N: int64, tokens in each text; they add up to T.
        prompt_lengths_N: int64, leading tokens of each text that are not pooled; fewer than its length.
        method: a name of `POOLING`.
    Returns:
        float32 (N, D).
    """
    return POOLING[method].vectors(states_TD, lengths_N, prompt_lengths_N).float()


def pooled_T(lengths_N: Tensor, prompt_lengths_N: Tensor, total: int) -> Tensor:
    """bool (T,): whether a token is pooled."""
    prompt_length_T = prompt_lengths_N.repeat_interleave(lengths_N, output_size=total)
    return positions(lengths_N, total) >= prompt_length_T


def _weighted(states_TD: Tensor, lengths_N: Tensor, weights_T: Tensor) -> Tensor:
    sums_ND = torch.segment_reduce(states_TD.float() * weights_T[:, None], "sum", lengths=lengths_N, unsafe=True)
    return sums_ND / torch.segment_reduce(weights_T, "sum", lengths=lengths_N, unsafe=True)[:, None]


def positions(lengths_N: Tensor, total: int) -> Tensor:
    """int64 (T,): each token's position in its text, from 0. `total` is T, given so that no device is read."""
    starts_N = lengths_N.cumsum(0) - lengths_N
    starts_T = starts_N.repeat_interleave(lengths_N, output_size=total)
    return torch.arange(total, device=lengths_N.device) - starts_T
