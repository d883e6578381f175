"""The terms of the loss, and their table `TERMS`. A term is one function and one row.

Shape suffixes: B local queries, G passages per query, S = B*G local passage slots, M positives per query, N scored
pairs, D and E widths of the model and of the teacher.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gritlm.errors import UserError
from gritlm.training import distillation
from gritlm.training.arguments import ObjectiveArguments
from gritlm.training.contrast import (
    Contrast,
    LogSum,
    answering_queries,
    known_passages,
    related_passages,
    related_queries,
)
from gritlm.training.losses import EMPTY
from gritlm.training.regularizers import gaussian_distance, spread

# ---- terms: Contrast -> float32 (B,), the loss of each local query


def info_nce(contrast: Contrast) -> Tensor:
    """InfoNCE over hard, in-batch and cross-device negatives (van den Oord et al., arXiv 1807.03748).

    `log(1 + sum over d of exp((s(q, d) - s(q, d+))/t))`. A passage with the text of a known positive of the query is
    no negative.
    """
    passages = contrast.passages()
    masked = known_passages(contrast, passages)
    return loss_of(contrast, contrast.lse("queries", passages, masked, hardness=True))


def same_tower(contrast: Contrast) -> Tensor:
    """InfoNCE whose denominator also holds q-q' and d+-d' (GTE, arXiv 2308.03281; Qwen3-Embedding, arXiv 2506.05176).

    q' is another query that shares neither text nor known positive with q. d' is a passage of another query that is
    no known positive of q.
    """
    queries, passages = contrast.queries(), contrast.passages()
    return loss_of(
        contrast,
        contrast.lse("queries", passages, known_passages(contrast, passages), hardness=True),
        contrast.lse("queries", queries, related_queries(contrast, queries)),
        contrast.lse("positives", passages, related_passages(contrast, passages)),
    )


def passage_to_query(contrast: Contrast) -> Tensor:
    """InfoNCE from each positive to the queries (jina-embeddings-v2, arXiv 2310.19923).

    A query that has the passage as a known positive is no negative.
    """
    queries = contrast.queries()
    return loss_of(contrast, contrast.lse("positives", queries, answering_queries(contrast, queries)))


def sigreg(contrast: Contrast) -> Tensor:
    """SIGReg of all query and passage vectors of the global batch (LeJEPA, arXiv 2511.08544)."""
    used_SD = contrast.slots_SD[contrast.batch.text_of_slot_S >= 0]
    vectors = torch.cat([contrast.queries_BD, used_SD])
    distance = gaussian_distance(vectors * vectors.shape[1] ** 0.5, contrast.batch.seed, contrast.everywhere)
    return distance.expand(len(contrast.queries_BD))


def spread_out(contrast: Contrast) -> Tensor:
    """The spread-out regulariser of all queries, and of all positives (Zhang et al., arXiv 1708.06320)."""
    sides = contrast.queries_BD, contrast.positives_BD
    return torch.stack([spread(contrast.everywhere(side)) for side in sides]).sum().expand(len(contrast.queries_BD))


def cosent(contrast: Contrast) -> Tensor:
    """CoSENT over all scored pairs of the global batch: a query, its first passage, and the passage's score."""
    return _rank_pairs(contrast, contrast.positive_similarity_B)


def angle(contrast: Contrast) -> Tensor:
    """CoSENT on AnglE's similarity (Li & Li, arXiv 2309.12871)."""
    return _rank_pairs(contrast, distillation.angle_similarity(contrast.queries_BD, contrast.positives_BD))


def _rank_pairs(contrast: Contrast, similarity_B: Tensor) -> Tensor:
    score_B = found(contrast.batch.scores_S, "scores")[:: contrast.group_size]
    similarity_N, score_N = contrast.everywhere(torch.stack([similarity_B, score_B], dim=1)).unbind(1)
    known_N = score_N.isfinite()
    loss = distillation.cosent(similarity_N[known_N], score_N[known_N].detach(), contrast.args.cosent_temperature)
    return loss.expand(len(similarity_B))


def distill(contrast: Contrast) -> Tensor:
    """KL divergence from a teacher's scores of a row's passages to the model's (Hinton et al., arXiv 1503.02531)."""
    teacher_BG, args = found(contrast.batch.scores_S, "scores").view(-1, contrast.group_size), contrast.args
    temperatures = args.student_temperature, args.teacher_temperature
    return distillation.score_divergence(contrast.similarity_BG, teacher_BG, teacher_BG.isfinite(), *temperatures)


def margin_mse(contrast: Contrast) -> Tensor:
    """MarginMSE (Hofstaetter et al., arXiv 2010.02666)."""
    teacher_BG, args = found(contrast.batch.scores_S, "scores").view(-1, contrast.group_size), contrast.args
    return distillation.margin_error(contrast.similarity_BG, teacher_BG, teacher_BG.isfinite(), args.margin_mse_scale)


def teacher(contrast: Contrast) -> Tensor:
    """The distance of the model's vectors, or of their similarities, to a teacher's (jina-v5, arXiv 2602.15547)."""
    batch, args, shape = contrast.batch, contrast.args, (len(contrast.queries_BD), contrast.group_size)
    teacher_BE, teacher_SE = found(batch.teacher_BE, "teacher vectors"), found(batch.teacher_SE, "teacher vectors")
    used_S = batch.text_of_slot_S >= 0
    if args.teacher_loss == "scores":
        passages, teacher_PE, used = map(contrast.everywhere, (contrast.slots_SD, teacher_SE, used_S[:, None].float()))
        return distillation.score_matrix_error(contrast.queries_BD, passages, teacher_BE, teacher_PE, used.sum())
    student_BE, student_SE = (
        contrast.projected_TE[text.clamp(min=0)] for text in (batch.text_of_query_B, batch.text_of_slot_S)
    )
    student_BE = student_BE.detach() if args.emb_p_only else student_BE
    student_SE = student_SE.detach() if args.emb_q_only else student_SE
    student_BGE, teacher_BGE = (
        torch.cat([query[:, None], slots.view(*shape, -1)], dim=1)
        for query, slots in ((student_BE, student_SE), (teacher_BE, teacher_SE))
    )
    used_BG = F.pad(used_S.view(shape), (1, 0), value=True)
    return distillation.vector_distance(student_BGE, teacher_BGE, used_BG, args.teacher_loss)


def found(value: Tensor | None, what: str) -> Tensor:
    """What a term reads of the batch.

    Raises:
        UserError: the data has none.
    """
    if value is None:
        raise UserError(f"found no {what} in the data, wanted them for a term of the loss")
    return value


def loss_of(contrast: Contrast, *parts: LogSum) -> Tensor:
    """float32 (B,): the loss of each query from the log-sums over its negatives, shifted by its first positive.

    With several positives M, each is contrasted with the same negatives, and the loss is their mean.
    """
    args, is_positive_BM = contrast.args, contrast.batch.positives_BM
    similarity_BM = contrast.similarity_BG[:, : is_positive_BM.shape[1]]
    log_sum_B = torch.logsumexp(torch.stack([part.log_sum_B for part in parts]), dim=0)
    log_sum_BM = log_sum_B[:, None] + (similarity_BM[:, :1] - similarity_BM) / args.temperature
    if args.debiased:
        count_B = torch.stack([part.count_B for part in parts if part.count_B is not None]).sum(0)
        log_sum_BM = debiased(args, log_sum_BM, count_B[:, None], similarity_BM)
    loss_BM = F.softplus(log_sum_BM)
    if args.focal_gamma:  # 1 - exp(-loss) is what the positive lacks of the softmax
        loss_BM = loss_BM * (-torch.expm1(-loss_BM.detach())) ** args.focal_gamma
    return (loss_BM * is_positive_BM).sum(1) / is_positive_BM.sum(1)


def debiased(args: ObjectiveArguments, log_sum_BM: Tensor, count_B1: Tensor, similarity_BM: Tensor) -> Tensor:
    """The log-sum over negatives, less the share of positives expected among them (Chuang et al., arXiv 2007.00224).

    `max((sum - tau N)/(1 - tau), N exp((-1 - s+)/t))`, in logarithms, since exp(1/t) overflows. The bound holds for
    unit vectors. Below it the negatives get no gradient.
    """
    tau, log_count_B1 = args.tau_plus, count_B1.clamp(min=1).log()
    bound_BM = log_count_B1 - (1 + similarity_BM) / args.temperature
    expected_BM = log_count_B1 + math.log(tau) - log_sum_BM  # below 0: the sum exceeds the expected positives' share
    above_BM = expected_BM < 0
    left_BM = torch.log(-torch.expm1(torch.where(above_BM, expected_BM, -1.0)))
    corrected_BM = torch.where(above_BM, log_sum_BM + left_BM - math.log(1 - tau), float("-inf"))
    corrected_BM = torch.where(corrected_BM > bound_BM, corrected_BM, bound_BM)
    return torch.where(count_B1 > 0, corrected_BM, EMPTY)


# ---- the table


@dataclass(frozen=True)
class Term:
    """A row of `TERMS`.

    losses: the loss of each local query. weight: of the term in a run with these flags; 0 leaves it out.
    example: flags that switch it on, for `gritlm verify-gradients` and the tests.
    every_width: whether --matryoshka_dims compute it at each width.
    """

    losses: Callable[[Contrast], Tensor]
    weight: Callable[[ObjectiveArguments], float]
    example: dict[str, Any]
    every_width: bool = True


def _from_queries(args: ObjectiveArguments) -> float:
    return args.contrastive_weight * (1 - args.sigreg_weight) * (0.5 if args.symmetric else 1.0)


TERMS = {
    "info_nce": Term(info_nce, lambda args: _from_queries(args) * (not args.same_tower), {}),
    "same_tower": Term(same_tower, lambda args: _from_queries(args) * args.same_tower, {"same_tower": True}),
    "passage_to_query": Term(passage_to_query, lambda args: _from_queries(args) * args.symmetric, {"symmetric": True}),
    "sigreg": Term(sigreg, lambda args: args.sigreg_weight, {"sigreg_weight": 0.05}, every_width=False),
    "spread_out": Term(spread_out, lambda args: args.spread_out_weight, {"spread_out_weight": 1.0}, every_width=False),
    "cosent": Term(cosent, lambda args: args.cosent_weight, {"cosent_weight": 0.1, "contrastive_weight": 0.0}),
    "angle": Term(angle, lambda args: args.angle_weight, {"angle_weight": 0.1, "contrastive_weight": 0.0}),
    "distill": Term(distill, lambda args: args.distill_weight, {"distill_weight": 1.0}),
    "margin_mse": Term(margin_mse, lambda args: args.margin_mse_weight, {"margin_mse_weight": 1.0}),
    "teacher": Term(teacher, lambda args: args.teacher_weight, {"teacher_weight": 1.0}, every_width=False),
}

# Flags that change how terms are computed, with examples for `gritlm verify-gradients` and the tests. A margin leaves
# out the negatives that count: at t = 0.05 float32 rounds off up to 2e-5 of the little gradient that is left.
OPTIONS: dict[str, dict[str, Any]] = {
    "hard_negatives": {"in_batch_negatives": False},
    "hardness": {"hardness_hard": 5.0, "hardness_in_batch": 9.0},
    "focal": {"focal_gamma": 2.0},
    "margin": {"same_tower": True, "false_negative_margin": 0.3, "temperature": 0.2},
    "relative_margin": {"false_negative_relative_margin": 0.05, "temperature": 0.2},
    "guide": {"guide_margin": 0.0},
    "debiased": {"debiased": True},
    "teacher_mse": {"teacher_weight": 1.0, "teacher_loss": "mse"},
    "teacher_scores": {"teacher_weight": 1.0, "teacher_loss": "scores"},
    "matryoshka": {"matryoshka_dims": [8, 4], "matryoshka_weights": [0.5, 0.25]},
}
CHANGES = (
    *("hardness_hard", "hardness_in_batch", "focal_gamma", "debiased"),
    *("false_negative_margin", "false_negative_relative_margin", "guide_margin"),
)
VARIANTS = {name: term.example for name, term in TERMS.items()} | OPTIONS
