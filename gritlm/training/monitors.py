"""What watches a run: signals that stop it, ranks that hang, numbers that are not finite, time and loss by part."""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from gritlm.distributed import all_reduce_sum, gather_objects, rank, shared_store, world_size
from gritlm.errors import UserError

NEVER = 2**62


class StopSignals:
    """Notes SIGUSR1, and SIGTERM where no torchrun is above: save, then stop.

    Under torchrun a SIGTERM means that another rank has died, and the ranks can save nothing together any more. The
    scripts turn a SIGTERM to the whole run into SIGUSR1.
    """

    def __init__(self) -> None:
        self.received = 0
        signal.signal(signal.SIGUSR1, self._note)
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGTERM, self._note)

    def end(self) -> None:
        """Ignore SIGUSR1 from here on: the run ends anyway, and a repeated signal must not cut it short."""
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number


class FiniteWatch:
    """Finds the first step whose loss or gradient is NaN or inf, without waiting for the device at each step."""

    def __init__(self, device: torch.device):
        self.eager = device.type == "cpu"  # reading a number costs nothing there
        self.first_bad = torch.full((), NEVER, dtype=torch.int64, device=device)
        self.steps: dict[int, tuple[Tensor, str, list[str]]] = {}

    def loss(self, step: int, loss: Tensor, dataset: str, rows: list[str]) -> None:
        self.steps[step] = (loss, dataset, rows)

    def gradient_norm(self, step: int, norm: Tensor | float) -> None:
        """Note the norm of the global gradient. A loss that is not finite on one rank shows in it on all ranks."""
        norm = torch.as_tensor(norm, device=self.first_bad.device)
        bad = ~torch.isfinite(norm) | (norm < 0)  # DeepSpeed reports -1
        self.first_bad = torch.where(bad, self.first_bad.clamp(max=step), self.first_bad)
        if self.eager:
            self.check()

    def check(self) -> None:
        """All ranks must call it.

        Raises:
            UserError: naming the step, the data set and the rows of the rank where it began.
        """
        first = int(self.first_bad)
        if first == NEVER:
            self.steps.clear()
            return
        loss, dataset, rows = self.steps[first]
        everyone = gather_objects((loss.item(), dataset, rows))
        bad = [entry for entry in everyone if not abs(entry[0]) < float("inf")]
        value, dataset, rows = (bad or everyone)[0]
        what = f"the loss is {value}" if bad else "the gradient is not finite"
        more = f", ... ({len(rows)} in all)" if len(rows) > 8 else ""
        raise UserError(f"step {first}: {what}; data set {dataset}, rows {', '.join(rows[:8])}{more}")


class Watchdog(threading.Thread):
    """Ends the run when no rank has moved for long, and names the rank that the others wait for.

    Every rank passes the same sequence of marks. The rank that has passed the fewest keeps the others waiting.
    """

    def __init__(self, seconds: float):
        super().__init__(daemon=True, name="watchdog")
        self.seconds = seconds
        self.store = shared_store()
        self.marks, self.where, self.since = 0, "start", time.monotonic()
        self._moved, self._ended = threading.Event(), False

    def mark(self, where: str) -> None:
        """This rank begins another part. `where` names the step, its part and its batch."""
        self.marks, self.where, self.since = self.marks + 1, where, time.monotonic()
        self._moved.set()

    def end(self) -> None:
        self._ended = True
        self._moved.set()
        self.join(timeout=10)  # no thread may still use the store when the process ends

    def run(self) -> None:
        while not self._ended:
            self._moved.wait(self.seconds / 4)
            self._moved.clear()
            if self.store:
                self.store.set(f"gritlm/marks/{rank()}", json.dumps([self.marks, self.where]))
            waited = time.monotonic() - self.since
            if waited > self.seconds:
                self._report(waited)

    def _report(self, waited: float) -> None:
        time.sleep(self.seconds / 5)  # the others' latest marks
        if time.monotonic() - self.since < self.seconds:
            return
        places: list[Any] = [[self.marks, self.where]]
        if self.store:
            keys = [f"gritlm/marks/{other}" for other in range(world_size())]
            places = [json.loads(self.store.get(key)) for key in keys]
        fewest = min(marks for marks, _ in places)
        behind = [number for number, (marks, _) in enumerate(places) if marks == fewest]
        ahead = [number for number in range(len(places)) if number not in behind]
        if rank() in behind or rank() == ahead[0]:
            named = "; ".join(f"rank {number} is at {places[number][1]}" for number in behind[:4])
            more = f" and {len(behind) - 4} ranks more" if len(behind) > 4 else ""
            wait = ", the others wait for it" if ahead else ""
            print(
                f"gritlm: error: no progress for {waited:.0f} s (--hang_timeout): {named}{more}{wait}",
                f"(reported by rank {rank()})",
                file=sys.stderr,
            )
        if rank() in behind:
            faulthandler.dump_traceback()
        sys.stderr.flush()
        os._exit(1)


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

    def read(self) -> dict[str, float]:
        """Means over the steps since the last read, of the global batch. All ranks must call it."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        totals = all_reduce_sum(torch.stack([self.sums[name] for name in names])).tolist()
        means = {name: total / self.steps[name] for name, total in zip(names, totals, strict=True)}
        self.sums, self.steps = {}, Counter()
        return means
