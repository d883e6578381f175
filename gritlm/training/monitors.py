"""What may end a run early: signals, ranks that hang, numbers that are not finite, a torchrun that was killed."""

import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from gritlm.cli import end_at_once
from gritlm.distributed import gather_objects, rank, shared_store, world_size
from gritlm.errors import UserError

NEVER = 2**62


class StopSignals:
    """Notes SIGUSR1, SIGHUP (a closed terminal), and SIGTERM where no torchrun is above: save, then stop.

    Under torchrun a SIGTERM means that another rank has died, and the ranks can save nothing together any more. The
    scripts turn a SIGTERM to the whole run into SIGUSR1. A SIGHUP that nohup has turned off stays off.
    """

    def __init__(self) -> None:
        self.received = 0
        self.numbers = [signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self.numbers.append(signal.SIGHUP)
        if not under_torchrun():
            self.numbers.append(signal.SIGTERM)
        for number in self.numbers:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.numbers)  # node.py holds SIGUSR1 back until now

    def end(self) -> None:
        """Ignore the signals from here on: the run ends anyway, and a repeated signal must not cut it short."""
        for number in self.numbers:
            signal.signal(number, signal.SIG_IGN)

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
        bad = [entry for entry in everyone if not math.isfinite(entry[0])]
        value, dataset, rows = (bad or everyone)[0]
        what = f"the loss is {value}" if bad else "the gradient is not finite"
        more = f", ... ({len(rows)} in all)" if len(rows) > 8 else ""
        raise UserError(f"step {first}: {what}; data set {dataset}, rows {', '.join(rows[:8])}{more}")


class Watchdog(threading.Thread):
    """Ends the run when no rank has moved for long, and names the rank that the others wait for.

    Every rank passes the same sequence of marks. The rank that has passed the fewest keeps the others waiting. While a
    checkpoint is written, a change in its folder counts as progress of every rank.

    Args:
        seconds: without progress; 0: nothing is watched.
    """

    def __init__(self, seconds: float):
        super().__init__(daemon=True, name="watchdog")
        self.seconds, self.store = seconds, shared_store() if seconds else None
        self.marks, self.where, self.since = 0, "start", time.monotonic()
        self.growing: Path | None = None
        self._moved, self._ended = threading.Event(), False

    def start(self) -> None:
        if self.seconds:
            super().start()
            # Its own thread: one that asks a dead file system may wait for ever.
            threading.Thread(target=self._watch_folder, daemon=True, name="watchdog-folder").start()

    def mark(self, where: str, growing: Path | None = None) -> None:
        """This rank begins another part; `growing` is the folder that the part writes."""
        self.marks, self.where, self.since, self.growing = self.marks + 1, where, time.monotonic(), growing
        self._moved.set()

    def alive(self) -> None:
        """This rank makes progress within its part."""
        self.since = time.monotonic()

    def _watch_folder(self) -> None:
        seen: tuple[Path | None, Any] = None, None
        while not self._ended:
            time.sleep(self.seconds / 4)
            folder = self.growing
            found = folder, folder and fingerprint(folder)
            if folder and folder is self.growing and found != seen:
                self.since = time.monotonic()
            seen = found

    def end(self) -> None:
        self._ended = True
        self._moved.set()
        if self.is_alive():
            self.join(timeout=10)  # no thread may still use the store when the process ends

    def run(self) -> None:
        while not self._ended:
            self._moved.wait(self.seconds / 4)
            self._moved.clear()
            if self.store:
                try:
                    self.store.set(f"gritlm/marks/{rank()}", json.dumps([self.marks, self.where]))
                except RuntimeError:  # its host is gone; this rank still watches itself
                    self.store = None
            waited = time.monotonic() - self.since
            if waited > self.seconds:
                self._report(waited)

    def _report(self, waited: float) -> None:
        time.sleep(self.seconds / 5)  # the others' latest marks
        if time.monotonic() - self.since < self.seconds:
            return
        places: dict[int, Any] = {rank(): [self.marks, self.where]}
        if self.store:
            with suppress(RuntimeError):  # its host is gone, or a rank has never said anything
                for other in range(world_size()):
                    places[other] = json.loads(self.store.get(f"gritlm/marks/{other}"))
        fewest = min(marks for marks, _ in places.values())
        behind = [number for number, (marks, _) in sorted(places.items()) if marks == fewest]
        ahead = [number for number in sorted(places) if number not in behind]
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


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def end_with_torchrun(seconds: float = 2.0) -> None:
    """Watch, from a thread, whether torchrun lives. Its ranks end when it has been killed: nobody would end them."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        end_at_once(f"rank {os.environ['RANK']}: torchrun was killed; this rank ends")

    if under_torchrun():
        threading.Thread(target=watch, daemon=True, name="torchrun").start()


def fingerprint(folder: Path) -> list[tuple[str, int, int, int]]:
    """Name, size, blocks and time of each file in a folder. One of them changes while the system writes a file."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                stat = os.stat(path := os.path.join(parent, name))
                found.append((path, stat.st_size, stat.st_blocks, stat.st_mtime_ns))
    return sorted(found)
