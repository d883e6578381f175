"""Tokenised texts, cut into the chunks that the model encodes one at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gritlm.models.tokenizer import Tokens


@dataclass(frozen=True)
class ChunkConfig:
    """How texts are cut into chunks.

    tokens: limit per chunk, padding included. A text longer than that gets a chunk for itself.
    packed: put texts end to end without padding; otherwise pad each on the right to the chunk's longest.
    deduplicate: encode texts with equal tokens once. Exact only without dropout.
    """

    tokens: int
    packed: bool = True
    deduplicate: bool = True


def make_chunks(texts: Sequence[Tokens], chunking: ChunkConfig, pad_id: int) -> tuple[list[dict[str, Any]], Tensor]:
    """Sort all texts by length, longest first, and cut them into chunks.

    Returns:
        The chunks, each the keyword arguments of `Embedder.forward`.
        int64 (T,): for each of the T texts, its row in the concatenated output of the chunks.
    """
    if chunking.deduplicate:
        first_with: dict[tuple, int] = {}
        encoded_as = [first_with.setdefault((tuple(text.ids), text.prompt_length), i) for i, text in enumerate(texts)]
    else:
        encoded_as = list(range(len(texts)))
    order = sorted(set(encoded_as), key=lambda i: (-len(texts[i].ids), i))
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
    return chunks, torch.tensor([row_of[i] for i in encoded_as], dtype=torch.long)


def _chunk(texts: list[Tokens], packed: bool, pad_id: int) -> dict[str, Any]:
    lengths = [len(text.ids) for text in texts]
    chunk: dict[str, Any] = {
        "lengths": torch.tensor(lengths),
        "prompt_lengths": torch.tensor([text.prompt_length for text in texts]),
    }
    if packed:
        chunk["input_ids"] = torch.tensor([i for text in texts for i in text.ids])
        chunk["equal_length_runs"] = tuple((len(list(run)), length) for length, run in groupby(lengths))
    else:
        padded = np.full((len(texts), lengths[0]), pad_id, dtype=np.int64)
        for row, text in enumerate(texts):
            padded[row, : len(text.ids)] = text.ids
        chunk["input_ids"] = torch.from_numpy(padded)
    return chunk


def to_device(values: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The same values, with the tensors among them on the device. Copies from pinned memory are asynchronous."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in values.items()
    }
