"""Read files of named columns row by row: .csv, .tsv, .jsonl and .parquet, gzip too."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from gritlm.data.folders import SUFFIXES
from gritlm.data.raw import BadRows
from gritlm.data.rows import decode, read_blocks
from gritlm.errors import UserError

ENDINGS = (*SUFFIXES, ".csv", ".csv.gz", ".tsv", ".tsv.gz")

csv.field_size_limit(1 << 30)


def read_rows(path: Path, bad: BadRows, no_header: bool = False) -> Iterator[tuple[str, dict]]:
    name = path.name.removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        yield from _separated(path, "\t" if name.endswith(".tsv") else ",", bad, no_header)
        return
    for block in read_blocks(path, columns=None):
        for number, raw in block:
            try:
                row = decode(path, number, raw)
                if not isinstance(row, dict):
                    found = json.dumps(row)[:60]
                    raise UserError(f"{path}:{number}: found {found}, wanted an object with named fields")
            except UserError as error:
                bad.add(error)
            else:
                yield f"{path}:{number}", row


def _separated(path: Path, separator: str, bad: BadRows, no_header: bool) -> Iterator[tuple[str, dict]]:
    opener = gzip.open if path.name.endswith(".gz") else open
    # In tab-separated files a quotation mark is a plain character.
    quoting: Literal[0, 3] = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, delimiter=separator, quoting=quoting, strict=separator == ",")
        header: list[str] | None = None
        line = 1  # the first line of the row: a quoted field may span several lines
        try:
            for values in reader:
                where, line = f"{path}:{line}", reader.line_num + 1
                try:
                    "".join(values).encode()
                except UnicodeEncodeError as error:
                    byte = ord(error.object[error.start]) - 0xDC00  # how surrogateescape encodes a byte
                    not_utf8 = UserError(f"{where}: found byte 0x{byte:02X}, wanted UTF-8 text")
                    if header is None:
                        raise not_utf8 from error
                    bad.add(not_utf8)
                    continue
                if header is None:
                    header = ["query", "positive", "negative"][: len(values)] if no_header else values
                    if len(header) < 2 or len(header) < len(values):
                        wanted = "2 or 3 (--no_header)" if no_header else "at least 2"
                        raise UserError(f"{path}:1: found {len(values)} columns, wanted {wanted}")
                    if twice := sorted({name for name in header if header.count(name) > 1}):
                        raise UserError(f"{path}:1: found the column {twice[0]!r} twice, wanted it once")
                    if not no_header:
                        continue
                if not values:
                    continue
                if len(values) != len(header):
                    bad.add(UserError(f"{where}: found {len(values)} columns, wanted {len(header)} as in line 1"))
                    continue
                yield where, dict(zip(header, values, strict=True))
        except (csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
            kind = "tab" if separator == "\t" else "comma"
            raise UserError(f"{path}:{line}: found {error}, wanted {kind}-separated UTF-8 text") from error
