"""The output folder: whose run it holds, and its checkpoints, each whole or absent.

run.json says which flags and data the run has; a checkpoint's own checkpoint.json, written last, lists its files.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from gritlm.distributed import ShardsUnsaved
from gritlm.errors import UserError
from gritlm.files import publish
from gritlm.training.arguments import EmbeddingTrainingArguments

MANIFEST = "checkpoint.json"
STAGING_FOLDER = ".unfinished"  # where a checkpoint is written before it is renamed


def engine_of(args: EmbeddingTrainingArguments) -> str:
    """Which engine's checkpoints a run writes and reads: "ddp" (one process included), "fsdp2" or "zero1/2/3"."""
    if args.deepspeed:
        return f"zero{args.hf_deepspeed_config.config['zero_optimization']['stage']}"
    return "fsdp2" if args.fsdp else "ddp"


def publish_checkpoint(aside: Path, target: Path, header: dict, served: list[str]) -> None:
    """List the files of a checkpoint that was written aside, bring all to the disk, and rename the folder."""
    files = {str(path.relative_to(aside)): path.stat().st_size for path in aside.rglob("*") if path.is_file()}
    manifest = header | {"served": served, "files": dict(sorted(files.items()))}
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    if target.exists():  # it was damaged, and passed over
        remove_checkpoint(target)
    publish(aside, target)


def remove_checkpoint(path: Path) -> None:
    """Out of sight first, so that a checkpoint is never seen half gone."""
    gone = path.parent / STAGING_FOLDER / f"old-{path.name}"
    gone.parent.mkdir(exist_ok=True)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def rotate_checkpoints(run: Path, limit: int | None) -> None:
    """Remove the oldest checkpoints, so that at most `limit` are left, and at least one."""
    if limit is not None and limit > 0:
        for path in sort_checkpoints(str(run))[:-limit]:
            remove_checkpoint(Path(path))


def read_manifest(checkpoint: str | Path) -> dict:
    return json.loads((Path(checkpoint) / MANIFEST).read_text())


def find_damage(checkpoint: str | Path) -> str:
    """What is wrong with a checkpoint folder, by its own list of files; empty where it is whole."""
    folder = Path(checkpoint)
    if not (folder / MANIFEST).is_file():
        return f"found no {MANIFEST} there, wanted a whole checkpoint folder"
    try:
        files = read_manifest(folder)["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({error})"
    for name, size in files:
        if not (folder / name).is_file():
            return f"{name} is missing"
        found = (folder / name).stat().st_size
        if found != size:
            return f"{name} is cut short: found {found} bytes, wanted {size}"
    return ""


def why_not_resumable(checkpoint: str | Path, run_settings: dict, engine: str | None, ranks: int) -> str:
    """Why a whole checkpoint is not one of this run's, or not for this engine; empty where it is."""
    manifest = read_manifest(checkpoint)
    difference = differing(manifest["flags"], run_settings)
    if difference:
        return f"it is of another run: {difference}"
    if engine and manifest["engine"] != engine:
        return f"it was written by the engine {manifest['engine']}, this run has {engine}; use that engine"
    if engine and engine.startswith("zero") and manifest["ranks"] != ranks:
        return (
            f"DeepSpeed wrote it on {manifest['ranks']} ranks and cannot go on with it on {ranks}; "
            f"start {manifest['ranks']} ranks (plain DDP and FSDP2 go on with any number)"
        )
    return ""


def is_last(checkpoint: str | Path) -> bool:
    """Whether a checkpoint holds the run's last step."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    return state.global_step >= state.max_steps


def checkpoint_name(step: int) -> str:
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def check_finite(weights: dict[str, torch.Tensor]) -> None:
    """Refuse to save what no run can go on from.

    Raises:
        UserError: naming the weight.
    """
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{name} is not finite any more: nothing was saved, the last checkpoint is as it was")


def explain_unsaved(error: BaseException, run: Path, name: str) -> None:
    """Raise a UserError when a checkpoint could not be written for want of room or rights."""
    if isinstance(error, ShardsUnsaved) and error.failures:  # rank -> (error, where)
        error = next(iter(error.failures.values()))[0]
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    writing = any(sign in text for sign in ("PytorchStreamWriter", "inline_container", "file write"))
    if not writing and not isinstance(error, (OSError, SafetensorError)):
        return
    whole = sort_checkpoints(str(run))
    last = f"{Path(whole[-1]).name} is whole" if whole else "there is no checkpoint before it"
    free = shutil.disk_usage(run).free / 2**20
    raise UserError(
        f"{run / name} could not be written ({text}; {free:.0f} MiB are free there); {last}: "
        "make room and start the same command again"
    ) from error


def differing(before: dict, now: dict, was: str = "was", is_: str = "now") -> str:
    """The flags in which two runs differ, in words; empty where there are none."""
    names = [name for name in now if before.get(name) != now[name]]
    if not names:
        return ""
    more = f" (and {len(names) - 1} more: {', '.join(names[1:6])})" if names[1:] else ""
    return f"{names[0]} {was} {before.get(names[0])!r}, {is_} {now[names[0]]!r}{more}"
