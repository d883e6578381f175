"""From flags, base and data to the plan, the batches and the text contract of a run."""

import dataclasses
from collections import Counter
from typing import TypeVar

import numpy as np

from gritlm.data.batch_plan import HELD_OUT, Plan
from gritlm.data.batches import BatchBuilder
from gritlm.data.folders import describe_folder
from gritlm.data.held_out import NOTHING, HeldOut, hold_out
from gritlm.data.mined_batches import MinedBatches, hardness, mine_batches
from gritlm.data.no_repeats import RowTexts
from gritlm.data.records import RecordSet
from gritlm.data.teacher_vectors import TeacherVectors
from gritlm.errors import UserError
from gritlm.models.base import BaseSettings
from gritlm.models.chunks import ChunkConfig
from gritlm.models.text import TextContract
from gritlm.models.tokenizer import TextTokenizer, load_tokenizer
from gritlm.training.arguments import DataArguments, ModelArguments, RunArguments, contract_values, papers_values
from gritlm.training.rehearsal import steps_in_all
from gritlm.training.set_settings import LENGTHS, lengths_of, objectives_of, rows_of, stays_apart

FEW_STEPS = 10  # a run of fewer is hardly intended
EXAMPLES = 3  # rows that are shown as the model sees them
Group = TypeVar("Group", ModelArguments, DataArguments)


# ---- the base


def settle(group: Group, base: BaseSettings, contract: str | None = None) -> Group:
    """The group with a value for each open flag that was not given: what --contract or the base says, else the paper's.

    A projection of width 0 is None: there is none.
    """
    left = {name: value for name, value in papers_values(type(group)).items() if getattr(group, name) is None}
    said = {name: getattr(base, name) for name in left if getattr(base, name) is not None}
    chosen = {name: value for name, value in contract_values(contract, base).items() if name in left}
    none = {"projection": None} if getattr(group, "projection", None) == 0 else {}
    return dataclasses.replace(group, **(left | said | chosen | none))


# ---- the plan


def make_plan(run: RunArguments, records: list[RecordSet]) -> Plan:
    """The plan of the run.

    Raises:
        UserError: the data has too few rows for the flags.
    """
    by_set = objectives_of(run, [r.name for r in records])
    return Plan(
        list(by_set),
        list(map(len, records)),
        run.training.global_batch_size,
        run.training.seed,
        run.data.max_example_num_per_dataset,
        rows_of(run),
        run.data.sampling_temperature,
        RowTexts.concatenate([r.row_texts for r in records]),
        hold_out_rows(run, records),
        [name for name, args in by_set.items() if stays_apart(args)],
        order_rows(run, records, [args.in_batch_negatives for args in by_set.values()]),
    )


def order_rows(run: RunArguments, records: list[RecordSet], in_batch: list[bool]) -> MinedBatches | None:
    """The order of the rows of each data set with in-batch negatives; the first rank of a machine computes it."""
    folder, rows = run.data.mined_batches, rows_of(run)
    if not folder:
        return None
    wanted = [has and rows.get(r.name, 1) > 0 for r, has in zip(records, in_batch, strict=True)]
    if not any(wanted):
        raise UserError(f"--mined_batches {folder}: found no data set with in-batch negatives, so it has no effect")
    with run.training.main_process_first(desc="ordering the rows"):
        return mine_batches(folder, records, wanted, run.data.cluster_size, run.data.data_cache)


def hold_out_rows(run: RunArguments, records: list[RecordSet]) -> HeldOut:
    """The rows of --eval_held_out, of each data set that the run uses.

    Raises:
        UserError: a data set would have no row left, or none shares no text with too many others.
    """
    count, used = run.data.eval_held_out, rows_of(run)
    if not count:
        return NOTHING
    wanted = [count if used.get(r.name, 1) else 0 for r in records]
    for record_set, rows in zip(records, wanted, strict=True):
        if rows >= len(record_set):
            raise UserError(
                f"--eval_held_out {count}: found {len(record_set)} rows in data set {record_set.name}, wanted more "
                "than that"
            )
    texts = RowTexts.concatenate([r.texts_without_instructions for r in records])
    held_out = hold_out(texts, list(map(len, records)), wanted, (run.training.seed, HELD_OUT))
    if not len(held_out.rows):
        raise UserError(
            f"--eval_held_out {count}: found no row that shares no query and no positive with too many others; give "
            "--eval_data"
        )
    return held_out


def used_sets(plan: Plan, records: list[RecordSet]) -> list[RecordSet]:
    """The data sets that an epoch takes rows of."""
    return [r for r, rows in zip(records, plan.epoch_sizes, strict=True) if rows]


def slots(data: DataArguments, records: list[RecordSet]) -> tuple[int, int]:
    """Passages per query at most, and positives among them: no more than the fullest rows of the data fill."""
    most = max(int(np.diff(r.row_texts.starts).max()) - 1 for r in records) if data.max_positives > 1 else 1
    positives = min(data.max_positives, most)
    return positives - 1 + min(data.train_group_size, max(r.longest_group for r in records)), positives


def make_builder(
    run: RunArguments,
    plan: Plan,
    records: list[RecordSet],
    text_tokenizer: TextTokenizer,
    chunking: ChunkConfig,
    place: tuple[int, int],
    teacher: TeacherVectors | None = None,
) -> BatchBuilder:
    """What builds the batches of a rank; `place` is its number, and how many there are."""
    group_size, positives = slots(run.data, records)
    lengths = list(lengths_of(run, [r.name for r in records]).values())
    return BatchBuilder(plan, records, text_tokenizer, group_size, chunking, *place, positives, teacher, lengths)


def describe(plan: Plan, run: RunArguments, records: list[RecordSet], ranks: int) -> list[str]:
    """What the run will see: steps, rows, and what is left out."""
    lines = [*plan.describe(ranks), *describe_mined(plan)]
    lines += [*describe_folder(run.data.train_data), describe_steps(plan, run, ranks)]
    if dropped := sum(r.dropped_negatives for r in records):
        lines.append(f"  {dropped} negatives left out: they repeat a positive of the same row")
    if hidden := sum(r.hidden_negatives for r in records):
        lines.append(f"  {hidden} negatives left out: another row has them as a positive of the same query")
    return lines


def describe_mined(plan: Plan) -> list[str]:
    """What --mined_batches does, on 128 rows of each of 64 batches of the first epoch, beside random batches."""
    if plan.mined is None or plan.row_texts is None:
        return []
    order = {name: number for number, name in enumerate(plan.names) if plan.mined.places[number] is not None}
    steps = [step for step, name in enumerate(plan.datasets(epoch=0)) if name in order]
    rng, batches, random = np.random.default_rng(plan.seed), [], []
    for step in steps[:: -(-len(steps) // 64) or 1]:
        batch = plan.batch(0, step)
        rows = np.array([plan.first_row[number] + row for number, row in batch.rows])
        first, end = plan.first_row[order[batch.dataset] :][:2]
        batches.append(rng.permutation(rows)[:128])
        random.append(rng.integers(first, end, len(batches[-1])))
    lines = []
    if steps:
        near, by_chance = (hardness(plan.mined.teacher, plan.row_texts, some) for some in (batches, random))
        lines.append(
            f"  mined batches: clusters of {plan.mined.cluster_size} rows; similarity of a query to the positives of "
            f"other rows {near[0]:.3f} (random batches {by_chance[0]:.3f}), above its own positive's {near[1]:.2%} "
            f"({by_chance[1]:.2%})"
        )
    unmined = [
        plan.names[number] for number in plan.used if not plan.full_batches[number] or plan.names[number] not in order
    ]
    why = "no in-batch negatives, or fewer rows than a batch"
    return [*lines, *([f"  mined batches: none of {', '.join(unmined)} ({why})"] if unmined else [])]


def describe_steps(plan: Plan, run: RunArguments, ranks: int) -> str:
    """The steps of the run. Where there are few, also a batch size that gives more."""
    args, smaller = run.training, plan.batch_size

    def steps_with(batch_size: int) -> int:
        return steps_in_all(args, plan.steps_with(batch_size))

    steps = steps_with(plan.batch_size)
    if args.max_steps > 0:
        return f"  {steps} steps in all (--max_steps), {steps / plan.steps_per_epoch:.2f} epochs"
    while steps_with(smaller) < FEW_STEPS and smaller // 2 >= max(ranks, 2):
        smaller = smaller // 2 // ranks * ranks
    more = f": a smaller --global_batch_size gives more ({smaller}: {steps_with(smaller)} steps)"
    return f"  {steps} {'step' if steps == 1 else 'steps'} in all{more if steps_with(smaller) > steps else ''}"


# ---- the texts


def clip(text: str) -> str:
    """A prompt for the screen."""
    return (repr(text) if len(text) <= 80 else f"{text[:80]!r}...") if text else "none"


def main_instruction(counts: Counter[str]) -> str | None:
    """The instruction of at least nine texts of ten ("": none), or None if there is no such instruction."""
    instruction, count = counts.most_common(1)[0]
    return instruction if 10 * count >= 9 * counts.total() else None


def choose_prompts(run: RunArguments, records: list[RecordSet]) -> dict[str, str]:
    """The prompts of the model: each data set's, the largest set's or --query_prompt for queries, the passages'."""
    prompts = {r.name: main_instruction(r.instruction_counts) or "" for r in records}
    query = run.data.query_prompt
    query = prompts[max(records, key=len).name] if query is None else query
    document = main_instruction(count_passage_instructions(records)) or ""
    return {name: prompt for name, prompt in prompts.items() if prompt} | {"query": query, "document": document}


def count_passage_instructions(records: list[RecordSet]) -> Counter[str]:
    return sum((r.passage_instruction_counts for r in records), Counter())


def build_text_tokenizer(run: RunArguments, records: list[RecordSet]) -> TextTokenizer:
    """The tokenizer under this run's text contract, with the prompts that go with the model.

    Raises:
        UserError: an instruction of the data leaves no room, or can share a token with its text.
    """
    contract = TextContract(
        query_max_len=run.data.query_max_len,
        passage_max_len=run.data.passage_max_len,
        pooling_method=run.model.pooling_method,
        normalized=run.model.normalized,
        pool_instruction=run.data.pool_instruction,
        append_eos=run.data.append_eos,
        rstrip=run.base.rstrip if run.data.contract is None else run.data.contract == "paper",
        prompts=choose_prompts(run, records),
    )
    tokenizer = load_tokenizer(run.model.model_name_or_path, contract, run.model.trust_remote_code)
    text_tokenizer = TextTokenizer(tokenizer, contract)
    text_tokenizer.check_instruction(contract.prompts["query"], contract.query_max_len, "--query_max_len")
    lengths = lengths_of(run, [r.name for r in records])
    for r in records:
        sides = zip(LENGTHS, lengths[r.name], (r.instructions, r.passage_instructions), strict=True)
        for key, limit, instructions in sides:
            flag = f"--{key}" if limit == getattr(contract, key) else f"--num_samples: {r.name}: {key}"
            for instruction in instructions:
                text_tokenizer.check_instruction(instruction, limit, flag)
    return text_tokenizer


def show_examples(
    text_tokenizer: TextTokenizer, records: list[RecordSet], lengths: dict[str, tuple[int, int]]
) -> list[str]:
    """The first rows as the model will see them. Tokens in the first brackets are not pooled.

    Args:
        lengths: the longest query and passage of each data set.
    """
    lines = ["examples, as tokenised: [not pooled] pooled"]
    decode = text_tokenizer.tokenizer.decode
    rows = [(r, i) for i in range(EXAMPLES) for r in records if i < len(r)][:EXAMPLES]
    for record_set, index in rows:
        record, (query, passage) = record_set[index], lengths[record_set.name]
        for name, text, limit in (("query", record.query, query), ("pos", record.positives[0], passage)):
            (tokens,) = text_tokenizer([text], limit)
            prompt, pooled = decode(tokens.ids[: tokens.prompt_length]), decode(tokens.ids[tokens.prompt_length :])
            pooled = pooled if len(pooled) <= 160 else pooled[:160] + "..."
            line = f"  {record_set.name} {name}, {len(tokens.ids)} tokens: [{prompt}]{pooled}"
            lines.append(line.replace("\n", "\\n"))
    return lines
