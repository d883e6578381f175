"""Read all training data and report what is wrong with it, file by file.

Findings (exit code 1): bad rows, duplicate rows, negatives that repeat a positive of their row, queries of an
evaluation set, instructions that training refuses, instructions or labels that only positives or only negatives have.
Notes: repeated queries, positives of several queries (a batch never holds two of them), negatives per row,
instructions, keys that are not read, lengths, truncation, scripts.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from gritlm.cli import home_expanded, verb_parser
from gritlm.curation.file_stats import (
    BlockReader,
    FileStats,
    count_characters,
    find_duplicates,
    read_file_stats,
    repeated_texts,
)
from gritlm.curation.histogram import describe_lengths
from gritlm.curation.overlap import EvaluationTexts, read_evaluation_queries
from gritlm.data.folders import SUFFIXES, find_files, list_files, stem
from gritlm.data.records import revealing_label, spelled_alike
from gritlm.data.rows import decode, read_blocks
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


@dataclass
class FileReport:
    """The findings and notes on one file."""

    path: Path
    stats: FileStats
    problems: list[str]  # of the file as a whole
    duplicates: np.ndarray  # lines that repeat an earlier row, of this file or of an earlier one

    @property
    def findings(self) -> int:
        return len(self.problems) + len(self.dropped()) + len(self.changed()) + len(self.kept())

    def dropped(self) -> list[tuple[int, str]]:
        """The lines that --fix drops, and why."""
        why = [(line, "repeats an earlier row") for line in self.duplicates.tolist()]
        why += [(line, f"the query is in an evaluation set ({match})") for line, match in self.stats.leaked]
        return why + [(line, message.removeprefix(f"{self.path}:{line}: ")) for line, message in self.stats.bad]

    def changed(self) -> list[tuple[int, str]]:
        """The lines of which --fix drops negatives, and why."""
        return [(line, f"{count} negatives repeat a positive") for line, count in self.stats.repeated_positives]

    def kept(self) -> list[tuple[int, str]]:
        """The lines with a fault that --fix cannot mend, and the fault."""
        return [(line, "the instructions tell the positives from the negatives") for line in self.stats.revealing]

    def summary(self, unit: str, max_lengths: dict[str, int]) -> Iterator[str]:
        stats, rows = self.stats, len(self.stats.lines)
        yield f"{self.path}: {rows + len(stats.bad)} rows"
        yield from (f"  !! {problem}" for problem in self.problems[:SHOWN])
        for count, kind in (
            (len(stats.bad), "bad rows"),
            (len(self.duplicates), "rows that repeat an earlier row"),
            (len(stats.repeated_positives), "rows with negatives that repeat a positive"),
            (len(stats.revealing), "rows whose instructions tell the positives from the negatives (--fix keeps them)"),
            (len(stats.leaked), f"queries of an evaluation set ({_counts(match for _, match in stats.leaked)})"),
        ):
            if count:
                yield f"  !! {count} {kind}"
        if not rows:
            return
        queries, positives = repeated_texts(stats)
        yield f"  {queries} rows repeat a query, {positives} positives answer several queries"
        negatives = np.asarray(stats.negative_counts)
        yield (
            f"  negatives per row: {negatives.min()} to {negatives.max()}, median {np.median(negatives):.0f}; "
            f"{(negatives == 0).mean():.0%} of the rows have none"
        )
        for instruction, count in stats.instructions.most_common(3):
            yield f"  instruction, {count} rows: {instruction!r}"
        if len(stats.instructions) > 3:
            yield f"  and {len(stats.instructions) - 3} more instructions"
        for spellings in spelled_alike(stats.instructions + stats.passage_instructions):
            yield f"  one instruction in several spellings: {', '.join(map(repr, spellings))}"
        if stats.unread:
            keys = ", ".join(f"{json.dumps(key)} ({count} rows)" for key, count in stats.unread.most_common())
            yield f"  keys that are not read: {keys}"
        for kind, lengths in (("query", stats.query_lengths), ("passage", stats.passage_lengths)):
            yield from describe_lengths(kind, np.asarray(lengths), unit, max_lengths[kind])
        total = max(1, stats.scripts.total())
        yield "  scripts: " + ", ".join(f"{n} {c / total:.0%}" for n, c in stats.scripts.most_common(4))


def _counts(values: Iterable[str]) -> str:
    return ", ".join(f"{count} {value}" for value, count in Counter(values).most_common())


# ---- checking


def check(
    paths: list[Path],
    evaluation: EvaluationTexts | None,
    text_tokenizer: "TextTokenizer | None",
    max_lengths: dict[str, int],
    processes: int,
) -> list[FileReport]:
    """Read the files in order and report on each.

    Args:
        paths: files of training data.
        evaluation: the queries that training data must not contain.
        text_tokenizer: measures the lengths and checks the instructions. None: lengths are in characters.
        max_lengths: tokens per "query" and "passage".
        processes: processes that read a file together.
    """
    reader = BlockReader(partial(count_tokens, text_tokenizer) if text_tokenizer else count_characters, evaluation)
    read = [read_file_stats(path, reader, processes) for path in paths]
    duplicates = find_duplicates([stats for stats, _ in read])
    reports = []
    for path, (stats, problem), lines in zip(paths, read, duplicates, strict=True):
        problems = [problem] if problem else []
        if label := revealing_label(stats.positive_labels, stats.negative_labels):
            problems.append(f"the label {label!r} tells positives from negatives")
        if text_tokenizer:
            problems += find_bad_instructions(stats, text_tokenizer, max_lengths)
        reports.append(FileReport(path, stats, problems, lines))
    return reports


def count_tokens(text_tokenizer: "TextTokenizer", texts: list[Text]) -> list[int]:
    return [len(tokens.ids) for tokens in text_tokenizer(texts, 1 << 30)]


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


def skipped_files(folder: Path) -> list[Path]:
    """The files of a data folder that are not read because of their suffix, without hidden ones."""
    return [path for path in list_files(folder) if not path.name.endswith(SUFFIXES)]


# ---- writing


def write_report(reports: list[FileReport], path: Path) -> None:
    with written_aside(path) as aside, open(aside, "w", encoding="utf-8") as out:
        for report in reports:
            found = [(0, problem) for problem in report.problems]
            found += report.dropped() + report.changed() + report.kept()
            out.writelines(f"{report.path}\t{line}\t{finding}\n" for line, finding in sorted(found))


def fix(reports: list[FileReport], folder: Path, roots: list[Path]) -> None:
    """Write the good rows of each file to the same sub-folder and name in `folder`, so that data sets stay the same."""
    lines = []
    with written_aside(folder) as aside:
        aside.mkdir(parents=True)
        with open(aside / "dropped.tsv", "w", encoding="utf-8") as log:
            for report, root in zip(reports, roots, strict=True):
                name = report.path.relative_to(root if root.is_dir() else root.parent)
                base, number = stem(name), 2
                name = name.with_name(f"{base}.jsonl")
                while (aside / name).exists():
                    name, number = name.with_name(f"{base}-{number}.jsonl"), number + 1
                kept = write_good_rows(report, aside / name, log)
                if not kept:
                    (aside / name).unlink()
                lines.append(f"{report.path}: " + (f"{kept} rows in {folder / name}" if kept else "no good row"))
    print("\n".join(lines))


def write_good_rows(report: FileReport, path: Path, log: TextIO) -> int:
    """Write the good rows unchanged, but for negatives that repeat a positive. Every change goes to the log.

    Returns:
        the number of rows written.
    """
    dropped, changed, kept = dict(report.dropped()), dict(report.changed()), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as out:
        try:
            for block in read_blocks(report.path):
                for number, raw in block:
                    if number in dropped:
                        log.write(f"{report.path}\t{number}\tdropped\t{dropped[number]}\n")
                        continue
                    if number in changed:
                        log.write(f"{report.path}\t{number}\tchanged\t{changed[number]}\n")
                    if number in changed or not isinstance(raw, bytes):
                        raw = json.dumps(_without_repeats(decode(report.path, number, raw))).encode()
                    out.write(raw if raw.endswith(b"\n") else raw + b"\n")
                    kept += 1
        except UserError as error:
            log.write(f"{report.path}\t0\tcut off\t{error}\n")
    return kept


def _without_repeats(row: dict[str, Any]) -> dict[str, Any]:
    positives = {_string(text) for text in row["pos"]}
    return row | {"neg": [text for text in row["neg"] if _string(text) not in positives]}


def _string(text: str | list[str]) -> str:
    return (text if isinstance(text, str) else text[1]).rstrip()


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
    add("--report", type=Path, help="write all findings to this new file: file, line, finding, tab-separated")
    add(
        "--fix",
        type=Path,
        metavar="OUT",
        help="write the good rows to this new folder, the changes to dropped.tsv",
    )
    add("--processes", type=int, default=os.cpu_count() or 1, help="default: one per core")
    args = parser.parse_args(argv)
    if args.fix and args.fix.exists():
        raise UserError(f"--fix {args.fix} exists; nothing is overwritten, name a new folder")
    if args.report and args.report.exists():
        raise UserError(f"--report {args.report} exists; nothing is overwritten, name a new file")
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
        evaluation = EvaluationTexts(text for path in args.eval for text in read_evaluation_queries(path))
    reports = check([file for file, _ in found], evaluation, text_tokenizer, max_lengths, args.processes)

    for path in (path for path in args.paths if path.is_dir()):
        if skipped := skipped_files(path):
            print(f"{path}: skipped because of their suffix: {_counts(file.suffix for file in skipped)}")
    for report in reports:
        print("\n".join(report.summary("tokens" if text_tokenizer else "characters", max_lengths)))
    bad = [message for report in reports for _, message in report.stats.bad]
    if bad:
        print("\nbad rows" + (f", the first {SHOWN} (all: --report FILE)" if len(bad) > SHOWN else "") + ":")
        print("\n".join(f"  {message}" for message in bad[:SHOWN]))
    if args.report:
        write_report(reports, args.report)
    if args.fix:
        fix(reports, args.fix, [path for _, path in found])
    rows, findings = sum(len(report.stats.lines) for report in reports), sum(report.findings for report in reports)
    print(f"{len(reports)} files, {rows} good rows, {findings} findings")
    return int(findings > 0)
