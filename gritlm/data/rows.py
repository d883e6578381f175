"""Read and check rows of jsonl and parquet files. An error names file, line, field, found and wanted.

A row is {"query": TEXT, "pos": [TEXT, ...], "neg": [TEXT, ...]}. TEXT is a string or [instruction, string]. The
instruction is prepended to the string unchanged.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gritlm.data.row_scores import SCORE_KEYS, parse_scores
from gritlm.errors import UserError, first_line
from gritlm.models.text import Text
from gritlm.strict_json import parse_json

FIELDS = ("query", "pos", "neg")
READ = (*FIELDS, *SCORE_KEYS)
BLOCK_BYTES = 1 << 20  # bytes of a file read at once
FORMAT_VERSION = 5  # of the cached form; raise it when SCHEMA or a rule below changes

_texts = pa.struct({"instruction": pa.list_(pa.large_string()), "text": pa.list_(pa.large_string())})
SCHEMA = pa.schema(
    {
        "query": pa.struct({"instruction": pa.large_string(), "text": pa.large_string()}),
        "pos": _texts,
        "neg": _texts,
        "query_id": pa.int64(),
        "pos_id": pa.list_(pa.int64()),
        "neg_id": pa.list_(pa.int64()),
        "row_id": pa.int64(),
        "pos_score": pa.list_(pa.float32()),
        "neg_score": pa.list_(pa.float32()),
        "is_scored_pair": pa.bool_(),
        "dropped_negatives": pa.int32(),
        "unread": pa.string(),
    }
)
Block = list[tuple[int, Any]]  # (line number from 1, raw line or parquet row)


def text_id(text: str) -> int:
    """A 64-bit hash of a text without its trailing white space. It is the same on every machine."""
    digest = hashlib.blake2b(text.rstrip().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# ---- one row


def _kind(value: Any) -> str:
    names = {type(None): "null", str: "a string", list: "a list", dict: "an object", bool: "true or false"}
    return (names | {bytes: "bytes"}).get(type(value), "a number")


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
    """Check a decoded row and convert it to the cached form (`SCHEMA`).

    A negative that repeats a positive of the row is dropped and counted in `dropped_negatives`. `unread` lists the
    row's other keys, in JSON. Scores beside the passages are read as in `row_scores`.

    Args:
        row: the decoded row.
        where: file:line, the start of every message.
    Raises:
        UserError: the row is bad; the message names the field, what was found and what is wanted.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: found {_kind(row)}, wanted an object with query, pos and neg")
    for field in FIELDS:
        if field not in row:
            hint = ' ("neg": [] where there are none)' if field == "neg" else ""
            raise UserError(f"{where}: {field}: found no such key, wanted query, pos and neg{hint}")
    query = _parse_text(row["query"], where, "query")
    positives = _parse_texts(row, "pos", where)
    if not positives:
        raise UserError(f"{where}: pos: found an empty list, wanted at least one passage")
    negatives = _parse_texts(row, "neg", where)
    positive_ids = [text_id(passage.text) for passage in positives]
    scores = parse_scores(row, len(positives), len(negatives), where)
    hashed = [(text_id(passage.text), number) for number, passage in enumerate(negatives)]
    hashed = [(key, number) for key, number in hashed if key not in positive_ids]
    kept = [negatives[number] for _, number in hashed]
    groups: tuple = ([query], positives, kept)
    groups += (scores,) if scores else ()
    return {
        "query": query._asdict(),
        "pos": {"instruction": [p.instruction for p in positives], "text": [p.text for p in positives]},
        "neg": {"instruction": [p.instruction for p in kept], "text": [p.text for p in kept]},
        "query_id": text_id("\n".join(query)),
        "pos_id": positive_ids,
        "neg_id": [key for key, _ in hashed],
        "row_id": text_id(json.dumps(groups)),
        "pos_score": scores.positives if scores else None,
        "neg_score": [scores.negatives[number] for _, number in hashed] if scores else None,
        "is_scored_pair": bool(scores and scores.is_pair),
        "dropped_negatives": len(negatives) - len(kept),
        "unread": json.dumps(unread) if (unread := sorted(row.keys() - {*READ})) else "",
    }


# ---- one file


def _decode_line(line: bytes, where: str) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: found byte 0x{line[error.start]:02X}, wanted UTF-8 text") from error
    if text.startswith("\ufeff"):
        raise UserError(f"{where}: found a byte order mark, wanted plain UTF-8 (save without BOM)")
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: found {error.msg} at column {error.colno}, wanted one JSON object a line") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: found {error}, wanted one JSON object a line") from error


def _jsonl_blocks(path: Path) -> Iterator[Block]:
    zipped = path.name.endswith(".gz")
    with open(path, "rb") as stream:
        start = stream.read(4)
    if start[:2] == b"\x1f\x8b" and not zipped:
        raise UserError(f"{path}: found gzip data, wanted it under a name that ends in .jsonl.gz")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: found UTF-16 text, wanted UTF-8")
    if start[:1] == b"[" and _is_one_array(path, zipped):
        raise UserError(f"{path}: found one JSON array, wanted one object a line")
    with gzip.open(path, "rb") if zipped else open(path, "rb") as stream:
        block, size = [], 0
        try:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    block.append((number, line))
                    size += len(line)
                if size > BLOCK_BYTES:
                    yield block
                    block, size = [], 0
        except (OSError, EOFError, zlib.error):
            yield block  # the rows read before the damage
            raise
        yield block


def _is_one_array(path: Path, zipped: bool) -> bool:
    # A first line that opens a list and does not close it. A list that closes on its line is one bad row.
    with gzip.open(path, "rb") if zipped else open(path, "rb") as lines:
        first = lines.readline(1_000_000).strip()
    return not first.endswith(b"]")


def _parquet_blocks(path: Path, columns: Collection[str] | None) -> Iterator[Block]:
    file, first = pq.ParquetFile(path), 1
    names = file.schema_arrow.names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: found the column {twice[0]!r} twice, wanted it once")
    wanted = [name for name in names if columns is None or name in columns] or None
    for batch in file.iter_batches(1000, columns=wanted):
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date beyond Python's
            for number in range(batch.num_rows):
                try:
                    batch.slice(number, 1).to_pylist()
                except (ValueError, OverflowError) as row_error:
                    found = "bytes that are not UTF-8" if isinstance(row_error, UnicodeDecodeError) else row_error
                    raise UserError(f"{path}:{first + number}: found {found}, wanted text") from row_error
            raise UserError(f"{path}: cannot be read as parquet: {error}") from error
        yield list(enumerate(rows, start=first))
        first += len(rows)


def read_blocks(path: Path, columns: Collection[str] | None = READ) -> Iterator[Block]:
    """Yield the rows of a file in blocks, not yet decoded. Blank lines are skipped.

    Args:
        path: a .jsonl, .jsonl.gz or .parquet file.
        columns: columns of a parquet file to read where it has them; None reads all.
    Raises:
        UserError: the file cannot be read, has another format, or holds no row.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would be empty the second time
        raise UserError(f"{path}: found a pipe, socket or device, wanted a file")
    rows = 0
    try:
        for block in _parquet_blocks(path, columns) if path.suffix == ".parquet" else _jsonl_blocks(path):
            yield block
            rows += len(block)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except pa.ArrowException as error:
        raise UserError(f"{path}: cannot be read as parquet: {first_line(error)}") from error
    if not rows:
        raise UserError(f"{path}: found no row, wanted at least one")


def unread_columns(path: Path) -> list[str]:
    """The columns of a parquet file that are no field of a row."""
    return sorted({*pq.read_schema(path).names} - {*READ}) if path.suffix == ".parquet" else []


def decode(path: Path, number: int, raw: Any) -> Any:
    """Decode one raw line. A parquet row is returned unchanged.

    Raises:
        UserError: the line is not UTF-8 or not JSON.
    """
    return _decode_line(raw, f"{path}:{number}") if isinstance(raw, bytes) else raw


def parse_block(path: Path, block: Block) -> pa.Table:
    """Convert a block to the cached form.

    Raises:
        UserError: at the first bad row.
    """
    rows = [parse_row(decode(path, number, raw), f"{path}:{number}") for number, raw in block]
    return pa.Table.from_pylist(rows, schema=SCHEMA)
