"""The memory-mapped form of a data file: named by the file's content, whole or absent, as private as the file."""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
from huggingface_hub.constants import HF_HOME
from tqdm import tqdm

from gritlm.data.folders import stem
from gritlm.data.parallel import in_order
from gritlm.data.rows import FORMAT_VERSION, SCHEMA, parse_block, read_blocks, unread_columns
from gritlm.errors import UserError
from gritlm.files import check_name, content_hash, write_text, written_aside

END_OF_STREAM = bytes.fromhex("ffffffff00000000")  # https://arrow.apache.org/docs/format/Columnar.html
LARGE_FILE = 16 << 20  # bytes; several processes read a larger file


def open_cache(cache: str | Path | None = None) -> Path:
    """The folder of the cached files, made for its owner alone if it does not exist.

    None: a folder in the cache of the datasets library. If that folder belongs to another user, one of this user's own
    beside it.

    Raises:
        UserError: it cannot be made.
    """
    beside = Path(os.environ.get("HF_DATASETS_CACHE", f"{HF_HOME}/datasets"))
    folder = Path(cache or beside / "gritlm").expanduser()
    check_name(folder)
    if not cache and folder.exists() and not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        folder = folder.with_name(f"gritlm-{os.geteuid()}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; see --data_cache") from error
    return folder


def cached_form(path: Path, folder: Path) -> Path:
    """The cached form of a file. The first call converts the file; later calls find the result.

    A hash of the file's bytes and FORMAT_VERSION name it. It is renamed when it is complete, so processes may race for
    it. Let one rank of each machine go first all the same: it saves the work. A user who may not read the file may not
    read its cached form either.

    Raises:
        UserError: the file or a row is bad, or the folder cannot be written.
    """
    check_name(path)
    target = _convert(path, folder)
    with suppress(pa.ArrowException, OSError):
        if _is_complete(target) and map_table(target).num_rows:
            return target
    target.unlink(missing_ok=True)  # damaged after it was written
    return _convert(path, folder)


def map_table(file: Path) -> pa.Table:
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_stream(source).read_all().replace_schema_metadata(None)


def _is_complete(target: Path) -> bool:
    """Whether an Arrow stream has its end mark. Arrow itself reads a stream cut off between batches without error."""
    with open(target, "rb") as stream:
        stream.seek(-len(END_OF_STREAM), os.SEEK_END)
        return stream.read() == END_OF_STREAM


def _convert(path: Path, folder: Path) -> Path:
    """The cached form of a file, written now if it is not there."""
    try:
        before, public = _state(path), _is_public(path)
        digest = _hash(path, before, folder)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    suffix = path.name.removeprefix(stem(path))
    reader = "" if public else f"|{os.geteuid()}"  # a private form, since other users could not read this one
    target = folder / f"{stem(path)}-{_short(f'{digest}|{suffix}|{FORMAT_VERSION}{reader}')}.arrow"
    if target.exists():
        return target
    try:
        with written_aside(target) as aside:
            os.close(os.open(aside, os.O_CREAT | os.O_WRONLY, 0o666 if public else 0o600))
            _write(path, aside)
            if _state(path)[:4] != before[:4]:  # a new link or other rights change the last one
                raise UserError(f"{path}: found a file that changed while it was read, wanted one that is complete")
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}; see --data_cache") from error
    return target


def _write(path: Path, aside: Path) -> None:
    processes = (os.cpu_count() or 1) if path.stat().st_size > LARGE_FILE else 1
    progress = tqdm(desc=f"reading {path.name}", unit=" rows", delay=2)
    with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer, progress:
        blocks = ((path, block) for block in read_blocks(path))
        for table in in_order(parse_block, blocks, processes):
            if columns := unread_columns(path):
                unread = pa.repeat(json.dumps(columns), len(table))
                table = table.set_column(SCHEMA.get_field_index("unread"), "unread", unread)
            writer.write_table(table, max_chunksize=1000)
            progress.update(len(table))


# ---- what names it


def _short(key: str) -> str:
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


def _state(path: Path) -> tuple[int, int, int, int, int]:
    """Device, inode, size and times of a file. Opening the file makes a network file system look again."""
    with open(path, "rb") as file:
        state = os.fstat(file.fileno())
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _hash(path: Path, state: tuple[int, ...], folder: Path) -> str:
    """The hash of a file's bytes, kept in the folder until the file changes.

    Size and modification time do not show each change: images, archives and git trees carry fixed times. The time at
    which the inode changed (ctime) does, since no program sets it. It is trusted if it has a fraction of a second, and
    if it is so old that a later change gets another one.
    """
    note, changed = folder / f".{_short(repr(state))}.sha256", state[-1]
    trusted = changed % 10**9 and time.time_ns() - changed > 2 * 10**9
    if trusted and note.exists():
        return note.read_text(encoding="ascii")
    digest = content_hash(path)
    if trusted:
        with suppress(OSError):
            write_text(note, digest)
    return digest


def _is_public(path: Path) -> bool:
    """Whether every user may read a file, and search the folders on the way to it."""
    real = path.resolve()
    return bool(real.stat().st_mode & 0o004) and all(folder.stat().st_mode & 0o001 for folder in real.parents)
