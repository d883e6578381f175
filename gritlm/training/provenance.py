"""What run.json records of a start, so that the run can be repeated: command, flags, versions, machine."""

import os
import platform
import shlex
import subprocess
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gritlm import __version__
from gritlm.data.records import RecordSet
from gritlm.devices import device_name
from gritlm.models.tokenizer import TextTokenizer
from gritlm.training.arguments import RunArguments
from gritlm.training.checkpoints import differing
from gritlm.training.environment import recorded_environment
from gritlm.training.flag_parser import PATHS
from gritlm.training.inherited_flags import REFUSED
from gritlm.training.set_settings import lengths_of
from gritlm.training.setup import show_examples

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "numpy", "deepspeed", "peft", "bitsandbytes")
OF_THE_DATA = ("data", "num_samples", "order of the rows, version")


def resolved_flags(run: RunArguments) -> dict[str, Any]:
    """Every flag of the run by name, as `gritlm train run.json` reads it: with the base's settings, paths absolute."""
    settled = vars(run.model) | vars(run.data)
    parsed = {name: value for name, value in run.command.parsed.items() if name not in REFUSED}
    flags = {name: settled.get(name) if value is None else value for name, value in parsed.items()}
    flags["projection"] = flags["projection"] or 0  # else the base would decide again
    for name in PATHS:
        path: Any = flags.get(name) or ""
        if isinstance(path, list):
            flags[name] = [os.path.abspath(part) for part in path]
        elif path and (name == "output_dir" or Path(path).exists()):
            flags[name] = os.path.abspath(path)
    return flags


def describe_start(run: RunArguments, records: list[RecordSet], text_tokenizer: TextTokenizer) -> dict[str, Any]:
    """The command, the given flags, ranks, versions, the first rank's machine and environment, and the data."""
    args, lengths = run.training, lengths_of(run, [r.name for r in records])
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(["gritlm", "train", *run.command.words]),
        "folder": os.getcwd(),
        "given": run.command.given,
        "ranks": args.world_size,
        "versions": versions(),
        "host": platform.node(),
        "system": platform.platform(),
        "device": device_name(str(args.device)),
        "environment": recorded_environment(),
        "data sets": [{"name": r.name, "rows": len(r), "fingerprint": r.fingerprint()} for r in records],
        "examples": show_examples(text_tokenizer, records, lengths),
    }


def versions() -> dict[str, str]:
    found = {"gritlm": __version__, "python": platform.python_version()}
    if commit := git_commit(Path(__file__).parents[2]):
        found["gritlm commit"] = commit
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_commit(folder: Path) -> str:
    """The commit of the repository at a folder, with -dirty where files differ from it; empty if there is none."""
    if not (folder / ".git").exists():
        return ""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def unlike(run: RunArguments, run_settings: dict[str, Any]) -> list[str]:
    """Differences between a run and that of the run.json it was started from, except those that a flag asked for."""
    before = run.command.repeats
    if not before:
        return []
    words, lines = run.command.words, []
    own = {name: run_settings[name] for name in OF_THE_DATA if name in run_settings}
    asked = any(word.startswith(("--train_data", "--train-data", "--num_samples", "--num-samples")) for word in words)
    if not asked and (difference := differing(before["flags"], own)):
        lines.append(f"{words[0]}: this is not the same run: {difference}")
    starts, now = before.get("starts") or [{}], run.training.world_size
    ranks = (starts[0] | starts[-1]).get("ranks")
    if ranks != now:
        lines.append(f"{words[0]}: that run had {ranks} ranks, this one has {now}; its sums are rounded differently")
    return lines
