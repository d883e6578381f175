"""From flags and data to the plan, the text contract, and the lines that a run prints before it trains."""

from gritlm.data.batch_plan import Plan, read_num_samples
from gritlm.data.no_repeats import RowTexts
from gritlm.data.records import RecordSet
from gritlm.errors import UserError
from gritlm.models.text import TextContract
from gritlm.models.tokenizer import TextTokenizer, load_tokenizer
from gritlm.training.arguments import DataArguments, RunArguments


def make_plan(run: RunArguments, records: list[RecordSet], ranks: int) -> Plan:
    batch_size, across = run.training.global_batch_size, run.objective.negatives_cross_device
    queries_in_reach = batch_size // (1 if across else ranks)
    if queries_in_reach * largest_group(run.data, records) == 1:
        raise UserError(
            f"--global_batch_size {batch_size} on {ranks} ranks, --negatives_cross_device {across}, "
            f"--train_group_size {run.data.train_group_size} and the negatives in the data leave a query none to "
            "contrast with"
        )
    return Plan(
        [r.name for r in records],
        list(map(len, records)),
        batch_size,
        run.training.seed,
        run.data.max_example_num_per_dataset,
        read_num_samples(run.data.num_samples),
        run.data.sampling_temperature,
        RowTexts.concatenate([r.row_texts for r in records]),
    )


def largest_group(data: DataArguments, records: list[RecordSet]) -> int:
    """Passages per query at most: no more slots than the fullest row of the data fills."""
    return min(data.train_group_size, max(r.longest_group for r in records))


def describe(plan: Plan, run: RunArguments, records: list[RecordSet], ranks: int) -> list[str]:
    """What the run will see: steps, rows, negatives, and what is left out."""
    group_size, across = largest_group(run.data, records), run.objective.negatives_cross_device
    lines = plan.describe(ranks, group_size, across).split("\n")
    if run.objective.same_tower:
        others = (plan.batch_size if across else plan.batch_size // ranks) - 1
        lines.append(f"  --same_tower adds up to {others} queries, and to its positive {others * group_size} passages")
    if dropped := sum(r.dropped_negatives for r in records):
        lines.append(f"  {dropped} negatives left out: they repeat a positive of their own row")
    if hidden := sum(r.hidden_negatives for r in records):
        lines.append(f"  {hidden} negatives left out: another row has them as a positive of the same query")
    return lines


def build_text_tokenizer(run: RunArguments, records: list[RecordSet]) -> TextTokenizer:
    """The tokenizer under this run's text contract, with the prompts that go with the model.

    Raises:
        UserError: an instruction of the data leaves no room, or can share a token with its text.
    """
    prompts = {r.name: r.instructions[0] for r in records if len(r.instructions) == 1 and r.instructions[0]}
    largest = max(records, key=len)
    on_passages = {instruction for r in records for instruction in r.passage_instructions}
    sides = {"query": prompts.get(largest.name, ""), "document": on_passages.pop() if len(on_passages) == 1 else ""}
    contract = TextContract(
        query_max_len=run.data.query_max_len,
        passage_max_len=run.data.passage_max_len,
        pooling_method=run.model.pooling_method,
        normalized=run.model.normalized,
        pool_instruction=run.data.pool_instruction,
        append_eos=run.data.append_eos,
        prompts=prompts | sides,
    )
    tokenizer = load_tokenizer(run.model.model_name_or_path, contract, run.model.trust_remote_code)
    text_tokenizer = TextTokenizer(tokenizer, contract)
    for record_set in records:
        for instruction in record_set.instructions:
            text_tokenizer.check_instruction(instruction, contract.query_max_len, "--query_max_len")
        for instruction in record_set.passage_instructions:
            text_tokenizer.check_instruction(instruction, contract.passage_max_len, "--passage_max_len")
    return text_tokenizer


def show_examples(text_tokenizer: TextTokenizer, records: list[RecordSet], count: int = 3) -> list[str]:
    """The first rows as the model will see them. Tokens in the first brackets are not pooled."""
    lines = ["examples, as tokenised: [not pooled] pooled"]
    contract, decode = text_tokenizer.contract, text_tokenizer.tokenizer.decode
    rows = [(r, i) for i in range(count) for r in records if i < len(r)][:count]
    for record_set, index in rows:
        record = record_set[index]
        for name, text, limit in (
            ("query", record.query, contract.query_max_len),
            ("pos", record.positives[0], contract.passage_max_len),
        ):
            (tokens,) = text_tokenizer([text], limit)
            prompt, pooled = decode(tokens.ids[: tokens.prompt_length]), decode(tokens.ids[tokens.prompt_length :])
            pooled = pooled if len(pooled) <= 160 else pooled[:160] + "..."
            line = f"  {record_set.name} {name}, {len(tokens.ids)} tokens: [{prompt}]{pooled}"
            lines.append(line.replace("\n", "\\n"))
    return lines
