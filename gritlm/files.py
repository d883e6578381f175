"""Files that are whole or absent: written aside, brought to the disk, renamed."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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

    Raises:
        OSError: with `target` as its filename: no such folder, no room, no permission.
    """
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield aside
        publish(aside, target)
    except OSError as error:
        if error.filename is None or str(error.filename).startswith(str(aside)):
            raise OSError(error.errno, error.strerror or str(error), str(target)) from error
        raise
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
