"""One folder, one run: a lock file that a living run holds, and that a dead run does not leave in force.

The file names the run's process, and the run rewrites it every few seconds. A file lock of the operating system does
not reach over every network file system.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from gritlm.cli import end_at_once
from gritlm.errors import RankError
from gritlm.training.run_log import log

LOCK_FILE = ".lock"
BEAT = 5.0  # seconds between two signs of life
WATCHED_BEATS = 3  # signs of life that a run on another machine may miss before it counts as dead


def machine() -> str:
    """This machine as its processes see it: the host, since it was started, and the container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def this_run() -> dict[str, Any]:
    """What a lock file holds."""
    return {
        "token": uuid.uuid4().hex,
        "machine": machine(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "beats": 0,
    }


@contextmanager
def locked(folder: Path, beat: float = BEAT) -> Iterator[None]:
    """Hold a folder's lock while the block runs.

    Raises:
        RankError: a living run holds it, or it is no folder.
    """
    path, own, new = folder / LOCK_FILE, this_run(), not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise RankError(f"--output_dir {folder}: found no folder, wanted a folder or a new name") from error
    _acquire(path, own, beat)
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(path, own, beat, ended), daemon=True, name="run lock")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if _read(path).get("token") == own["token"]:
            path.unlink(missing_ok=True)
        if new:
            with suppress(OSError):  # it holds a run
                folder.rmdir()


def _acquire(path: Path, own: dict[str, Any], beat: float) -> None:
    while not _create(path, own):
        found = _read(path)
        if _is_alive(path, found, own, beat):
            host, pid = found["machine"].split()[0], found["pid"]
            job = f", SLURM job {found['job']}" if found["job"] else ""
            raise RankError(
                f"--output_dir {path.parent}: a running process writes there (host {host}, pid {pid}{job}); "
                "stop it, or name another folder"
            )
        log.info("%s: the run that held it has ended; this run takes it over", path)
        _remove(path, found, own["token"])


def _create(path: Path, own: dict[str, Any]) -> bool:
    """Write the lock file, whole, if there is none."""
    aside = _write_aside(path, own)
    try:
        os.link(aside, path)  # unlike a rename, it fails where the name is taken
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with open(path, "x", encoding="utf-8") as out:
                out.write(json.dumps(own))
        except FileExistsError:
            return False
    finally:
        aside.unlink(missing_ok=True)
    return True


def _write_aside(path: Path, own: dict[str, Any]) -> Path:
    aside = path.with_name(f"{LOCK_FILE}.{own['token']}.part")
    aside.write_text(json.dumps(own), encoding="utf-8")
    return aside


def _remove(path: Path, judged: dict[str, Any], token: str) -> None:
    """Remove a dead run's lock file, and not the one that another process may have put in its place."""
    aside = path.with_name(f"{LOCK_FILE}.{token}.part")
    with suppress(FileNotFoundError):
        os.rename(path, aside)
        if _read(aside).get("token") != judged.get("token"):
            os.rename(aside, path)
        aside.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """The lock file's entries; empty where it is absent or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _is_alive(path: Path, found: dict[str, Any], own: dict[str, Any], beat: float) -> bool:
    if not found.keys() >= own.keys():
        return False
    if found["machine"] == own["machine"]:
        with suppress(psutil.Error):
            process = psutil.Process(found["pid"])
            same = abs(process.create_time() - found["started"]) < 1
            return same and process.status() != psutil.STATUS_ZOMBIE
        return False
    if found["job"] and found["job"] == own["job"] and found["restarts"] != own["restarts"]:
        return False  # SLURM ends a job before it starts it again
    log.info("%s: host %s holds it; waiting for a sign of life", path, found["machine"].split()[0])
    for _ in range(2 * WATCHED_BEATS):
        time.sleep(beat / 2)
        now = _read(path)  # opened anew each time: a network file system then asks its server
        if now and now != found:
            return True
    return False


def _beat(path: Path, own: dict[str, Any], beat: float, ended: threading.Event) -> None:
    while not ended.wait(beat):
        found = _read(path)
        if found and found.get("token") != own["token"]:
            host = found.get("machine", "?").split()[0]
            end_at_once(f"{path}: a run on host {host} has taken the folder over; this run ends", 2)
        own["beats"] += 1
        # A full disk or a share that is away for a moment ends no run.
        with suppress(OSError):
            os.replace(_write_aside(path, own), path)
