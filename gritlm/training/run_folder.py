"""The output folder: whose run it holds (run.json), where a run resumes, and the model that is published in it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedConfig
from transformers.trainer_utils import sort_checkpoints

from gritlm.data.batch_plan import VERSION as PLAN_VERSION
from gritlm.data.records import RecordSet
from gritlm.data.teacher_vectors import TeacherVectors
from gritlm.distributed import barrier, destroy_process_group, gather_objects, rank
from gritlm.errors import UserError, first_line
from gritlm.evaluation.sets import EvaluationSet, fingerprint
from gritlm.files import write_text
from gritlm.models.base_files import Base
from gritlm.models.folder import move_model_folder
from gritlm.report.card import CARD, read_facts, write_card
from gritlm.training.arguments import EmbeddingTrainingArguments, RunArguments, fixed_flags
from gritlm.training.checkpoints import (
    STAGING_FOLDER,
    by_version,
    differing,
    find_damage,
    read_manifest,
    read_trainer_state,
    stamp,
    why_not_resumable,
    why_unreadable,
)
from gritlm.training.inherited_flags import follows_evaluations
from gritlm.training.run_lock import LOCK_FILE
from gritlm.training.run_log import log
from gritlm.training.set_settings import read_set_settings

RUN_FILE = "run.json"
RESUMED_FROM = "resumed from"  # entry of run.json: the checkpoint of --resume_from_checkpoint


# ---- whose run it is


def run_settings_of(
    run: RunArguments, records: list[RecordSet], ranks: int, eval_sets: Sequence[EvaluationSet] = ()
) -> dict[str, Any]:
    """What all ranks, and a run and its continuation, must have in common. JSON values only."""
    values = run.flags()
    settings = {name: values[name] for name in fixed_flags()}
    settings["order of the rows, version"] = PLAN_VERSION
    settings["num_samples"] = read_set_settings(run.data.num_samples)
    # By content: a path has many spellings, and a link another name.
    settings["data"] = [f"{len(r)} rows, {r.fingerprint()}" for r in records]
    if run.objective.teacher_vectors:
        settings["teacher_vectors"] = TeacherVectors(run.objective.teacher_vectors).fingerprint()
    if run.data.mined_batches:
        settings["mined_batches"] = TeacherVectors(run.data.mined_batches, "--mined_batches").fingerprint()
    if Path(run.model.model_name_or_path).is_dir():
        settings["model_name_or_path"] = os.path.abspath(run.model.model_name_or_path)
        settings["base's config and tokenizer"] = _hash_of_base(Path(run.model.model_name_or_path))
    # A checkpoint with an adapter does not hold the base.
    of_base = Base(run.model.model_name_or_path, PreTrainedConfig())
    if (run.tuning.lora or run.tuning.qlora) and (found := of_base.fingerprint):
        settings["base's weights"] = found
    if follows_evaluations(SimpleNamespace(**values)):
        settings |= {name: values[name] for name in ("eval_strategy", "eval_steps", "eval_delay")}
        settings["evaluation sets"] = [f"{data.name}, {fingerprint(data)}" for data in eval_sets]
    if not run.objective.negatives_cross_device:
        settings["ranks"] = ranks
    return json.loads(json.dumps(settings, default=str))


def _hash_of_base(folder: Path) -> str:
    """A hash of a model folder's files that a resumed run reads again. Its weights come from the checkpoint."""
    patterns = ("config.json", "*token*", "vocab.json", "merges.txt")
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths if path.is_file())).hexdigest()[:16]


def check_ranks_agree(run_settings: dict[str, Any]) -> None:
    """Refuse to train on ranks that were started with other flags or see other data.

    Raises:
        UserError: on all ranks, naming the first that differs, and in what.
    """
    first, *others = gather_objects(run_settings)
    for number, other in enumerate(others, start=1):
        difference = differing(first, other, "is", f"on rank {number}")
        if difference:
            raise UserError(f"the ranks were not started alike: {difference}")


def write_run_file(
    folder: str | Path, run_settings: dict[str, Any], resolved: dict[str, Any], start: dict[str, Any]
) -> None:
    """Note a start of a run.

    Args:
        run_settings: what a continuation must agree on.
        resolved: every flag's value; `gritlm train run.json` starts from them.
        start: command, versions, machine. A later start is noted with what differs from the first.
    """
    starts = read_run_file(folder).get("starts", [])
    starts += [{name: value for name, value in start.items() if not starts or value != starts[0].get(name)}]
    update_run_file(folder, **stamp(), finished=False, starts=starts, flags=run_settings, resolved=resolved)


def read_run_file(folder: str | Path) -> dict[str, Any]:
    """The entries of run.json; none if there is no such file."""
    path = Path(folder) / RUN_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def update_run_file(folder: str | Path, **entries: Any) -> None:
    """Set some entries of run.json and keep the others."""
    write_text(Path(folder) / RUN_FILE, json.dumps(read_run_file(folder) | entries, indent=2) + "\n")


# ---- where it resumes


def find_checkpoint(
    args: EmbeddingTrainingArguments, run_settings: dict[str, Any], engine: str | None
) -> tuple[str | None, list[str]]:
    """The newest whole checkpoint, or None for a fresh start; and a line for each damaged one.

    Args:
        engine: the run's engine, or None where it is not known yet.
    Raises:
        UserError: the folder holds something that is not an unfinished run of the same flags (nothing is overwritten),
            or a checkpoint that this run cannot resume from.
    """
    folder, named = Path(args.output_dir or ""), args.resume_from_checkpoint
    if named:
        if named in ("True", "true"):
            raise UserError(
                f"--resume_from_checkpoint: found {named}, wanted a checkpoint folder; leave it out, "
                "a run resumes from its newest checkpoint anyway"
            )
        problem = find_damage(named) or why_not_resumable(named, run_settings, engine, args.world_size)
        if problem:
            raise UserError(f"--resume_from_checkpoint {named}: {problem}")
    if not folder.exists() or (folder.is_dir() and all(map(_is_left_over, folder.iterdir()))):
        return named, []
    found = _check_run_file(folder, run_settings)
    checkpoints = sort_checkpoints(str(folder))[::-1]
    if named:
        # The same command, started again after a kill, goes on from what it has saved since.
        started_there = found.get(RESUMED_FROM) == str(Path(named).resolve())
        checkpoints = [*(newer_checkpoints(folder, named) if started_there else []), named]
    damaged: list[str] = []
    for checkpoint in checkpoints:
        problem = find_damage(checkpoint)
        if not problem:
            problem = why_not_resumable(checkpoint, run_settings, engine, args.world_size)
            if problem:
                raise UserError(f"{checkpoint}: {problem}")
            return checkpoint, damaged
        damaged.append(f"{checkpoint} cannot be used: {problem}")
    if checkpoints:
        raise UserError(f"{'; '.join(damaged)}; no whole checkpoint is left, delete them to start over")
    return None, []


def _is_left_over(path: Path) -> bool:
    """Whether a killed process may have left this behind before it wrote run.json."""
    return path.name.endswith(".part") or path.name == LOCK_FILE


def go_back_to(checkpoint: str, folder: Path) -> list[str]:
    """Note in run.json that the run resumes from a named checkpoint, and move the newer ones in its folder away.

    Otherwise the next start would go on from the newest, and the user would get another run than the one asked for.
    Returns a line that says what was moved, if anything was.
    """
    update_run_file(folder, **{RESUMED_FROM: str(Path(checkpoint).resolve())})
    newer = [Path(path) for path in newer_checkpoints(folder, checkpoint)]
    if not newer:
        return []
    number = 1 + len(list(folder.glob("set-aside-*")))
    aside = folder / f"set-aside-{number}"
    aside.mkdir()
    for path in newer:
        path.rename(aside / path.name)
    return [f"--resume_from_checkpoint {checkpoint}: moved {', '.join(path.name for path in newer)} to {aside}"]


def newer_checkpoints(folder: Path, checkpoint: str) -> list[str]:
    """The checkpoints in a run's folder that lie after a whole checkpoint, the newest first."""
    step = read_trainer_state(checkpoint).global_step
    return [path for path in sort_checkpoints(str(folder))[::-1] if int(path.rsplit("-", 1)[1]) > step]


def _check_run_file(folder: Path, run_settings: dict[str, Any]) -> dict[str, Any]:
    """The run.json of a folder that holds an unfinished run of these settings. Any other folder is refused."""
    kept = "nothing is overwritten, name another folder"
    if not (folder / RUN_FILE).is_file():
        raise UserError(f"--output_dir {folder} is not empty and holds no run of ours; {kept}")
    try:
        found = read_run_file(folder)
        flags, finished = dict(found["flags"]), bool(found["finished"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / RUN_FILE}: found a damaged file ({error}); {kept}") from error
    further = f"to train its model further: --model_name_or_path {folder} --output_dir NEW"
    if problem := why_unreadable(found) or differing(flags, run_settings):
        longer = any(flags.get(name) != run_settings.get(name) for name in ("num_train_epochs", "max_steps"))
        hint = f". The learning rate has followed the length of the run to its end; {further}"
        more = hint if finished and longer else ""
        raise UserError(f"--output_dir {folder} holds another run: {problem}{by_version(found)}; {kept}{more}")
    if finished:
        raise UserError(f"--output_dir {folder} holds the finished run of these flags; {kept}. Or {further}")
    return found


# ---- the model that is published


def finish(run: RunArguments, write: Callable[[Path], object], more: dict[str, Any]) -> int:
    """Publish the model in the output folder.

    Args:
        write: puts its files into a folder; all ranks call it.
        more: entries of run.json.
    """
    folder = Path(run.training.output_dir or "")
    staged, first = folder / STAGING_FOLDER, run.training.process_index == 0
    if first:
        shutil.rmtree(staged, ignore_errors=True)
    barrier()
    write(staged)
    if first:
        update_run_file(folder, **more)  # the card shows the verdict
        add_card(staged, folder)
        move_model_folder(staged, folder)
        update_run_file(folder, finished=True)
    log.info("model saved to %s", folder)
    barrier()
    destroy_process_group()
    return 0


def add_card(model: Path, folder: str | Path, step: int | None = None) -> None:
    """Write the card of a model of the run in `folder`. A full disk ends the run; a log that cannot be read does not.

    Args:
        step: the checkpoint's; None for the model that is published.
    """
    try:
        write_card(model, replace(read_facts(folder), step=step))
    except OSError:
        raise
    except Exception as error:  # a log or a card of a base that somebody has edited, in one of many ways
        log.warning("%s was not written: %s", CARD, first_line(error))


def copy_served(checkpoint: str, target: Path) -> None:
    """Copy the model folder within a checkpoint, without the trainer's files. The first rank copies."""
    if rank() == 0:
        for name in read_manifest(checkpoint)["served"]:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(checkpoint) / name, target / name)
        for folder in (path for path in Path(checkpoint).iterdir() if path.is_dir() and not any(path.iterdir())):
            (target / folder.name).mkdir()
