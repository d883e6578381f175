"""From planned rows to one rank's batch: tokens in chunks, and where each vector belongs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from gritlm.data.batch_plan import Plan
from gritlm.data.records import Record, RecordSet
from gritlm.models.chunks import ChunkConfig, make_chunks
from gritlm.models.tokenizer import TextTokenizer, Tokens

Chunk = dict[str, Any]  # keyword arguments of `Embedder`


@dataclass
class ContrastiveBatch:
    """Where each local vector belongs: B queries, G passages per query, S = B*G slots.

    Slot `b*G` holds query b's positive. An unused slot has no text.

    text_of_query_B: int64 (B,), text_of_slot_S: int64 (S,), indices into the local vectors, -1 for an unused slot.
    query_id_B: int64 (B,), a hash of the query with its instruction.
    id_of_slot_S: int64 (S,), a hash of the passage's text.
    known_positives_BK: int64 (B, K), hashes of the query's known positives, padded with one of them.
    """

    text_of_query_B: Tensor
    text_of_slot_S: Tensor
    query_id_B: Tensor
    id_of_slot_S: Tensor
    known_positives_BK: Tensor


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

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        def changed(values: dict[str, Any]) -> dict[str, Any]:
            return {name: change(value) if isinstance(value, Tensor) else value for name, value in values.items()}

        contrastive = ContrastiveBatch(**changed(vars(self.contrastive)))
        return replace(self, chunks=[changed(chunk) for chunk in self.chunks], contrastive=contrastive)


def build_contrastive_batch(
    queries: Sequence[Tokens],
    groups: Sequence[Sequence[Tokens]],
    query_ids: Sequence[int],
    group_ids: Sequence[Sequence[int]],
    known_positives: Sequence[Sequence[int]],
    group_size: int,
    chunking: ChunkConfig,
    pad_id: int,
) -> tuple[list[Chunk], ContrastiveBatch]:
    """The chunks of one rank's texts, and where their vectors belong.

    Args:
        queries, query_ids: each query's tokens, and its id.
        groups, group_ids: each query's passages, its positive first, and their ids; at most `group_size` of them.
        known_positives: the ids of each query's known positives, the drawn one included.
    """
    passages = [passage for group in groups for passage in group]
    chunks, row_of_text = make_chunks([*queries, *passages], chunking, pad_id)
    row_of_passage = iter(row_of_text[len(queries) :].tolist())
    unused = [group_size - len(group) for group in groups]
    slots = [[next(row_of_passage) for _ in group] + [-1] * n for group, n in zip(groups, unused, strict=True)]
    ids = [[*group, *[0] * n] for group, n in zip(group_ids, unused, strict=True)]
    width = max(map(len, known_positives))
    known = [[*row, *[row[0]] * (width - len(row))] for row in known_positives]
    return chunks, ContrastiveBatch(
        text_of_query_B=row_of_text[: len(queries)],
        text_of_slot_S=torch.tensor(slots).flatten(),
        query_id_B=torch.tensor(query_ids),
        id_of_slot_S=torch.tensor(ids).flatten(),
        known_positives_BK=torch.tensor(known),
    )


class BatchBuilder(Dataset):
    """(epoch, step) -> this rank's slice of that global batch. A pure function, so any worker may build any batch.

    Args:
        plan: which rows form a global batch.
        records: the data sets, in the plan's order.
        text_tokenizer: texts to tokens.
        group_size: passages per query, at most.
        chunking: how texts are cut into chunks.
        rank, ranks: which slice of the global batch.
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
    ):
        self.plan, self.records, self.text_tokenizer = plan, records, text_tokenizer
        self.group_size, self.chunking = group_size, chunking
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return self.plan.steps_per_epoch

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, step = key
        planned = self.plan.batch(epoch, step)
        share = len(planned.rows) // self.ranks
        rows = planned.rows[self.rank * share : (self.rank + 1) * share]
        records = [self.records[dataset][row] for dataset, row in rows]
        drawn = [self._draw(epoch, step, *row, record) for row, record in zip(rows, records, strict=True)]

        contract = self.text_tokenizer.contract
        queries = self.text_tokenizer([record.query for record in records], contract.query_max_len)
        passages = self.text_tokenizer([text for texts, _ in drawn for text in texts], contract.passage_max_len)
        remaining = iter(passages)
        chunks, contrastive = build_contrastive_batch(
            queries,
            [[next(remaining) for _ in texts] for texts, _ in drawn],
            [record.query_id for record in records],
            [ids for _, ids in drawn],
            [record.known_positives for record in records],
            self.group_size,
            self.chunking,
            self.text_tokenizer.tokenizer.pad_token_id,
        )
        return Batch(
            chunks=chunks,
            contrastive=contrastive,
            dataset=planned.dataset,
            rows=[f"{self.records[dataset].name}:{row}" for dataset, row in rows],
            real_tokens=sum(len(text.ids) for text in [*queries, *passages]),
            encoded_tokens=sum(int(chunk["lengths"].sum()) for chunk in chunks),
            padded_tokens=sum(chunk["input_ids"].numel() for chunk in chunks),
        )

    def _draw(self, epoch: int, step: int, dataset: int, row: int, record: Record) -> tuple[list, list[int]]:
        """The passages that a row contributes to a batch, its positive first, and their ids."""
        counts = len(record.positives), len(record.negatives)
        positive, negatives = self.plan.draw(epoch, step, dataset, row, *counts, self.group_size - 1)
        texts = [record.positives[positive], *(record.negatives[i] for i in negatives)]
        return texts, [record.positive_ids[positive], *(record.negative_ids[i] for i in negatives)]


class StepSampler(BatchSampler):
    """The keys (epoch, step) of one epoch, one key a batch."""

    def __init__(self, steps: int):
        self.steps, self.epoch = steps, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list]:
        for step in range(self.steps):
            yield [(self.epoch, step)]


class StepLoader(DataLoader):
    """The batches of an epoch, step by step. The Trainer sets the epoch.

    Args:
        builder: builds this rank's slice of any global batch.
        options: of `torch.utils.data.DataLoader`.
    """

    def __init__(self, builder: BatchBuilder, **options: Any):
        self.steps = StepSampler(len(builder))
        # Without a generator each iterator would draw its seed from the global one, and a resume makes one more.
        super().__init__(builder, batch_sampler=self.steps, collate_fn=_only, generator=torch.Generator(), **options)

    def set_epoch(self, epoch: int) -> None:
        self.steps.set_epoch(epoch)


def _only(batches: list[Batch]) -> Batch:
    (batch,) = batches
    return batch
