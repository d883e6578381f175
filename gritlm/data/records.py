"""Read jsonl and parquet into memory-mapped records. Every bad row is refused with file:line, field, found, wanted.

The format: {"query": text | [instruction, text], "pos": [passage, ...], "neg": [passage, ...]},
a passage being text | [instruction, text]. An instruction is put before its text as it stands.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Features, Sequence, Value
from tqdm import tqdm

from gritlm.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
FORMAT_VERSION = 1  # of the cached form; a change of the schema or of the rules below raises it

_text, _id = Value("large_string"), Value("int64")
FEATURES = Features(
    {
        "query": {"instruction": _text, "text": _text},
        "pos": {"instruction": Sequence(_text), "text": Sequence(_text)},
        "neg": {"instruction": Sequence(_text), "text": Sequence(_text)},
        "query_id": _id,
        "pos_id": Sequence(_id),
        "dropped_negatives": Value("int32"),
    }
)


class Text(NamedTuple):
    """What is encoded: the instruction stands right before the text."""

    instruction: str
    text: str


@dataclass(frozen=True)
class Record:
    """One row: `known` holds the ids of every known positive of this query, in this row or another."""

    query: Text
    positives: list[Text]
    negatives: list[Text]
    known: list[int]


def text_id(text: str) -> int:
    """A 64-bit hash of a text (trailing white space does not count): equal texts, equal ids, on every machine."""
    digest = hashlib.blake2b(text.rstrip().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# ---- one row


def _kind(value: Any) -> str:
    names = {type(None): "null", str: "a string", list: "a list", dict: "an object", bool: "true or false"}
    return names.get(type(value), "a number")


def _parse_text(value: Any, where: str, field: str) -> Text:
    if isinstance(value, str):
        instruction, text = "", value
    elif isinstance(value, list):
        if len(value) != 2:
            raise UserError(f"{where}: {field}: found a list of {len(value)}, wanted text or [instruction, text]")
        instruction, text = value
    else:
        raise UserError(f"{where}: {field}: found {_kind(value)}, wanted text or [instruction, text]")
    for name, part in (("instruction", instruction), ("text", text)):
        if not isinstance(part, str):
            raise UserError(f"{where}: {field} {name}: found {_kind(part)}, wanted a string")
        try:
            part.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: {field} {name}: found half a surrogate pair, wanted valid Unicode") from error
    if not text.strip():
        raise UserError(f"{where}: {field}: found an empty text, wanted at least one character that is not white space")
    return Text(instruction, text)


def _parse_texts(row: dict, field: str, where: str) -> list[Text]:
    value = row[field]
    if not isinstance(value, list):
        raise UserError(f"{where}: {field}: found {_kind(value)}, wanted a list of passages")
    return [_parse_text(item, where, f"{field}[{number}]") for number, item in enumerate(value)]


def parse_row(row: Any, where: str) -> dict:
    """A decoded row to the cached form (`FEATURES`). `where` opens every message, as file:line.

    A negative with the text of one of the row's positives is left out, and counted in `dropped_negatives`.

    Raises:
        UserError: naming the field, what was found and what is wanted.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: found {_kind(row)}, wanted an object with query, pos and neg")
    for field in ("query", "pos", "neg"):
        if field not in row:
            hint = ' ("neg": [] where there are none)' if field == "neg" else ""
            raise UserError(f"{where}: {field}: found no such key, wanted query, pos and neg{hint}")
    query = _parse_text(row["query"], where, "query")
    positives = _parse_texts(row, "pos", where)
    if not positives:
        raise UserError(f"{where}: pos: found an empty list, wanted at least one passage")
    negatives = _parse_texts(row, "neg", where)
    ids = [text_id(passage.text) for passage in positives]
    kept = [passage for passage in negatives if text_id(passage.text) not in ids]
    return {
        "query": query._asdict(),
        "pos": {"instruction": [p.instruction for p in positives], "text": [p.text for p in positives]},
        "neg": {"instruction": [p.instruction for p in kept], "text": [p.text for p in kept]},
        "query_id": text_id("\n".join(query)),
        "pos_id": ids,
        "dropped_negatives": len(negatives) - len(kept),
    }


# ---- one file


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} given twice")
    return row


def _not_json(name: str):
    raise ValueError(f"{name}, which is not JSON")


def _decode_line(line: bytes, where: str) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: found byte 0x{line[error.start]:02X}, wanted UTF-8 text") from error
    if text.startswith("\ufeff"):
        raise UserError(f"{where}: found a byte order mark, wanted plain UTF-8 (save without BOM)")
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_not_json)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: found {error.msg} at column {error.colno}, wanted one JSON object a line") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: found {error}, wanted one JSON object a line") from error


def _read_jsonl(path: Path) -> Iterator[tuple[Any, str]]:
    zipped = path.name.endswith(".gz")
    with open(path, "rb") as stream:
        start = stream.read(4)
    if start[:2] == b"\x1f\x8b" and not zipped:
        raise UserError(f"{path}: found gzip data, wanted it under a name that ends in .jsonl.gz")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: found UTF-16 text, wanted UTF-8")
    if start[:1] == b"[" and _is_one_array(path, zipped):
        raise UserError(f"{path}: found one JSON array, wanted one object a line")
    with gzip.open(path, "rb") if zipped else open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}:{number}"
                yield _decode_line(line, where), where


def _is_one_array(path: Path, zipped: bool) -> bool:
    # A first line that opens a list and does not close it; a row that is a list is the row's own mistake.
    with gzip.open(path, "rb") if zipped else open(path, "rb") as lines:
        first = lines.readline(1_000_000).strip()
    return not first.endswith(b"]")


def _read_parquet(path: Path) -> Iterator[tuple[Any, str]]:
    number = 0
    for batch in pq.ParquetFile(path).iter_batches(1000):
        for row in batch.to_pylist():
            number += 1
            yield row, f"{path}:{number}"


def read_rows(path: Path) -> Iterator[dict]:
    """Every row of a file in the cached form, in order.

    Raises:
        UserError: at the first bad row, or for the file as a whole.
    """
    rows = 0
    try:
        for row, where in _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path):
            yield parse_row(row, where)
            rows += 1
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except pa.ArrowException as error:
        raise UserError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from error
    if not rows:
        raise UserError(f"{path}: found no row, wanted at least one")


# ---- data sets


class RecordSet:
    """One data set, memory-mapped: `len()` and `[index] -> Record`; safe to use from any process."""

    def __init__(self, name: str, tables: list[Path]):
        self.name = name
        self.table = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in tables])
        self.dropped_negatives = int(np.sum(self._column("dropped_negatives")))
        negatives = (chunk.field("text") for chunk in self.table.data["neg"].chunks)
        self.longest_group = 1 + max(pc.max(pc.list_value_length(texts)).as_py() for texts in negatives)
        self.instructions = self._instructions("query")
        self.passage_instructions = sorted({*self._instructions("pos"), *self._instructions("neg")})
        self.known_elsewhere = self._find_repeated_queries()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Record:
        row = self.table[int(index)]
        positives, negatives = (
            [Text(*pair) for pair in zip(row[side]["instruction"], row[side]["text"], strict=True)]
            for side in ("pos", "neg")
        )
        known = self.known_elsewhere.get(row["query_id"])
        if known:
            negatives = [passage for passage in negatives if text_id(passage.text) not in known]
        return Record(Text(**row["query"]), positives, negatives, sorted(known or row["pos_id"]))

    def _instructions(self, side: str) -> list[str]:
        parts = [chunk.field("instruction") for chunk in self.table.data[side].chunks]
        parts = parts if side == "query" else [pc.list_flatten(part) for part in parts]
        return sorted({text for part in parts for text in pc.unique(part).to_pylist()})

    def _column(self, name: str) -> np.ndarray:
        return self.table.data[name].combine_chunks().to_numpy(zero_copy_only=False)

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
            if entry.is_dir():
                files = sorted(file for file in entry.rglob("*") if file.name.endswith(SUFFIXES))
            else:
                files = [entry] if entry.name.endswith(SUFFIXES) else []
            if files:
                found.setdefault(_stem(entry), []).extend(files)
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
    folder = Path(cache) if cache else Path(datasets.config.HF_DATASETS_CACHE) / "gritlm"
    return [
        RecordSet(name, [_cached(path, folder) for path in paths]) for name, paths in find_files(train_data).items()
    ]


def _cached(path: Path, folder: Path) -> Path:
    stat = path.stat()
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{FORMAT_VERSION}"
    target = folder / f"{_stem(path)}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.arrow"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        aside = target.with_suffix(f".{os.getpid()}.part")
        try:
            with datasets.arrow_writer.ArrowWriter(
                features=FEATURES, path=str(aside), writer_batch_size=1000
            ) as writer:
                for row in tqdm(read_rows(path), f"reading {path.name}", unit=" rows", delay=2):
                    writer.write(row)
                writer.finalize()
            os.replace(aside, target)
        except OSError as error:
            raise UserError(f"{target}: cannot be written: {error.strerror or error}; see --data_cache") from error
        finally:
            aside.unlink(missing_ok=True)
    return target
