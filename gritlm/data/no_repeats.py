"""What must not stand twice in a batch: each row's queries and positives; and the rows that wait because of them."""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RowTexts:
    """What must not stand twice in a batch: row r has the hashes `ids[starts[r]:starts[r + 1]]`."""

    starts: np.ndarray
    ids: np.ndarray

    @classmethod
    def concatenate(cls, parts: Sequence["RowTexts"]) -> "RowTexts":
        shifts = np.cumsum([0, *(len(part.ids) for part in parts)])
        starts = [part.starts[:-1] + shift for part, shift in zip(parts, shifts, strict=False)]
        return cls(np.concatenate([*starts, shifts[-1:]]), np.concatenate([part.ids for part in parts]))

    def rows_without_repeats(self, rows: np.ndarray) -> np.ndarray:
        """bool per row: true where none of its documents is in an earlier one of these rows."""
        lengths = self.starts[rows + 1] - self.starts[rows]
        position = np.repeat(np.arange(len(rows)), lengths)
        within = np.arange(len(position)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        ids = self.ids[np.repeat(self.starts[rows], lengths) + within]
        _, first, of = np.unique(ids, return_index=True, return_inverse=True)
        repeated = position[first][of] != position
        return ~np.isin(np.arange(len(rows)), position[repeated])

    def of(self, rows: np.ndarray) -> list[list[int]]:
        """Each row's documents."""
        return [self.ids[self.starts[row] : self.starts[row + 1]].tolist() for row in rows]


class PostponedRows:
    """Rows that could not stand in a batch, in a queue for each document that kept them out; the first go first."""

    def __init__(self, documents: RowTexts):
        self.documents = documents
        self.queues: dict[int, deque[tuple[int, int]]] = {}  # document -> (arrival, row), all of them with it
        self.heads: list[tuple[int, int]] = []  # heap of (arrival, document), one for each queue
        self.arrivals = 0

    def put(self, row: int, document: int) -> None:
        queue = self.queues.setdefault(document, deque())
        queue.append((self.arrivals, row))
        if len(queue) == 1:
            heapq.heappush(self.heads, (self.arrivals, document))
        self.arrivals += 1

    def put_all(self, rows: np.ndarray, batch: np.ndarray) -> None:
        """Rows, each of which repeats a document of the batch or of one another."""
        if len(rows):
            taken = {document for documents in self.documents.of(batch) for document in documents}
            for row, documents in zip(rows.tolist(), self.documents.of(rows), strict=True):
                self.put(row, next((document for document in documents if document in taken), documents[-1]))

    def take(self, count: int) -> np.ndarray:
        """At most so many rows of which no two share a document."""
        rows, taken, later = [], set(), []
        while len(rows) < count and self.heads:
            arrival, document = heapq.heappop(self.heads)
            if document in taken:
                later.append((arrival, document))
                continue
            queue = self.queues[document]
            _, row = queue.popleft()
            (documents,) = self.documents.of([row])
            other = next((document for document in documents if document in taken), None)
            if other is None:
                rows.append(row)
                taken.update(documents)
            else:
                self.put(row, other)
            if queue:
                heapq.heappush(self.heads, (queue[0][0], document))
        for head in later:
            heapq.heappush(self.heads, head)
        return np.array(rows, dtype=np.int64)

    def rest(self) -> np.ndarray:
        """All that still wait, as they came."""
        entries = sorted(entry for queue in self.queues.values() for entry in queue)
        return np.array([row for _, row in entries], dtype=np.int64)
