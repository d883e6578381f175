"""Retrieval with vectors that are cut to fewer dimensions and stored as int8 or bits.

Shape suffixes: Q queries, N passages, D full width, W width kept.
"""

from typing import Any, NamedTuple

import numpy as np

FLOAT_QUERIES = "metrics of float32 queries"  # of a result: only the passages are quantised
BITS = {"float32": 32, "int8": 8, "binary": 1}
TILE = 1 << 16  # vectors quantised at once


class Form(NamedTuple):
    """How vectors are stored: the leading dimensions that are kept, and the precision of each."""

    width: int
    precision: str

    def about(self) -> dict[str, Any]:
        return {**self._asdict(), "bytes": -(-self.width * BITS[self.precision] // 8)}


def cut(vectors_ND: np.ndarray, width: int) -> np.ndarray:
    """The leading dimensions, float32 (N, W). What was a unit vector is one again."""
    norms_N = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    vectors_NW = vectors_ND[:, :width]
    if width == vectors_ND.shape[1] or not np.allclose(norms_N, 1, atol=1e-2):
        return vectors_NW
    return vectors_NW / np.maximum(np.linalg.norm(vectors_NW, axis=1, keepdims=True), 1e-12)


def quantise(vectors_NW: np.ndarray, precision: str, ranges_2W: np.ndarray) -> np.ndarray:
    """The vectors as sentence-transformers' `quantize_embeddings` stores them; ranked by their dot products.

    Bits are 1 and -1: the dot product then ranks as the Hamming distance does.

    Args:
        ranges_2W: the smallest and the largest value of each dimension, over the corpus.
    """
    if precision == "float32":
        return vectors_NW
    from sentence_transformers import quantize_embeddings  # takes two seconds to import

    parts = []
    for start in range(0, len(vectors_NW), TILE):
        part = vectors_NW[start : start + TILE]
        if precision == "int8":  # clipped, since sentence-transformers 5 lets values beyond the ranges wrap around
            parts.append(quantize_embeddings(part.clip(*ranges_2W), "int8", ranges=ranges_2W))
        else:
            bits = np.unpackbits(quantize_embeddings(part, "ubinary"), axis=1, count=part.shape[1])
            parts.append(bits.astype(np.int8) * 2 - 1)
    return np.concatenate(parts) if parts else vectors_NW
