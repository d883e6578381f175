"""Read the texts of a file, one per row: what to encode, or a corpus."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gritlm.data.cells import is_null
from gritlm.data.rows import decode, read_blocks
from gritlm.errors import UserError
from gritlm.models.text import titled


def read_texts(path: Path, may_be_empty: bool = True) -> list[str]:
    """Read a .jsonl (plain or compressed) or .parquet file. A row is a text, or "title" and "text" become one.

    Raises:
        UserError: a row has no text; the message names file and line.
    """
    return [text_of(path, number, decode(path, number, raw), may_be_empty) for number, raw in text_rows(path)]


def text_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a file of texts with their line numbers, not yet decoded. Read block by block."""
    return itertools.chain.from_iterable(read_blocks(path, columns=("title", "text", "_id", "id")))


def text_of(path: Path, number: int, row: Any, may_be_empty: bool = True) -> str:
    """The text of a decoded row. Raises UserError."""
    if isinstance(row, dict) and row.get("title"):
        row = row | {field: "" for field in ("title", "text") if field in row and is_null(row[field])}
    text = titled(row, f"{path}:{number}")
    if not may_be_empty and (not text.strip() or is_null(text)):
        found = f"{text!r}, the word of an empty cell" if text.strip() else "an empty text"
        raise UserError(f"{path}:{number}: found {found}, wanted a passage")
    return text
