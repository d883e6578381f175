"""The main job: parse, read, plan, build, train, publish. `gritlm train`, or under torchrun `-m gritlm train`."""

from contextlib import nullcontext
from pathlib import Path

from transformers import PreTrainedConfig, set_seed

from gritlm.cli import quieten
from gritlm.data.batches import BatchBuilder
from gritlm.data.records import load_records
from gritlm.devices import describe_devices, device_name
from gritlm.distributed import all_ranks, barrier, destroy_process_group, gather_objects
from gritlm.models.attention import varlen_unavailable_reason
from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.checks import check_base
from gritlm.models.chunks import ChunkConfig
from gritlm.models.embedder import Embedder
from gritlm.models.text import TextContract
from gritlm.training.arguments import RunArguments
from gritlm.training.checkpoints import engine_name, is_last
from gritlm.training.engines import load_weights_once
from gritlm.training.flag_checks import parse
from gritlm.training.monitors import end_with_torchrun
from gritlm.training.objective import Objective
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
from gritlm.training.setup import largest_group, make_plan, used_sets
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
    run_settings = run_settings_of(run, records, ranks)
    check_ranks_agree(run_settings)
    checkpoint, damaged = find_checkpoint(args, run_settings, engine_name(args))
    for line in damaged:
        log.warning(line)

    plan = make_plan(run, records)
    text_tokenizer, lines, warnings = describe_run(run, plan, records, config, ranks)
    for line in lines:
        log.info(line)
    for line in [*warnings, *unlike(run, run_settings)]:
        log.warning(line)

    barrier()  # every rank has looked at the output folder before one of them writes there
    if first:
        described = describe_start(run, used_sets(plan, records), text_tokenizer)
        write_run_file(args.output_dir, run_settings, False, resolved_flags(run), described)
        if checkpoint and checkpoint == args.resume_from_checkpoint:
            for line in go_back_to(checkpoint, Path(args.output_dir)):
                log.info(line)
    if checkpoint and is_last(checkpoint):  # killed while it published the model; the Trainer would take one step more
        return finish(run, run_settings, lambda staged: copy_served(checkpoint, staged))

    embedder, dropout = build_embedder(run, config, text_tokenizer.contract)
    chunking = ChunkConfig(args.chunk_tokens, embedder.packed, deduplicate=not dropout)
    group_size = largest_group(run.data, records)
    batches = BatchBuilder(plan, records, text_tokenizer, group_size, chunking, args.process_index, ranks)
    trainer = EmbeddingTrainer(
        embedder,
        args,
        Objective(run.objective, all_ranks()),
        train_dataset=batches,
        processing_class=text_tokenizer,
        attn=run.model.attn,
        run_settings=run_settings,
    )
    report_to_one_run(trainer, Path(args.output_dir), run.flags())
    if checkpoint:
        log.info("resuming from %s", checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    step = trainer.state.global_step
    if trainer.stopped and step < trainer.state.max_steps:
        log.info("stopped by a signal after step %d, saved; the same command resumes from there", step)
        barrier()
        destroy_process_group()
        return 0
    return finish(run, run_settings, trainer.write_model)


def build_embedder(run: RunArguments, config: PreTrainedConfig, contract: TextContract) -> tuple[Embedder, float]:
    """The model, and its attention dropout."""
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
    )
    embedder = Embedder(backbone, contract, model.projection)
    if (weights := run.base.projection_folder) and not model.reset_weight:
        embedder.load_projection(weights.parent, weights.name, run.base.projection_bias)
    dropout = getattr(config, "attention_dropout", 0.0)
    reason = varlen_unavailable_reason(args.device, args.bf16, dropout)
    if embedder.packed and args.device.type == "cuda" and reason:
        log.info("attention: one kernel call for each run of equally long texts, not one for all (%s)", reason)
    return embedder, dropout
