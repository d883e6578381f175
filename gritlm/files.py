"""Files that are whole or absent: written under a temporary name, flushed to the disk, renamed."""

import errno
import glob
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DAY = 24 * 60 * 60  # seconds
NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # errors of a file system without fsync
NO_FSYNC_OF_FOLDERS = (*NO_FSYNC, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF)


def to_disk(path: Path) -> None:
    """Wait until a file or a folder's list of names outlasts a loss of power, if the file system can do that."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in (NO_FSYNC_OF_FOLDERS if path.is_dir() else NO_FSYNC):
            raise


def content_hash(path: Path) -> str:
    """A hash of a file's bytes. SHA-256: processors have instructions for it (2 GB/s), but none for BLAKE2."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_text(count: float) -> str:
    """Bytes for the screen."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def check_name(path: str | Path) -> None:
    """Refuse a name beyond ASCII where the locale is not UTF-8: libraries written in Rust or C++ look for another file.

    Raises:
        OSError: with `path` as its filename. Also where the name is not UTF-8 itself.
    """
    encoding = sys.getfilesystemencoding()
    try:
        str(path).encode("utf-8" if encoding == "utf-8" else "ascii")
    except UnicodeEncodeError as error:
        wanted = "a name in UTF-8"
        if encoding != "utf-8":
            wanted = f"ASCII, since the locale's encoding is {encoding}, or a UTF-8 locale (LC_ALL=C.UTF-8)"
        found = f"found the name {os.fsencode(path)!r}, wanted {wanted}"
        raise OSError(errno.EILSEQ, found, str(path)) from error


def publish(aside: Path, target: Path) -> None:
    """Give a file or a folder that was written aside its name, in the place of a file of that name if there is one."""
    for path in [aside, *aside.rglob("*")]:
        to_disk(path)
    os.replace(aside, target)
    to_disk(target.parent)


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` for a file or a folder. Renamed on success, removed on failure.

    A killed process leaves a hidden file, which is removed when the same target is written a day later.

    Raises:
        OSError: with `target` as its filename: no room, no permission.
    """
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        with suppress(FileNotFoundError):  # another process may take it away
            if time.time() - left.stat().st_mtime > DAY:
                _remove(left)
    try:
        yield aside
        publish(aside, target)
    except OSError as error:
        if error.filename is None or str(error.filename).startswith(str(aside)):
            raise OSError(error.errno, error.strerror or str(error), str(target)) from error
        raise
    finally:
        _remove(aside)


def write_text(target: Path, text: str, errors: str = "strict") -> None:
    """Write a file in UTF-8, whole or not at all."""
    with written_aside(target) as aside:
        aside.write_text(text, encoding="utf-8", errors=errors)


def write_json(path: Path, content: object) -> None:
    """Write a value as indented JSON, for a file of a folder that is written aside."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
