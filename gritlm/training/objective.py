"""From one rank's vectors to its share of the global loss: arrange, gather, mask, and sum the terms of `TERMS`.

A term is one function and one row of `TERMS`. Shape suffixes: T local texts, B local queries, G passages per query,
S = B*G local passage slots, P candidates of all ranks, K known positives kept per query, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gritlm.data.batches import ContrastiveBatch
from gritlm.distributed import Ranks, all_gather, all_reduce_max, gather_with_gradient, ring_shift
from gritlm.training.arguments import ObjectiveArguments
from gritlm.training.losses import Mask, Ring, logsumexp_over

MANY_KNOWN = 64  # known positives of a query; from here on a binary search is faster than comparing one by one


@dataclass(frozen=True)
class Candidates:
    """Vectors of all ranks to contrast with. With a ring: this rank's block, and the others as they arrive.

    vectors: (P, D), or (P / ranks, D) with a ring; columns_PC: int64 (P, C), what the masks need to know of each.
    """

    vectors: Tensor
    columns_PC: Tensor
    ring: Ring | None


@dataclass
class Contrast:
    """What a term sees: unit vectors, who is whose positive, and the other ranks' candidates.

    queries_BD, positives_BD: float32 (B, D), this rank's. slots_SD: float32 (S, D), zeros in an unused slot.
    """

    args: ObjectiveArguments
    ranks: Ranks
    gather: Callable[[Tensor], Tensor]
    batch: ContrastiveBatch
    queries_BD: Tensor
    positives_BD: Tensor
    slots_SD: Tensor

    @property
    def group_size(self) -> int:
        return len(self.slots_SD) // len(self.queries_BD)

    @property
    def known_BK(self) -> Tensor:
        """int64 (B, K + 1): the ids of each query's known positives, and of its positive's tokens."""
        return torch.cat([self.batch.known_positives_BK, self.batch.tokens_of_slot_S[:: self.group_size, None]], dim=1)

    @property
    def positive_similarity_B(self) -> Tensor:
        return (self.queries_BD * self.positives_BD).sum(1)

    def lse(self, rows_BD: Tensor, candidates: Candidates, masked: Mask) -> Tensor:
        """(B,): the log-sum over candidates, shifted by each query's similarity to its positive."""
        return logsumexp_over(
            rows_BD, candidates.vectors, self.positive_similarity_B, self.args.temperature, masked, candidates.ring
        )

    def from_all_ranks(self, vectors: Tensor, columns: Tensor) -> Candidates:
        """The rows of all ranks: gathered, or sent round a ring, so that a rank holds at most two ranks' share."""
        ranks = self.ranks
        if ranks.size == 1 or not self.args.negatives_cross_device:
            return Candidates(vectors, columns, None)
        columns = all_gather(columns)
        if not self.args.negatives_ring:
            return Candidates(self.gather(vectors), columns, None)
        by_rank = columns.chunk(ranks.size)
        arrival = [by_rank[ranks.rank - hop] for hop in range(ranks.size)]
        return Candidates(vectors, torch.cat(arrival), Ring(ranks.size, ring_shift))

    def passages(self) -> Candidates:
        """All passage slots. Columns: the text's id, that of its tokens (0 if unused), the query of the slot."""
        batch = self.batch
        owner_S = batch.query_id_B.repeat_interleave(self.group_size)
        columns = [batch.id_of_slot_S, batch.tokens_of_slot_S, owner_S]
        return self.from_all_ranks(self.slots_SD, torch.stack(columns, dim=1))

    def queries(self) -> Candidates:
        """All queries. Columns: the query's id, then `known_BK`."""
        known_BK = self.known_BK
        if self.ranks.size > 1 and self.args.negatives_cross_device:
            (width,) = all_reduce_max(known_BK.shape[1])
            known_BK = torch.cat([known_BK, known_BK[:, :1].expand(-1, width - known_BK.shape[1])], dim=1)
        return self.from_all_ranks(self.queries_BD, torch.cat([self.batch.query_id_B[:, None], known_BK], dim=1))


# ---- terms: Contrast -> float32 (B,), the loss of each local query


def info_nce(contrast: Contrast) -> Tensor:
    """InfoNCE over hard, in-batch and cross-device negatives (van den Oord et al., arXiv 1807.03748).

    `log(1 + sum over d of exp((s(q, d) - s(q, d+))/t))`. A passage with the text of a known positive of the query is
    no negative.
    """
    passages = contrast.passages()
    return F.softplus(contrast.lse(contrast.queries_BD, passages, known_passages(contrast, passages)))


def same_tower(contrast: Contrast) -> Tensor:
    """InfoNCE whose denominator also holds q-q' and d+-d' (GTE, arXiv 2308.03281; Qwen3-Embedding, arXiv 2506.05176).

    q' is another query that shares neither text nor known positive with q. d' is a passage of another query that is
    no known positive of q.
    """
    queries, passages = contrast.queries(), contrast.passages()
    parts = [
        contrast.lse(contrast.queries_BD, passages, known_passages(contrast, passages)),
        contrast.lse(contrast.queries_BD, queries, related_queries(contrast, queries)),
        contrast.lse(contrast.positives_BD, passages, related_passages(contrast, passages)),
    ]
    return F.softplus(torch.logsumexp(torch.stack(parts), dim=0))


# ---- masks: the candidates that are no negatives of a query
#
# Texts with the same tokens after the cut have one vector, so they are one text. A query knows its positive by the
# tokens, too, and the positives of the queries that equal it.


def known_passages(contrast: Contrast, passages: Candidates) -> Mask:
    """Unused slots, and known positives of the query."""
    batch = contrast.batch
    positive_B, answered_P = batch.tokens_of_slot_S[:: contrast.group_size], answered_queries(contrast, passages)

    def masked(b: slice, p: slice) -> Tensor:
        id_p, tokens_p, _ = passages.columns_PC[p].unbind(1)
        masked_bp = (tokens_p == 0) | is_known(id_p, batch.known_positives_BK[b])
        return masked_bp | (tokens_p == positive_B[b, None]) | (answered_P[p] == batch.query_id_B[b, None])

    return masked


def related_passages(contrast: Contrast, passages: Candidates) -> Mask:
    """Besides known passages, the passages of the query itself."""
    known = known_passages(contrast, passages)
    return lambda b, p: known(b, p) | (contrast.batch.query_id_B[b, None] == passages.columns_PC[p, 2])


def related_queries(contrast: Contrast, queries: Candidates) -> Mask:
    """Queries with the text of this one, or with a known positive of it."""
    id_P, known_PK = queries.columns_PC[:, 0], queries.columns_PC[:, 1:]
    query_id_B, known_BK = contrast.batch.query_id_B, contrast.known_BK

    def masked(b: slice, p: slice) -> Tensor:
        masked_bp = query_id_B[b, None] == id_P[p]
        for known_p in known_PK[p].unbind(1):
            masked_bp = masked_bp | is_known(known_p, known_BK[b])
        return masked_bp

    return masked


def answered_queries(contrast: Contrast, passages: Candidates) -> Tensor:
    """int64 (P,): the query that each passage answers, which is one that has its tokens as the positive; 0 if none."""
    tokens_P, owner_P = passages.columns_PC[:, 1], passages.columns_PC[:, 2]
    positive_Q, order_Q = tokens_P[:: contrast.group_size].sort()
    at_P = torch.searchsorted(positive_Q, tokens_P.contiguous()).clamp(max=len(positive_Q) - 1)
    answered_P = torch.where(positive_Q[at_P] == tokens_P, owner_P[:: contrast.group_size][order_Q[at_P]], 0)
    answered_P[:: contrast.group_size] = owner_P[:: contrast.group_size]  # of several queries, each its own
    return answered_P


def is_known(id_P: Tensor, known_positives_BK: Tensor) -> Tensor:
    """bool (B, P): true where a candidate's text is a known positive of the query."""
    if known_positives_BK.shape[1] > MANY_KNOWN:
        known_BK = known_positives_BK.sort(dim=1).values
        nearest_BP = torch.searchsorted(known_BK, id_P.repeat(len(known_BK), 1)).clamp(max=known_BK.shape[1] - 1)
        return known_BK.gather(1, nearest_BP) == id_P
    known_BP = torch.zeros(len(known_positives_BK), len(id_P), dtype=torch.bool, device=id_P.device)
    for known_B in known_positives_BK.unbind(1):
        known_BP |= id_P == known_B[:, None]
    return known_BP


# ---- the objective


@dataclass(frozen=True)
class Term:
    """A row of `TERMS`.

    losses: the loss of each local query. weight: of the term in a run with these flags; 0 leaves it out.
    example: flags that switch it on, for `gritlm verify-gradients` and the tests.
    """

    losses: Callable[[Contrast], Tensor]
    weight: Callable[[ObjectiveArguments], float]
    example: dict[str, Any]


TERMS = {
    "info_nce": Term(info_nce, lambda args: float(not args.same_tower), {}),
    "same_tower": Term(same_tower, lambda args: float(args.same_tower), {"same_tower": True}),
}


@dataclass(frozen=True)
class Objective:
    """The mean loss over the global batch, as one rank sees it.

    Args:
        args: which terms there are, and their settings.
        ranks: who shares the global batch; one process by default, also inside a job of many ranks.
        gather: this rank's vectors -> all ranks', with gradient.
    """

    args: ObjectiveArguments
    ranks: Ranks = Ranks()
    gather: Callable[[Tensor], Tensor] = gather_with_gradient

    def __call__(self, vectors_TD: Tensor, batch: ContrastiveBatch) -> dict[str, Tensor]:
        """This rank's share of each term: the sum of its queries' losses over the number of queries of all ranks.

        The global loss is the sum over ranks and terms. Scalars, float32, differentiable once.
        """
        vectors_TD = vectors_TD.float()  # before anything else, so that gradients of a vector add up in float32
        queries_BD = vectors_TD[batch.text_of_query_B]
        used_S = batch.text_of_slot_S >= 0
        slots_SD = vectors_TD[batch.text_of_slot_S.clamp(min=0)] * used_S[:, None]
        queries_BD = queries_BD.detach() if self.args.emb_p_only else queries_BD
        slots_SD = slots_SD.detach() if self.args.emb_q_only else slots_SD
        positives_BD = slots_SD[:: len(slots_SD) // len(queries_BD)]
        contrast = Contrast(self.args, self.ranks, self.gather, batch, queries_BD, positives_BD, slots_SD)
        total = len(queries_BD) * self.ranks.size
        weights = {name: term.weight(self.args) for name, term in TERMS.items()}
        return {name: w * TERMS[name].losses(contrast).sum() / total for name, w in weights.items() if w}
