"""A folder's lock: held by a living run, taken over from a dead one, on this machine and on another."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from processes import Ranks

from gritlm.errors import RankError
from gritlm.training.run_lock import LOCK_FILE, locked, this_run

BEAT = 0.05


def hold(folder: Path, seconds: float) -> None:
    """What a run in another process does."""
    with locked(folder, BEAT):
        (folder / "held").touch()
        time.sleep(seconds)


def holder(folder: Path) -> Ranks:
    started = Ranks(hold, folder, 60)
    while not (folder / "held").exists():
        time.sleep(0.01)
    return started


def lock_of_another(folder: Path, **entries) -> None:
    (folder / LOCK_FILE).write_text(json.dumps(this_run() | {"machine": "faraway 1 2", "pid": 7} | entries))


def test_the_run_of_another_process(tmp_path):
    started = holder(tmp_path)
    (process,) = started.running
    refused = pytest.raises(RankError, match=rf"a running process writes there \(host .*, pid {process.pid}\)")
    with refused, locked(tmp_path, BEAT):
        pass
    os.kill(process.pid, signal.SIGKILL)
    started.wait()
    assert (tmp_path / LOCK_FILE).exists()
    with locked(tmp_path, BEAT):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_process_that_was_killed_and_is_not_yet_waited_for(tmp_path):
    """Its number is still taken, as that of a process that has ended under a container's first process."""
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    lock = {**this_run(), "pid": child, "started": time.time()}
    (tmp_path / LOCK_FILE).write_text(json.dumps(lock))
    with pytest.raises(RankError), locked(tmp_path, BEAT):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    with locked(tmp_path, BEAT):
        pass
    os.waitpid(child, 0)


def test_another_process_under_the_same_number(tmp_path):
    lock = {**this_run(), "started": this_run()["started"] - 100}
    (tmp_path / LOCK_FILE).write_text(json.dumps(lock))
    with locked(tmp_path, BEAT):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["token"] != lock["token"]


def test_a_living_run_of_another_machine(tmp_path):
    """It is known by its signs of life. Without them, it is dead."""
    lock_of_another(tmp_path)
    ended = threading.Event()

    def live() -> None:
        beats = 0
        while not ended.wait(BEAT):
            beats += 1
            lock_of_another(tmp_path, beats=beats, token="theirs")

    thread = threading.Thread(target=live)
    thread.start()
    with pytest.raises(RankError, match="host faraway, pid 7"), locked(tmp_path, BEAT):
        pass
    ended.set()
    thread.join()
    with locked(tmp_path, BEAT):
        pass


def test_a_job_that_slurm_has_started_again_takes_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    lock_of_another(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with locked(tmp_path, beat=1000):  # so long a beat: it watched nothing
        pass
    lock_of_another(tmp_path, job="42")
    with pytest.raises(TimeoutError):  # the control: another job's lock is watched
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError()))
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with locked(tmp_path, beat=1000):
            pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_a_damaged_lock_is_taken_over(tmp_path, text):
    (tmp_path / LOCK_FILE).write_text(text)
    with locked(tmp_path, BEAT):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    refused = pytest.raises(RankError, match=r"file: found no folder, wanted a folder or a new name")
    with refused, locked(tmp_path / "file", BEAT):
        pass


def test_a_refused_run_leaves_no_new_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a" / "new", BEAT):
        raise ZeroDivisionError
    assert not (tmp_path / "a" / "new").exists()


def test_a_run_whose_folder_was_taken_over_ends(tmp_path):
    started = holder(tmp_path)
    lock_of_another(tmp_path)
    done = started.wait()
    assert done.returncode == 2
    assert "a run on host faraway has taken the folder over; this run ends" in done.stderr
