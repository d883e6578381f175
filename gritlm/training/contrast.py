"""What a loss term sees: this rank's vectors, the candidates of all ranks, and the masks that leave some of them out.

Shape suffixes: B local queries, G passages per query, S = B*G local passage slots, P candidates of all ranks, K known
positives kept per query, D width; b, p: a range of queries and of candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gritlm.data.batches import ContrastiveBatch
from gritlm.distributed import Ranks, all_gather, all_reduce_max, ring_shift
from gritlm.training.arguments import ObjectiveArguments
from gritlm.training.losses import Bias, Mask, Ring, logsumexp_over

MANY_KNOWN = 64  # known positives of a query; from here on a binary search is faster than comparing one by one


@dataclass(frozen=True)
class Candidates:
    """Vectors of all ranks to contrast with. With a ring: this rank's block, and the others as they arrive.

    vectors: (P, D), or (P / ranks, D) with a ring; columns_PC: int64 (P, C), what the masks need to know of each.
    guide_PE: the teacher's vectors of all candidates, where --guide_margin wants them.
    """

    vectors: Tensor
    columns_PC: Tensor
    ring: Ring | None
    guide_PE: Tensor | None = None


@dataclass(frozen=True)
class LogSum:
    """float32 (B,): the log-sum over a query's candidates. int64 (B,): how many the masks left, where it is counted."""

    log_sum_B: Tensor
    count_B: Tensor | None


@dataclass
class Contrast:
    """What a term sees: unit vectors, who is whose positive, and the other ranks' candidates.

    queries_BD, positives_BD: float32 (B, D), this rank's. slots_SD: float32 (S, D), zeros in an unused slot.
    projected_TE: float32 (T, E), the local vectors on the teacher's width, by --teacher_weight.
    left_out: by rule, how many candidates of these queries it left out so far.
    """

    args: ObjectiveArguments
    ranks: Ranks
    gather: Callable[[Tensor], Tensor]
    batch: ContrastiveBatch
    queries_BD: Tensor
    positives_BD: Tensor
    slots_SD: Tensor
    projected_TE: Tensor
    left_out: dict[str, Tensor] = field(default_factory=dict)

    @property
    def group_size(self) -> int:
        return len(self.slots_SD) // len(self.queries_BD)

    @property
    def known_BK(self) -> Tensor:
        """int64 (B, K + 1): the ids of each query's known positives, and of its positive's tokens."""
        return torch.cat([self.batch.known_positives_BK, self.batch.tokens_of_slot_S[:: self.group_size, None]], dim=1)

    @property
    def similarity_BG(self) -> Tensor:
        """float32 (B, G): a query's similarity to each slot of its row."""
        return torch.einsum(
            "bd,bgd->bg", self.queries_BD, self.slots_SD.view(len(self.queries_BD), self.group_size, -1)
        )

    @property
    def positive_similarity_B(self) -> Tensor:
        return (self.queries_BD * self.positives_BD).sum(1)

    def lse(self, rows: str, candidates: Candidates, masked: Mask, hardness: bool = False) -> "LogSum":
        """The log-sum over candidates, shifted by each query's similarity to its positive.

        Args:
            rows: what is contrasted with the candidates: "queries" or "positives".
            hardness: whether --hardness_hard and --hardness_in_batch act on these candidates.
        """
        rows_BD = self.queries_BD if rows == "queries" else self.positives_BD
        bias, limited = (
            self._bias(rows, candidates, hardness),
            self.margin is not None or candidates.guide_PE is not None,
        )
        similarity_B, ring, left_out_2B = self.positive_similarity_B, candidates.ring, None
        if limited or self.args.debiased:  # counting costs a pass over each tile
            left_out_2B = torch.zeros(2, len(rows_BD), dtype=torch.long, device=rows_BD.device)
        log_sum_B = logsumexp_over(
            rows_BD, candidates.vectors, similarity_B, self.args.temperature, masked, ring, bias, left_out_2B
        )
        if left_out_2B is None:
            return LogSum(log_sum_B, None)
        if limited:
            self.left_out["margins"] = self.left_out.get("margins", 0) + left_out_2B[1].sum()
        return LogSum(log_sum_B, len(candidates.columns_PC) - left_out_2B.sum(0))

    @property
    def margin(self) -> Tensor | None:
        """float32 (B,): the similarity above which a candidate counts as a false negative; None without such a flag."""
        similarity_B, limits = self.positive_similarity_B.detach(), []
        if self.args.false_negative_margin is not None:
            limits.append(similarity_B + self.args.false_negative_margin)
        if self.args.false_negative_relative_margin is not None:
            limits.append(similarity_B - self.args.false_negative_relative_margin * similarity_B.abs())
        return torch.stack(limits).amin(0) if limits else None

    def _bias(self, rows: str, candidates: Candidates, hardness: bool) -> Bias | None:
        """What is added to the logits: the hardness of a negative, and -inf above a margin or the guide's."""
        margin_B, args, query_id_B, guide_PE = self.margin, self.args, self.batch.query_id_B, candidates.guide_PE
        hardness = hardness and bool(args.hardness_hard or args.hardness_in_batch)
        if margin_B is None and guide_PE is None and not hardness:
            return None
        if guide_PE is not None:
            assert self.batch.teacher_BE is not None and self.batch.teacher_SE is not None
            own_BE = self.batch.teacher_SE[:: self.group_size]
            guide_BE = self.batch.teacher_BE if rows == "queries" else own_BE
            limit_B = (self.batch.teacher_BE * own_BE).sum(1) + (args.guide_margin or 0.0)

        def bias(b: slice, p: slice, similarity_bp: Tensor) -> Tensor:
            added_bp = torch.zeros_like(similarity_bp)
            if hardness:
                own_bp = query_id_B[b, None] == candidates.columns_PC[p, 2]
                added_bp = similarity_bp * torch.where(own_bp, args.hardness_hard, args.hardness_in_batch)
            if margin_B is not None:
                added_bp.masked_fill_(similarity_bp > margin_B[b, None], float("-inf"))
            if guide_PE is not None:
                added_bp.masked_fill_(guide_BE[b] @ guide_PE[p].T > limit_B[b, None], float("-inf"))
            return added_bp

        return bias

    def everywhere(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, gathered with gradient."""
        return self.gather(rows) if self.ranks.size > 1 else rows

    def from_all_ranks(self, vectors: Tensor, columns: Tensor, guide: Tensor | None) -> Candidates:
        """The rows of all ranks: gathered, or sent round a ring, so that a rank holds at most two ranks' share."""
        ranks = self.ranks
        if ranks.size == 1 or not (self.args.negatives_cross_device and self.args.in_batch_negatives):
            return Candidates(vectors, columns, None, guide)
        columns, guide = all_gather(columns), None if guide is None else all_gather(guide)
        if not self.args.negatives_ring:
            return Candidates(self.gather(vectors), columns, None, guide)

        def arrival(rows: Tensor) -> Tensor:
            by_rank = rows.chunk(ranks.size)
            return torch.cat([by_rank[ranks.rank - hop] for hop in range(ranks.size)])

        guide = None if guide is None else arrival(guide)
        return Candidates(vectors, arrival(columns), Ring(ranks.size, ring_shift), guide)

    def passages(self) -> Candidates:
        """All passage slots. Columns: the text's id, that of its tokens (0 if unused), the query of the slot."""
        batch = self.batch
        owner_S = batch.query_id_B.repeat_interleave(self.group_size)
        columns = [batch.id_of_slot_S, batch.tokens_of_slot_S, owner_S]
        return self.from_all_ranks(self.slots_SD, torch.stack(columns, dim=1), self._guide(batch.teacher_SE))

    def queries(self) -> Candidates:
        """All queries. Columns: the query's id, then `known_BK`."""
        known_BK = self.known_BK
        if self.ranks.size > 1 and self.args.negatives_cross_device:
            (width,) = all_reduce_max(known_BK.shape[1])
            known_BK = torch.cat([known_BK, known_BK[:, :1].expand(-1, width - known_BK.shape[1])], dim=1)
        columns = torch.cat([self.batch.query_id_B[:, None], known_BK], dim=1)
        return self.from_all_ranks(self.queries_BD, columns, self._guide(self.batch.teacher_BE))

    def _guide(self, vectors: Tensor | None) -> Tensor | None:
        return vectors if self.args.guide_margin is not None else None


# ---- masks: the candidates that are no negatives of a query
#
# Texts with the same tokens after the cut have one vector, so they are one text. A query knows its positive by the
# tokens, too, and the positives of the queries that equal it.


def known_passages(contrast: Contrast, passages: Candidates) -> Mask:
    """Unused slots, and known positives of the query. Without in-batch negatives, the slots of other rows, too."""
    batch = contrast.batch
    row_P = torch.arange(len(passages.columns_PC), device=batch.query_id_B.device) // contrast.group_size
    row_B = torch.arange(len(batch.query_id_B), device=batch.query_id_B.device)
    answered_P, is_positive_BM = answered_queries(contrast, passages), batch.positives_BM
    tokens_BM = batch.tokens_of_slot_S.view(len(row_B), -1)[:, : is_positive_BM.shape[1]]
    tokens_BM = torch.where(is_positive_BM, tokens_BM, tokens_BM[:, :1])  # of the query's positives

    def masked(b: slice, p: slice) -> Tensor:
        id_p, tokens_p, _ = passages.columns_PC[p].unbind(1)
        masked_bp = (tokens_p == 0) | is_known(id_p, batch.known_positives_BK[b])
        if not contrast.args.in_batch_negatives:
            masked_bp |= row_P[p] != row_B[b, None]
        return masked_bp | is_known(tokens_p, tokens_BM[b]) | (answered_P[p] == batch.query_id_B[b, None])

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


def answering_queries(contrast: Contrast, queries: Candidates) -> Mask:
    """For a positive among queries: those that know it as a positive, by its text or by its tokens."""
    id_P, known_PK = queries.columns_PC[:, 0], queries.columns_PC[:, 1:]
    batch, group = contrast.batch, contrast.group_size
    own_2B = torch.stack([batch.id_of_slot_S[::group], batch.tokens_of_slot_S[::group]])

    def masked(b: slice, p: slice) -> Tensor:
        masked_bp = batch.query_id_B[b, None] == id_P[p]
        for known_p in known_PK[p].unbind(1):
            masked_bp = masked_bp | (known_p == own_2B[0, b, None]) | (known_p == own_2B[1, b, None])
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
