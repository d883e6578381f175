"""Which rows are held out of training to evaluate on: a pure function of the data, the seed and the number of rows.

No query and no positive of a held-out row is in a training row, whatever the instruction before it.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np

from gritlm.data.no_repeats import RowTexts

LARGEST_GROUP = 0.1  # a group of rows that share texts may be this share of the rows wanted of a data set


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
    set_of = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.argsort(group_of, kind="stable")
    starts = np.searchsorted(group_of[rows], np.arange(group_of.max() + 2))
    turn = np.random.default_rng(seed).permutation(len(starts) - 1)
    left, held = np.array(wanted), np.zeros(len(starts) - 1, dtype=bool)
    for number, count in enumerate(wanted):
        groups = np.unique(group_of[set_of == number])
        groups = groups[np.diff(starts)[groups] <= max(1, count * LARGEST_GROUP)]
        for group in groups[np.argsort(turn[groups])]:
            if not left[number]:
                break
            by_set = np.bincount(set_of[rows[starts[group] : starts[group + 1]]], minlength=len(sizes))
            if not held[group] and (by_set <= left).all():
                left -= by_set
                held[group] = True
    chosen = np.flatnonzero(held[group_of])
    return HeldOut(chosen, frozenset(text for texts in row_texts.of(chosen) for text in texts))


def _groups(row_texts: RowTexts) -> np.ndarray:
    """The group of each row, from 0: the connected component of rows and texts."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    rows = len(row_texts.starts) - 1
    row_of_text = np.repeat(np.arange(rows), np.diff(row_texts.starts))
    distinct, text = np.unique(row_texts.ids, return_inverse=True)
    nodes = rows + len(distinct)
    edges = coo_matrix((np.ones(len(text), dtype=np.int8), (row_of_text, rows + text)), shape=(nodes, nodes))
    _, component = connected_components(edges, directed=False)
    return np.unique(component[:rows], return_inverse=True)[1]
