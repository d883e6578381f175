"""The main job: parse, read, plan, build, train, publish. `gritlm train`, or under torchrun `-m gritlm train`."""

import dataclasses
import functools
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, TrainerState, set_seed

from gritlm.cli import quieten
from gritlm.data.batch_plan import Plan
from gritlm.data.records import RecordSet, load_records
from gritlm.data.teacher_vectors import TeacherVectors
from gritlm.devices import describe_devices, device_name
from gritlm.distributed import all_ranks, barrier, destroy_process_group, gather_objects
from gritlm.errors import UserError
from gritlm.models.attention import varlen_unavailable_reason
from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.checks import check_base
from gritlm.models.chunks import ChunkConfig
from gritlm.models.embedder import Embedder
from gritlm.models.families import dropouts, head_width
from gritlm.models.text import TextContract
from gritlm.models.tokenizer import TextTokenizer
from gritlm.training.adapters import add_adapter, merged
from gritlm.training.arguments import RunArguments
from gritlm.training.checkpoints import (
    checkpoint_name,
    find_damage,
    is_last,
    read_trainer_state,
    weight_copies,
)
from gritlm.training.engines import load_weights_once
from gritlm.training.environment import abandoned_builds
from gritlm.training.evaluation import RunEvaluation, keep_results, steps_with_results, verdict
from gritlm.training.evaluation_data import EvaluationData, gather_evaluation_data, given_sets
from gritlm.training.flag_checks import parse
from gritlm.training.linear_products import set_products
from gritlm.training.monitors import end_with_torchrun
from gritlm.training.objective import Objective, needs_projection, without_teacher
from gritlm.training.optimizers import to_bfloat16
from gritlm.training.provenance import describe_start, resolved_flags, unlike
from gritlm.training.reporters import report_to_one_run
from gritlm.training.run_folder import (
    check_ranks_agree,
    copy_served,
    find_checkpoint,
    finish,
    go_back_to,
    run_settings_of,
    write_run_file,
)
from gritlm.training.run_lock import locked
from gritlm.training.run_log import log, set_up_logging
from gritlm.training.set_settings import objectives_of
from gritlm.training.setup import make_builder, make_plan, used_sets
from gritlm.training.start_report import describe_run
from gritlm.training.trainer import EmbeddingTrainer


def main(argv: list[str]) -> int:
    quieten(deepspeed=any(word.startswith("--deepspeed") for word in argv))
    run = parse(argv)
    first = run.training.process_index == 0
    set_up_logging(first)
    end_with_torchrun()
    with locked(Path(run.training.output_dir)) if first else nullcontext():
        return train(run)


def train(run: RunArguments) -> int:
    """Train, or resume, and publish the model. Returns the exit code; all ranks call it."""
    args = run.training
    first, ranks = args.process_index == 0, args.world_size
    name, remote = run.model.model_name_or_path, run.model.trust_remote_code
    config = load_config(name, run.model.attn, remote)
    for line in check_base(name, config, remote, run.model.reset_weight, download=True):
        log.info(line)
    log.info("device: %s", describe_devices(gather_objects(device_name(str(args.device))), args.use_cpu))
    with args.main_process_first(desc="reading the data"):
        records = load_records(run.data.train_data, run.data.data_cache)
    given = given_sets(run)
    run_settings = run_settings_of(run, records, ranks, given)
    check_ranks_agree(run_settings)
    checkpoint, damaged = find_checkpoint(args, run_settings, args.engine)
    for line in damaged:
        log.warning(line)

    plan = make_plan(run, records)
    evaluation_data = gather_evaluation_data(run, plan, records, given)
    text_tokenizer, lines, warnings = describe_run(run, plan, records, config, ranks, evaluation_data)
    for line in lines:
        log.info(line)
    for line in [*warnings, *unlike(run, run_settings), *(abandoned_builds() if args.deepspeed else ())]:
        log.warning(line)

    state = read_trainer_state(checkpoint) if checkpoint else None
    folder = Path(args.output_dir)
    barrier()  # every rank has looked at the output folder before one of them writes there
    if first:
        described = describe_start(run, used_sets(plan, records), text_tokenizer)
        write_run_file(folder, run_settings, resolved_flags(run), described)
        discard_later(folder, checkpoint, args.resume_from_checkpoint, state.global_step if state else 0)
    if checkpoint and state and is_last(state):  # killed while it published; the Trainer would take one step more
        write = functools.partial(copy_served, checkpoint)
        return publish(run, state, checkpoint, write, text_tokenizer)

    trainer = build_trainer(run, config, plan, records, text_tokenizer, evaluation_data, run_settings, checkpoint)
    report_to_one_run(trainer, folder, run.flags())
    if checkpoint:
        log.info("resuming from %s", checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    step = trainer.state.global_step
    if trainer.stopped and step < trainer.state.max_steps:
        log.info("stopped by a signal after step %d, saved; the same command resumes from there", step)
        barrier()
        destroy_process_group()
        return 0
    return publish(run, trainer.state, checkpoint, trainer.write_model, text_tokenizer)


def discard_later(folder: Path, checkpoint: str | None, named: str | None, step: int) -> None:
    """Move or remove what the output folder holds of steps after the checkpoint's; the run takes them again.

    Args:
        checkpoint: what the run resumes from, or None for a fresh start.
        named: --resume_from_checkpoint.
        step: of the checkpoint, or 0.
    """
    if checkpoint and checkpoint == named:
        for line in go_back_to(checkpoint, folder):
            log.info(line)
    for number, copy in weight_copies(folder).items():
        if number > step:
            shutil.rmtree(copy, ignore_errors=True)
    keep_results(folder, step, Path(checkpoint).parent if checkpoint else folder)


def publish(
    run: RunArguments,
    state: TrainerState,
    resumed: str | None,
    write_last: Callable[[Path], object],
    text_tokenizer: TextTokenizer,
) -> int:
    """Publish the last model, or with --load_best_model_at_end the best one, and say the verdict on it.

    Args:
        state: at the end of the run.
        resumed: the checkpoint that the run resumed from.
        write_last: writes the last model's files into a folder, or its adapter's; all ranks call it.
    """
    step, write, folder = state.global_step, write_last, Path(run.training.output_dir or "")
    if run.training.load_best_model_at_end and state.best_global_step not in (None, step):
        name = checkpoint_name(state.best_global_step)
        places = [folder / name, *([Path(resumed).parent / name] if resumed else [])]
        best = next((place for place in places if not find_damage(place)), None)
        if best is None:
            raise UserError(f"{places[0]}: found no whole checkpoint of the best step, wanted it for the model")
        step, chosen = state.best_global_step, str(best)
        log.info("best model: step %d, %s %.4f", step, run.training.metric_for_best_model, state.best_metric)
        write = functools.partial(copy_served, chosen)
    entries = verdict(folder, step) if run.training.process_index == 0 and steps_with_results(folder) else {}
    if entries:
        log.info("verdict: %s", entries["verdict"])
    if (kept := len(weight_copies(folder))) > 1:
        log.info("weights of the last %d saves: gritlm merge %s NEW --last %d averages them", kept, folder, kept)
    return finish(run, merged(run, text_tokenizer, write), {"evaluation": entries} if entries else {})


def build_trainer(
    run: RunArguments,
    config: PreTrainedConfig,
    plan: Plan,
    records: list[RecordSet],
    text_tokenizer: TextTokenizer,
    evaluation_data: EvaluationData,
    run_settings: dict[str, Any],
    checkpoint: str | None,
) -> EmbeddingTrainer:
    """The trainer, with its model, batches, loss and evaluations; `checkpoint` is what it will resume from."""
    args = run.training
    embedder = build_embedder(run, config, text_tokenizer.contract)
    teacher = TeacherVectors(run.objective.teacher_vectors) if run.objective.teacher_vectors else None
    by_set = list(objectives_of(run, [r.name for r in records]).values())
    if teacher and any(map(needs_projection, by_set)):
        embedder.add_teacher_projection(teacher.width)
    if run.tuning.bf16_weights:
        to_bfloat16(embedder.backbone)
    set_products(run, embedder, checkpoint)
    chunking = ChunkConfig(args.chunk_tokens, embedder.packed, deduplicate=not embedder.drops_out)
    batches = make_builder(run, plan, records, text_tokenizer, chunking, (args.process_index, args.world_size), teacher)
    evaluation = None
    if evaluation_data.sets:
        model, contract = run.model.model_name_or_path, dataclasses.asdict(text_tokenizer.contract)
        about = {"model": model, "run": str(Path(args.output_dir)), "contract": contract}
        objective = Objective(run.objective, by_set=without_teacher(by_set))
        evaluation = RunEvaluation(evaluation_data, batches, objective, Path(args.output_dir), about)
    return EmbeddingTrainer(
        embedder,
        args,
        Objective(run.objective, all_ranks(), by_set=by_set),
        train_dataset=batches,
        processing_class=text_tokenizer,
        attn=run.model.attn,
        run_settings=run_settings,
        evaluation=evaluation,
        tuning=run.tuning,
    )


def build_embedder(run: RunArguments, config: PreTrainedConfig, contract: TextContract) -> Embedder:
    """The model, with its adapter."""
    args, model = run.training, run.model
    set_seed(args.seed)
    load_weights_once(args)
    backbone = load_backbone(
        model.model_name_or_path,
        config,
        model.attn_implementation,
        model.reset_weight,
        args.seed,
        model.trust_remote_code,
        merge_adapters=not run.tuning.continue_adapter,
    )
    embedder = Embedder(backbone, contract, model.projection)
    if (weights := run.base.projection_folder) and not model.reset_weight:
        embedder.load_projection(weights.parent, weights.name, run.base.projection_bias)
    if run.objective.matryoshka_dims:  # for servers that cut vectors on request
        embedder.config.matryoshka_dimensions = [embedder.embedding_dim, *run.objective.matryoshka_dims]
    elif (model.reset_weight or model.projection != run.base.projection) and hasattr(config, "matryoshka_dimensions"):
        log.info("base: its widths %s are not those of this model: left out", config.matryoshka_dimensions)
        del embedder.config.matryoshka_dimensions
    add_adapter(run, embedder)
    if args.selective_checkpointing:
        embedder.keep_products()
    reason = varlen_unavailable_reason(args.device, args.bf16, dropouts(config)[0], head_width(config))
    if embedder.packed and args.device.type == "cuda" and reason:
        log.info("attention: one kernel call for each run of equally long texts, not one for all (%s)", reason)
    return embedder
