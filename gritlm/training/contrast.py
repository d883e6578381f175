"""What a loss term sees: this rank's vectors, the candidates of all ranks, and the masks that leave some of them out.

Shape suffixes: B local queries, G passages per query, S = B*G local passage slots, P candidates of all ranks, Q queries
of all ranks, K known positives kept per query, D width; b, p: a range of queries and of candidates.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gritlm.data.batches import ContrastiveBatch
from gritlm.distributed import Ranks, all_gather, all_reduce_max, ring_shift
from gritlm.training.arguments import ObjectiveArguments
from gritlm.training.losses import Bias, Mask, Ring, logsumexp_over

FEW_POSITIVES = 4  # of a query: so few are all looked up, without a search for those that queries share


class Known(NamedTuple):
    """int64 (Q,), ids of queries, and int64 (Q, K), hashes of their known positives: of whole texts, and of tokens."""

    query_Q: Tensor
    text_QK: Tensor


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
    left_out: by rule, int64 (B,), how many candidates of a query it left out so far.
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
    def gathers(self) -> bool:
        """Whether the candidates are those of all ranks."""
        return self.ranks.size > 1 and self.args.negatives_cross_device and self.args.in_batch_negatives

    @functools.cached_property
    def known(self) -> Known:
        """The known positives of this rank's queries; of all ranks' queries where candidates are gathered.

        All ranks must read it.
        """
        batch, is_positive_BM = self.batch, self.batch.positives_BM
        tokens_BM = batch.tokens_of_slot_S.view(-1, self.group_size)[:, : is_positive_BM.shape[1]]
        tokens_BM = torch.where(is_positive_BM, tokens_BM, tokens_BM[:, :1])  # of the query's positives
        known_BK = torch.cat([batch.known_positives_BK, tokens_BM], dim=1)
        if not self.gathers:
            return Known(batch.query_id_B, known_BK)
        (width,) = all_reduce_max(known_BK.shape[1])
        padding_BK = known_BK[:, :1].expand(-1, width - known_BK.shape[1])
        columns_QK = all_gather(torch.cat([batch.query_id_B[:, None], known_BK, padding_BK], dim=1))
        return Known(columns_QK[:, 0].contiguous(), columns_QK[:, 1:].contiguous())

    @property
    def known_row_B(self) -> Tensor:
        """int64 (B,): the row of each query in `known`."""
        row_B = torch.arange(len(self.queries_BD), device=self.queries_BD.device)
        return row_B + (self.ranks.rank * len(row_B) if self.gathers else 0)

    @property
    def similarity_BG(self) -> Tensor:
        """float32 (B, G): a query's similarity to each slot of its row."""
        slots_BGD = self.slots_SD.view(len(self.queries_BD), self.group_size, -1)
        return torch.einsum("bd,bgd->bg", self.queries_BD, slots_BGD)

    @property
    def positive_similarity_B(self) -> Tensor:
        return (self.queries_BD * self.positives_BD).sum(1)

    def lse(self, rows: str, candidates: Candidates, masked: Mask, hardness: bool = False) -> LogSum:
        """The log-sum over candidates, shifted by each query's similarity to its positive.

        Args:
            rows: what is contrasted with the candidates: "queries" or "positives".
            hardness: whether --hardness_hard and --hardness_in_batch act on these candidates.
        """
        rows_BD = self.queries_BD if rows == "queries" else self.positives_BD
        limited, left_out_2B = self.margin is not None or candidates.guide_PE is not None, None
        if limited or self.args.debiased:  # counting costs a pass over each tile
            left_out_2B = torch.zeros(2, len(rows_BD), dtype=torch.long, device=rows_BD.device)
        log_sum_B = logsumexp_over(
            rows_BD,
            candidates.vectors,
            self.positive_similarity_B,
            self.args.temperature,
            masked,
            candidates.ring,
            self._bias(rows, candidates, hardness),
            left_out_2B,
        )
        if left_out_2B is None:
            return LogSum(log_sum_B, None)
        if limited:
            self.left_out["margins"] = self.left_out.get("margins", 0) + left_out_2B[1]
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
        if not self.gathers:
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
        """All queries. Columns: the query's id, and its row in `known`."""
        columns = torch.stack([self.batch.query_id_B, self.known_row_B], dim=1)
        return self.from_all_ranks(self.queries_BD, columns, self._guide(self.batch.teacher_BE))

    def _guide(self, vectors: Tensor | None) -> Tensor | None:
        return vectors if self.args.guide_margin is not None else None


# ---- masks: the candidates that are no negatives of a query
#
# Texts with the same tokens after the cut have one vector, so they are one text. A query knows its positives by their
# tokens, too, and it knows the positives of the queries that equal it.


def known_passages(contrast: Contrast, passages: Candidates) -> Mask:
    """Unused slots, and known positives of the query. Without in-batch negatives, the slots of other rows, too."""
    query_id_B = contrast.batch.query_id_B
    row_P = torch.arange(len(passages.columns_PC), device=query_id_B.device) // contrast.group_size
    row_B = torch.arange(len(query_id_B), device=query_id_B.device)

    def masked(b: slice, p: slice) -> Tensor:
        masked_bp = knows(contrast.known, query_id_B[b], passages.columns_PC[p, :2])
        if not contrast.args.in_batch_negatives:
            masked_bp |= row_P[p] != row_B[b, None]
        return masked_bp | (passages.columns_PC[p, 1] == 0)

    return masked


def related_passages(contrast: Contrast, passages: Candidates) -> Mask:
    """Besides known passages, the passages of the query itself."""
    known = known_passages(contrast, passages)
    return lambda b, p: known(b, p) | (contrast.batch.query_id_B[b, None] == passages.columns_PC[p, 2])


def related_queries(contrast: Contrast, queries: Candidates) -> Mask:
    """Queries with the text of this one, or with a known positive of it."""
    known, query_id_B = shared_only(contrast.known), contrast.batch.query_id_B
    row_B, (id_P, row_P) = contrast.known_row_B, queries.columns_PC.unbind(1)

    def masked(b: slice, p: slice) -> Tensor:
        masked_bp = knows(known, query_id_B[b], known.text_QK[row_P[p]])
        masked_bp |= knows(known, id_P[p], known.text_QK[row_B[b]]).T  # of a query that equals the candidate
        return masked_bp | (query_id_B[b, None] == id_P[p])

    return masked


def answering_queries(contrast: Contrast, queries: Candidates) -> Mask:
    """For a positive among queries: those that know it as a positive, by its text or by its tokens."""
    batch, group = contrast.batch, contrast.group_size
    own_B2 = torch.stack([batch.id_of_slot_S[::group], batch.tokens_of_slot_S[::group]], dim=1)
    return lambda b, p: knows(contrast.known, queries.columns_PC[p, 0], own_B2[b]).T


def knows(known: Known, query_id_b: Tensor, text_pC: Tensor) -> Tensor:
    """bool (b, p): whether a query, or an equal one, knows one of the C hashes of a candidate as its positive's.

    Hashes are looked up among sorted ones, so memory grows with b*p and with Q*K, time with C*(b*p + Q*K).
    """
    (count, width), sorted_Q = (len(query_id_b), len(text_pC)), known.query_Q.sort().values
    at_b = torch.searchsorted(sorted_Q, query_id_b.contiguous())
    row_of_Q = torch.full_like(sorted_Q, count)  # row `count` is for queries outside of the range
    row_of_Q[at_b] = torch.arange(count, device=sorted_Q.device)
    row_QK = row_of_Q[torch.searchsorted(sorted_Q, known.query_Q)][:, None].expand_as(known.text_QK)
    known_pb = torch.zeros(width, count + 1, dtype=torch.bool, device=sorted_Q.device)  # rows are quickly gathered
    for text_p in text_pC.T.contiguous():
        sorted_p = text_p.sort().values
        at_QK = torch.searchsorted(sorted_p, known.text_QK).clamp(max=width - 1)
        found_pb = known_pb.new_zeros(width + 1, count + 1)
        found_pb[torch.where(sorted_p[at_QK] == known.text_QK, at_QK, width), row_QK] = True
        known_pb |= found_pb[torch.searchsorted(sorted_p, text_p)]
    return known_pb.T.contiguous()[row_of_Q[at_b]]


def shared_only(known: Known) -> Known:
    """The known positives that different queries share, in as few columns as hold them. Others relate no queries."""
    text_QK, flat = known.text_QK, known.text_QK.flatten()
    if text_QK.shape[1] <= FEW_POSITIVES:
        return known
    at_N = torch.searchsorted(flat.sort().values, flat)
    query_N = torch.searchsorted(known.query_Q.sort().values, known.query_Q).repeat_interleave(text_QK.shape[1])
    first_N, last_N = (query_N.scatter_reduce(0, at_N, query_N, kind, include_self=False) for kind in ("amin", "amax"))
    shared_QK = (first_N[at_N] < last_N[at_N]).view_as(text_QK)
    shared_QK[:, 1:] &= text_QK[:, 1:] != text_QK[:, :1]  # padding
    width = int(shared_QK.sum(1).max())  # waits for the device
    return Known(known.query_Q, text_QK.gather(1, shared_QK.int().argsort(dim=1, descending=True)[:, :width]))
