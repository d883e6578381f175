"""Read the rows of a file: separated text, JSON lines, a JSON array or parquet, compressed too.

The first bytes tell what the file is (`gritlm.data.containers`), its ending tells how a text file is written, and the
first lines tell what separates the columns.
"""

import csv
import io
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from gritlm.data.containers import FileError, file_errors, kind_of, open_stream
from gritlm.data.folders import SUFFIXES
from gritlm.data.labels import normal
from gritlm.data.raw import BadRows
from gritlm.data.roles import POSITIVE, QUERY
from gritlm.data.rows import decode, read_blocks
from gritlm.errors import UserError
from gritlm.strict_json import parse_json

ENDINGS = (*SUFFIXES, ".csv", ".csv.gz", ".tsv", ".tsv.gz")  # of a file that may be one of many in a folder
SEPARATED = (".csv", ".tsv", ".tab", ".txt")
TABLES = (*SEPARATED, ".jsonl", ".ndjson", ".json", ".parquet")
SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe"}
COMPRESSED = re.compile(r"\.(gz|bz2|zst|xz)$", re.I)
SEP_LINE = re.compile(r"sep=(.)\s*", re.I)  # of Excel, before the header
QUOTED_LINES = 1000  # at most, of one quoted field
ARRAY_BYTES = 1 << 30  # at most, of one JSON array: it is decoded as a whole

csv.field_size_limit(1 << 30)


def ending(path: Path) -> str:
    """The ending of a file in lower case, without that of its compression."""
    return Path(COMPRESSED.sub("", path.name)).suffix.lower()


def read_rows(path: Path, bad: BadRows, no_header: bool = False) -> Iterator[tuple[str, object]]:
    """Yield file:line and the row: an object of named columns, or what else a line of JSON holds.

    Raises:
        UserError: the file cannot be read, or a row is bad and bad rows are not skipped.
    """
    if (kind := kind_of(path)) == "parquet":
        for block in read_blocks(path, columns=None):
            yield from ((f"{path}:{number}", row) for number, row in block)
    elif ending(path) in SEPARATED:
        yield from _separated(path, bad, no_header)
    elif kind == "text" and ending(path) not in TABLES:
        raise FileError(f"{path}: found another ending, wanted one of {', '.join(TABLES)}")
    else:
        yield from _json(path, bad)


def objects(rows: Iterable[tuple[str, object]], bad: BadRows) -> Iterator[tuple[str, dict]]:
    """The rows that are objects of named columns; any other is bad."""
    for where, row in rows:
        if isinstance(row, dict):
            yield where, row
        else:
            found = json.dumps(row, ensure_ascii=False)[:60]
            bad.add(UserError(f"{where}: found {found}, wanted an object with named fields"))


# ---- JSON


def _json(path: Path, bad: BadRows) -> Iterator[tuple[str, object]]:
    with file_errors(path), open_stream(path) as stream:
        lines = ((number, line) for number, line in enumerate(stream, start=1) if not line.isspace())
        first = [(number, line.removeprefix(b"\xef\xbb\xbf")) for number, line in islice(lines, 1)]
        if not first:
            raise FileError(f"{path}: found no row, wanted at least one")
        second = [*islice(lines, 1)]
        if first[0][1].lstrip()[:1] in (b"[", b"{"):
            whole = _whole(path, first[0][1], alone=not second)
            if whole is not None:
                yield from ((f"{path}: item {number}", row) for number, row in enumerate(whole, start=1))
                return
        for number, line in chain(first, second, lines):
            try:
                row = decode(path, number, line)
            except UserError as error:
                bad.add(error)
            else:
                yield f"{path}:{number}", row


def _whole(path: Path, first: bytes, alone: bool) -> list | None:
    """The items of a file that is one JSON value; None for a file of one value a line."""
    array = first.lstrip().startswith(b"[")
    try:
        value = parse_json(first.decode())
    except (ValueError, RecursionError):
        if first.strip() != b"{" and ending(path) != ".json" and not (array and first.rstrip()[-1:] != b"]"):
            return None  # one bad line
    else:
        return value if alone and array and any(isinstance(item, dict | list) for item in value) else None
    with open_stream(path) as stream:
        text = stream.read(ARRAY_BYTES + 1)
    if len(text) > ARRAY_BYTES:
        raise FileError(f"{path}: found one JSON value of more than 1 GB, wanted one object a line (jq -c '.[]')")
    try:
        value = parse_json(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if not array:
            return None
        raise FileError(f"{path}: found {error} in one JSON array, wanted one object a line") from error
    if isinstance(value, dict) and {"queries", "corpus", "relevant_docs"} <= value.keys():  # LlamaIndex
        return [value]
    if isinstance(value, list):
        return value
    keys = ", ".join(map(str, value))[:100]
    found = f"one JSON object over several lines, with the keys {keys}"
    raise FileError(f"{path}: found {found}; wanted one object a line (jq -c '.NAME[]' FILE > FILE.jsonl)")


# ---- separated text


def _separated(path: Path, bad: BadRows, no_header: bool) -> Iterator[tuple[str, dict]]:
    with file_errors(path), open_stream(path) as stream:
        lines = _Lines(io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=""))
        if not lines.window:
            return
        separator = _separator(path, [*islice(lines.window, 20)])
        if SEP_LINE.fullmatch(lines.window[0]):
            lines.drop(1)
        header: list[str] | None = None
        while lines.window:
            where = f"{path}:{lines.number + 1}"
            try:
                values = lines.next_row(separator, len(header) if header else 0, where)
            except UserError as error:
                if header is None:
                    raise FileError(str(error)) from error
                bad.add(error)
                continue
            if not values:
                continue
            if header is None:
                header = _header(where, values, no_header)
                if not no_header:
                    continue
            if values == header:
                bad.add(UserError(f"{where}: found the header again, wanted a row"))
            elif len(values) == len(header):
                yield where, dict(zip(header, values, strict=True))
            else:
                bad.add(UserError(f"{where}: found {len(values)} columns, wanted {len(header)} as in line 1"))


def _header(where: str, values: list[str], no_header: bool) -> list[str]:
    if no_header:
        if len(values) not in (2, 3):
            raise FileError(f"{where}: found {len(values)} columns, wanted 2 or 3 (--no_header)")
        names = ["query", "positive", "negative"][: len(values)]
        if len({normal(value) for value in values} & {*QUERY, *POSITIVE, *names, "neg", "negatives"}) > 1:
            raise FileError(f"{where}: found the column names {', '.join(values)}, wanted a row (--no_header)")
        return names
    names = [value.strip() or f"column {number}" for number, value in enumerate(values, start=1)]
    if len(names) < 2:
        raise FileError(f"{where}: found 1 column, wanted at least 2, separated by comma, tab, semicolon or pipe")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise FileError(f"{where}: found the column {twice[0]!r} twice, wanted it once; --no_header if it is no name")
    return names


def _separator(path: Path, sample: list[str]) -> str:
    """What separates the columns: of what the first line has, what gives the first lines one number of columns."""
    if named := SEP_LINE.fullmatch(sample[0]):
        return named[1]
    tabs = all("\t" in line for line in sample if not line.isspace())  # no text has one in each line
    own = "," if ending(path) == ".csv" and not tabs else "\t"
    found = sorted((mark for mark in SEPARATORS if mark in sample[0]), key=lambda mark: mark != own)
    for mark in found:
        widths = {len(row) for row in csv.reader(sample[:-1] or sample, delimiter=mark, skipinitialspace=True) if row}
        if len(widths) == 1 and widths != {1}:
            return mark
    return max(found, key=lambda mark: (mark == own, sample[0].count(mark)), default=own)


class _Lines:
    """The lines of a file, by rows. A broken quote costs one row: the next one begins at the next line."""

    def __init__(self, stream: Iterable[str]):
        self._stream = iter(stream)
        self.window = deque(islice(self._stream, QUOTED_LINES))  # lines that are still to come
        self.number = 0  # of lines taken
        self._broken = 0  # lines still to come of a quoted field that is broken

    def drop(self, count: int) -> None:
        for _ in range(count):
            self.window.popleft()
        self.window.extend(islice(self._stream, count))
        self.number += count
        self._broken = max(0, self._broken - count)

    def next_row(self, separator: str, width: int, where: str) -> list[str]:
        """The values of the next row, which may span several lines; [] for a blank line.

        Args:
            width: the number of columns, 0 if it is not known.
        Raises:
            UserError: the row is bad.
        """
        line, used = self.window[0].removeprefix("\ufeff"), 1  # the mark of a file that was put behind another one
        plain = line.rstrip("\r\n")
        try:
            if not line.isascii():
                line.encode()
            if '"' not in line and f"{separator} " not in line:
                return plain.split(separator) if plain else []
            reader = csv.reader(
                chain([line], islice(self.window, 1, None)), delimiter=separator, strict=True, skipinitialspace=True
            )
            try:
                values = next(reader)
                self._check_quoted(values, line, reader.line_num, separator)
                used = reader.line_num
            except csv.Error:
                self._broken = max(self._broken, reader.line_num + 1)
                values = _plain_quotes(plain, separator)
                if not values or len(values) != (width or len(values)):
                    raise
            return values
        except csv.Error as error:
            kind = SEPARATORS.get(separator, repr(separator))
            raise UserError(f"{where}: found {error}, wanted {kind}-separated UTF-8 text") from error
        except UnicodeEncodeError as error:
            byte = ord(error.object[error.start]) - 0xDC00  # how surrogateescape encodes a byte
            raise UserError(f"{where}: found byte 0x{byte:02X}, wanted UTF-8 text") from error
        finally:
            self.drop(used)

    def _check_quoted(self, values: list[str], line: str, count: int, separator: str) -> None:
        if self._broken and line.count('"') % 2:
            raise csv.Error("one end of a quoted field")
        if count > 1:
            "".join(islice(self.window, count)).encode()
            if separator == "\t" and any({"\t", "\n"} <= {*value} for value in values):
                raise csv.Error("a tab and a line break between two quotation marks")


def _plain_quotes(line: str, separator: str) -> list[str]:
    """The values of a line whose quotation marks are plain characters, or have backslashes; [] for neither."""
    if separator == "\t":
        return line.split("\t")
    if '\\"' not in line:
        return []
    return next(csv.reader([line], delimiter=separator, doublequote=False, escapechar="\\", strict=True))
