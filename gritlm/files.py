"""Files that are whole or absent: written aside, brought to the disk, renamed."""

import glob
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DAY = 24 * 60 * 60  # seconds


def to_disk(path: Path) -> None:
    """Wait until a file or a folder's list of names would outlast a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(aside: Path, target: Path) -> None:
    """Give a file or a folder that was written aside its name, in the place of a file of that name if there is one."""
    for path in [aside, *aside.rglob("*")]:
        to_disk(path)
    os.replace(aside, target)
    to_disk(target.parent)


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A path beside `target` to write a file or a folder at: published at the end, or nothing is left of it.

    What a killed process leaves there is hidden, and goes when the same target is written a day later.

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


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
