"""Killed anywhere, at any time, by a full disk too, a run goes on and ends with the same weights."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from helpers import DRIVER, run, train_flags
from processes import Ranks, as_main
from safetensors.torch import load_file

from gritlm.training.checkpoints import STAGING_FOLDER, find_damage
from gritlm.training.run_folder import RUN_FILE

pytestmark = pytest.mark.long

KILLS = 20


def start(rows, flags) -> Ranks:
    return Ranks(as_main, [str(DRIVER), str(rows), "slow", *flags], ranks=2)


def kill(process) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.kill(process.pid, signal.SIGKILL)


def whole(out) -> bool:
    return all(find_damage(path) == "" for path in out.glob("checkpoint-*"))


def same(one, other) -> bool:
    weights = [load_file(folder / "model.safetensors") for folder in (one, other)]
    return all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_killed_twenty_times(qwen3_dropout, data, tmp_path):
    rng = random.Random(0)
    options = {"max_steps": 40, "save_steps": 2, "save_total_limit": 2, "dataloader_num_workers": 2}
    undisturbed = train_flags(qwen3_dropout, data, tmp_path / "undisturbed", tmp_path / "cache", **options)
    assert run(DRIVER, tmp_path / "rows", "-", *undisturbed, ranks=2).returncode == 0

    kills, in_a_save, runs = 0, 0, 0
    while kills < KILLS:
        out, rows = tmp_path / f"run{runs}", tmp_path / f"rows{runs}"
        flags = train_flags(qwen3_dropout, data, out, tmp_path / "cache", **options)
        finished = False
        while not finished:
            size = os.path.getsize(f"{rows}.1") if os.path.exists(f"{rows}.1") else 0
            started = start(rows, flags)
            while started.running and (not os.path.exists(f"{rows}.1") or os.path.getsize(f"{rows}.1") == size):
                time.sleep(0.01)
            if kills < KILLS:
                time.sleep(rng.uniform(0, 2))
                if kills % 2:
                    while started.running and not (out / STAGING_FOLDER).exists():
                        pass
                    time.sleep(rng.uniform(0, 0.01))
            if kills < KILLS and started.running:
                in_a_save += (out / STAGING_FOLDER).exists()
                for process in started.running if kills % 4 < 2 else [rng.choice(started.running)]:
                    kill(process)
                kills += 1
            started.wait()
            # Not its exit code: a kill may have come when all was done.
            finished = (out / RUN_FILE).exists() and json.loads((out / RUN_FILE).read_text())["finished"]
            assert whole(out)
        assert same(out, tmp_path / "undisturbed"), f"run {runs}, after {kills} kills"
        runs += 1
    print(f"{kills} kills, {in_a_save} of them in a save, over {runs} runs")
    assert in_a_save >= 3


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk(qwen3_dropout, data, tmp_path, small_disk, ranks):
    options = {"max_steps": 6, "save_steps": 1, "save_total_limit": 9}
    whole_flags = train_flags(qwen3_dropout, data, tmp_path / "undisturbed", tmp_path / "cache", **options)
    assert run(DRIVER, tmp_path / "rows", "-", *whole_flags, ranks=ranks).returncode == 0
    flags = train_flags(qwen3_dropout, data, small_disk / "out", tmp_path / "cache", **options)
    failed = run(DRIVER, tmp_path / "rows", "fill:3", *flags, ranks=ranks)
    assert failed.returncode != 0
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("gritlm: error:")]
    checkpoints = sorted(path.name for path in (small_disk / "out").glob("checkpoint-*"))
    assert checkpoints and whole(small_disk / "out")
    assert "could not be written" in line
    assert f"{checkpoints[-1]} is whole: make room and start the same command again" in line
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    resumed = run("-m", "gritlm", "train", *flags, ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert f"{checkpoints[-1]}" in resumed.stdout
    assert same(small_disk / "out", tmp_path / "undisturbed")


def test_a_damaged_checkpoint_is_said_and_passed_over(qwen3_dropout, data, tmp_path):
    options = {"save_steps": 2, "save_total_limit": 9}
    flags = train_flags(qwen3_dropout, data, tmp_path / "out", tmp_path / "cache", **options)
    assert run(DRIVER, tmp_path / "rows", "kill:5", *flags).returncode != 0
    newest = tmp_path / "out" / "checkpoint-4"
    (newest / "optimizer.safetensors").write_bytes((newest / "optimizer.safetensors").read_bytes()[:100])
    shutil.copytree(newest, tmp_path / "cut")
    named = run("-m", "gritlm", "train", *flags, "--resume_from_checkpoint", tmp_path / "cut")
    assert named.returncode == 2
    assert f"--resume_from_checkpoint {tmp_path / 'cut'}: optimizer.safetensors is cut short: found 100" in named.stderr
    other = train_flags(qwen3_dropout, data, tmp_path / "other", tmp_path / "cache", **options, temperature=0.5)
    named = run("-m", "gritlm", "train", *other, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-2")
    assert named.returncode == 2
    assert "it is of another run: temperature was 0.02, now 0.5" in named.stderr
    resumed = run("-m", "gritlm", "train", *flags)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert f"{newest} cannot be used: optimizer.safetensors is cut short" in resumed.stdout
    assert f"resuming from {tmp_path / 'out' / 'checkpoint-2'}" in resumed.stdout


def test_ranks_that_were_not_started_alike(qwen3, data, tmp_path):
    """Another temperature on rank 1: a shell that tells the ranks apart stands in for a user's mistake."""
    flags = train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache")
    unlike = tmp_path / "unlike.py"
    unlike.write_text(
        "import os, sys\nfrom gritlm.training import train\nfrom gritlm.cli import run_verb\n"
        "sys.exit(run_verb(train.main, sys.argv[1:] + ['--temperature', '0.0' + str(2 + int(os.environ['RANK']))]))\n"
    )
    done = run(unlike, *flags, ranks=2)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("gritlm: error:")]
    assert line == "gritlm: error: the ranks were not started alike: temperature is 0.02, on rank 1 0.03"
