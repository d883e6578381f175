"""Read the texts of a file, one per row: what to encode, or a corpus."""

import itertools
from pathlib import Path

from gritlm.data.rows import decode, read_blocks
from gritlm.errors import UserError
from gritlm.models.text import titled


def read_texts(path: Path, may_be_empty: bool = True) -> list[str]:
    """Read a .jsonl, .jsonl.gz or .parquet file. A row is a text or has a column "text", to which "title" is prepended.

    Raises:
        UserError: a row has no text; the message names file and line.
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
