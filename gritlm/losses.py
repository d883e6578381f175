"""Contrastive losses: pure maths on vectors. Knows nothing of ranks, data or models.

Shape suffixes: B queries, P candidate passages, D width.
"""

import torch
from torch import Tensor


def info_nce(
    queries_BD: Tensor, passages_PD: Tensor, positive_B: Tensor, temperature: float, masked_BP: Tensor | None = None
) -> Tensor:
    """InfoNCE of each query over all candidates (van den Oord et al., arXiv 1807.03748).

    `-log( exp(s(q, d+)/t) / sum over d of exp(s(q, d)/t) )`, s the dot product, in float32.

    Args:
        queries_BD: (B, D), any float dtype.
        passages_PD: (P, D).
        positive_B: int64 (B,), each query's positive as an index into the passages.
        temperature: t.
        masked_BP: bool (B, P), true where a candidate is left out of the sum; must be false at the positive.
    Returns:
        float32 (B,), the loss of each query.
    """
    with torch.autocast(queries_BD.device.type, enabled=False):
        scores_BP = queries_BD.float() @ passages_PD.float().T / temperature
        if masked_BP is not None:
            scores_BP = scores_BP.masked_fill(masked_BP, float("-inf"))
        return torch.nn.functional.cross_entropy(scores_BP, positive_B, reduction="none")
