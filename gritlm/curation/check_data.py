"""Read all training data and report what is wrong with it, file by file.

Findings (exit code 1): files that cannot be read, bad rows, equal rows, negatives that repeat a positive of their row,
queries and relevant documents of an evaluation set, instructions that training refuses, instructions or labels that
only positives or only negatives have, [instruction, text] in place of a list of passages, unread labels and splits.
Notes: repeated queries, positives of several queries (a batch never holds two of them), negatives per row,
instructions, keys that are not read, lengths, truncation, scripts.
"""

import argparse
import json
import os
import re
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gritlm.cli import home_expanded, verb_parser
from gritlm.curation.file_stats import (
    KINDS,
    LEAKS,
    FileReport,
    FileStats,
    count_characters,
    find_repeats,
    flag_keys,
    flat_instructions,
    read_block,
    read_file_stats,
    repeated_texts,
)
from gritlm.curation.fix import LOG, fix
from gritlm.curation.histogram import describe_lengths
from gritlm.curation.overlap import EvaluationTexts
from gritlm.data.folders import describe_folder, find_files
from gritlm.data.labels import is_label, is_split, unread_notes
from gritlm.data.records import revealing_label, spelled_alike
from gritlm.errors import UserError
from gritlm.files import written_aside
from gritlm.models.text import Text, TextContract

if TYPE_CHECKING:
    from gritlm.models.tokenizer import TextTokenizer

EXAMPLES = """examples:
  gritlm check-data train.jsonl
  gritlm check-data data/ --model_name_or_path Qwen/Qwen3-0.6B --query_max_len 512 --eval beir/scifact
  gritlm check-data data/ --fix clean/      writes the good rows, and dropped.tsv with all changes"""

SHOWN = 20  # bad rows on the screen; --report lists all
FIRST = 5  # lines named for each kind of finding
VARIABLE = re.compile(r"0x\w+|\d+|'[^']*'")  # what differs between the messages of one kind of fault


def describe_file(report: FileReport, unit: str, max_lengths: dict[str, int]) -> Iterator[str]:
    """The findings and notes on a file."""
    stats, rows = report.stats, len(report.stats.lines)
    yield f"{report.path}: {_number(report.rows, 'row')}"
    yield from (f"  !! {problem.removeprefix(f'{report.path}: ')}" for problem in report.problems[:SHOWN])
    if more := report.problems[SHOWN:]:
        yield f"  !! and {len(more)} more like these (--report FILE lists all)"
    for kind, (words, fix_does) in KINDS.items():
        if lines := [line for line, found, _ in report.stats.found if found == kind]:
            kept = " (--fix keeps them)" if fix_does == "keeps" else ""
            words = words.replace("rows", "row", 1) if len(lines) == 1 else words
            yield f"  !! {len(lines)} {words}{kept}: {_first_lines(lines)}"
    if not rows:
        if report.stats.found:
            yield "  no row is good; gritlm prepare makes this format of other columns and shapes"
        return
    queries, positives = repeated_texts(stats)
    yield f"  rows that repeat a query: {queries}; positives that answer several queries: {positives}"
    negatives = np.asarray(stats.negative_counts)
    yield (
        f"  negatives per row: {negatives.min()} to {negatives.max()}, median {np.median(negatives):.0f}; "
        f"{(negatives == 0).mean():.0%} of the rows have none"
    )
    for instruction, count in stats.instructions.most_common(3):
        yield f"  instruction of {_number(count, 'row')}: {repr(instruction) if instruction else 'none'}"
    if len(stats.instructions) > 3:
        yield f"  and {len(stats.instructions) - 3} more instructions"
    for spellings in spelled_alike(stats.instructions + stats.passage_instructions):
        yield f"  one instruction in several spellings: {', '.join(map(repr, spellings))}"
    for what, count in stats.similar.items():
        yield f"  {_number(count, 'row')} in which {LEAKS[what].words}, but for a word in 6 (similar; no finding)"
    if stats.score_errors:
        line, why = stats.score_errors[0]
        rows_with = _number(len(stats.score_errors), "row")
        yield f"  scores that no loss can read, in {rows_with}; the first, line {line}: {why}"
    if stats.unread:
        keys = (f"{json.dumps(key)} ({_number(count, 'row')})" for key, count in stats.unread.most_common())
        yield f"  keys that are not read: {', '.join(keys)}"
    for kind, lengths in (("query", stats.query_lengths), ("passage", stats.passage_lengths)):
        yield from describe_lengths(kind, np.asarray(lengths), unit, max_lengths[kind])
    total = max(1, stats.scripts.total())
    yield "  scripts: " + ", ".join(f"{n} {c / total:.0%}" for n, c in stats.scripts.most_common(4))


def _number(count: int, word: str) -> str:
    return f"{count} {word}" + "s" * (count != 1)


def _first_lines(lines: list[int]) -> str:
    more = f" and {len(lines) - FIRST} more" if len(lines) > FIRST else ""
    return f"line{'s' * (len(lines) > 1)} {', '.join(map(str, lines[:FIRST]))}{more}"


def describe_bad_rows(reports: list[FileReport]) -> Iterator[str]:
    """The first bad rows of all files; then each kind of fault, with the number of rows and its first row."""
    kinds: dict[str, list[str]] = {}
    bad = []
    for report in reports:
        for line, why in ((line, why) for line, kind, why in report.stats.found if kind == "bad"):
            bad.append(f"{report.path}:{line}: {why}")
            kinds.setdefault(VARIABLE.sub("", why), []).append(bad[-1])
    if bad:
        yield "\nbad rows" + f", the first {SHOWN} of {len(bad)} (--report FILE lists all)" * (len(bad) > SHOWN) + ":"
        yield from (f"  {message}" for message in bad[:SHOWN])
    if len(bad) > SHOWN:
        yield "\nbad rows by kind of fault:"
        for rows in sorted(kinds.values(), key=len, reverse=True)[:SHOWN]:
            yield f"  {_number(len(rows), 'row')} as {rows[0]}"
        if len(kinds) > SHOWN:
            yield f"  and {len(kinds) - SHOWN} rarer kinds"


# ---- checking


def check(
    paths: list[Path],
    evaluation: EvaluationTexts | None,
    text_tokenizer: "TextTokenizer | None",
    max_lengths: dict[str, int],
    processes: int,
    ignored: Collection[str] = (),
) -> list[FileReport]:
    """Read the files in order and report on each.

    Args:
        paths: files of training data.
        evaluation: the queries that training data must not contain.
        text_tokenizer: measures the lengths and checks the instructions. None: lengths are in characters.
        max_lengths: tokens per "query" and "passage".
        processes: processes that read a file together.
        ignored: keys that may stay unread, although they look like a label or a split.
    """
    count_units = partial(count_tokens, text_tokenizer) if text_tokenizer else count_characters
    reader = partial(read_block, count_units, evaluation)
    read = [read_file_stats(path, reader, processes) for path in paths]
    find_repeats(paths, [stats for stats, _ in read])
    reports = []
    for path, (stats, ended) in zip(paths, read, strict=True):
        problems = [ended] if ended else []
        if flat := list(flat_instructions(stats)):  # whose negatives are no repeats
            stats.found = [found for found in stats.found if found[1] != "negative"]
            problems += flat
        if label := revealing_label(stats.positive_labels, stats.negative_labels):
            problems.append(f"the label {label!r} tells positives from negatives")
        problems += find_unread_labels(stats, ignored)
        if text_tokenizer:
            problems += find_bad_instructions(stats, text_tokenizer, max_lengths)
        stats.found.sort()
        reports.append(FileReport(path, stats, ended, problems))
    return reports


def count_tokens(text_tokenizer: "TextTokenizer", texts: list[Text]) -> list[int]:
    return [len(tokens.ids) for tokens in text_tokenizer(texts, 1 << 30)]


def find_unread_labels(stats: FileStats, ignored: Collection[str]) -> Iterator[str]:
    """A message for each key that seems to say which rows to train on, although training reads no such key."""
    for name in dict.fromkeys([*unread_notes(stats.unread)[1], *flag_keys(stats)]):
        if name not in ignored:
            rates, splits = "--label_column if it rates the pairs", "--split if it names the split"
            use = rates if is_label(name) else splits if is_split(name) else f"{rates}, {splits}"
            if name == "score":
                use += "; or train the pairs by their scores, --cosent_weight 1 --contrastive_weight 0 of gritlm train"
            yield (
                f"{name}: found a key that InfoNCE does not read, in {_number(stats.unread[name], 'row')}; use gritlm "
                f"prepare {use}, or --ignore_columns {name} if all rows are good"
            )


def find_bad_instructions(
    stats: FileStats, text_tokenizer: "TextTokenizer", max_lengths: dict[str, int]
) -> Iterator[str]:
    """The messages with which training would refuse the instructions of a file."""
    for kind, instructions in (("query", stats.instructions), ("passage", stats.passage_instructions)):
        for instruction in instructions:
            try:
                text_tokenizer.check_instruction(instruction, max_lengths[kind], f"--{kind}_max_len")
            except UserError as error:
                yield str(error)


def write_report(reports: list[FileReport], path: Path) -> None:
    with written_aside(path) as aside, open(aside, "w", encoding="utf-8") as out:
        for report in reports:
            found = [(0, problem) for problem in report.problems] + [(line, why) for line, _, why in report.stats.found]
            out.writelines(f"{report.path}\t{line}\t{finding}\n" for line, finding in sorted(found))


# ---- the verb


def parse(argv: list[str]) -> argparse.Namespace:
    parser = verb_parser("check-data", __doc__, EXAMPLES)
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="a file or folder, as --train_data of gritlm train")
    add(
        "--model_name_or_path",
        type=home_expanded,
        help="check instructions, and measure lengths in tokens, with this model's tokenizer",
    )
    add("--query_max_len", type=int, default=512, help="tokens per query in training, default 512")
    add("--passage_max_len", type=int, default=512, help="tokens per passage in training, default 512")
    add("--eval", nargs="+", type=Path, default=[], help="BEIR folders or files of queries to keep out of the data")
    add("--ignore_columns", nargs="+", default=[], help="label- or split-like keys left unread on purpose: a,b or a b")
    add("--report", type=Path, help="write all findings to this new file: file, line, finding, tab-separated")
    add("--fix", type=Path, metavar="OUT", help=f"write the good rows to this new folder, the changes to {LOG}")
    add("--processes", type=int, default=os.cpu_count() or 1, help="default: one per core")
    args = parser.parse_args(argv)
    args.ignore_columns = [name for names in args.ignore_columns for name in names.split(",") if name]
    for flag, path in (("--fix", args.fix), ("--report", args.report)):
        if path and path.exists():
            raise UserError(f"{flag} {path} exists; nothing is overwritten, choose another name")
    for path in args.paths:
        if args.fix and path.is_dir() and args.fix.resolve().is_relative_to(path.resolve()):
            raise UserError(f"--fix {args.fix} is in {path}, and would be read as data; name a folder elsewhere")
    return args


def load_text_tokenizer(name_or_path: str, max_lengths: dict[str, int]) -> "TextTokenizer":
    from gritlm.models.tokenizer import TextTokenizer, load_tokenizer  # transformers takes seconds to import

    contract = TextContract(max_lengths["query"], max_lengths["passage"])
    return TextTokenizer(load_tokenizer(name_or_path, contract), contract)


def main(argv: list[str]) -> int:
    args = parse(argv)
    found = [(file, path) for path in args.paths for files in find_files(path).values() for file in files]
    max_lengths = {"query": args.query_max_len, "passage": args.passage_max_len}
    name_or_path, evaluation = args.model_name_or_path, None
    text_tokenizer = load_text_tokenizer(name_or_path, max_lengths) if name_or_path else None
    if args.eval:
        evaluation = EvaluationTexts.read(args.eval)
        print(f"--eval: looking for {evaluation.queries} evaluation queries and the documents relevant to them")
        print(*(f"  {line}" for line in evaluation.read_from), sep="\n")
    reports = check(
        [file for file, _ in found], evaluation, text_tokenizer, max_lengths, args.processes, args.ignore_columns
    )

    for path in (path for path in args.paths if path.is_dir()):
        print("\n".join([f"{path}: {_number(len(find_files(path)), 'data set')}", *describe_folder(path)]))
    for name in {*args.ignore_columns}.difference(*(report.stats.unread for report in reports)):
        print(f"--ignore_columns {name}: no row has this key")
    for report in reports:
        print("\n".join(describe_file(report, "tokens" if text_tokenizer else "characters", max_lengths)))
    for line in describe_bad_rows(reports):
        print(line)
    if args.report:
        write_report(reports, args.report)
    if args.fix:
        print("\n".join(["", *fix(reports, args.fix, [path for _, path in found])]))
        print(f"{args.fix / LOG} lists the rows that were dropped or changed")
    rows = sum(len(report.stats.lines) for report in reports)
    findings = sum(len(report.problems) + len(report.stats.found) for report in reports)
    print(", ".join((_number(len(reports), "file"), _number(rows, "good row"), _number(findings, "finding"))))
    return int(findings > 0)
