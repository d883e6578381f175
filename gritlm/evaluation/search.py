"""The nearest vectors, by tiles of the corpus."""

import numpy as np
import torch

COLUMNS = 65536  # passages scored at once


def nearest(queries_BD: np.ndarray, corpus_ND: np.ndarray, count: int, device: torch.device):
    """The `count` best scores of each query and their numbers, (B, count) each; by tiles of the corpus."""
    queries = torch.from_numpy(queries_BD).to(device)
    scores = torch.empty(len(queries), 0, device=device)
    numbers = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    room = torch.empty(len(queries), min(COLUMNS, len(corpus_ND)), device=device)  # once: fresh pages take time
    for start in range(0, len(corpus_ND), COLUMNS):
        tile = torch.from_numpy(corpus_ND[start : start + COLUMNS]).to(device)
        products = torch.matmul(queries, tile.T, out=room[:, : len(tile)])
        found, places = products.topk(min(count, len(tile)), dim=1)
        scores, numbers = torch.cat([scores, found], 1), torch.cat([numbers, places + start], 1)
        scores, order = scores.topk(min(count, scores.shape[1]), dim=1)
        numbers = numbers.gather(1, order)
    return scores.cpu().numpy(), numbers.cpu().numpy()
