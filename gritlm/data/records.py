"""Data sets: found on disk, read once into a memory-mapped form, and looked up row by row."""

import functools
import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

from gritlm.data.no_repeats import RowTexts
from gritlm.data.parallel import in_order
from gritlm.data.rows import FEATURES, FORMAT_VERSION, SUFFIXES, parse_block, read_blocks
from gritlm.errors import UserError
from gritlm.files import written_aside
from gritlm.models.text import Text

END_OF_STREAM = bytes.fromhex("ffffffff00000000")  # https://arrow.apache.org/docs/format/Columnar.html
LARGE = 16 << 20  # bytes of a file that is worth several processes


@dataclass(frozen=True)
class Record:
    """One row: `known_positives` holds the ids of every known positive of this query, in this row or another."""

    query: Text
    positives: list[Text]
    negatives: list[Text]
    known_positives: list[int]


class RecordSet:
    """One data set, memory-mapped: `len()` and `[index] -> Record`; safe to use from any process."""

    def __init__(self, name: str, tables: list[datasets.Dataset]):
        self.name = name
        self.table = datasets.concatenate_datasets(tables)
        self.dropped_negatives = int(np.sum(self._column("dropped_negatives")))
        negatives = (chunk.field("text") for chunk in self.table.data["neg"].chunks)
        self.longest_group = 1 + max(pc.max(pc.list_value_length(texts)).as_py() for texts in negatives)
        self.instructions = self._instructions("query")
        self.passage_instructions = sorted({*self._instructions("pos"), *self._instructions("neg")})
        self.positives_by_query = self._find_repeated_queries()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Record:
        row = self.table[int(index)]
        positives, negatives = (
            [Text(*pair) for pair in zip(row[side]["instruction"], row[side]["text"], strict=True)]
            for side in ("pos", "neg")
        )
        known = self.positives_by_query.get(row["query_id"])
        if known:
            pairs = zip(row["neg_id"], negatives, strict=True)
            negatives = [passage for key, passage in pairs if key not in known]
        return Record(Text(**row["query"]), positives, negatives, sorted(known or row["pos_id"]))

    @functools.cached_property
    def documents(self) -> RowTexts:
        """The ids of each row's query and positives: no two rows of a batch may share one."""
        queries = self._column("query_id")
        positives = pa.concat_arrays([part.cast(pa.list_(pa.int64())) for part in self.table.data["pos_id"].chunks])
        counts = pc.list_value_length(positives).to_numpy(zero_copy_only=False)
        starts = np.concatenate([[0], np.cumsum(counts + 1)])
        ids = np.empty(starts[-1], dtype=np.int64)
        of_query = np.zeros(len(ids), dtype=bool)
        of_query[starts[:-1]] = True
        ids[of_query] = queries
        ids[~of_query] = pc.list_flatten(positives).to_numpy(zero_copy_only=False)
        return RowTexts(starts, ids)

    def positive_ids(self, row: int) -> np.ndarray:
        """The ids of a row's positives."""
        documents = self.documents
        return documents.ids[documents.starts[row] + 1 : documents.starts[row + 1]]

    @property
    def most_positives(self) -> int:
        """Of any query, all its rows taken together."""
        counts = np.diff(self.documents.starts) - 1
        _, query = np.unique(self._column("query_id"), return_inverse=True)
        return int(np.bincount(query, weights=counts).max())

    def fingerprint(self) -> str:
        """A short hash of all rows in their order; the same file on another machine has the same."""
        return hashlib.sha256(self._column("row_id").tobytes()).hexdigest()[:16]

    def _instructions(self, side: str) -> list[str]:
        parts = [chunk.field("instruction") for chunk in self.table.data[side].chunks]
        parts = parts if side == "query" else [pc.list_flatten(part) for part in parts]
        return sorted({text for part in parts for text in pc.unique(part).to_pylist()})

    def _column(self, name: str) -> np.ndarray:
        return self.table.data[name].combine_chunks().to_numpy(zero_copy_only=False)

    @functools.cached_property
    def hidden_negatives(self) -> int:
        """Negatives that are left out because another row has them as a positive of the same query."""
        rows = np.flatnonzero(
            np.isin(self._column("query_id"), np.array(list(self.positives_by_query), dtype=np.int64))
        )
        ids = self.table.data["neg_id"].take(rows).to_pylist()
        queries = self._column("query_id")[rows].tolist()
        return sum(
            key in self.positives_by_query[query] for query, keys in zip(queries, ids, strict=True) for key in keys
        )

    def _find_repeated_queries(self) -> dict[int, set[int]]:
        """For queries that stand in several rows: the positives of all those rows."""
        queries = self._column("query_id")
        values, counts = np.unique(queries, return_counts=True)
        rows = np.flatnonzero(np.isin(queries, values[counts > 1]))
        known: dict[int, set[int]] = {}
        for query, positives in zip(queries[rows], self.table.data["pos_id"].take(rows).to_pylist(), strict=True):
            known.setdefault(int(query), set()).update(positives)
        return known


def find_files(train_data: str | Path) -> dict[str, list[Path]]:
    """Data-set name -> its files, both sorted. A file is one set; in a folder each file and each sub-folder is.

    Raises:
        UserError: when there is nothing to read.
    """
    root = Path(train_data)
    wanted = ", ".join(SUFFIXES)
    try:
        if root.is_file():
            return {_stem(root): [root]}
        if not root.is_dir():
            root.stat()  # says why: missing, a loop of links, no permission
        found = {}
        for entry in sorted(root.iterdir()):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                files = sorted(file for file in entry.rglob("*") if file.name.endswith(SUFFIXES))
                files = [file for file in files if not any(part[0] == "." for part in file.relative_to(root).parts)]
            else:
                files = [entry] if entry.name.endswith(SUFFIXES) else []
            if files and _stem(entry) in found:
                raise UserError(f"{entry}: found a second data set {_stem(entry)!r} in {root}, wanted one of a name")
            if files:
                found[_stem(entry)] = files
    except (OSError, RuntimeError) as error:
        raise UserError(f"{root}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not found:
        raise UserError(f"{root}: found a folder without data, wanted files that end in {wanted}")
    return found


def _stem(path: Path) -> str:
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.name


def load_records(train_data: str | Path, cache: str | Path | None = None) -> list[RecordSet]:
    """All data sets of a path, sorted. The first call writes a memory-mapped form to `cache`, later ones map it.

    The cached form is keyed by the file's path, size, time and this format's version, written aside and renamed, so
    any number of processes may race. Let one rank of a machine go first all the same.
    """
    processes = os.cpu_count() or 1
    folder = Path(cache) if cache else Path(datasets.config.HF_DATASETS_CACHE) / "gritlm"
    found = find_files(train_data).items()
    return [RecordSet(name, [_open(path, folder, processes) for path in paths]) for name, paths in found]


def _open(path: Path, folder: Path, processes: int) -> datasets.Dataset:
    target = _cached(path, folder, processes)
    with suppress(pa.ArrowException, OSError):
        if _ends(target):
            return datasets.Dataset.from_file(str(target))
    target.unlink(missing_ok=True)  # damaged since it was written: what it was made from is still there
    return datasets.Dataset.from_file(str(_cached(path, folder, processes)))


def _ends(target: Path) -> bool:
    """Whether an Arrow stream has its end mark; without it, a whole number of batches would pass for all of them."""
    with open(target, "rb") as stream:
        stream.seek(-len(END_OF_STREAM), os.SEEK_END)
        return stream.read() == END_OF_STREAM


def _cached(path: Path, folder: Path, processes: int) -> Path:
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{FORMAT_VERSION}"
    target = folder / f"{_stem(path)}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.arrow"
    if not target.exists():
        try:
            with written_aside(target) as aside:
                _write(path, aside, processes if stat.st_size > LARGE else 1)
        except OSError as error:
            raise UserError(f"{target}: cannot be written: {error.strerror or error}; see --data_cache") from error
    return target


def _write(path: Path, aside: Path, processes: int) -> None:
    with ArrowWriter(features=FEATURES, path=str(aside), writer_batch_size=1000) as writer:
        with tqdm(desc=f"reading {path.name}", unit=" rows", delay=2) as progress:
            blocks = ((path, block) for block in read_blocks(path))
            for table in in_order(parse_block, blocks, processes):
                writer.write_table(table)
                progress.update(len(table))
        writer.finalize()
