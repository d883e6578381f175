"""Texts of a file, one a row, for encoding and as a corpus."""

import itertools
from pathlib import Path

from gritlm.data.rows import decode, read_blocks
from gritlm.errors import UserError
from gritlm.models.text import titled


def read_texts(path: Path, may_be_empty: bool = True) -> list[str]:
    """Texts of a .jsonl, .jsonl.gz or .parquet file, one a row; blank lines are no rows.

    Raises:
        UserError: naming file and line.
    """
    texts = []
    for number, raw in itertools.chain.from_iterable(read_blocks(path, columns=("title", "text"))):
        row = decode(path, number, raw)
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            row = titled(row)
        if not isinstance(row, str):
            raise UserError(f'{path}:{number}: found no text, wanted a JSON string or an object with "text"')
        if row != row.encode(errors="replace").decode():
            raise UserError(f"{path}:{number}: found half of a surrogate pair, wanted valid Unicode")
        if not (may_be_empty or row.strip()):
            raise UserError(f"{path}:{number}: found an empty text, wanted a passage")
        texts.append(row)
    return texts
