"""Vectors on disk by key, shared by the tasks and processes of an evaluation and by the run that goes on with it.

Each process appends to part files of its own and reads those of all. A vector is on the disk before its key is, so a
killed process leaves no key without a vector. The oldest parts are removed beyond a limit. Nothing is locked.
"""

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gritlm.files import to_disk

KEY = 16  # bytes
PARTS = 8  # part files at the limit: the oldest eighth is removed at a time
LEFT = 1_000_000_000  # bytes of the disk that stay free, for results


class VectorCache:
    """Vectors of one width by keys of 16 bytes.

    Args:
        folder: where the part files are; made if need be.
        width: of a vector, float32.
        limit: bytes that all parts may have together. At most half of the disk's free space is used, beyond 1 GB.
    """

    def __init__(self, folder: Path, width: int, limit: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.width, self.problem = folder, width, ""
        known = sorted(folder.glob("*.keys"), key=lambda path: path.stat().st_mtime)
        used = sum(path.with_suffix(".vectors").stat().st_size for path in known)
        limit = min(limit, used + max(0, shutil.disk_usage(folder).free - LEFT) // 2)
        self.rows_a_part = limit // PARTS // (4 * width)
        if not self.rows_a_part:
            self.problem = f"{folder}: found less than {LEFT / 1e9:.0f} GB free on the disk"
        self.parts: list[tuple[Path, np.memmap]] = []
        self.place_of: dict[bytes, tuple[int, int]] = {}  # key -> number of the part and row in it
        self.first = 0  # number of the oldest part that is left
        for path in known:
            self._open(path)
        self.own: Path | None = None  # the part that this process appends to
        self.own_rows = 0
        self._remove_old()

    def _open(self, path: Path) -> None:
        keys = path.read_bytes()
        rows = len(keys) // KEY
        vectors = path.with_suffix(".vectors")
        if rows == 0 or vectors.stat().st_size < 4 * self.width * rows:  # of a write that the disk had no room for
            return
        self.parts.append((path, np.memmap(vectors, np.float32, "r", shape=(rows, self.width))))
        number = self.first + len(self.parts) - 1
        for row in range(rows):
            self.place_of[keys[row * KEY : (row + 1) * KEY]] = (number, row)

    def find(self, keys: Sequence[bytes], vectors_ND: np.ndarray) -> list[int]:
        """Put the vectors of known keys into their rows of `vectors_ND`; return the rows of the others."""
        missing = []
        for row, key in enumerate(keys):
            number, place = self.place_of.get(key, (-1, 0))
            if number < self.first:
                missing.append(row)
            else:
                vectors_ND[row] = self.parts[number - self.first][1][place]
        return missing

    def add(self, keys: Sequence[bytes], vectors_ND: np.ndarray) -> None:
        """Append vectors. After an error of the disk nothing more is written; `problem` then says why."""
        if self.problem:
            return
        try:
            for start in range(0, len(keys), self.rows_a_part):
                self._append(keys[start : start + self.rows_a_part], vectors_ND[start : start + self.rows_a_part])
        except OSError as error:
            self.problem = f"{self.folder}: {error.strerror}"

    def _append(self, keys: Sequence[bytes], vectors_ND: np.ndarray) -> None:
        if self.own is None or self.own_rows + len(keys) > self.rows_a_part:
            self.own, self.own_rows = self.folder / f"{uuid.uuid4().hex}.keys", 0
        vectors = self.own.with_suffix(".vectors")
        with open(vectors, "ab") as out:
            out.write(np.ascontiguousarray(vectors_ND, np.float32).data)
        to_disk(vectors)
        with open(self.own, "ab") as out:
            out.write(b"".join(keys))
        self.own_rows += len(keys)
        whole = np.memmap(vectors, np.float32, "r", shape=(self.own_rows, self.width))
        if self.parts and self.parts[-1][0] == self.own:
            self.parts[-1] = (self.own, whole)
        else:
            self.parts.append((self.own, whole))
        number, before = self.first + len(self.parts) - 1, self.own_rows - len(keys)
        self.place_of.update({key: (number, before + row) for row, key in enumerate(keys)})
        self._remove_old()

    def _remove_old(self) -> None:
        while (
            len(self.parts) > 1
            and self.rows_a_part
            and sum(len(part) for _, part in self.parts) > PARTS * self.rows_a_part
        ):
            path, _ = self.parts.pop(0)
            self.first += 1
            for file in (path, path.with_suffix(".vectors")):
                if file.exists():
                    os.unlink(file)
