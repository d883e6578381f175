"""What a run says about its texts before it trains: the model's prompts, texts that are cut off, doubtful rows."""

import json
from collections import Counter
from collections.abc import Iterator

from gritlm.data.labels import unread_notes
from gritlm.data.records import Record, RecordSet, label_of, revealing_label, spelled_alike
from gritlm.errors import UserError
from gritlm.models.text import Text
from gritlm.models.tokenizer import TextTokenizer
from gritlm.training.arguments import DataArguments
from gritlm.training.setup import clip, count_passage_instructions, main_instruction

SAMPLED = 1000  # rows of all data sets, but at least 20 of each, whose texts are looked at
SHORT = 8  # a query or passage that is cut off keeps fewer tokens than this: next to nothing


def report_on_texts(
    records: list[RecordSet],
    text_tokenizer: TextTokenizer,
    data: DataArguments,
    lengths: dict[str, tuple[int, int]],
) -> tuple[list[str], list[str]]:
    """Lines to print, and warnings.

    Args:
        lengths: the longest query and passage of each data set, in tokens.
    Raises:
        UserError: rows have an unread key that seems to be a label or a split.
    """
    samples = {r.name: sample_rows(r, max(20, SAMPLED // len(records))) for r in records}
    warnings = [*doubtful_prompts(records, data.query_prompt), *unread_keys(records, data.ignored)]
    for r in records:
        warnings += revealing_rows(r, samples[r.name])
    contract = text_tokenizer.contract
    lines = describe_prompts(records, contract.prompts)
    for number, (kind, limit) in enumerate((("query", contract.query_max_len), ("passage", contract.passage_max_len))):
        limits = {r.name: lengths[r.name][number] for r in records}
        cut, short = cut_off_texts(samples, text_tokenizer, kind, limits)
        what = f"--{kind}_max_len {limit}" + " or the length of the data set" * (len({limit, *limits.values()}) > 1)
        lines += [f"  {cut} are cut to {what}"] if cut else []
        if short:
            warnings.append(f"{what} leaves fewer than {SHORT} tokens behind the instruction of {short}: raise it")
    return lines, warnings


def sample_rows(records: RecordSet, count: int) -> list[Record]:
    """At most `count` rows at equal distances."""
    count = min(count, len(records))
    return [records[i * len(records) // count] for i in range(count)]


# ---- instructions


def describe_prompts(records: list[RecordSet], prompts: dict[str, str]) -> list[str]:
    """The model's query and document prompts, where there are any, and the instructions in the data."""
    lines, largest = [], max(records, key=len)
    for name, whose, counts in (
        ("query", largest.name, largest.instruction_counts),
        ("document", "the passages", count_passage_instructions(records)),
    ):
        if prompts[name] or (len(counts) > 1 and main_instruction(counts) is not None):
            found = f"; instructions of {whose}: {_shares(counts)}" if len(counts) > 1 else ""
            lines.append(f"  {name} prompt of the model: {clip(prompts[name])}{found}")
    return lines


def _shares(counts: Counter[str]) -> str:
    frequent = [f"{count / counts.total():.1%} {clip(text)}" for text, count in counts.most_common(3)]
    return ", ".join([*frequent, *([f"and {len(counts) - 3} more"] if len(counts) > 3 else [])])


def doubtful_prompts(records: list[RecordSet], query_prompt: str | None) -> Iterator[str]:
    """Prompts that are missing because no instruction is frequent enough; instructions spelled in several ways."""
    largest, of_passages = max(records, key=len), count_passage_instructions(records)
    none = [r.name for r in records if main_instruction(r.instruction_counts) is None]
    if largest.name in none and query_prompt is None:
        yield (
            f"the model gets no query prompt: no instruction is that of nine rows of ten of {largest.name} "
            f"({_shares(largest.instruction_counts)}); --query_prompt names one"
        )
    if others := [name for name in none if name != largest.name]:
        yield f"the model gets no prompt for {', '.join(others)}: no instruction is that of nine of ten of its rows"
    if main_instruction(of_passages) is None:
        shares = _shares(of_passages)
        yield f"the model gets no document prompt: no instruction is that of nine passages of ten ({shares})"
    counts = sum((r.instruction_counts for r in records), of_passages)
    if query_prompt and query_prompt not in counts:
        yield f"--query_prompt {query_prompt!r} is the instruction of no row"
    for group in spelled_alike(counts):
        yield "one instruction in several spellings: " + ", ".join(f"{text!r} ({counts[text]} texts)" for text in group)


# ---- rows


def unread_keys(records: list[RecordSet], ignored: set[str]) -> Iterator[str]:
    for r in records:
        names, unclear = unread_notes(Counter({name: rows for name, rows in r.unread.items() if name not in ignored}))
        if unclear:
            raise UserError(
                f"{r.name}: found the key {unclear[0]!r} in {r.unread[unclear[0]]} rows, which seems to tell positives "
                "from others, or train from test; training does not read it. gritlm prepare does (--label_column, "
                f"--split); --ignore_columns {','.join(unclear)} trains on all rows"
            )
        if names:
            keys = ", ".join(f"{json.dumps(name)} ({r.unread[name]} rows)" for name in names)
            yield f'{r.name}: keys that are not read: {keys}; an instruction is read from "query": [instruction, text]'


def revealing_rows(records: RecordSet, sample: list[Record]) -> Iterator[str]:
    """What tells positives from negatives without their content."""
    if records.revealing_rows:
        yield (
            f"{records.name}: the instructions tell the positives from the negatives in {records.revealing_rows} of "
            f"{len(records)} rows, which gives the answer away"
        )
    rows = [row for row in sample if row.negatives]
    positives = Counter(label_of(text.text) for row in rows for text in row.positives)
    negatives = Counter(label_of(text.text) for row in rows for text in row.negatives)
    if label := revealing_label(positives, negatives):
        yield f"{records.name}: the label {label!r} tells positives from negatives, which gives the answer away"


# ---- lengths


def cut_off_texts(
    samples: dict[str, list[Record]], text_tokenizer: TextTokenizer, kind: str, limits: dict[str, int]
) -> tuple[str, str]:
    """How many texts of the sampled rows are longer than allowed, and how many of them keep next to nothing.

    Args:
        kind: query or passage. A row's passages are its first positive and its first negative.
        limits: the longest text of each data set, in tokens.
    """
    cut, short = [], []  # names of data sets
    total: Counter[str] = Counter()  # data set -> texts
    for name, rows in samples.items():
        found = [text for row in rows for text in ([row.query] if kind == "query" else _passages(row))]
        total[name], limit = len(found), limits[name]
        tokens = text_tokenizer(found, limit + 1, pool_instruction=False)
        longer = [text.prompt_length for text in tokens if len(text.ids) > limit]
        room = limit - text_tokenizer.contract.append_eos
        cut += [name] * len(longer)
        short += [name for prompt_length in longer if room - prompt_length < SHORT]
    what = {"query": "queries", "passage": "passages"}[kind]

    def in_words(names: list[str]) -> str:
        if not names:
            return ""
        by_set = sorted(Counter(names).items(), key=lambda item: -item[1] / total[item[0]])
        sets = ", ".join(f"{name} {count} of {total[name]}" for name, count in by_set[:3])
        return f"{len(names)} of {total.total()} {what} looked at ({sets}{', ...' if by_set[3:] else ''})"

    return in_words(cut), in_words(short)


def _passages(row: Record) -> list[Text]:
    return [row.positives[0], *row.negatives[:1]]
