"""Checkpoints: each whole or absent. A checkpoint's checkpoint.json, written last, lists its files."""

import fnmatch
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from gritlm import __version__
from gritlm.distributed import ShardsUnsaved
from gritlm.errors import UserError, first_line
from gritlm.files import publish, size_text
from gritlm.models.base_files import MANIFEST, find_damaged_file
from gritlm.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from gritlm.report.run import WEIGHT_COPIES
from gritlm.training.arguments import fixed_flags

STAGING_FOLDER = ".unfinished"  # in the output folder: what is written there is renamed when it is whole
FORMAT = 2  # of run.json and checkpoint.json. Checkpoints of format 1 hold pickles, which are not read.
MODEL, OPTIMIZER, SCHEDULER = "model*.safetensors", "optimizer.safetensors", "scheduler.safetensors"
TRAINED = "trained.safetensors"  # with an adapter under FSDP2: all weights that are trained
TRAINED_WEIGHTS = "trained_weights.safetensors"  # with --ema_decay: the model folder holds the average
TEACHER_PROJECTION = "teacher_projection.safetensors"  # where --teacher_vectors has another width than the model

# Patterns of the files that a checkpoint of an engine must hold, beside those of every engine. {rank}: one for each.
ENGINE_FILES = {
    "ddp": (OPTIMIZER, SCHEDULER),
    "fsdp2": (
        *(f"{part}_0/{file}" for part in ("pytorch_model_fsdp", "optimizer") for file in (".metadata", "__*.distcp")),
        "scheduler.pt",
    ),
    **dict.fromkeys(
        ("zero1", "zero2", "zero3"),
        ("latest", "global_step*/*model_states.pt", "global_step*/*zero_pp_rank_{rank}_*optim_states.pt"),
    ),
}


def checkpoint_name(step: int) -> str:
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def random_state_file(rank: int | str) -> str:
    return f"rng_state_{rank}.safetensors"


def find_missing(files: Iterable[str], engine: str, ranks: int) -> str:
    """The first file that a checkpoint of this engine must hold and does not; empty where there is none."""
    patterns = (MODEL, "trainer_state.json", random_state_file("{rank}"), *ENGINE_FILES[engine])
    found = list(files)
    if ADAPTER_CONFIG in found:
        own = (TRAINED if pattern.startswith("pytorch_model_fsdp") else pattern for pattern in patterns[1:])
        patterns = (ADAPTER_WEIGHTS, *own)
    for pattern in patterns:
        for name in [pattern.format(rank=rank) for rank in range(ranks if "{rank}" in pattern else 1)]:
            if not fnmatch.filter(found, name):
                return name
    return ""


# ---- write


def stamp() -> dict[str, Any]:
    """The first entries of run.json and checkpoint.json: which version of this project wrote it."""
    return {"format": FORMAT, "version": __version__}


def publish_checkpoint(staged: Path, target: Path, header: dict[str, Any], served: list[str]) -> None:
    """List the files of a staged checkpoint, flush all to the disk, and rename the folder.

    Args:
        header: the engine, the ranks and the flags of the run.
        served: the files of the model folder in it, relative to it.
    Raises:
        UserError: a file that the engine needs is not there.
    """
    files = {str(path.relative_to(staged)): path.stat().st_size for path in staged.rglob("*") if path.is_file()}
    if missing := find_missing(files, header["engine"], header["ranks"]):
        raise UserError(f"{target}: {missing} is missing before the checkpoint is complete; nothing was published")
    manifest = stamp() | header | {"served": served, "files": dict(sorted(files.items()))}
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    if target.exists():  # a damaged one that the run has passed over
        remove_checkpoint(target)
    publish(staged, target)


def remove_checkpoint(path: Path) -> None:
    """Rename before deleting, so that no half-deleted checkpoint is ever visible."""
    gone = path.parent / STAGING_FOLDER / f"old-{path.name}"
    gone.parent.mkdir(exist_ok=True)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def rotate_checkpoints(run: Path, limit: int | None, best: int | None = None) -> None:
    """Remove the oldest checkpoints until `limit` are left. The newest stays, and that of the best step."""
    if limit is not None and limit > 0:
        found = [Path(path) for path in sort_checkpoints(str(run))]
        others = [path for path in found[:-1] if best is None or path.name != checkpoint_name(best)]
        for path in others[: max(len(found) - limit, 0)]:
            remove_checkpoint(path)


def weight_copies(run: Path) -> dict[int, Path]:
    """The weight-only copies in a run's folder by their steps, in order."""
    found = {path.name.removeprefix("step-"): path for path in (run / WEIGHT_COPIES).glob("step-*")}
    return {int(step): found[step] for step in sorted(filter(str.isdecimal, found), key=int)}


def keep_weights(model: Path, run: Path, step: int, count: int) -> None:
    """Copy a staged model folder to weights/step-N of the run, and keep the `count` newest copies.

    Called before the checkpoint is published: a run that is killed between the two removes the copy as it resumes.
    """
    if count:
        aside, target = model.parent / f"step-{step}", run / WEIGHT_COPIES / f"step-{step}"
        shutil.copytree(model, aside, copy_function=_link)
        target.parent.mkdir(exist_ok=True)
        publish(aside, target)
    for path in list(weight_copies(run).values())[: -count or None]:
        shutil.rmtree(path, ignore_errors=True)


def _link(source: str, target: str) -> None:
    """Needs no room until the checkpoint is removed."""
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def check_finite(weights: dict[str, torch.Tensor]) -> None:
    """Refuse to save weights that no run can resume from.

    Raises:
        UserError: naming the weight.
    """
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{name} is not finite any more: nothing was saved, the last checkpoint is as it was")


def explain_unsaved(error: BaseException, run: Path, name: str) -> None:
    """Raise a UserError where a checkpoint could not be written for want of room or rights."""
    if isinstance(error, ShardsUnsaved) and error.failures:  # rank -> (error, where)
        error = next(iter(error.failures.values()))[0]
    text = first_line(error)
    writing = any(sign in text for sign in ("PytorchStreamWriter", "inline_container", "file write", "os error"))
    if not writing and not isinstance(error, OSError | SafetensorError):
        return
    whole = sort_checkpoints(str(run))
    last = f"{Path(whole[-1]).name} is whole" if whole else "there is no checkpoint before it"
    free = size_text(shutil.disk_usage(run).free)
    raise UserError(
        f"{run / name} could not be written ({text}; {free} are free there); {last}: "
        "make room and start the same command again"
    ) from error


# ---- read


def read_manifest(checkpoint: str | Path) -> dict[str, Any]:
    return json.loads((Path(checkpoint) / MANIFEST).read_text(encoding="utf-8"))


def find_damage(checkpoint: str | Path) -> str:
    """What is wrong with a checkpoint folder, by its list of files; empty where it is whole."""
    folder = Path(checkpoint)
    if not (folder / MANIFEST).is_file():
        return f"found no {MANIFEST} there, wanted a whole checkpoint folder"
    try:
        manifest = read_manifest(folder)
        files, version = dict(manifest["files"]), manifest.get("format", 0)
        missing = find_missing(manifest["files"], manifest["engine"], manifest["ranks"]) if version == FORMAT else ""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({error})"
    if missing:
        return f"it holds no {missing}"
    return find_damaged_file(folder, files)


def why_not_resumable(checkpoint: str | Path, run_settings: dict[str, Any], engine: str | None, ranks: int) -> str:
    """Why a whole checkpoint is of another run, or of another engine; empty where this run can resume from it."""
    manifest = read_manifest(checkpoint)
    if manifest.get("format", 0) < FORMAT:
        return f"its format is {manifest.get('format', 0)}, wanted {FORMAT}{by_version(manifest)}; use that version"
    if problem := why_unreadable(manifest) or differing(manifest["flags"], run_settings):
        return f"it is of another run: {problem}{by_version(manifest)}"
    if engine and manifest["engine"] != engine:
        return f"it was written by the engine {manifest['engine']}, this run has {engine}; use that engine"
    if engine and engine.startswith("zero") and manifest["ranks"] != ranks:
        return (
            f"DeepSpeed wrote it on {manifest['ranks']} ranks and cannot resume it on {ranks}; "
            f"start {manifest['ranks']} ranks (plain DDP and FSDP2 resume on any number)"
        )
    return ""


def why_unreadable(stamped: dict[str, Any]) -> str:
    """Why this version cannot read a run.json or checkpoint.json; empty where it can."""
    found = stamped.get("format", 0)
    return f"found format {found}, wanted at most {FORMAT}" if found > FORMAT else ""


def by_version(stamped: dict[str, Any]) -> str:
    """Which version wrote it, where that is another one. Folders of 0.1.0 carry no version."""
    version = stamped.get("version", "0.1.0")
    return f" (written by gritlm {version}, this is {__version__})" if version != __version__ else ""


def differing(before: dict[str, Any], now: dict[str, Any], was: str = "was", is_: str = "now") -> str:
    """The flags in which two runs differ, in words; empty where there are none. A missing flag has its default."""
    defaults = json.loads(json.dumps(fixed_flags(), default=str))
    earlier = {name: before.get(name, defaults.get(name, now[name])) for name in now}
    names = [name for name in now if earlier[name] != now[name]]
    if not names:
        return ""
    more = f" (and {len(names) - 1} more: {', '.join(names[1:6])})" if names[1:] else ""
    return f"{names[0]} {was} {earlier[names[0]]!r}, {is_} {now[names[0]]!r}{more}"


def is_last(state: TrainerState) -> bool:
    """Whether a checkpoint has the run's last step: all steps are taken, or early stopping has ended it."""
    if state.global_step >= state.max_steps:
        return True
    saved = state.stateful_callbacks.get("EarlyStopping")
    counter, patience = "early_stopping_patience_counter", "early_stopping_patience"
    return bool(saved) and saved["attributes"][counter] >= saved["args"][patience]


def read_trainer_state(checkpoint: str | Path) -> TrainerState:
    return TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
