"""Read and check rows of jsonl and parquet files. An error names file, line, field, found and wanted.

A row is {"query": TEXT, "pos": [TEXT, ...], "neg": [TEXT, ...]}. TEXT is a string or [instruction, string]. The
instruction is prepended to the string unchanged.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gritlm.data.containers import (
    HEAD_BYTES,
    READ_ERRORS,
    FileError,
    compression_of,
    file_errors,
    open_parquet,
    open_stream,
)
from gritlm.data.row_scores import SCORE_KEYS, parse_scores
from gritlm.errors import UserError
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
        "score_error": pa.string(),
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


def parse_row(row: Any, where: str, with_id: bool = True) -> dict:
    """Check a decoded row and convert it to the cached form (`SCHEMA`).

    A negative that repeats a positive of the row is dropped and counted in `dropped_negatives`. `unread` lists the
    row's other keys, in JSON. Scores beside the passages are read as in `row_scores`; `score_error` says why not.

    Args:
        where: file:line, the start of every message.
        with_id: hash the row, which takes a fifth of the time.
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
    scores, score_error = None, ""
    try:
        scores = parse_scores(row, len(positives), len(negatives), where)
    except UserError as error:  # only a loss that reads scores must have them
        score_error = str(error)
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
        "row_id": text_id(json.dumps(groups)) if with_id else 0,
        "pos_score": scores.positives if scores else None,
        "neg_score": [scores.negatives[number] for _, number in hashed] if scores else None,
        "is_scored_pair": bool(scores and scores.is_pair),
        "score_error": score_error,
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
    with open_stream(path) as stream:
        _check_lines(path, stream.readline(BLOCK_BYTES) + stream.read(HEAD_BYTES))
    if (compression := compression_of(path)) and path.name.lower().endswith(".jsonl"):
        raise FileError(f"{path}: found {compression} data, wanted it under a name that ends in .jsonl.gz or the like")
    with open_stream(path) as stream:
        block, size = [], 0
        try:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    block.append((number, line))
                    size += len(line)
                if size > BLOCK_BYTES:
                    yield block
                    block, size = [], 0
        except READ_ERRORS:
            yield block  # the rows read before the damage
            raise
        yield block


def _check_lines(path: Path, head: bytes) -> None:
    """Refuse a file that does not hold one JSON value a line, by its first lines. A single bad line is a bad row."""
    lines = [line.strip() for line in head.removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip()]
    first = lines[0] if lines else b""
    wanted = "wanted one JSON object a line; gritlm prepare makes rows for training of .csv, .tsv and .json"
    # A list that closes on its line is one bad row.
    if first[:1] == b"[" and (not first.endswith(b"]") or re.match(rb"\[\s*\{", first)):
        raise FileError(f"{path}: found one JSON array, {wanted}")
    if first == b"{":
        raise FileError(f"{path}: found one JSON object over several lines, {wanted}")
    if lines and not any(line[:1] in (b"{", b"[") or _is_json(line) for line in lines):
        shown = first[:60].decode(errors="replace")
        raise FileError(f"{path}: found text that is not JSON (line 1: {shown!r}), {wanted}")


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line.decode())
    except (ValueError, RecursionError):
        return False
    return True


def _parquet_blocks(path: Path, columns: Collection[str] | None) -> Iterator[Block]:
    file, first = open_parquet(path), 1
    names = file.schema_arrow.names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise FileError(f"{path}: found the column {twice[0]!r} twice, wanted it once")
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
            raise FileError(f"{path}: cannot be read as parquet: {error}") from error
        yield list(enumerate(rows, start=first))
        first += len(rows)


def read_blocks(path: Path, columns: Collection[str] | None = READ) -> Iterator[Block]:
    """Yield the rows of a file in blocks, not yet decoded. Blank lines are skipped.

    Args:
        path: a .jsonl file, compressed or not, or a .parquet file.
        columns: columns of a parquet file to read where it has them; None reads all.
    Raises:
        FileError: the file cannot be read, has another format, or holds no row.
    """
    rows = 0
    with file_errors(path):
        for block in _parquet_blocks(path, columns) if is_parquet(path) else _jsonl_blocks(path):
            yield block
            rows += len(block)
    if not rows:
        raise FileError(f"{path}: found no row, wanted at least one")


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def unread_columns(path: Path) -> list[str]:
    """The columns of a parquet file that are no field of a row."""
    return sorted({*pq.read_schema(path).names} - {*READ}) if is_parquet(path) else []


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
