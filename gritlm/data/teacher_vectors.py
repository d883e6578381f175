"""A teacher's vectors of a data set's texts, memory-mapped from what `gritlm encode --rows` wrote."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from gritlm.data.records import RecordSet
from gritlm.errors import UserError
from gritlm.strict_json import read_json_object

VECTORS, IDS, ABOUT = "vectors.npy", "ids.npy", "teacher.json"


class TeacherVectors:
    """Vectors by text id: `rows.text_id` of a passage, `Record.query_id` of a query. Processes may share it.

    Args:
        folder: holds vectors.npy, float (N, E) of unit norm, ids.npy, int64 (N,) in rising order, and teacher.json.
        flag: names the folder in messages.
    Raises:
        UserError: the folder is none of `gritlm encode --rows`.
    """

    def __init__(self, folder: str | Path, flag: str = "--teacher_vectors"):
        self.folder, self.flag = Path(folder), flag
        try:
            self.vectors = np.load(self.folder / VECTORS, mmap_mode="r", allow_pickle=False)
            self.ids = np.load(self.folder / IDS, mmap_mode="r", allow_pickle=False)
            self.about = read_json_object(str(self.folder / ABOUT))
        except (OSError, ValueError) as error:
            wanted = f"wanted {VECTORS}, {IDS} and {ABOUT} of gritlm encode --rows"
            raise UserError(f"{flag} {folder}: cannot be read: {error}; {wanted}") from error
        if self.vectors.ndim != 2 or self.ids.shape != self.vectors.shape[:1]:
            shapes = f"{self.vectors.shape} vectors and {self.ids.shape} ids"
            raise UserError(f"{flag} {folder}: found {shapes}, wanted (N, E) and (N,)")

    def __reduce__(self) -> tuple:
        return TeacherVectors, (self.folder, self.flag)  # another process maps the files, too

    @property
    def width(self) -> int:
        return self.vectors.shape[1]

    def fingerprint(self) -> str:
        """A short hash of the ids, of what made the vectors, and of a thousand of them."""
        rows = self.vectors[:: max(1, len(self.vectors) // 1000)]
        parts = np.asarray(self.ids).tobytes(), np.ascontiguousarray(rows).tobytes(), json.dumps(self.about).encode()
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    def lookup(self, ids: Sequence[int]) -> np.ndarray:
        """(len(ids), E), float16 as `encode --rows` writes it, else float32.

        An id that is not there is an error of `check`; here it is a row of zeros.
        """
        wanted = np.asarray(ids, dtype=np.int64)
        places = np.searchsorted(self.ids, wanted).clip(max=len(self.ids) - 1)
        kind = np.float16 if self.vectors.dtype == np.float16 else np.float32  # half the bytes from a data worker
        found = np.asarray(self.vectors[places], dtype=kind)
        found[self.ids[places] != wanted] = 0.0
        return found

    def check(self, records: Iterable[RecordSet]) -> None:
        """Refuse vectors that lack a text of the data.

        Raises:
            UserError: naming the data set, and how many of its texts have no vector.
        """
        norms = np.linalg.norm(np.asarray(self.vectors[:1000], dtype=np.float32), axis=1)
        if not (np.diff(self.ids) > 0).all() or not np.allclose(norms, 1, atol=0.01):
            raise UserError(f"{self.flag} {self.folder}: found ids out of order, or vectors of another norm than 1")
        for record_set in records:
            ids = np.unique(record_set.text_places()[0])
            missing = len(ids) - int(np.isin(ids, self.ids).sum())
            if missing:
                found = f"no vector of {missing} of {len(ids)} texts of {record_set.name}"
                raise UserError(f"{self.flag} {self.folder}: found {found}; run gritlm encode --rows on this very data")
