"""The batches of an epoch from data workers; what a run says when a worker meets an error, dies, or cannot start."""

import multiprocessing.queues
import os
import sys
import traceback
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from gritlm.data.batches import Batch, BatchBuilder
from gritlm.errors import RankError, UserError, first_line, one_line


class StepSampler(BatchSampler):
    """The keys (epoch, step) of one epoch, one key a batch."""

    def __init__(self, steps: int):
        self.steps, self.epoch = steps, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer where it skips the first batches of a resumed epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list]:
        for step in range(self.steps):
            yield [(self.epoch, step)]


class StepLoader(DataLoader):
    """The batches of an epoch, step by step. The Trainer sets the epoch."""

    def __init__(self, builder: BatchBuilder, **options: Any):
        self.steps = StepSampler(len(builder))
        super().__init__(
            _Caught(builder),
            batch_sampler=self.steps,  # not sampler: on a resume, accelerate skips batches of this one
            collate_fn=itemgetter(0),  # a key is a batch
            # Without one each iterator would draw its seed from the global generator, and a resume makes one more.
            generator=torch.Generator(),
            worker_init_fn=_end_when_unsent,
            **options,
        )

    def set_epoch(self, epoch: int) -> None:
        self.steps.set_epoch(epoch)


class _Caught(Dataset):
    """A builder that returns an error in place of a batch. From a worker, torch would raise its traceback as a text."""

    def __init__(self, builder: BatchBuilder):
        self.builder = builder

    def __len__(self) -> int:
        return len(self.builder)

    def __getitem__(self, key: tuple[int, int]) -> Batch | Exception:
        try:
            return self.builder[key]
        except (UserError, OSError, MemoryError) as error:
            return error


def batch_or_error(item: Batch | Exception) -> Batch:
    """What a `StepLoader` gave. Raises the error that the batch met, as one of this rank alone."""
    if not isinstance(item, Exception):
        return item
    message = one_line(item)
    if isinstance(item, OSError) and item.filename is not None:
        message = f"{item.filename}: {item.strerror}"
    raise RankError(message) from item


def _end_when_unsent(worker: int) -> None:
    """End a worker that cannot send a batch, since the loader would wait for the batch for ever."""

    def end(error: BaseException, item: Any) -> None:
        print(f"data worker {worker}: a batch could not be sent: {error}", file=sys.stderr, flush=True)
        os._exit(1)

    setattr(multiprocessing.queues.Queue, "_on_queue_feeder_error", staticmethod(end))  # noqa: B010, a hook


LOST_WORKER = ("DataLoader worker (pid", "Pin memory thread", "Too many open files", "can't start new thread")
ADVICE = {  # a part of an error's text -> what to do
    "AF_UNIX path too long": "set TMPDIR to a shorter path",
    "open files": "raise the limit on open files (ulimit -n)",
    "signal: Killed": "the host may be out of memory",
    "exited unexpectedly": "the line above says why",
    "new thread": "raise the limit on processes (ulimit -u)",
    "temporarily unavailable": "raise the limit on processes (ulimit -u)",
    "allocate memory": "the host is out of memory",
}


def explain_workers(error: BaseException) -> str:
    """What has happened and what to do, where a data worker has died or could not start; empty for other errors."""
    text = first_line(error).rstrip(".")
    starting = isinstance(error, OSError) and any(
        frame.f_globals.get("__name__", "").startswith("multiprocessing.")
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
    if not starting and not text.startswith(LOST_WORKER):
        return ""
    advice = next((advice for part, advice in ADVICE.items() if part in text), "")
    if starting and not advice:
        advice = "it needs a /dev/shm with some room (docker run --shm-size 1g)"
    return f"{text}; {advice or 'its memory or the file system of its data failed'}, or --dataloader_num_workers 0"
