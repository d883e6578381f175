"""The text contract, and rows made into tensors.

The contract is what training, encoding and the served folder must agree on: how a text becomes tokens and which tokens
are pooled. It lives in the tokenizer itself wherever it can, so that every loader of the folder obeys it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gritlm.data.batch_plan import Plan
from gritlm.data.records import RecordSet
from gritlm.data.rows import text_id
from gritlm.models.chunks import ChunkConfig, make_chunks
from gritlm.models.tokenizer import TextTokenizer, Tokens


def build_contrastive_batch(
    tokens: Sequence[Tokens],
    slots: Sequence[int],
    ids: Sequence[int],
    known: Sequence[Sequence[int]],
    chunking: ChunkConfig,
    pad_id: int,
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The chunks of one rank's texts, and the fields of objective.ContrastiveBatch that say what is what.

    Args:
        tokens: the queries, then the passages.
        slots: per query as many as there are passages in the largest group: the passage's number, or -1.
        ids: hash of each passage's text.
        known: per query, the hashes of its known positives, the drawn one included.
    """
    chunks, row_of_text = make_chunks(tokens, chunking, pad_id)
    slot_S, id_of_passage = torch.tensor(slots), torch.tensor(ids)
    used_S, passage_S = slot_S >= 0, slot_S.clamp(min=0)
    width = max(map(len, known))
    return chunks, {
        "text_of_query_B": row_of_text[: len(known)],
        "text_of_slot_S": torch.where(used_S, row_of_text[len(known) + passage_S], -1),
        "id_of_slot_S": torch.where(used_S, id_of_passage[passage_S], 0),
        "known_positives_BK": torch.tensor([[*row, *row[:1] * (width - len(row))] for row in known]),
    }


class BatchBuilder(torch.utils.data.Dataset):
    """(epoch, step) -> this rank's slice of that global batch, as tensors. Pure, so any worker may build any batch."""

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

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """`chunks`, `contrastive` (the fields of objective.ContrastiveBatch), token counts, and the rows' names."""
        epoch, step = key
        planned = self.plan.batch(epoch, step)
        share = len(planned.rows) // self.ranks
        rows = planned.rows[self.rank * share : (self.rank + 1) * share]

        queries, passages, slots, known = [], [], [], []
        for dataset, row in rows:
            record = self.records[dataset][row]
            positive, negatives = self.plan.draw(
                epoch, step, dataset, row, len(record.positives), len(record.negatives), self.group_size - 1
            )
            group = [record.positives[positive], *(record.negatives[i] for i in negatives)]
            queries.append(record.query)
            slots += [len(passages) + i for i in range(len(group))] + [-1] * (self.group_size - len(group))
            passages += group
            known.append(record.known_positives)

        contract = self.text_tokenizer.contract
        tokens = self.text_tokenizer(queries, contract.query_max_len) + self.text_tokenizer(
            passages, contract.passage_max_len
        )
        ids = [text_id(passage.text) for passage in passages]
        chunks, contrastive = build_contrastive_batch(
            tokens, slots, ids, known, self.chunking, self.text_tokenizer.tokenizer.pad_token_id
        )
        return {
            "chunks": chunks,
            "contrastive": contrastive,
            "real_tokens": sum(len(text.ids) for text in tokens),
            "encoded_tokens": sum(int(chunk["lengths"].sum()) for chunk in chunks),
            "padded_tokens": sum(chunk["input_ids"].numel() for chunk in chunks),
            "dataset": planned.dataset,
            "rows": [f"{self.records[dataset].name}:{row}" for dataset, row in rows],
        }
