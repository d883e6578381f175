"""Signals to the launch script of a real run: what saves, what ends at once, and that nothing of it stays."""

import os
import pty
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from helpers import ROOT, write_jsonl

pytestmark = pytest.mark.long

BASH = shutil.which("bash3.2") or shutil.which("bash4.2") or "bash"


@pytest.fixture
def command(qwen3, tmp_path, monkeypatch) -> list[str]:
    write_jsonl(tmp_path / "pairs.jsonl", rows=40, negatives=2, seed=0)
    settings = {
        "MODEL_NAME_OR_PATH": qwen3,
        "TRAIN_DATA": "pairs.jsonl",
        "OUTPUT_DIR": "out",
        "GPUS": "none",
        "GLOBAL_BATCH_SIZE": 8,
        "QUERY_MAX_LEN": 32,
        "PASSAGE_MAX_LEN": 48,
        "MAX_STEPS": 100_000,
        "HF_HUB_OFFLINE": 1,
        "OMP_NUM_THREADS": 1,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    script = str(ROOT / "scripts" / "training" / "train_embonly.sh")
    return [BASH, script, "--save_steps", "0.9", "--dataloader_num_workers", "1", "--logging_steps", "5"]


def until(condition, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)


def of_the_run(folder: Path) -> list[psutil.Process]:
    """The processes of a run in this folder: launch script, torchrun, ranks, data workers."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(folder):
                found.append(process)
        except psutil.Error:
            pass
    return [process for process in found if process.pid != os.getpid()]


def is_training(folder: Path) -> bool:
    return (folder / "out" / "checkpoint-1").is_dir()


def checkpoints(folder: Path) -> int:
    return len(list((folder / "out").glob("checkpoint-*")))


def test_a_closed_terminal_saves(command, tmp_path):
    """A terminal of its own is closed, with the progress bar on it. Afterwards every write to it fails."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvp(command[0], [*command, "--disable_tqdm", "False"])

    def trains() -> bool:
        if select.select([terminal], [], [], 0)[0]:
            os.read(terminal, 1 << 16)
        return is_training(tmp_path)

    until(trains, 120, "the first checkpoint")
    os.close(terminal)
    os.waitpid(child, 0)
    until(lambda: not of_the_run(tmp_path), 20, "the end")
    assert checkpoints(tmp_path) == 2
    assert '"finished": false' in (tmp_path / "out" / "run.json").read_text()


def test_ctrl_c_under_nohup_ends_it(command, tmp_path):
    """In the background of a script, under nohup: SIGINT and SIGHUP are ignored at its start."""
    script = 'nohup "$@" > log 2>&1 & echo $!; wait $!; echo code $?'
    run = subprocess.Popen(
        ["bash", "-c", script, "bash", *command], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    until(lambda: is_training(tmp_path), 120, "the first checkpoint")
    launcher = psutil.Process(int(run.stdout.readline()))
    for process in (launcher, *launcher.children()):
        process.send_signal(signal.SIGHUP)
    time.sleep(3)
    assert launcher.is_running(), "control: nohup has turned SIGHUP off"
    assert checkpoints(tmp_path) == 1
    for process in (launcher, *launcher.children()):  # what a terminal does
        process.send_signal(signal.SIGINT)
    assert run.communicate(timeout=20)[0] == "code 130\n"
    until(lambda: not of_the_run(tmp_path), 5, "the end")
    assert checkpoints(tmp_path) == 1, "it does not save"


@pytest.mark.parametrize("killed", ["the launch script", "torchrun"])
def test_nothing_outlives_a_kill(command, tmp_path, killed):
    with open("log", "w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log)
    until(lambda: is_training(tmp_path), 120, "the first checkpoint")
    (torchrun,) = psutil.Process(run.pid).children()
    ranks = {process.pid for process in torchrun.children()}
    seen = {process.pid for process in of_the_run(tmp_path)}
    assert seen >= {run.pid, torchrun.pid, *ranks}, "control: what stays would be seen"
    os.kill(run.pid if killed == "the launch script" else torchrun.pid, signal.SIGKILL)
    # The launch script may stay a zombie: nobody has waited for it.
    until(lambda: not of_the_run(tmp_path), 15, "the end of what was left")
    run.wait()
