"""The output folder: whose run it holds, and the model that is published in it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints

from gritlm.data.batch_plan import VERSION as PLAN_VERSION
from gritlm.data.batch_plan import read_num_samples
from gritlm.data.records import RecordSet
from gritlm.distributed import barrier, destroy_process_group, gather_objects, rank
from gritlm.errors import UserError
from gritlm.files import written_aside
from gritlm.models.folder import move_model_folder
from gritlm.training.arguments import DataArguments, EmbeddingTrainingArguments, ModelArguments
from gritlm.training.checkpoints import STAGING_FOLDER, differing, find_damage, read_manifest, why_not_resumable

RUN_FILE = "run.json"
KEPT = "nothing is overwritten, name another folder"


def write_run_file(folder: str | Path, run_settings: dict, finished: bool) -> None:
    path = Path(folder) / RUN_FILE
    with written_aside(path) as aside:
        aside.write_text(json.dumps({"finished": finished, "flags": run_settings}, indent=2) + "\n")


def find_checkpoint(
    args: EmbeddingTrainingArguments, run_settings: dict, engine: str | None
) -> tuple[str | None, list[str]]:
    """The newest whole checkpoint to go on from, or None for a fresh start; and what to say about damaged ones.

    `engine` is the one that will go on (see `engine_of`), or None where that is not yet known.

    Raises:
        UserError: the folder holds something that is not an unfinished run of the same flags (nothing is overwritten),
            or a checkpoint that this run cannot go on from.
    """
    folder, named = Path(args.output_dir), args.resume_from_checkpoint
    if named:
        problem = find_damage(named) or why_not_resumable(named, run_settings, engine, args.world_size)
        if problem:
            raise UserError(f"--resume_from_checkpoint {named}: {problem}")
    if not folder.exists() or (folder.is_dir() and all(path.name.endswith(".part") for path in folder.iterdir())):
        return named, []
    if not (folder / RUN_FILE).is_file():
        raise UserError(f"--output_dir {folder} is not empty and holds no run of ours; {KEPT}")
    try:
        run = json.loads((folder / RUN_FILE).read_text())
        flags, finished = dict(run["flags"]), bool(run["finished"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / RUN_FILE}: found a damaged file ({error}); {KEPT}") from error
    difference = differing(flags, run_settings)
    if difference:
        raise UserError(f"--output_dir {folder} holds another run: {difference}; {KEPT}")
    if finished:
        raise UserError(f"--output_dir {folder} holds the finished run of these flags; {KEPT}")
    if named:
        return named, []
    checkpoints = sort_checkpoints(str(folder))[::-1]
    damaged = []
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


# What may change between a run and its continuation without changing what is learnt.
FREE_TO_CHANGE = ("data_cache",)
FIXED_TRAINING = """
    global_batch_size temperature negatives_cross_device seed learning_rate lr_scheduler_type lr_scheduler_kwargs
    warmup_steps weight_decay num_train_epochs max_steps optim optim_args adam_beta1 adam_beta2 adam_epsilon
    max_grad_norm bf16
""".split()  # noqa: SIM905


def finish(args: EmbeddingTrainingArguments, run_settings: dict, write: Callable[[Path], None]) -> int:
    """Publish the model in the output folder. `write` puts its files into a folder; all ranks call it."""
    aside = Path(args.output_dir) / STAGING_FOLDER
    first = args.process_index == 0
    if first:
        shutil.rmtree(aside, ignore_errors=True)
    barrier()
    write(aside)
    if first:
        move_model_folder(aside, args.output_dir)
        write_run_file(args.output_dir, run_settings, finished=True)
        print(f"model saved to {args.output_dir}")
    barrier()
    destroy_process_group()
    return 0


def copy_served(checkpoint: str, aside: Path) -> None:
    """The model folder within a checkpoint, without the trainer's own files."""
    if rank() == 0:
        for name in read_manifest(checkpoint)["served"]:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(checkpoint) / name, aside / name)
        for folder in (path for path in Path(checkpoint).iterdir() if path.is_dir() and not any(path.iterdir())):
            (aside / folder.name).mkdir()


def check_ranks_agree(run_settings: dict) -> None:
    """Refuse to train on ranks that were started with other flags or see other data.

    Raises:
        UserError: on all ranks, naming the first that differs, and in what.
    """
    first, *others = gather_objects(run_settings)
    for number, other in enumerate(others, start=1):
        difference = differing(first, other, "is", f"on rank {number}")
        if difference:
            raise UserError(f"the ranks were not started alike: {difference}")


def run_settings_of(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: EmbeddingTrainingArguments,
    records: list[RecordSet],
    ranks: int,
) -> dict:
    """What all ranks, and a run and its continuation, must have in common."""
    flags = asdict(model_args) | asdict(data_args)
    flags |= {name: getattr(args, name) for name in FIXED_TRAINING}
    for name in FREE_TO_CHANGE:
        del flags[name]
    flags["order of the rows, version"] = PLAN_VERSION
    flags["num_samples"] = read_num_samples(data_args.num_samples)
    flags["data"] = {r.name: f"{len(r)} rows, {r.fingerprint()}" for r in records}
    if not args.negatives_cross_device:
        flags["ranks"] = ranks
    return json.loads(json.dumps(flags, default=str))
