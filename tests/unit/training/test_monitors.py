"""Means of the loss since the last log line, and the first step that is not finite."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from processes import ROOT, Ranks

from gritlm.errors import UserError
from gritlm.training.meters import SLURM_WARNING, LossMeter, SaveTimer
from gritlm.training.monitors import FiniteWatch, StopSignals, Watchdog, end_with_torchrun


def test_the_meter_gives_means_by_term_and_by_data_set():
    meter = LossMeter()
    for value, dataset in ((1.0, "nq"), (3.0, "nq"), (8.0, "squad")):
        meter.add({"info_nce": torch.tensor(value), "spread_out": torch.tensor(0.5)}, dataset)
    assert meter.read() == {"info_nce": 4.0, "spread_out": 0.5, "loss/nq": 2.5, "loss/squad": 8.5}
    assert meter.read() == {}, "it starts anew"
    for count, dataset in ((6, "nq"), (2, "squad"), (4, "nq"), (0, None)):
        meter.add_left_out({"margins": torch.tensor(count)}, 2, dataset)
    assert meter.read() == {"left_out/margins": 1.5, "left_out/margins/nq": 2.5, "left_out/margins/squad": 1.0}


@pytest.mark.parametrize("eager", [True, False])
def test_the_first_step_that_is_not_finite_is_named(eager):
    watch = FiniteWatch(torch.device("cpu"))
    watch.eager = False
    for step, loss in enumerate((1.0, float("nan"), float("nan")), start=1):
        watch.loss(step, torch.tensor(loss), "nq", [f"nq:{step}"])
        watch.gradient_norm(step, torch.tensor(loss))
    with pytest.raises(UserError, match="step 2: the loss is nan; data set nq, rows nq:2"):
        watch.check()
    healthy = FiniteWatch(torch.device("cpu"))
    healthy.eager = eager
    healthy.loss(1, torch.tensor(1.0), "nq", ["nq:1"])
    healthy.gradient_norm(1, torch.tensor(2.0))
    healthy.check()


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_stops_a_run_unless_nohup_is_above(ignored):
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        signals = StopSignals()
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received == (0 if ignored else signal.SIGHUP)
        signals.end()
        os.kill(os.getpid(), signal.SIGHUP)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _rank(folder: Path) -> None:
    end_with_torchrun(0.05)
    time.sleep(20)
    (folder / "lived on").touch()


def _torchrun(folder: Path) -> None:
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "RANK": "3"}
    rank = multiprocessing.get_context("fork").Process(target=_rank, args=(folder,))
    rank.start()
    (folder / "pid").write_text(str(rank.pid))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_ends_when_torchrun_was_killed(tmp_path):
    Ranks(_torchrun, tmp_path).wait()
    rank = int((tmp_path / "pid").read_text())
    while psutil.pid_exists(rank) and psutil.Process(rank).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.02)
    assert not (tmp_path / "lived on").exists()


def wait_while_another_saves(folder: Path) -> None:
    watchdog = Watchdog(1.5)
    watchdog.start()
    watchdog.mark("step 1, saving", growing=folder)
    while not (folder / "done").exists():
        time.sleep(0.05)
    watchdog.end()
    print("went on")


@pytest.mark.long
def test_a_save_that_grows_is_no_hang(tmp_path):
    """As the ranks that wait see it. Control: one that stands still."""
    folders = tmp_path / "grows", tmp_path / "stands still"
    for folder in folders:
        (folder / "checkpoint-1").mkdir(parents=True)
    waiting = [Ranks(wait_while_another_saves, folder) for folder in folders]
    with open(folders[0] / "checkpoint-1" / "model.safetensors", "wb", buffering=0) as out:
        for _ in range(40):
            out.write(bytes(1000))
            time.sleep(0.1)
    (folders[0] / "done").touch()
    grows, stands_still = (process.wait() for process in waiting)
    assert (grows.returncode, grows.stdout) == (0, "went on\n"), grows.stderr
    assert stands_still.returncode == 1
    assert "(--hang_timeout): rank 0 is at step 1, saving" in stands_still.stderr


def time_a_save(warning: float) -> None:
    timer = SaveTimer(warning)
    for event in (timer.on_step_begin, timer.on_step_end, timer.on_save, timer.on_step_end, timer.on_save):
        event(None, None, None)


def test_a_first_save_that_slurm_leaves_no_time_for(monkeypatch, logged):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    time_a_save(SLURM_WARNING)
    assert not logged.messages
    time_a_save(0.0)
    line = "the first save took 0 s; SLURM warns 0 s before the time limit: submit with --signal=USR1@300"
    assert logged.messages == [line]
    monkeypatch.delenv("SLURM_JOB_ID")
    time_a_save(0.0)
    assert logged.messages == [line]


def test_the_launch_script_asks_slurm_for_that_warning():
    script = (ROOT / "scripts" / "training" / "train_embonly.sh").read_text(encoding="utf-8")
    assert f"#SBATCH --signal=USR1@{SLURM_WARNING:.0f}\n" in script
