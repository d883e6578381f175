"""Exact nearest-neighbour search over tiles of a corpus."""

import numpy as np
import torch

TILE = 65536  # passages scored at once


def nearest(
    queries_BD: np.ndarray, corpus_ND: np.ndarray, count: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest dot products of each query and the passages' numbers, best first, (B, count) each.

    Where the corpus has fewer passages, all of them.
    """
    queries = torch.from_numpy(queries_BD).to(device)
    scores = torch.empty(len(queries), 0, device=device)
    numbers = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    buffer = torch.empty(len(queries), min(TILE, len(corpus_ND)), device=device)  # allocated once, for speed
    for start in range(0, len(corpus_ND), TILE):
        tile = torch.from_numpy(corpus_ND[start : start + TILE]).to(device)
        products = torch.matmul(queries, tile.T, out=buffer[:, : len(tile)])
        found, places = products.topk(min(count, len(tile)), dim=1)
        scores, numbers = torch.cat([scores, found], 1), torch.cat([numbers, places + start], 1)
        scores, order = scores.topk(min(count, scores.shape[1]), dim=1)
        numbers = numbers.gather(1, order)
    return scores.cpu().numpy(), numbers.cpu().numpy()
