"""Exact nearest-neighbour search over tiles of a corpus."""

import numpy as np
import torch
from torch import Tensor

TILE_VALUES = 1 << 26  # of the passages scored at once: 256 MiB, since a training GPU may be nearly full
BLOCK = 512  # queries scored at once; a part of the queries that starts at a multiple of it gets the same bits
LOW_BITS = 0xFFFFFFFF


def nearest(
    queries_BD: np.ndarray, corpus_ND: np.ndarray, count: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest dot products of each query and the passages' numbers, best first, (B, count) each.

    The vectors are float32 or int8; they are multiplied in float32.

    Among equal scores the passage with the lower number comes first. Where the corpus has fewer passages, all of them.
    """
    blocks = torch.from_numpy(queries_BD).to(device).float().split(BLOCK)
    best = [torch.empty(len(block), 0, dtype=torch.int64, device=device) for block in blocks]
    size = TILE_VALUES // corpus_ND.shape[1]
    buffer = torch.empty(BLOCK, min(size, len(corpus_ND)), device=device)  # allocated once, for speed
    for start in range(0, len(corpus_ND), size):
        tile = torch.from_numpy(corpus_ND[start : start + size]).to(device).float()
        for i, block in enumerate(blocks):
            products = torch.matmul(block, tile.T, out=buffer[: len(block), : len(tile)])
            keys = torch.cat([best[i], _largest(products, count, start)], 1)
            best[i] = keys.topk(min(count, keys.shape[1]), dim=1).values
    keys = torch.cat(best)
    return _scores(keys).cpu().numpy(), (LOW_BITS - (keys & LOW_BITS)).cpu().numpy()


def _largest(products: Tensor, count: int, start: int) -> Tensor:
    """The keys of the largest products of each row, in no order."""
    numbers = torch.arange(start, start + products.shape[1], device=products.device)
    if len(numbers) <= count:
        return _keys(products, numbers)
    found, places = products.topk(count + 1, dim=1)
    keys = _keys(found[:, :count], places[:, :count] + start)
    tied = (found[:, count - 1] == found[:, count]).nonzero()[:, 0]  # topk chose any of the equal ones
    for rows in tied.split(8):  # few at once: a key takes twice the memory of a score
        keys[rows] = _keys(products[rows], numbers).topk(count, dim=1).values
    return keys


# A key is an integer that orders by score, then by the lower number: the bits of the score, made to ascend with it,
# above the number.


def _keys(scores: Tensor, numbers: Tensor) -> Tensor:
    bits = (scores + 0.0).contiguous().view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    return (_ascending(bits).long() << 32) | (LOW_BITS - numbers)


def _scores(keys: Tensor) -> Tensor:
    return _ascending((keys >> 32).int()).view(torch.float32)


def _ascending(bits: Tensor) -> Tensor:
    """Flip the bits of a negative float below its sign, or flip them back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
