"""Which rows are held out of training to evaluate on: a pure function of the data, the seed and the number of rows.

No query and no positive of a held-out row is in a training row, whatever the instruction before it.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np

from gritlm.data.no_repeats import RowTexts

LARGEST_GROUP = 0.1  # of the rows wanted of a data set: a larger group of rows that share texts is not held out


@dataclass(frozen=True)
class HeldOut:
    """Rows that are held out, numbered through all data sets and sorted, and the ids of their queries and positives."""

    rows: np.ndarray
    texts: Set[int]


NOTHING = HeldOut(np.zeros(0, dtype=np.int64), frozenset())


def hold_out(row_texts: RowTexts, sizes: Sequence[int], wanted: Sequence[int], seed: int | tuple[int, ...]) -> HeldOut:
    """Choose the rows to hold out.

    Rows that share a query or a positive, directly or through other rows, form a group and stay together. Groups are
    taken in random order, as long as no data set gives more rows than wanted of it.

    Args:
        row_texts: the ids of each row's query, without its instruction, and of its positives.
        sizes: the rows of each data set.
        wanted: how many of them to hold out at most.
    """
    group_of = _groups(row_texts)
    set_of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    rows = np.argsort(group_of, kind="stable")
    group_sizes = np.bincount(group_of).astype(np.int32)
    starts = np.cumsum(group_sizes) - group_sizes
    in_turn = np.argsort(np.random.default_rng(seed).permutation(len(starts)))
    left, held = np.array(wanted), np.zeros(len(starts), dtype=bool)
    for number, count in enumerate(wanted):
        candidates = np.zeros(len(starts), dtype=bool)
        candidates[group_of[set_of == number]] = True
        candidates &= group_sizes <= max(1, count * LARGEST_GROUP)
        for group in in_turn[candidates[in_turn]]:
            if not left[number]:
                break
            members = rows[starts[group] : starts[group] + group_sizes[group]]
            by_set = np.bincount(set_of[members], minlength=len(sizes))
            if not held[group] and (by_set <= left).all():
                left -= by_set
                held[group] = True
    chosen = np.flatnonzero(held[group_of])
    return HeldOut(chosen, frozenset(text for texts in row_texts.of(chosen) for text in texts))


def _groups(row_texts: RowTexts) -> np.ndarray:
    """The group of each row, from 0: the connected component of rows that share texts."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    rows = len(row_texts.starts) - 1
    ends = _edges(row_texts)
    edges = coo_matrix((np.ones(len(ends[0]), dtype=np.int8), ends), shape=(rows, rows))
    return connected_components(edges, directed=False)[1]


def _edges(row_texts: RowTexts) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows that share a text; enough of them to connect all rows with it."""
    order = np.argsort(row_texts.ids)
    ids = row_texts.ids[order]
    repeated = np.flatnonzero(ids[1:] == ids[:-1])
    del ids
    rows = np.arange(len(row_texts.starts) - 1, dtype=np.int32)
    row_of_text = np.repeat(rows, np.diff(row_texts.starts))
    return row_of_text[order[repeated]], row_of_text[order[repeated + 1]]
