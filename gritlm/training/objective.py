"""From one rank's vectors to its share of the global loss: arrange, gather, mask, contrast.

Shape suffixes: T local texts, B local queries, G passages per query, S = B*G local passage slots, P slots of all ranks,
K known positives kept per query, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gritlm.distributed import all_gather, gather_with_gradient, rank, ring_shift, world_size
from gritlm.training.losses import Ring, info_nce

MANY_KNOWN = 64  # positives of a query; from there on a search in their order is faster than one after the other


@dataclass
class ContrastiveBatch:
    """Where each local vector belongs. Slot `b*G` holds query b's positive; unused slots have no text.

    text_of_query_B: int64 (B,), text_of_slot_S: int64 (S,) indices into the local vectors, -1 for an unused slot.
    id_of_slot_S: int64 (S,), a hash of the passage's text.
    known_positives_BK: int64 (B, K), hashes of every known positive of the query, padded with one of them.
    """

    text_of_query_B: Tensor
    text_of_slot_S: Tensor
    id_of_slot_S: Tensor
    known_positives_BK: Tensor


@dataclass
class Objective:
    """The mean InfoNCE over the global batch, as seen from one rank.

    cross_device: with the passages of all ranks, gathered on each; or, with `ring`, passed around the ranks, so that
    none ever holds more than two ranks' (and their gradients).
    """

    temperature: float
    cross_device: bool = True
    ring: bool = False

    def __call__(self, vectors_TD: Tensor, batch: ContrastiveBatch) -> Tensor:
        """This rank's share: the sum of its queries' losses over the number of queries of all ranks.

        A candidate is left out for a query where its text is a known positive of that query, other than the
        positive drawn: an identical text is not a negative.
        """
        queries_BD = vectors_TD[batch.text_of_query_B]
        used_S = batch.text_of_slot_S >= 0
        slots_SD = vectors_TD[batch.text_of_slot_S.clamp(min=0)] * used_S.unsqueeze(1)
        n_queries, slots = len(queries_BD), len(slots_SD)

        across = self.cross_device and world_size() > 1
        id_and_used_P2 = torch.stack([batch.id_of_slot_S, used_S.long()], dim=1)
        id_and_used_P2 = all_gather(id_and_used_P2) if across else id_and_used_P2
        passages_PD, offset, ring = slots_SD, 0, None
        if across and self.ring:
            ring = Ring(world_size(), ring_shift)
            by_rank = id_and_used_P2.chunk(world_size())
            id_and_used_P2 = torch.cat([by_rank[rank() - hop] for hop in range(world_size())])  # as the blocks come
        elif across:
            passages_PD, offset = gather_with_gradient(slots_SD), rank() * slots

        positive_B = offset + torch.arange(n_queries, device=vectors_TD.device) * (slots // n_queries)
        id_P, used_P = id_and_used_P2[:, 0], id_and_used_P2[:, 1].bool()

        def masked(b: slice, p: slice) -> Tensor:
            return mask_candidates(id_P[p], used_P[p], batch.known_positives_BK[b])

        losses_B = info_nce(queries_BD, passages_PD, positive_B, self.temperature, masked, ring)
        return losses_B.sum() / (n_queries * world_size())


def mask_candidates(id_P: Tensor, used_P: Tensor, known_positives_BK: Tensor) -> Tensor:
    """bool (B, P): true where a candidate is unused, or is a known positive of the query."""
    masked_BP = ~used_P.expand(len(known_positives_BK), -1)
    if known_positives_BK.shape[1] > MANY_KNOWN:
        known_positives_BK = known_positives_BK.sort(dim=1).values
        nearest_BP = torch.searchsorted(known_positives_BK, id_P.repeat(len(known_positives_BK), 1)).clamp(
            max=known_positives_BK.shape[1] - 1
        )
        return masked_BP | (known_positives_BK.gather(1, nearest_BP) == id_P)
    for known_positives_B1 in known_positives_BK.split(1, dim=1):
        masked_BP = masked_BP | (id_P == known_positives_B1)
    return masked_BP
