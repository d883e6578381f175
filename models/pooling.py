"""Pooling: token states to one vector per text. Pure functions; which tokens count is the caller's mask.

Shape suffixes: N texts, L padded length, D width. Formulas are those of sentence-transformers' `Pooling`
(the served folder is loaded by it), so positions are counted over the whole text, prompt included.
"""

import torch
from torch import Tensor


def mean(states_NLD: Tensor, mask_NL: Tensor) -> Tensor:
    """Mean of the states that count, accumulated in float32."""
    weights_NL1 = mask_NL.unsqueeze(-1).float()
    return (states_NLD.float() * weights_NL1).sum(1) / weights_NL1.sum(1)


def weightedmean(states_NLD: Tensor, mask_NL: Tensor) -> Tensor:
    """Mean weighted by position, 1 for the first token of the text (SGPT, arXiv 2202.08904)."""
    position_L = torch.arange(1, mask_NL.shape[1] + 1, device=mask_NL.device, dtype=torch.float32)
    weights_NL1 = (mask_NL.float() * position_L).unsqueeze(-1)
    return (states_NLD.float() * weights_NL1).sum(1) / weights_NL1.sum(1)


def lasttoken(states_NLD: Tensor, mask_NL: Tensor) -> Tensor:
    """State of the last token that counts."""
    last_N = mask_NL.shape[1] - 1 - mask_NL.int().flip(1).argmax(1)
    return states_NLD[torch.arange(len(states_NLD), device=states_NLD.device), last_N].float()


def cls(states_NLD: Tensor, mask_NL: Tensor) -> Tensor:
    """State of the first token that counts."""
    first_N = mask_NL.int().argmax(1)
    return states_NLD[torch.arange(len(states_NLD), device=states_NLD.device), first_N].float()


POOLING = {"mean": mean, "weightedmean": weightedmean, "lasttoken": lasttoken, "cls": cls}


def pool(states_NLD: Tensor, mask_NL: Tensor, method: str) -> Tensor:
    """One float32 vector per text.

    Args:
        states_NLD: token states (N, L, D), any float dtype, right padded.
        mask_NL: bool (N, L), true where a token counts; every row must hold at least one true.
        method: a key of `POOLING`.
    Returns:
        float32 (N, D).
    """
    return POOLING[method](states_NLD, mask_NL)
