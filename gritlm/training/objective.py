"""From one rank's vectors to its share of the global loss: the terms of `TERMS`, at each width, times their weights.

A term is one function and one row of `TERMS`. Shape suffixes: T local texts, B local queries, G passages per query,
S = B*G local passage slots, D width.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gritlm.data.batches import ContrastiveBatch
from gritlm.distributed import Ranks, gather_with_gradient
from gritlm.errors import UserError
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
    return loss_of(contrast, contrast.lse(contrast.queries_BD, passages, masked, hardness=True))


def same_tower(contrast: Contrast) -> Tensor:
    """InfoNCE whose denominator also holds q-q' and d+-d' (GTE, arXiv 2308.03281; Qwen3-Embedding, arXiv 2506.05176).

    q' is another query that shares neither text nor known positive with q. d' is a passage of another query that is
    no known positive of q.
    """
    queries, passages = contrast.queries(), contrast.passages()
    return loss_of(
        contrast,
        contrast.lse(contrast.queries_BD, passages, known_passages(contrast, passages), hardness=True),
        contrast.lse(contrast.queries_BD, queries, related_queries(contrast, queries)),
        contrast.lse(contrast.positives_BD, passages, related_passages(contrast, passages)),
    )


def passage_to_query(contrast: Contrast) -> Tensor:
    """InfoNCE from each positive to the queries (jina-embeddings-v2, arXiv 2310.19923).

    A query that has the passage as a known positive is no negative.
    """
    queries = contrast.queries()
    return loss_of(contrast, contrast.lse(contrast.positives_BD, queries, answering_queries(contrast, queries)))


def sigreg(contrast: Contrast) -> Tensor:
    """SIGReg of all query and passage vectors of the global batch (LeJEPA, arXiv 2511.08544)."""
    used_SD = contrast.slots_SD[contrast.batch.text_of_slot_S >= 0]
    vectors = torch.cat([contrast.queries_BD, used_SD])
    distance = gaussian_distance(vectors * vectors.shape[1] ** 0.5, contrast.batch.seed, contrast.everywhere)
    return distance.expand(len(contrast.queries_BD))


def spread_out(contrast: Contrast) -> Tensor:
    """The spread-out regulariser of all queries, and of all positives (Zhang et al., arXiv 1708.06320)."""
    sides = contrast.queries_BD, contrast.positives_BD
    return sum(spread(contrast.everywhere(side)) for side in sides).expand(len(contrast.queries_BD))


def loss_of(contrast: Contrast, *parts: LogSum) -> Tensor:
    """float32 (B,): the loss of each query from the log-sums over its negatives, shifted by its first positive.

    With several positives M, each is contrasted with the same negatives, and the loss is their mean.
    """
    args, is_positive_BM, similarity_BM = contrast.args, contrast.batch.positives_BM, contrast.similarity_BM
    log_sum_B = torch.logsumexp(torch.stack([part.log_sum_B for part in parts]), dim=0)
    log_sum_BM = log_sum_B[:, None] + (similarity_BM[:, :1] - similarity_BM) / args.temperature
    if args.debiased:
        count_B = torch.stack([part.count_B for part in parts]).sum(0)
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


# ---- the objective


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
    return (1 - args.sigreg_weight) * (0.5 if args.symmetric else 1.0)


TERMS = {
    "info_nce": Term(info_nce, lambda args: _from_queries(args) * (not args.same_tower), {}),
    "same_tower": Term(same_tower, lambda args: _from_queries(args) * args.same_tower, {"same_tower": True}),
    "passage_to_query": Term(
        passage_to_query, lambda args: (1 - args.sigreg_weight) * 0.5 * args.symmetric, {"symmetric": True}
    ),
    "sigreg": Term(sigreg, lambda args: args.sigreg_weight, {"sigreg_weight": 0.05}, every_width=False),
    "spread_out": Term(spread_out, lambda args: args.spread_out_weight, {"spread_out_weight": 1.0}, every_width=False),
}

# Flags that change how terms are computed, with examples for `gritlm verify-gradients` and the tests. The relative
# margin leaves out each negative that counts: at t = 0.05 float32 rounds off 2e-5 of the little gradient that is left.
OPTIONS: dict[str, dict[str, Any]] = {
    "hard_negatives": {"in_batch_negatives": False},
    "hardness": {"hardness_hard": 5.0, "hardness_in_batch": 9.0},
    "focal": {"focal_gamma": 2.0},
    "margin": {"same_tower": True, "false_negative_margin": 0.3},
    "relative_margin": {"false_negative_relative_margin": 0.05, "temperature": 0.2},
    "debiased": {"debiased": True},
    "matryoshka": {"matryoshka_dims": [8, 4], "matryoshka_weights": [0.5, 0.25]},
}
CHANGES = ("hardness_hard", "hardness_in_batch", "focal_gamma", "false_negative_margin")
CHANGES += ("false_negative_relative_margin", "debiased")
VARIANTS = {name: term.example for name, term in TERMS.items()} | OPTIONS


def narrow_widths(args: ObjectiveArguments) -> list[tuple[int, float]]:
    """Each width of --matryoshka_dims, and its weight."""
    dims = args.matryoshka_dims or []
    return list(zip(dims, args.matryoshka_weights or [1.0] * len(dims), strict=True))


def describe_objective(args: ObjectiveArguments, width: int) -> str:
    """A line with the terms of a run's loss, their weights, and the widths that are trained.

    Raises:
        UserError: a width of --matryoshka_dims is not below the model's.
    """
    dims = args.matryoshka_dims or []
    if dims and dims[0] >= width:
        raise UserError(f"--matryoshka_dims {dims[0]}: wanted widths below the model's, which is {width}")
    weights = {name: term.weight(args) for name, term in TERMS.items()}
    parts = [f"{weight:g} {name}" if weight != 1 else name for name, weight in weights.items() if weight]
    changes = [f"--{name}" for name in CHANGES if getattr(args, name) not in (None, False, 0.0)]
    changes += ["hard negatives only"] * (not args.in_batch_negatives)
    widths = ", ".join(f"{dim} ({weight:g})" for dim, weight in narrow_widths(args))
    return (
        f"loss: {' + '.join(parts)}, temperature {args.temperature:g}"
        + (f", with {', '.join(changes)}" if changes else "")
        + (f"; also at the widths {widths} of {width}" if dims else "")
    )


@dataclass(frozen=True)
class Objective:
    """The mean loss over the global batch, as one rank sees it.

    Args:
        args: which terms there are, and their settings.
        ranks: who shares the global batch; one process by default, also inside a job of many ranks.
        gather: this rank's vectors -> all ranks', with gradient.
        left_out: by rule, how many candidates of this rank's queries it left out in the last call.
    """

    args: ObjectiveArguments
    ranks: Ranks = Ranks()
    gather: Callable[[Tensor], Tensor] = gather_with_gradient
    left_out: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def __call__(self, vectors_TD: Tensor, batch: ContrastiveBatch) -> dict[str, Tensor]:
        """This rank's share of each term: the sum of its queries' losses over the number of queries of all ranks.

        A term at a narrower width w is named `term@w`. The global loss is the sum over ranks and terms. Scalars,
        float32, differentiable once.
        """
        vectors_TD = vectors_TD.float()  # before anything else, so that gradients of a vector add up in float32
        self.left_out.clear()
        total = len(batch.text_of_query_B) * self.ranks.size
        shares = {}
        for suffix, weight, narrow_TD in self._widths(vectors_TD):
            contrast = self._contrast(narrow_TD, batch)
            for name, term in TERMS.items():
                if (own := weight * term.weight(self.args)) and (term.every_width or not suffix):
                    shares[name + suffix] = own * term.losses(contrast).sum() / total
        return shares

    def _widths(self, vectors_TD: Tensor) -> Iterator[tuple[str, float, Tensor]]:
        """The suffix of a term's name, the weight, and the vectors at each width."""
        yield "", 1.0, vectors_TD
        for width, weight in narrow_widths(self.args):
            yield f"@{width}", weight, F.normalize(vectors_TD[:, :width], dim=1)

    def _contrast(self, vectors_TD: Tensor, batch: ContrastiveBatch) -> Contrast:
        queries_BD = vectors_TD[batch.text_of_query_B]
        used_S = batch.text_of_slot_S >= 0
        slots_SD = vectors_TD[batch.text_of_slot_S.clamp(min=0)] * used_S[:, None]
        queries_BD = queries_BD.detach() if self.args.emb_p_only else queries_BD
        slots_SD = slots_SD.detach() if self.args.emb_q_only else slots_SD
        positives_BD = slots_SD[:: len(slots_SD) // len(queries_BD)]
        return Contrast(self.args, self.ranks, self.gather, batch, queries_BD, positives_BD, slots_SD, self.left_out)
