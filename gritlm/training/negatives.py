"""How many negatives a query has: counted on batches of the plan, tokenised and masked as in training."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from gritlm.data.batch_plan import MIXED, Plan
from gritlm.data.batches import BatchBuilder
from gritlm.data.records import RecordSet
from gritlm.distributed import Ranks
from gritlm.errors import UserError
from gritlm.models.chunks import ChunkConfig
from gritlm.models.tokenizer import TextTokenizer
from gritlm.training.arguments import ObjectiveArguments, RunArguments
from gritlm.training.contrast import Contrast, known_passages, related_passages, related_queries
from gritlm.training.set_settings import objectives_of
from gritlm.training.setup import make_builder, slots

SAMPLED = 2048  # texts to look at
SLICE = 256  # queries of one batch to look at, at most
FEW = 0.01  # a count above this share of the queries is a warning


@dataclass
class Count:
    """Sums over the queries looked at, of some batches or of slices of them."""

    queries: int = 0
    batches: int = 0
    without: int = 0  # queries that have no negative left
    hard: int = 0  # negatives of the query's own row
    others: int = 0  # passages of other rows
    rows: int = 0  # the other rows
    more_queries: int = 0  # what --same_tower contrasts with
    more_passages: int = 0
    queries_once: int = 0  # different queries
    positives_once: int = 0
    equal_queries: int = 0  # equal to another of their batch only after the cut
    equal_positives: int = 0
    answers: int = 0  # queries that equal their positive after the cut

    def __add__(self, other: "Count") -> "Count":
        return Count(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def describe_negatives(
    plan: Plan, run: RunArguments, records: list[RecordSet], ranks: int, text_tokenizer: TextTokenizer
) -> tuple[list[str], list[str]]:
    """What is left to a query after the masks: lines to print, and warnings.

    Raises:
        UserError: nothing is left to any query that was looked at.
    """
    by_set = count_negatives(plan, run, records, ranks, text_tokenizer)
    total = sum(by_set.values(), Count())
    if not by_set:  # no data set is contrasted
        return [], []
    if total.without == total.queries:
        raise UserError(
            f"--train_data {run.data.train_data}: found nothing to contrast: {_without(total, run)}; wanted passages "
            "that answer different queries, hard negatives, or a larger --global_batch_size or --train_group_size"
        )
    warnings = []
    for name, found in by_set.items():
        if found.without > FEW * found.queries:
            warnings.append(f"{name}: {_without(found, run)}; the loss of such a query is 0")
        warnings += [f"{name}: {line}: they count as one text" for line in _equal_after_the_cut(found, run)]
        if found.answers > FEW * found.queries:
            warnings.append(f"{name}: {found.answers} of {found.queries} queries looked at are equal to their positive")
    return _lines(total, plan, run, ranks), warnings


def _without(found: Count, run: RunArguments) -> str:
    of_a_batch = (_rounded(n / found.batches) for n in (found.queries, found.queries_once, found.positives_once))
    different = "{} queries of a batch, {} of them different, and {} different positives".format(*of_a_batch)
    reasons = [f"found {different}", *_equal_after_the_cut(found, run)]
    return f"{found.without} of {found.queries} queries looked at see no negative ({'; '.join(reasons)})"


def _equal_after_the_cut(found: Count, run: RunArguments) -> list[str]:
    counts = (
        ("queries", found.equal_queries, f"--query_max_len {run.data.query_max_len}"),
        ("positives", found.equal_positives, f"--passage_max_len {run.data.passage_max_len}"),
    )
    return [
        f"{limit} makes {count} of {found.queries} {what} looked at equal to another of their batch"
        for what, count, limit in counts
        if count > FEW * found.queries
    ]


def _lines(found: Count, plan: Plan, run: RunArguments, ranks: int) -> list[str]:
    across, asked = run.objective.negatives_cross_device, run.data.train_group_size - 1
    local = plan.batch_size // ranks
    outside = plan.batch_size - local if across else 0  # queries of other ranks
    per_row = found.others / max(found.rows, 1)
    hard, in_batch, elsewhere = found.hard / found.queries, per_row * (local - 1), per_row * outside
    allowed = f" (--train_group_size {asked + 1} asks for {asked})" if hard < asked else ""
    lines = [
        f"  each query sees {_rounded(hard + in_batch + elsewhere)} negatives: {_rounded(hard)} hard{allowed}, "
        f"{_rounded(in_batch)} in-batch, {_rounded(elsewhere)} from other ranks (mean of {found.queries} queries of "
        f"{found.batches} {'batch' if found.batches == 1 else 'batches'})"
    ]
    if found.more_queries or found.more_passages:
        reach = (local + outside - 1) / max(found.rows, 1)
        queries, passages = _rounded(found.more_queries * reach), _rounded(found.more_passages * reach)
        lines.append(f"  --same_tower adds {queries} queries, and to its positive {passages} passages")
    return lines


def _rounded(number: float) -> str:
    return f"{number:.0f}" if number >= 100 or number == round(number) else f"{number:.1f}"


def count_negatives(
    plan: Plan, run: RunArguments, records: list[RecordSet], ranks: int, text_tokenizer: TextTokenizer
) -> dict[str, Count]:
    """Count by data set: on the first batch of each, then on their second, and so on; on a slice of a large batch."""
    group_size, _ = slots(run.data, records)
    reach = plan.batch_size // (1 if run.objective.negatives_cross_device else ranks)
    names = plan.datasets(epoch=0)
    seen: Counter[str] = Counter()
    turns = []  # (which batch of its data set, step)
    losses = objectives_of(run, [r.name for r in records]) | {MIXED: run.objective}
    for step, name in enumerate(names):
        if losses[name].contrastive_weight:
            turns.append((seen[name], step))
        seen[name] += 1
    wanted = SAMPLED // (1 + group_size)  # queries
    size = min(reach, SLICE, max(wanted // len(seen), 8))
    chunking, place = ChunkConfig(run.training.chunk_tokens), (0, plan.batch_size // size)
    builder = make_builder(run, plan, records, text_tokenizer, chunking, place)
    by_set: dict[str, Count] = {}
    for _, step in sorted(turns)[: max(wanted // size, len(seen))]:
        name = names[step]
        by_set[name] = by_set.get(name, Count()) + count_batch(builder, step, losses[name])
    return by_set


def count_batch(builder: BatchBuilder, step: int, args: ObjectiveArguments) -> Count:
    """Count the negatives in one batch of the first epoch, for the queries of the builder's rank."""
    batch, group_size = builder[0, step].contrastive, builder.group_size
    count = len(batch.query_id_B)
    vectors_BD, slots_SD = torch.zeros(count, 1), torch.zeros(count * group_size, 1)  # the masks do not read them
    contrast = Contrast(args, Ranks(), lambda vectors: vectors, batch, vectors_BD, vectors_BD, slots_SD, vectors_BD)
    passages, queries = contrast.passages(), contrast.queries()
    everything = slice(None), slice(None)
    left_BS = ~known_passages(contrast, passages)(*everything)
    hard_B = left_BS.view(count, count, group_size).diagonal().sum(0)
    queries_B = (~related_queries(contrast, queries)(*everything)).sum(1)
    passages_B = (~related_passages(contrast, passages)(*everything)).sum(1)
    left_B = left_BS.sum(1)
    positive_B = batch.tokens_of_slot_S[::group_size]
    queries_once, positives_once = len(batch.query_id_B.unique()), len(positive_B.unique())
    return Count(
        queries=count,
        batches=1,
        without=int((left_B + (queries_B + passages_B) * args.same_tower == 0).sum()),
        hard=int(hard_B.sum()),
        others=int((left_B - hard_B).sum()),
        rows=count * (count - 1),
        more_queries=int(queries_B.sum()) * args.same_tower,
        more_passages=int(passages_B.sum()) * args.same_tower,
        queries_once=queries_once,
        positives_once=positives_once,
        equal_queries=len(np.unique(builder.plan.query_ids(0, step)[:count])) - queries_once,
        equal_positives=max(len(batch.id_of_slot_S[::group_size].unique()) - positives_once, 0),
        answers=int((batch.query_id_B == positive_B).sum()),
    )
