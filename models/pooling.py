"""Pooling: token states to one vector per text. Pure functions; which tokens count is the caller's mask.

Shape suffixes: N texts, L padded length, T tokens of all texts one after the other, D width. Formulas are those of
sentence-transformers' `Pooling` (the served folder is loaded by it), so positions count from the text's first token.
"""

import torch
from torch import Tensor

POOLING = ("mean", "weightedmean", "lasttoken", "cls")


def pool(states_TD: Tensor, lengths_N: Tensor, prompt_lengths_N: Tensor, method: str) -> Tensor:
    """One float32 vector per text.

    Args:
        states_TD: token states (T, D), any float dtype, texts one after the other.
        lengths_N: int64 (N,), tokens of each text; their sum is T.
        prompt_lengths_N: int64 (N,), how many of its first tokens do not count, fewer than its length.
        method: mean; weightedmean, by position, 1 for the first token (SGPT, arXiv 2202.08904); lasttoken; cls, the
            first token that counts.
    Returns:
        float32 (N, D).
    """
    starts_N = lengths_N.cumsum(0) - lengths_N
    if method == "lasttoken":
        return states_TD[starts_N + lengths_N - 1].float()
    if method == "cls":
        return states_TD[starts_N + prompt_lengths_N].float()
    position_T = positions(lengths_N, len(states_TD))
    prompt_length_T = prompt_lengths_N.repeat_interleave(lengths_N, output_size=len(states_TD))
    weights_T = (position_T >= prompt_length_T).float()
    if method == "weightedmean":
        weights_T = weights_T * (position_T + 1)
    sums_ND = torch.segment_reduce(states_TD.float() * weights_T[:, None], "sum", lengths=lengths_N, unsafe=True)
    return sums_ND / torch.segment_reduce(weights_T, "sum", lengths=lengths_N, unsafe=True)[:, None]


def positions(lengths_N: Tensor, total: int) -> Tensor:
    """int64 (T,): each token's place in its own text, from 0."""
    starts_N = lengths_N.cumsum(0) - lengths_N
    starts_T = starts_N.repeat_interleave(lengths_N, output_size=total)
    return torch.arange(total, device=lengths_N.device) - starts_T
