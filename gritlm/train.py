"""The main job: parse, read, plan, build, train, publish. `gritlm train`, or under torchrun `-m gritlm.train`."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from transformers import set_seed

from gritlm.arguments import DataArguments, EmbeddingTrainingArguments, ModelArguments, parse
from gritlm.data.collator import BatchBuilder, Chunking, TextContract, TextEncoder, load_tokenizer
from gritlm.data.documents import Documents
from gritlm.data.plan import VERSION as PLAN_VERSION
from gritlm.data.plan import Plan, read_num_samples
from gritlm.data.records import RecordSet, load_records
from gritlm.distributed import barrier, close, gather_objects, leave, rank
from gritlm.errors import UserError, quieten, run_verb
from gritlm.model_folder import move_model_folder
from gritlm.models.attention import why_a_call_per_run
from gritlm.models.backbone import load_backbone, load_config
from gritlm.models.embedder import Embedder
from gritlm.run_folder import UNFINISHED, differing, engine_of, find_checkpoint, is_last, read_manifest, write_run_file
from gritlm.trainer import EmbeddingTrainer

# What may change between a run and its continuation without changing what is learnt.
FREE_TO_CHANGE = ("data_cache",)
FIXED_TRAINING = """
    global_batch_size temperature negatives_cross_device seed learning_rate lr_scheduler_type lr_scheduler_kwargs
    warmup_steps weight_decay num_train_epochs max_steps optim optim_args adam_beta1 adam_beta2 adam_epsilon
    max_grad_norm bf16
""".split()  # noqa: SIM905


def main(argv: list[str]) -> int:
    quieten()
    model_args, data_args, args = parse(argv)
    first = args.process_index == 0
    say = print if first else (lambda *_: None)

    config = load_config(model_args.model_name_or_path, model_args.attn, model_args.trust_remote_code)
    with args.main_process_first(desc="reading the data"):
        records = load_records(data_args.train_data, data_args.data_cache)
    identity = run_identity(model_args, data_args, args, records, args.world_size)
    check_ranks_agree(identity)
    checkpoint, damaged = find_checkpoint(args, identity, engine_of(args))
    for problem in damaged:
        say(problem)

    plan = make_plan(data_args, args, records, args.world_size)
    for line in describe(plan, data_args, args, records, args.world_size):
        say(line)
    encoder = build_encoder(model_args, data_args, records)
    for line in show_examples(encoder, records):
        say(line)

    barrier()  # every rank has looked at the output folder before one of them writes there
    if first:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_run_file(args.output_dir, identity, finished=False)
    if checkpoint and is_last(checkpoint):  # cut off while the model was published: the Trainer would take a step more
        return finish(args, identity, lambda aside: copy_served(checkpoint, aside))

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
    chunking = Chunking(args.chunk_tokens, embedder.packed, merge=not dropout)
    builder = BatchBuilder(plan, records, encoder, group_size, chunking, args.process_index, args.world_size)
    why = why_a_call_per_run(args.device, args.bf16, getattr(config, "attention_dropout", 0.0))
    if embedder.packed and args.device.type == "cuda" and why:
        say(f"attention: one kernel call for each run of equally long texts, not one for all ({why})")
    trainer = EmbeddingTrainer(embedder, args, builder, model_args.attn, identity)
    if checkpoint:
        say(f"resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stopped and trainer.state.global_step < trainer.state.max_steps:
        say(f"stopped by a signal after step {trainer.state.global_step}, saved; the same command goes on from there")
        barrier()
        close()
        return 0
    return finish(args, identity, lambda aside: trainer.save_model(str(aside)))


def finish(args: EmbeddingTrainingArguments, identity: dict, write: Callable[[Path], None]) -> int:
    """Publish the model in the output folder. `write` puts its files into a folder; all ranks call it."""
    aside = Path(args.output_dir) / UNFINISHED
    first = args.process_index == 0
    if first:
        shutil.rmtree(aside, ignore_errors=True)
    barrier()
    write(aside)
    if first:
        move_model_folder(aside, args.output_dir)
        write_run_file(args.output_dir, identity, finished=True)
        print(f"model saved to {args.output_dir}")
    barrier()
    close()
    return 0


def copy_served(checkpoint: str, aside: Path) -> None:
    """The model folder within a checkpoint, without the trainer's own files."""
    if rank() == 0:
        for name in read_manifest(checkpoint)["served"]:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(checkpoint) / name, aside / name)
        for folder in (path for path in Path(checkpoint).iterdir() if path.is_dir() and not any(path.iterdir())):
            (aside / folder.name).mkdir()


def check_ranks_agree(identity: dict) -> None:
    """Refuse to train on ranks that were started with other flags or see other data.

    Raises:
        UserError: on all ranks, naming the first that differs, and in what.
    """
    first, *others = gather_objects(identity)
    for number, other in enumerate(others, start=1):
        difference = differing(first, other, "is", f"on rank {number}")
        if difference:
            raise UserError(f"the ranks were not started alike: {difference}")


# ---- the data


def make_plan(data_args: DataArguments, args: EmbeddingTrainingArguments, records: list[RecordSet], ranks: int) -> Plan:
    in_reach = args.global_batch_size // (1 if args.negatives_cross_device else ranks)
    if in_reach * largest_group(data_args, records) == 1:
        raise UserError(
            f"--global_batch_size {args.global_batch_size} on {ranks} ranks, --negatives_cross_device "
            f"{args.negatives_cross_device}, --train_group_size {data_args.train_group_size}, and the data's own "
            "negatives: leave a query none to contrast with"
        )
    return Plan(
        [r.name for r in records],
        list(map(len, records)),
        args.global_batch_size,
        args.seed,
        data_args.max_example_num_per_dataset,
        read_num_samples(data_args.num_samples),
        data_args.sampling_temperature,
        Documents.concatenate([r.documents for r in records]),
    )


def largest_group(data_args: DataArguments, records: list[RecordSet]) -> int:
    """Passages per query at most: no more slots than any row of the data can fill."""
    return min(data_args.train_group_size, max(r.longest_group for r in records))


def describe(
    plan: Plan, data_args: DataArguments, args: EmbeddingTrainingArguments, records: list[RecordSet], ranks: int
) -> list[str]:
    lines = [plan.describe(ranks, largest_group(data_args, records), args.negatives_cross_device)]
    if dropped := sum(r.dropped_negatives for r in records):
        lines.append(f"  {dropped} negatives left out: they repeat a positive of their own row")
    if hidden := sum(r.hidden_negatives for r in records):
        lines.append(f"  {hidden} negatives left out: another row has them as a positive of the same query")
    return lines


def build_encoder(model_args: ModelArguments, data_args: DataArguments, records: list[RecordSet]) -> TextEncoder:
    """The text contract of this run, its tokenizer, and the prompts that go with the model."""
    prompts = {r.name: r.instructions[0] for r in records if len(r.instructions) == 1 and r.instructions[0]}
    largest = max(records, key=len)
    on_passages = {instruction for r in records for instruction in r.passage_instructions}
    sides = {"query": prompts.get(largest.name, ""), "document": on_passages.pop() if len(on_passages) == 1 else ""}
    contract = TextContract(
        query_max_len=data_args.query_max_len,
        passage_max_len=data_args.passage_max_len,
        pooling_method=model_args.pooling_method,
        normalized=model_args.normalized,
        pool_instruction=data_args.pool_instruction,
        append_eos=data_args.append_eos,
        prompts=prompts | sides,
    )
    tokenizer = load_tokenizer(model_args.model_name_or_path, contract, model_args.trust_remote_code)
    encoder = TextEncoder(tokenizer, contract)
    for record_set in records:
        for instruction in record_set.instructions:
            encoder.check_instruction(instruction, data_args.query_max_len, "--query_max_len")
        for instruction in record_set.passage_instructions:
            encoder.check_instruction(instruction, data_args.passage_max_len, "--passage_max_len")
    return encoder


def show_examples(encoder: TextEncoder, records: list[RecordSet], count: int = 3) -> list[str]:
    """The first rows as the model will see them; what stands in the first brackets is not pooled."""
    lines = ["examples, as tokenised: [not pooled] pooled"]
    rows = [(r, i) for i in range(count) for r in records if i < len(r)][:count]
    for record_set, index in rows:
        record = record_set[index]
        for side, text, limit in (
            ("query", record.query, encoder.contract.query_max_len),
            ("pos", record.positives[0], encoder.contract.passage_max_len),
        ):
            (tokens,) = encoder([text], limit)
            cut = tokens.instruction
            skipped, pooled = (encoder.tokenizer.decode(ids) for ids in (tokens.ids[:cut], tokens.ids[cut:]))
            pooled = pooled if len(pooled) <= 160 else pooled[:160] + "..."
            line = f"  {record_set.name} {side}, {len(tokens.ids)} tokens: [{skipped}]{pooled}"
            lines.append(line.replace("\n", "\\n"))
    return lines


def run_identity(
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


if __name__ == "__main__":
    leave(run_verb(main))
