"""Data workers: what they need of the system, and how a run ends when one is lost."""

import os
import re
import resource
import signal
import tempfile

import pytest
import torch
from helpers import make_builder, train_flags
from processes import Ranks, as_main

from gritlm.data.batches import Batch, BatchBuilder
from gritlm.data.loader import StepLoader, batch_or_error, explain_workers
from gritlm.errors import RankError, UserError


@pytest.fixture
def builder(qwen3, data, tmp_path) -> BatchBuilder:
    return make_builder(qwen3, data / "hard.jsonl", tmp_path)


def numbers(batch: Batch) -> list:
    tensors = [value for part in (*batch.chunks, vars(batch.contrastive)) for value in part.values()]
    return [value.tolist() for value in tensors if isinstance(value, torch.Tensor)]


def in_cramped_quarters(builder: BatchBuilder, folder: str, by_value: bool) -> None:
    """Few open files, and a TMPDIR that is longer than a socket's name may be."""
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 30, opened + 30))
    if not by_value:
        del Batch.__reduce__
    got = [batch_or_error(batch) for batch in StepLoader(builder, num_workers=1)]
    assert [numbers(batch) for batch in got] == [numbers(builder[0, step]) for step in range(len(builder))]


@pytest.mark.parametrize("by_value", [True, False], ids=["", "control: tensors as shared memory"])
def test_a_worker_needs_no_socket_and_few_files(builder, tmp_path, by_value):
    folder = tmp_path / ("x" * 60) / ("y" * 60)
    folder.mkdir(parents=True)
    done = Ranks(in_cramped_quarters, builder, str(folder), by_value).wait()
    assert (done.returncode == 0) == by_value, done.stderr[-3000:]
    assert by_value or "data worker 0: a batch could not be sent: " in done.stderr


def too_few_files(builder: BatchBuilder) -> None:
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 3, opened + 3))
    try:
        next(iter(StepLoader(builder, num_workers=2)))
    except OSError as error:
        print(explain_workers(error))


def test_a_worker_that_cannot_start(builder):
    done = Ranks(too_few_files, builder).wait()
    line = "[Errno 24] Too many open files; raise the limit on open files (ulimit -n), or --dataloader_num_workers 0\n"
    assert done.stdout == line, done.stderr[-3000:]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_the_error_itself(builder, workers, monkeypatch):
    def wrong(self: BatchBuilder, key: tuple[int, int]) -> Batch:
        raise [UserError("d.jsonl:3: found no query"), OSError(5, "Input/output error", "/data/d")][key[1]]

    monkeypatch.setattr(BatchBuilder, "__getitem__", wrong)
    items = iter(StepLoader(builder, num_workers=workers))
    for message in ("d.jsonl:3: found no query", "/data/d: Input/output error"):
        with pytest.raises(RankError, match=f"^{message}$"):
            batch_or_error(next(items))


def lose_a_worker(*command: str) -> None:
    """The worker of the second rank is killed as it builds its third batch."""
    build = BatchBuilder.__getitem__

    def killed(self: BatchBuilder, key: tuple[int, int]) -> Batch:
        if (self.rank, key[1]) == (1, 2):
            os.kill(os.getpid(), signal.SIGKILL)
        return build(self, key)

    BatchBuilder.__getitem__ = killed
    as_main(list(command))


def test_a_killed_worker_ends_all_ranks(qwen3, data, tmp_path):
    flags = train_flags(qwen3, data, tmp_path / "out", tmp_path / "cache", dataloader_num_workers=1)
    done = Ranks(lose_a_worker, "-m", "gritlm", "train", *flags, ranks=2).wait()
    errors = "\n".join(line for line in done.stderr.splitlines() if line.startswith("gritlm: error: "))
    assert re.search(r"error: step \d, rank 1: DataLoader worker \(pid.*, or --dataloader_num_workers 0$", errors, re.M)
    assert re.search(r"error: step \d: another rank has ended, its own message says why$", errors, re.M)
    assert len(errors.splitlines()) == 2
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
