"""What a data file is, told by its first bytes, and its bytes decompressed.

Names do not tell: a clone without its large files holds pointers, a download may be an HTML page, and a workbook may be
named .csv. Such a file is refused by its kind, and never read as lines of text.
"""

import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from gritlm.errors import UserError, first_line

HEAD_BYTES = 4096  # of a file's content, which tell its kind
COMPRESSIONS = {  # kind -> the first bytes
    "gzip": rb"\x1f\x8b",
    "bz2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    "zstd": rb"\x28\xb5\x2f\xfd|\x50\x2a\x4d\x18",
    "xz": rb"\xfd7zXZ\x00|\x5d\x00\x00.{2}",
}
AS_ROWS = "write its rows as .jsonl or .parquet"
KINDS = (  # the first bytes (of the first kind that has them), kind, what to do
    (rb"PAR[1E][^ -~]", "parquet", "name it .parquet"),
    (rb"ARROW1\x00|FEA1\x00|\xff{4}.{2}\x00\x00", "arrow", "gritlm prepare reads it"),
    (rb"version https://git-lfs", "a Git LFS pointer in place of the data", "run git lfs pull in its folder"),
    (
        rb"(\.\./)*(\.git)?/annex/objects/",
        "a git-annex pointer in place of the data",
        "run git annex get in its folder",
    ),
    (rb"PK\x03\x04.*(\[Content_Types\]|docProps/|xl/)", "an Excel workbook (.xlsx)", "save it as CSV"),
    (rb"PK\x03\x04.*opendocument", "an OpenDocument file (.ods)", "save it as CSV"),
    (rb"PK\x03\x04.*(\.npy|data\.pkl)", "arrays of NumPy or PyTorch", AS_ROWS),
    (rb"PK(\x03\x04|\x05\x06|\x07\x08)", "a zip archive", "unzip it first"),
    (rb"7z\xbc\xaf|Rar!\x1a", "a 7z or rar archive", "unpack it first"),
    (rb".{257}ustar[\x00 ]", "a tar archive", "unpack it first (tar xf)"),
    (
        rb"\x04\x22\x4d\x18|\xff\x06\x00\x00sNaPpY|\x1f\x9d|LZIP\x01",
        "lz4, snappy, Z or lzip data",
        "decompress it first",
    ),
    (b"|".join(COMPRESSIONS.values()), "data that is compressed twice", "decompress it once"),
    (rb"\xd0\xcf\x11\xe0", "an Excel or Word file from before 2007 (.xls)", "save it as CSV"),
    (rb"\x80[\x02-\x05]", "a pickle of Python", AS_ROWS),
    (rb"SQLite format 3\x00|\x89HDF|\x93NUMPY|ORC[^ -~]|Obj\x01", "a database or arrays (SQLite, HDF5, ...)", AS_ROWS),
    (rb"%PDF-|\{\\rtf|\x89PNG|\xff\xd8\xff|GIF8[79]a", "a PDF, RTF or image file", AS_ROWS),
    (rb"(?i)\s*<(!doctype|html|head|body)\b", "an HTML page in place of the data", "download the file itself"),
    (rb"(?i)(404: |entry |file )?not found\s*\Z", "the text of a failed download", "download the file again"),
    (rb"\s*<\?xml", "an XML file", AS_ROWS),
    (rb"\x00{16}", "zero bytes, as of a download that broke off", "download the file again"),
    (rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff|(.\x00{3}){2}|(\x00{3}.){2}", "UTF-32 text", "save it as UTF-8"),
    (rb"\xff\xfe|\xfe\xff|([^\x00]\x00){3}|(\x00[^\x00]){3}", "UTF-16 text", "save it as UTF-8"),
)
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # characters that texts hardly have
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


class FileError(UserError):
    """A fault of a file as a whole, not of one row. Skipping bad rows does not mend it."""


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Raise what opening, reading or decompressing a file raises as a `FileError`."""
    try:
        yield
    except READ_ERRORS as error:
        raise FileError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or first_line(error)}") from error


def compression_of(path: Path) -> str:
    """A key of COMPRESSIONS, or "" for a file that is not compressed."""
    with open(path, "rb") as file:
        head = file.read(16)
    return next((name for name, start in COMPRESSIONS.items() if re.match(start, head, re.S)), "")


def kind_of(path: Path) -> str:
    """The kind of a file's decompressed content: "text", "parquet", "arrow", or that of a file that no reader takes.

    Raises:
        FileError: the file cannot be read.
    """
    return _kind(path)[0]


def open_stream(path: Path) -> BinaryIO:
    """Open a text file; gzip, bzip2, zstd and xz data is decompressed, whatever the file's name.

    Reading it may raise the errors of damaged data: read it within `file_errors`.

    Raises:
        FileError: the file cannot be read, or its first bytes are those of another kind of file.
    """
    _check(path, "text")
    with file_errors(path):
        return _decompressed(path)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a parquet file.

    Raises:
        FileError: the file cannot be read, or its first bytes are those of another kind of file.
    """
    _check(path, "parquet")
    with file_errors(path):
        return pq.ParquetFile(path)


def _check(path: Path, wanted: str) -> None:
    kind, advice = _kind(path)
    if kind != wanted:
        data = " data" if kind in ("parquet", "arrow") else ""
        raise FileError(f"{path}: found {kind}{data}, wanted {wanted}" + (f"; {advice}" if advice else ""))


def _kind(path: Path) -> tuple[str, str]:
    """The kind of a file's content, and what to do about it."""
    if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would be empty the second time
        raise FileError(f"{path}: found a pipe, socket or device, wanted a file")
    with file_errors(path), _decompressed(path) as stream:
        head = stream.read(HEAD_BYTES).removeprefix(b"\xef\xbb\xbf")
    binary = 20 * len(CONTROL.findall(head)) > len(head)
    default = ("binary data", AS_ROWS) if binary else ("text", "")
    found = next(((kind, advice) for start, kind, advice in KINDS if re.match(start, head, re.S)), default)
    if found[0] in ("parquet", "arrow") and compression_of(path):
        return f"compressed {found[0]} data", "decompress it first"
    return found


def _decompressed(path: Path) -> BinaryIO:
    compression = compression_of(path)
    if not compression:
        return open(path, "rb")
    if compression in ("bz2", "zstd"):  # bz2.open would end in silence where a second part is damaged
        return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(path), compression=compression), 1 << 16))
    stream: Any = (gzip.open if compression == "gzip" else lzma.open)(path, "rb")
    if compression == "xz":
        stream._buffer.raw._trailing_error = ()  # or it would do the same
    return cast(BinaryIO, stream)
