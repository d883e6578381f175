"""What watches over a run: signals that ask it to stop, ranks that hang, numbers that are not finite."""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections import Counter

import torch
from torch import Tensor
from transformers import TrainerCallback

from gritlm.distributed import gather_objects, rank, shared_store, world_size
from gritlm.errors import UserError

NEVER = 2**62


class StopSignals:
    """Notes SIGUSR1, and SIGTERM where no torchrun stands above: save, then stop.

    Under torchrun a SIGTERM says that another rank has died, and nothing can be saved together any more; the scripts
    turn a SIGTERM to the whole run into SIGUSR1.
    """

    def __init__(self):
        self.received = 0
        signal.signal(signal.SIGUSR1, self._note)
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGTERM, self._note)

    def end(self) -> None:
        """From here on the run ends anyway: a signal that is repeated must not cut it short."""
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _note(self, number: int, frame) -> None:
        self.received = number


class FiniteWatch:
    """Finds the first step whose loss or gradient is NaN or inf, without waiting for the device at each step."""

    def __init__(self, device: torch.device):
        self.eager = device.type == "cpu"  # where looking costs nothing
        self.first_bad = torch.full((), NEVER, dtype=torch.int64, device=device)
        self.steps: dict[int, tuple[Tensor, str, list[str]]] = {}

    def loss(self, step: int, loss: Tensor, dataset: str, rows: list[str]) -> None:
        self.steps[step] = (loss, dataset, rows)

    def gradient_norm(self, step: int, norm: Tensor | float) -> None:
        """The norm is that of the global gradient: a loss that is not finite on one rank shows in it on all."""
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
    """Ends the run when nothing has moved for long, and says which rank stands where.

    Every rank passes the same sequence of marks; the one that has passed fewest is the one that the others wait for.
    """

    def __init__(self, seconds: float):
        super().__init__(daemon=True, name="watchdog")
        self.seconds = seconds
        self.store = shared_store()
        self.marks, self.where, self.since = 0, "start", time.monotonic()
        self._moved, self._ended = threading.Event(), False

    def mark(self, where: str) -> None:
        """This rank begins something else: `where` names the step, the part of it and its batch."""
        self.marks, self.where, self.since = self.marks + 1, where, time.monotonic()
        self._moved.set()

    def end(self) -> None:
        self._ended = True
        self._moved.set()
        self.join(timeout=10)  # no thread may still speak to the store when the process ends

    def run(self) -> None:
        while not self._ended:
            self._moved.wait(self.seconds / 4)
            self._moved.clear()
            if self.store:
                self.store.set(f"gritlm/marks/{rank()}", json.dumps([self.marks, self.where]))
            standing = time.monotonic() - self.since
            if standing > self.seconds:
                self._report(standing)

    def _report(self, standing: float) -> None:
        time.sleep(self.seconds / 5)  # the others' latest marks
        if time.monotonic() - self.since < self.seconds:
            return
        places = [[self.marks, self.where]]
        if self.store:
            keys = [f"gritlm/marks/{other}" for other in range(world_size())]
            places = [json.loads(self.store.get(key)) for key in keys]
        fewest = min(marks for marks, _ in places)
        behind = [number for number, (marks, _) in enumerate(places) if marks == fewest]
        ahead = [number for number in range(len(places)) if number not in behind]
        if rank() in behind or rank() == ahead[0]:
            stand = "; ".join(f"rank {number} stands at {places[number][1]}" for number in behind[:4])
            more = f" and {len(behind) - 4} ranks more" if len(behind) > 4 else ""
            wait = ", the others wait for it" if ahead else ""
            print(
                f"gritlm: error: no progress for {standing:.0f} s (--hang_timeout): {stand}{more}{wait}",
                f"(said by rank {rank()})",
                file=sys.stderr,
            )
        if rank() in behind:
            faulthandler.dump_traceback()
        sys.stderr.flush()
        os._exit(1)


class StepTimer(TrainerCallback):
    """Where a step's time goes. On CUDA it records events and waits for the device only when read."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, object]] = []

    def mark(self, name: str) -> None:
        """The part `name` ends now; it began at the previous mark."""
        if self.cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.marks.append((name, moment))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.mark("optimizer")

    def read(self) -> Counter:
        """Seconds per part since the last read."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds: Counter = Counter()
        for (_, before), (name, after) in zip(self.marks, self.marks[1:], strict=False):
            seconds[name] += before.elapsed_time(after) / 1000 if self.cuda else after - before
        self.marks = self.marks[-1:]
        return seconds
