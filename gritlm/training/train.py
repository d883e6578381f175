"""The main job: parse, read, plan, build, train, publish. `gritlm train`, or under torchrun `-m gritlm train`."""

from pathlib import Path

from transformers import set_seed

from gritlm.cli import quieten
from gritlm.data.batches import BatchBuilder
from gritlm.data.records import load_records
from gritlm.distributed import barrier, destroy_process_group
from gritlm.models.attention import varlen_unavailable_reason
from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.chunks import ChunkConfig
from gritlm.models.embedder import Embedder
from gritlm.training.arguments import parse
from gritlm.training.checkpoints import engine_of, is_last
from gritlm.training.run_folder import (
    check_ranks_agree,
    copy_served,
    find_checkpoint,
    finish,
    run_settings_of,
    write_run_file,
)
from gritlm.training.setup import build_text_tokenizer, describe, largest_group, make_plan, show_examples
from gritlm.training.trainer import EmbeddingTrainer


def main(argv: list[str]) -> int:
    quieten()
    model_args, data_args, args = parse(argv)
    first = args.process_index == 0
    say = print if first else (lambda *_: None)

    config = load_config(model_args.model_name_or_path, model_args.attn, model_args.trust_remote_code)
    with args.main_process_first(desc="reading the data"):
        records = load_records(data_args.train_data, data_args.data_cache)
    run_settings = run_settings_of(model_args, data_args, args, records, args.world_size)
    check_ranks_agree(run_settings)
    checkpoint, damaged = find_checkpoint(args, run_settings, engine_of(args))
    for problem in damaged:
        say(problem)

    plan = make_plan(data_args, args, records, args.world_size)
    for line in describe(plan, data_args, args, records, args.world_size):
        say(line)
    text_tokenizer = build_text_tokenizer(model_args, data_args, records)
    for line in show_examples(text_tokenizer, records):
        say(line)

    barrier()  # every rank has looked at the output folder before one of them writes there
    if first:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_run_file(args.output_dir, run_settings, finished=False)
    if checkpoint and is_last(checkpoint):  # cut off while the model was published: the Trainer would take a step more
        return finish(args, run_settings, lambda aside: copy_served(checkpoint, aside))

    set_seed(args.seed)
    backbone = load_backbone(
        model_args.model_name_or_path,
        config,
        model_args.attn_implementation,
        model_args.reset_weight,
        args.seed,
        model_args.trust_remote_code,
    )
    embedder = Embedder(backbone, model_args.pooling_method, model_args.normalized, model_args.projection)
    args.per_device_train_batch_size = args.global_batch_size // args.world_size
    group_size = largest_group(data_args, records)
    dropout = getattr(config, "attention_dropout", 0.0) > 0
    chunking = ChunkConfig(args.chunk_tokens, embedder.packed, deduplicate=not dropout)
    builder = BatchBuilder(plan, records, text_tokenizer, group_size, chunking, args.process_index, args.world_size)
    why = varlen_unavailable_reason(args.device, args.bf16, getattr(config, "attention_dropout", 0.0))
    if embedder.packed and args.device.type == "cuda" and why:
        say(f"attention: one kernel call for each run of equally long texts, not one for all ({why})")
    trainer = EmbeddingTrainer(embedder, args, builder, model_args.attn, run_settings)
    if checkpoint:
        say(f"resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stopped and trainer.state.global_step < trainer.state.max_steps:
        say(f"stopped by a signal after step {trainer.state.global_step}, saved; the same command goes on from there")
        barrier()
        destroy_process_group()
        return 0
    return finish(args, run_settings, lambda aside: trainer.save_model(str(aside)))
