"""From planned rows to one rank's batch: tokens in chunks, and where each vector belongs."""

import hashlib
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gritlm.data.batch_plan import Plan
from gritlm.data.records import Record, RecordSet
from gritlm.data.teacher_vectors import TeacherVectors
from gritlm.models.chunks import ChunkConfig, make_chunks
from gritlm.models.text import Text
from gritlm.models.tokenizer import TextTokenizer, Tokens

Chunk = dict[str, Any]  # keyword arguments of `Embedder`


@dataclass
class ContrastiveBatch:
    """Where each local vector belongs: B queries, G passages per query, S = B*G slots.

    The first slots of query b, from `b*G` on, hold its positives: one, or with --max_positives several. An unused slot
    has no text.

    text_of_query_B: int64 (B,), text_of_slot_S: int64 (S,), indices into the local vectors, -1 for an unused slot.
    query_id_B: int64 (B,), a hash of the query's tokens.
    id_of_slot_S: int64 (S,), a hash of the passage's whole text.
    tokens_of_slot_S: int64 (S,), a hash of the passage's tokens, 0 for an unused slot.
    known_positives_BK: int64 (B, K), hashes of the query's known positives, padded with one of them.
    positives_BM: bool (B, M), which of the first M slots of a query hold a positive.
    seed: of what the loss draws, equal on all ranks.
    set_B: int64 (B,), the number of each query's data set; None: all data sets have one loss.
    sets: the numbers of the data sets that the global batch may hold, equal on all ranks.
    scores_S: float32 (S,), a teacher's score of the slot's passage, NaN where there is none; None: no row has scores.
    teacher_BE, teacher_SE: float (B, E) and (S, E), a teacher's vectors of queries and slots, zeros in unused slots.
    """

    text_of_query_B: Tensor
    text_of_slot_S: Tensor
    query_id_B: Tensor
    id_of_slot_S: Tensor
    tokens_of_slot_S: Tensor
    known_positives_BK: Tensor
    positives_BM: Tensor
    seed: int = 0
    scores_S: Tensor | None = None
    teacher_BE: Tensor | None = None
    teacher_SE: Tensor | None = None
    set_B: Tensor | None = None
    sets: tuple[int, ...] = ()


@dataclass
class Batch:
    """One rank's slice of a global batch.

    chunks: the texts, chunk by chunk.
    contrastive: where the chunks' vectors belong.
    dataset, rows: the name of the data set, and of each row.
    real_tokens, encoded_tokens, padded_tokens: of all texts; of distinct texts; of distinct texts with padding.
    """

    chunks: list[Chunk]
    contrastive: ContrastiveBatch
    dataset: str
    rows: list[str]
    real_tokens: int
    encoded_tokens: int
    padded_tokens: int

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on the device. The copy from pinned memory is asynchronous."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader."""
        return self._with_tensors(Tensor.pin_memory)

    def __reduce__(self) -> tuple:
        """Pickled by value: a data worker then needs no shared memory, no socket and no open file for a tensor."""
        return _unpickle, tuple(vars(self._with_tensors(Tensor.numpy)).values())

    def _with_tensors(self, change: Callable[[Any], Any], kind: type = Tensor) -> "Batch":
        def changed(values: dict[str, Any]) -> dict[str, Any]:
            return {name: change(value) if isinstance(value, kind) else value for name, value in values.items()}

        contrastive = ContrastiveBatch(**changed(vars(self.contrastive)))
        return replace(self, chunks=[changed(chunk) for chunk in self.chunks], contrastive=contrastive)


def _unpickle(*values: Any) -> Batch:
    return Batch(*values)._with_tensors(torch.from_numpy, np.ndarray)


def tokens_id(text: Tokens) -> int:
    """A 64-bit hash of a text's tokens. It is the same on every rank."""
    digest = hashlib.blake2b(array("q", text.ids).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def build_contrastive_batch(
    queries: Sequence[Tokens],
    groups: Sequence[Sequence[Tokens]],
    group_ids: Sequence[Sequence[int]],
    known_positives: Sequence[Sequence[int]],
    group_size: int,
    chunking: ChunkConfig,
    pad_id: int,
    positives: Sequence[int] | None = None,
) -> tuple[list[Chunk], ContrastiveBatch]:
    """The chunks of one rank's texts, and where their vectors belong.

    Args:
        groups, group_ids: each query's passages, its positives first, and their ids; at most `group_size` of them.
        known_positives: the ids of each query's known positives, the drawn ones included.
        positives: how many of each query's passages are positives; None: one.
    """
    passages = [passage for group in groups for passage in group]
    chunks, row_of_text = make_chunks([*queries, *passages], chunking, pad_id)
    row_of_passage = iter(row_of_text[len(queries) :].tolist())
    unused = [group_size - len(group) for group in groups]
    slots = [[next(row_of_passage) for _ in group] + [-1] * n for group, n in zip(groups, unused, strict=True)]
    ids = [[*group, *[0] * n] for group, n in zip(group_ids, unused, strict=True)]
    tokens = [[*map(tokens_id, group), *[0] * n] for group, n in zip(groups, unused, strict=True)]
    width, count = max(map(len, known_positives)), positives or [1] * len(queries)
    known = [[*row, *[row[0]] * (width - len(row))] for row in known_positives]
    return chunks, ContrastiveBatch(
        text_of_query_B=row_of_text[: len(queries)],
        text_of_slot_S=torch.tensor(slots).flatten(),
        query_id_B=torch.tensor([tokens_id(query) for query in queries]),
        id_of_slot_S=torch.tensor(ids).flatten(),
        tokens_of_slot_S=torch.tensor(tokens).flatten(),
        known_positives_BK=torch.tensor(known),
        positives_BM=torch.arange(max(count)) < torch.tensor(count)[:, None],
    )


class BatchBuilder(Dataset):
    """(epoch, step) -> this rank's slice of that global batch. A pure function, so any worker may build any batch.

    Args:
        records: the data sets, in the plan's order.
        group_size: passages per query, at most.
        rank, ranks: which slice of the global batch.
        max_positives: how many of the group's slots are for positives.
        teacher: a teacher's vectors of the texts, which a term of the loss reads.
        lengths: the longest query and passage of each data set, in tokens; None: the contract's.
    """

    def __init__(
        self,
        plan: Plan,
        records: Sequence[RecordSet],
        text_tokenizer: TextTokenizer,
        group_size: int,
        chunking: ChunkConfig,
        rank: int = 0,
        ranks: int = 1,
        max_positives: int = 1,
        teacher: TeacherVectors | None = None,
        lengths: Sequence[tuple[int, int]] | None = None,
    ):
        self.plan, self.records, self.text_tokenizer = plan, records, text_tokenizer
        self.group_size, self.chunking = group_size, chunking
        self.rank, self.ranks, self.max_positives, self.teacher = rank, ranks, max_positives, teacher
        contract = text_tokenizer.contract
        self.lengths = lengths or [(contract.query_max_len, contract.passage_max_len)] * len(records)

    def __len__(self) -> int:
        return self.plan.steps_per_epoch

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, step = key
        planned = self.plan.batch(epoch, step)
        share = len(planned.rows) // self.ranks
        return self.build(planned.rows[self.rank * share : (self.rank + 1) * share], planned.dataset, epoch, step)

    def build(self, rows: list[tuple[int, int]], dataset: str, epoch: int, step: int) -> Batch:
        """A batch of any rows, (data set number, row number), with passages drawn for this epoch and step."""
        records = [self.records[dataset][row] for dataset, row in rows]
        drawn = [self._draw(epoch, step, *row, record) for row, record in zip(rows, records, strict=True)]

        limits = [self.lengths[dataset] for dataset, _ in rows]
        queries = self._tokens([record.query for record in records], [query for query, _ in limits])
        per_row = zip(drawn, limits, strict=True)
        passages = self._tokens(
            [text for texts, *_ in drawn for text in texts],
            [passage for (texts, *_), (_, passage) in per_row for _ in texts],
        )
        remaining = iter(passages)
        chunks, contrastive = build_contrastive_batch(
            queries,
            [[next(remaining) for _ in texts] for texts, *_ in drawn],
            [ids for _, ids, _ in drawn],
            [record.known_positives for record in records],
            self.group_size,
            self.chunking,
            self.text_tokenizer.tokenizer.pad_token_id,
            [min(self.max_positives, len(record.positives)) for record in records],
        )
        contrastive.seed = self.plan.loss_seed(epoch, step)
        contrastive.set_B = torch.tensor([number for number, _ in rows])
        names = [record_set.name for record_set in self.records]
        contrastive.sets = (names.index(dataset),) if dataset in names else self.plan.used
        contrastive.scores_S = self._scores([own for *_, own in drawn])
        if self.teacher:
            contrastive.teacher_BE = torch.from_numpy(self.teacher.lookup([record.query_id for record in records]))
            vectors_SE = torch.from_numpy(self.teacher.lookup(contrastive.id_of_slot_S.tolist()))
            contrastive.teacher_SE = vectors_SE * (contrastive.text_of_slot_S >= 0)[:, None]
        return Batch(
            chunks=chunks,
            contrastive=contrastive,
            dataset=dataset,
            rows=[f"{self.records[dataset].name}:{row}" for dataset, row in rows],
            real_tokens=sum(len(text.ids) for text in [*queries, *passages]),
            encoded_tokens=sum(int(chunk["lengths"].sum()) for chunk in chunks),
            padded_tokens=sum(chunk["input_ids"].numel() for chunk in chunks),
        )

    def _draw(
        self, epoch: int, step: int, dataset: int, row: int, record: Record
    ) -> tuple[list, list[int], list[float]]:
        """The passages that a row contributes to a batch, its positives first, their ids and their scores."""
        held_out = self.plan.held_out.texts
        allowed = [i for i, key in enumerate(record.negative_ids) if key not in held_out]
        counts = len(record.positives), len(allowed)
        first, numbers = self.plan.draw(epoch, step, dataset, row, *counts, self.group_size - self.max_positives)
        more = self.plan.draw_more((epoch, step, dataset, row), counts[0], first, self.max_positives - 1)
        positives = [first, *more]
        negatives = [allowed[i] for i in numbers]
        texts = [*(record.positives[i] for i in positives), *(record.negatives[i] for i in negatives)]
        ids = [*(record.positive_ids[i] for i in positives), *(record.negative_ids[i] for i in negatives)]
        of_positives, of_negatives = record.positive_scores, record.negative_scores
        scores = [math.nan if of_positives is None else of_positives[i] for i in positives]
        scores += [math.nan if of_negatives is None else of_negatives[i] for i in negatives]
        return texts, ids, scores

    def _tokens(self, texts: list[Text], limits: list[int]) -> list[Tokens]:
        """The tokens of each text, cut to its own limit."""
        found: dict[int, Tokens] = {}
        for limit in set(limits):
            places = [place for place, own in enumerate(limits) if own == limit]
            found |= zip(places, self.text_tokenizer([texts[place] for place in places], limit), strict=True)
        return [found[place] for place in range(len(texts))]

    def _scores(self, drawn: list[list[float]]) -> Tensor | None:
        """Scores of the slots, nan where there is none; None where no data set has any."""
        if not any(record_set.scored_rows[0] for record_set in self.records):
            return None
        return torch.tensor([[*own, *[math.nan] * (self.group_size - len(own))] for own in drawn]).flatten()
