"""What a run says: log lines with time stamps on the first rank, and the same figures in OUTPUT_DIR/log.jsonl."""

import json
import logging
import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

LOG_FILE = "log.jsonl"
log = logging.getLogger("gritlm")

# In a log line these have a place of their own, or none.
SHOWN_APART = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "epoch", "real_token_share"}
SHOWN_APART |= {"peak_memory_gb"}


class _Handler(logging.Handler):
    """Prints to stdout without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def is_a_terminal() -> bool:
    return sys.stderr.isatty()


def set_up_logging(first_rank: bool) -> None:
    """Log INFO on the first rank, warnings on the others."""
    handler = _Handler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO if first_rank else logging.WARNING)


Kind = tuple[str, ...]  # of a log entry: the metrics of an evaluation, or the loss


def kind_of(entry: dict[str, Any]) -> Kind:
    """The kind of an entry. Entries that are neither of a step nor of an evaluation have none."""
    if "loss" in entry:
        return ("loss",)
    return tuple(sorted(name for name in entry if name.startswith("eval_")))


def last_logged_steps(folder: str | Path) -> dict[Kind, int]:
    """The last step of each kind of entry in log.jsonl. A line that a kill has cut short is passed over.

    A resumed run takes some steps again, with the same numbers. They are not reported a second time.
    """
    try:
        lines = (Path(folder) / LOG_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    steps: dict[Kind, int] = {}
    for line in lines:
        with suppress(ValueError):
            entry = json.loads(line)
            kind = kind_of(entry)
            steps[kind] = max(steps.get(kind, -1), entry["step"])
    return steps


def is_new(logs: dict[str, Any], step: int, last_logged: dict[Kind, int]) -> bool:
    """Whether an entry has not been reported before. `last_logged` is from `last_logged_steps` at the start."""
    kind = kind_of(logs)
    return not kind or step > last_logged.get(kind, -1)


class RunLog(TrainerCallback):
    """One readable line and one JSON object for each entry that the Trainer logs; first rank only.

    log.jsonl has the Trainer's keys, the step and the time. A resumed run appends what is new.
    """

    def __init__(self, folder: str | Path):
        self.path, self.last_logged = Path(folder) / LOG_FILE, last_logged_steps(folder)

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero and self.path.is_file():
            text = self.path.read_bytes()
            if not text.endswith(b"\n"):  # cut short
                os.truncate(self.path, text.rfind(b"\n") + 1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        entry = {"step": state.global_step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **logs}
        if is_new(logs, state.global_step, self.last_logged):
            with open(self.path, "a", encoding="utf-8") as out:
                out.write(json.dumps(entry) + "\n")
        if "loss" in logs:
            log.info(self._line(logs, state))

    def _line(self, logs: dict[str, float], state) -> str:
        terms = {name: value for name, value in logs.items() if name not in SHOWN_APART and "/" not in name}
        parts = [f"step {state.global_step}/{state.max_steps}", f"loss {logs['loss']:.4f}"]
        parts += [f"{name} {value:.4f}" for name, value in terms.items()] if len(terms) > 1 else []
        parts += [f"lr {logs.get('learning_rate', 0.0):.2e}", f"grad_norm {logs.get('grad_norm', 0.0):.3f}"]
        if "tokens_per_second" in logs:
            parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
        done = state.global_step - self.first_step
        if done:
            left = (time.monotonic() - self.began) / done * (state.max_steps - state.global_step)
            parts.append(f"left {timedelta(seconds=round(left))}")
        return "  ".join(parts)


class ProgressBar(ProgressCallback):
    """Hugging Face's progress bar without its log lines."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass
