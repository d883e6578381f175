"""The main job: parse, read, plan, build, train, save. `gritlm train`, or under torchrun `-m gritlm.train`."""

import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import TrainerState, set_seed
from transformers.trainer_utils import get_last_checkpoint

from gritlm.arguments import DataArguments, EmbeddingTrainingArguments, ModelArguments, parse
from gritlm.data.collator import BatchBuilder, TextContract, TextEncoder, load_tokenizer
from gritlm.data.plan import Plan
from gritlm.data.records import RecordSet, load_records
from gritlm.distributed import barrier, close
from gritlm.errors import UserError, run_verb
from gritlm.model_folder import publish_model_folder
from gritlm.models.backbone import load_backbone, load_config, probe_attention
from gritlm.models.embedder import Embedder
from gritlm.trainer import UNFINISHED, EmbeddingTrainer

RUN_FILE = "run.json"
KEPT = "nothing is overwritten, name another folder"
# What may change between a run and its continuation without changing what is learnt.
FREE_TO_CHANGE = ("data_cache",)
FIXED_TRAINING = """
    global_batch_size temperature negatives_cross_device seed learning_rate lr_scheduler_type warmup_steps weight_decay
    num_train_epochs max_steps optim adam_beta1 adam_beta2 adam_epsilon max_grad_norm bf16
""".split()  # noqa: SIM905


def main(argv: list[str]) -> int:
    quieten()
    model_args, data_args, args = parse(argv)
    first = args.process_index == 0
    say = print if first else (lambda *_: None)

    config = load_config(model_args.model_name_or_path, model_args.attn, model_args.trust_remote_code)
    with args.main_process_first(desc="reading the data"):
        records = load_records(data_args.train_data, data_args.data_cache)
    identity = run_identity(model_args, data_args, args, records)
    checkpoint = find_checkpoint(args, identity)

    ranks = args.dry_run or args.world_size
    plan = Plan(
        [r.name for r in records],
        list(map(len, records)),
        args.global_batch_size,
        args.seed,
        data_args.max_example_num_per_dataset,
    )
    group_size = min(data_args.train_group_size, max(r.longest_group for r in records))
    say(plan.describe(ranks, group_size, args.negatives_cross_device))
    dropped = sum(r.dropped_negatives for r in records)
    if dropped:
        say(f"  {dropped} negatives left out: they repeat a positive of their own row")

    encoder = build_encoder(model_args, data_args, records)
    for line in show_examples(encoder, records):
        say(line)
    if args.dry_run:
        return 0

    barrier()  # every rank has looked at the output folder before one of them writes there
    if first:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_run_file(args.output_dir, identity, finished=False)
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
    builder = BatchBuilder(plan, records, encoder, group_size, args.chunk_tokens, args.process_index, args.world_size)
    trainer = EmbeddingTrainer(embedder, args, builder)
    probe = probe_attention(embedder.backbone, model_args.attn, torch.bfloat16 if args.bf16 else None)
    say(f"attention probe: passed ({', '.join(f'{k} {v:.0e}' for k, v in probe.items())})")
    if checkpoint:
        say(f"resuming from {checkpoint}")
    if checkpoint and is_last(checkpoint):  # cut off while the model was published: the Trainer would take a step more
        embedder.load_weights(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)

    if first:
        publish_model_folder(embedder, encoder, args.output_dir, Path(args.output_dir) / UNFINISHED)
        write_run_file(args.output_dir, identity, finished=True)
        print(f"model saved to {args.output_dir}")
    barrier()
    close()
    return 0


def quieten() -> None:
    """Our own lines and one progress bar are enough."""
    transformers.utils.logging.disable_progress_bar()
    # accelerate on a DDP option that is set on purpose: buffers are constants, and a broadcast a chunk would hang
    # where ranks have different numbers of chunks.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
    warnings.filterwarnings("ignore", message=".gradient_checkpointing. is deprecated.*")


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


# ---- the output folder


def run_identity(
    model_args: ModelArguments, data_args: DataArguments, args: EmbeddingTrainingArguments, records: list[RecordSet]
) -> dict:
    """What a continuation must have in common with the run it continues."""
    flags = asdict(model_args) | asdict(data_args)
    flags |= {name: getattr(args, name) for name in FIXED_TRAINING}
    for name in FREE_TO_CHANGE:
        del flags[name]
    flags["rows"] = {r.name: len(r) for r in records}
    return json.loads(json.dumps(flags, default=str))


def find_checkpoint(args: EmbeddingTrainingArguments, identity: dict) -> str | None:
    """The newest checkpoint to go on from, or None for a fresh start.

    Raises:
        UserError: the folder holds something that is not an unfinished run of the same flags; nothing is overwritten.
    """
    folder, named = Path(args.output_dir), args.resume_from_checkpoint
    if named and not (Path(named) / "trainer_state.json").is_file():
        raise UserError(f"--resume_from_checkpoint {named}: found no whole checkpoint there")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return named
    if not (folder / RUN_FILE).is_file():
        raise UserError(f"--output_dir {folder} is not empty and holds no run of ours; {KEPT}")
    run = json.loads((folder / RUN_FILE).read_text())
    before = run["flags"]
    differing = [name for name in identity if before.get(name) != identity[name]]
    if differing:
        name = differing[0]
        raise UserError(
            f"--output_dir {folder} holds another run: {name} was {before.get(name)!r}, now {identity[name]!r}"
            + (f" (and {len(differing) - 1} more: {', '.join(differing[1:6])})" if differing[1:] else "")
            + f"; {KEPT}"
        )
    if run["finished"]:
        raise UserError(f"--output_dir {folder} holds the finished run of these flags; {KEPT}")
    return named or get_last_checkpoint(str(folder))


def is_last(checkpoint: str) -> bool:
    """Whether a checkpoint holds the run's last step."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    return state.global_step >= state.max_steps


def write_run_file(folder: str, identity: dict, finished: bool) -> None:
    path = Path(folder) / RUN_FILE
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps({"finished": finished, "flags": identity}, indent=2) + "\n")
    aside.replace(path)


if __name__ == "__main__":
    sys.exit(run_verb(main))
