"""Vectors in numpy's format, written in blocks by one process or several. A run that was interrupted goes on."""

import io
import os
import shutil
from pathlib import Path

import numpy as np

from gritlm.errors import RankError
from gritlm.files import to_disk


class VectorFile:
    """A .npy file of `rows` vectors in the folder TARGET.partial, until `blocks` parts of any sizes are written.

    It is not memory-mapped: on a full disk a write raises an error, but a mapped page ends the process. It is opened
    for writing only: NFS then sends a rank's own bytes, without those around them.
    """

    def __init__(self, target: Path, rows: int, blocks: int):
        self.target, self.rows, self.blocks = target, rows, blocks
        self.folder = target.with_name(f"{target.name}.partial")
        self.path = self.folder / "vectors.npy"

    def missing(self) -> list[int]:
        """The numbers of the blocks that no process has finished."""
        done = set(os.listdir(self.folder)) if self.path.exists() else set()
        return [number for number in range(self.blocks) if f"{number}.done" not in done]

    def write(self, number: int, start: int, vectors_BD: np.ndarray) -> None:
        """Write block `number`, from row `start` of the file on, to the disk. Raises RankError where that is full."""
        header, whole = io.BytesIO(), np.broadcast_to(vectors_BD[:1], (self.rows, vectors_BD.shape[1]))
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(whole))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.path, "wb", opener=lambda path, _: os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)) as file:
                file.write(header.getvalue())
                file.seek(start * vectors_BD[0].nbytes, os.SEEK_CUR)
                file.write(np.ascontiguousarray(vectors_BD).data)
            to_disk(self.path)
            (self.folder / f"{number}.done").touch()
        except OSError as error:
            done = f"{self.blocks - len(self.missing())} of {self.blocks} blocks are in {self.folder}"
            raise RankError(f"{self.target}: {error.strerror}; {done}, the same command goes on from there") from error

    def remove(self) -> None:
        """Remove the folder, its vectors first: what is left after a kill is not taken for blocks of another call."""
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.folder)


def first_not_finite(vectors_BD: np.ndarray) -> int | None:
    """The number of the first vector with a value that is not finite."""
    finite_B = np.isfinite(vectors_BD).all(axis=1)
    return None if finite_B.all() else int(np.argmin(finite_B))
