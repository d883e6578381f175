"""Keeps a query or a positive from appearing twice in a batch, and queues the rows postponed for it."""

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RowTexts:
    """The ids of each row's query and positives: row r has `ids[starts[r]:starts[r + 1]]`."""

    starts: np.ndarray
    ids: np.ndarray

    @classmethod
    def concatenate(cls, parts: Sequence["RowTexts"]) -> "RowTexts":
        shifts = np.cumsum([0, *(len(part.ids) for part in parts)])
        starts = [part.starts[:-1] + shift for part, shift in zip(parts, shifts, strict=False)]
        return cls(np.concatenate([*starts, shifts[-1:]]), np.concatenate([part.ids for part in parts]))

    def rows_without_repeats(self, rows: np.ndarray) -> np.ndarray:
        """bool per row: False where one of its texts is in an earlier one of these rows."""
        position, ids = self._texts_of(rows)
        _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
        repeated = position[first][inverse] != position
        return ~np.isin(np.arange(len(rows)), position[repeated])

    def earlier_uses(self, rows: np.ndarray) -> np.ndarray:
        """int64 per row: how many of the rows before it hold one text of it; the most for any of its texts."""
        position, ids = self._texts_of(rows)
        order = np.argsort(ids, kind="stable")
        starts = np.flatnonzero(np.diff(ids[order], prepend=~ids[order][:1]))
        uses = np.empty_like(order)
        uses[order] = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
        return np.maximum.reduceat(uses, np.flatnonzero(np.diff(position, prepend=-1))) if len(rows) else uses

    def _texts_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All texts of these rows: the position of each one's row among them, and its id."""
        lengths = self.starts[rows + 1] - self.starts[rows]
        position = np.repeat(np.arange(len(rows)), lengths)
        within = np.arange(len(position)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return position, self.ids[np.repeat(self.starts[rows], lengths) + within]

    def of(self, rows: Iterable[int]) -> list[list[int]]:
        """The ids of each of these rows."""
        return [self.ids[self.starts[row] : self.starts[row + 1]].tolist() for row in rows]


class PostponedRows:
    """Rows that would repeat a text of their batch, kept for later batches in the order of their arrival.

    Each row waits in the queue of one text that it shared with a batch. A batch that holds this text then passes over
    the whole queue at once.
    """

    def __init__(self, row_texts: RowTexts):
        self.row_texts = row_texts
        self.queues: dict[int, deque[tuple[int, int]]] = {}  # text id -> (arrival, row)
        self.heads: list[tuple[int, int]] = []  # heap of (arrival of the queue's first row, text id)
        self.arrivals = 0

    def put(self, row: int, text: int) -> None:
        queue = self.queues.setdefault(text, deque())
        queue.append((self.arrivals, row))
        if len(queue) == 1:
            heapq.heappush(self.heads, (self.arrivals, text))
        self.arrivals += 1

    def put_all(self, rows: np.ndarray, batch: np.ndarray) -> None:
        """Postpone rows; each repeats a text of the batch or of another of these rows."""
        if len(rows):
            taken = {text for texts in self.row_texts.of(batch) for text in texts}
            for row, texts in zip(rows.tolist(), self.row_texts.of(rows), strict=True):
                self.put(row, next((text for text in texts if text in taken), texts[-1]))

    def take(self, count: int) -> np.ndarray:
        """Remove and return at most `count` rows; no two of them share a text."""
        rows: list[int] = []
        taken: set[int] = set()
        later: list[tuple[int, int]] = []
        while len(rows) < count and self.heads:
            arrival, text = heapq.heappop(self.heads)
            if text in taken:
                later.append((arrival, text))
                continue
            queue = self.queues[text]
            _, row = queue.popleft()
            (texts,) = self.row_texts.of([row])
            shared = next((text for text in texts if text in taken), None)
            if shared is None:
                rows.append(row)
                taken.update(texts)
            else:
                self.put(row, shared)
            if queue:
                heapq.heappush(self.heads, (queue[0][0], text))
        for head in later:
            heapq.heappush(self.heads, head)
        return np.array(rows, dtype=np.int64)

    def rest(self) -> np.ndarray:
        """All rows still postponed, in the order of their arrival."""
        entries = sorted(entry for queue in self.queues.values() for entry in queue)
        return np.array([row for _, row in entries], dtype=np.int64)
