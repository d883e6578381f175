"""From flags and data to the plan, the text contract and the examples that a run prints."""

from gritlm.data.batch_plan import Plan, read_num_samples
from gritlm.data.no_repeats import RowTexts
from gritlm.data.records import RecordSet
from gritlm.errors import UserError
from gritlm.models.text import TextContract
from gritlm.models.tokenizer import TextTokenizer, load_tokenizer
from gritlm.training.arguments import DataArguments, EmbeddingTrainingArguments, ModelArguments


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
        RowTexts.concatenate([r.documents for r in records]),
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


def build_text_tokenizer(
    model_args: ModelArguments, data_args: DataArguments, records: list[RecordSet]
) -> TextTokenizer:
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
    text_tokenizer = TextTokenizer(tokenizer, contract)
    for record_set in records:
        for instruction in record_set.instructions:
            text_tokenizer.check_instruction(instruction, data_args.query_max_len, "--query_max_len")
        for instruction in record_set.passage_instructions:
            text_tokenizer.check_instruction(instruction, data_args.passage_max_len, "--passage_max_len")
    return text_tokenizer


def show_examples(text_tokenizer: TextTokenizer, records: list[RecordSet], count: int = 3) -> list[str]:
    """The first rows as the model will see them; what stands in the first brackets is not pooled."""
    lines = ["examples, as tokenised: [not pooled] pooled"]
    rows = [(r, i) for i in range(count) for r in records if i < len(r)][:count]
    for record_set, index in rows:
        record = record_set[index]
        for side, text, limit in (
            ("query", record.query, text_tokenizer.contract.query_max_len),
            ("pos", record.positives[0], text_tokenizer.contract.passage_max_len),
        ):
            (tokens,) = text_tokenizer([text], limit)
            cut = tokens.prompt_length
            skipped, pooled = (text_tokenizer.tokenizer.decode(ids) for ids in (tokens.ids[:cut], tokens.ids[cut:]))
            pooled = pooled if len(pooled) <= 160 else pooled[:160] + "..."
            line = f"  {record_set.name} {side}, {len(tokens.ids)} tokens: [{skipped}]{pooled}"
            lines.append(line.replace("\n", "\\n"))
    return lines
