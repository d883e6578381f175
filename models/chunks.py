"""Tokenised texts, cut into what the model takes at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from gritlm.models.tokenizer import Tokens


@dataclass(frozen=True)
class ChunkConfig:
    """How texts are cut into what the model takes at once.

    tokens: at most so many a chunk (padding included), but at least one text.
    packed: texts one after the other, without padding; else right-padded to the chunk's longest.
    deduplicate: encode texts with equal tokens once; exact only without dropout.
    """

    tokens: int
    packed: bool = True
    deduplicate: bool = True


def make_chunks(texts: Sequence[Tokens], chunking: ChunkConfig, pad_id: int) -> tuple[list[dict], Tensor]:
    """All texts, longest first, cut into chunks.

    Returns:
        the chunks (keyword arguments of `Embedder`), and int64 (T,): the chunks' row that holds each text.
    """
    first_of: dict[tuple, int] = {}
    if chunking.deduplicate:
        same = [first_of.setdefault((tuple(text.ids), text.prompt_length), i) for i, text in enumerate(texts)]
    else:
        same = list(range(len(texts)))
    order = sorted(set(same), key=lambda i: (-len(texts[i].ids), i))
    chunks, start = [], 0
    while start < len(order):
        size, total = 0, 0
        longest = len(texts[order[start]].ids)
        for i in order[start:]:
            total += len(texts[i].ids) if chunking.packed else longest
            if size and total > chunking.tokens:
                break
            size += 1
        chunks.append(_chunk([texts[i] for i in order[start : start + size]], chunking.packed, pad_id))
        start += size
    row_of = {i: row for row, i in enumerate(order)}
    return chunks, torch.tensor([row_of[i] for i in same])


def _chunk(texts: list[Tokens], packed: bool, pad_id: int) -> dict:
    lengths = [len(text.ids) for text in texts]
    if packed:
        equal_length_runs = tuple((len(list(run)), length) for length, run in groupby(lengths))
        ids = {
            "input_ids": torch.tensor([i for text in texts for i in text.ids]),
            "equal_length_runs": equal_length_runs,
        }
    else:
        padded = np.full((len(texts), lengths[0]), pad_id, dtype=np.int64)
        for row, text in enumerate(texts):
            padded[row, : len(text.ids)] = text.ids
        ids = {"input_ids": torch.from_numpy(padded)}
    return ids | {
        "lengths": torch.tensor(lengths),
        "prompt_lengths": torch.tensor([text.prompt_length for text in texts]),
    }


def to_device(chunk: dict, device: torch.device | str) -> dict:
    """Its tensors on the device; from pinned memory, without waiting for it."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in chunk.items()
    }
