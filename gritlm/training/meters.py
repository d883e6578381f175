"""What a run measures as it trains: the time of each part, the loss by term and data set, how long a save takes."""

import math
import os
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from gritlm.distributed import all_reduce_sum
from gritlm.training.run_log import log

SLURM_WARNING = 300.0  # seconds before a job's time limit; the --signal of scripts/training/train_embonly.sh


class StepTimer(TrainerCallback):
    """Seconds of each part of a step. On CUDA it records events, and waits for the device only when it is read."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []  # the name of the part that ended, and when

    def mark(self, name: str) -> None:
        """The part `name` ends now. It began at the previous mark."""
        moment: Any
        if self.cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.marks.append((name, moment))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.mark("optimizer")

    def read(self) -> Counter[str]:
        """Seconds per part since the last read."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds: Counter[str] = Counter()
        for (_, before), (name, after) in zip(self.marks, self.marks[1:], strict=False):
            seconds[name] += before.elapsed_time(after) / 1000 if self.cuda else after - before
        self.marks = self.marks[-1:]
        return seconds


class SaveTimer(TrainerCallback):
    """Under SLURM, compares the first save with the time that a job is left between SLURM's signal and its end.

    SLURM does not tell a job which --signal it was submitted with.
    """

    def __init__(self, warning: float = SLURM_WARNING):
        self.evaluation = 0.0
        self.warning: float | None = warning if os.environ.get("SLURM_JOB_ID") else None

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.step_ended = time.monotonic()

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.step_ended = time.monotonic()
        self.evaluation = metrics["eval_seconds"]

    def on_save(self, args, state, control, **kwargs):
        save = time.monotonic() - self.step_ended + self.evaluation  # the signal may come as an evaluation begins
        needed = save + 2 * (self.step_ended - self.step_began)
        if self.warning is not None and needed > self.warning:
            log.warning(
                "the first save%s took %.0f s; SLURM warns %.0f s before the time limit: submit with --signal=USR1@%d",
                " and an evaluation" if self.evaluation else "",
                save,
                self.warning,
                300 * math.ceil(2 * needed / 300),
            )
        self.warning = None


class LossMeter:
    """Means of each loss term, and of the loss by data set, since the last read. Sums stay on the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps: Counter[str] = Counter()

    def add(self, terms: dict[str, Tensor], dataset: str) -> None:
        """Add this rank's share of one step's terms."""
        for name, share in {**terms, f"loss/{dataset}": torch.stack(list(terms.values())).sum()}.items():
            self.sums[name] = self.sums.get(name, 0.0) + share.detach()
            self.steps[name] += 1

    def add_left_out(self, counts: dict[str, Tensor], queries: int, dataset: str | None = None) -> None:
        """Add how many candidates of this rank's queries each rule left out, also under the data set where it is given.

        Args:
            queries: of the global batch.
        """
        for rule, count in counts.items():
            for name in (f"left_out/{rule}", *([f"left_out/{rule}/{dataset}"] if dataset else [])):
                self.sums[name] = self.sums.get(name, 0.0) + count.float() / queries
                self.steps[name] += 1

    def read(self) -> dict[str, float]:
        """Means over the steps since the last read, of the global batch. All ranks must call it."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        totals = all_reduce_sum(torch.stack([self.sums[name] for name in names])).tolist()
        means = {name: total / self.steps[name] for name, total in zip(names, totals, strict=True)}
        self.sums, self.steps = {}, Counter()
        return means
