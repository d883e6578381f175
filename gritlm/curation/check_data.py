"""Read everything a run would read, and say what is wrong with it, file by file, before a GPU is waited for.

Findings (exit code 1): bad rows, rows that stand twice, positives among a row's own negatives, queries of an evaluation
set, instructions that training refuses. Notes: queries with several rows and texts that answer several queries (a batch
never holds two of them), negatives a row, instructions, lengths and what would be cut off, scripts.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gritlm.cli import verb_parser
from gritlm.curation.file_stats import BlockReader, FileStats, find_duplicates, read_file_stats, repeated_texts
from gritlm.curation.histogram import sparkline
from gritlm.curation.overlap import EvaluationTexts, read_evaluation_queries
from gritlm.data.records import find_files
from gritlm.data.rows import SUFFIXES, decode, read_blocks
from gritlm.errors import UserError
from gritlm.files import written_aside
from gritlm.models.text import TextContract
from gritlm.models.tokenizer import TextTokenizer, load_tokenizer

EXAMPLES = """examples:
  gritlm check-data train.jsonl
  gritlm check-data data/ --model_name_or_path Qwen/Qwen3-0.6B --query_max_len 512 --eval beir/scifact
  gritlm check-data data/ --fix clean/      writes the good rows, and what became of the others to dropped.tsv"""

SHOWN = 20  # bad rows on the screen; all of them with --report
EDGES = np.array([16, 32, 64, 128, 256, 512, 1024, 2048, 4096])


@dataclass
class FileReport:
    """One file's findings and notes, ready to be said."""

    path: Path
    stats: FileStats
    problems: list[str]  # of the file as a whole
    duplicates: np.ndarray  # lines that repeat a row of this file or of one before it

    @property
    def findings(self) -> int:
        stats = self.stats
        return sum(map(len, (self.problems, stats.bad, self.duplicates, stats.repeats, stats.leaked)))

    def dropped(self) -> list[tuple[int, str]]:
        """Lines that are no good rows, and why."""
        why = [(line, "the same row stands before") for line in self.duplicates.tolist()]
        why += [(line, f"the query stands in an evaluation set ({how})") for line, how in self.stats.leaked]
        return why + [(line, message.removeprefix(f"{self.path}:{line}: ")) for line, message in self.stats.bad]

    def mended(self) -> list[tuple[int, str]]:
        """Lines of good rows that lose something, and what."""
        return [(line, f"{count} negatives repeat a positive") for line, count in self.stats.repeats]

    def table(self, unit: str, limits: dict[str, int]) -> Iterator[str]:
        stats, rows = self.stats, len(self.stats.lines)
        yield f"{self.path}: {rows + len(stats.bad)} rows"
        yield from (f"  !! {problem}" for problem in self.problems[:SHOWN])
        for count, what in (
            (len(stats.bad), "bad rows"),
            (len(self.duplicates), "rows that stand before, the same in all"),
            (len(stats.repeats), "rows with a positive among their own negatives"),
            (len(stats.leaked), f"queries of an evaluation set ({_counts(how for _, how in stats.leaked)})"),
        ):
            if count:
                yield f"  !! {count} {what}"
        if not rows:
            return
        queries, answers = repeated_texts(stats)
        yield f"  {queries} rows repeat a query, {answers} positives answer several queries"
        negatives = np.asarray(stats.neg_counts)
        yield (
            f"  negatives a row: {negatives.min()} to {negatives.max()}, median {np.median(negatives):.0f}; "
            f"{(negatives == 0).mean():.0%} of the rows have none"
        )
        for instruction, count in stats.instructions.most_common(3):
            yield f"  instruction, {count} rows: {instruction!r}"
        if len(stats.instructions) > 3:
            yield f"  and {len(stats.instructions) - 3} more instructions"
        for side, lengths in (("query", stats.query_lengths), ("passage", stats.passage_lengths)):
            yield from _lengths(side, np.asarray(lengths), unit, limits[side])
        total = max(1, stats.scripts.total())
        yield "  scripts: " + ", ".join(f"{n} {c / total:.0%}" for n, c in stats.scripts.most_common(4))


def find_problems(stats: FileStats, text_tokenizer: TextTokenizer | None, limits: dict[str, int]) -> Iterator[str]:
    """What training would say of the instructions, and stop."""
    if not text_tokenizer:
        return
    for side, instructions in (("query", stats.instructions), ("passage", stats.passage_instructions)):
        for instruction in instructions:
            try:
                text_tokenizer.check_instruction(instruction, limits[side], f"--{side}_max_len")
            except UserError as error:
                yield str(error)


def _counts(values: Iterable[str]) -> str:
    return ", ".join(f"{count} {value}" for value, count in Counter(values).most_common())


def _lengths(side: str, lengths: np.ndarray, unit: str, limit: int) -> Iterator[str]:
    if not len(lengths):
        return
    counts = np.bincount(np.searchsorted(EDGES, lengths, side="left"), minlength=len(EDGES) + 1)
    low, middle, high = np.percentile(lengths, [5, 50, 95])
    cut = f"; {(lengths > limit).mean():.1%} longer than {limit} are cut" if unit == "tokens" else ""
    yield (
        f"  {side} {unit} |{sparkline(counts)}| (to {EDGES[0]}, {EDGES[1]}, ... {EDGES[-1]}, more): "
        f"median {middle:.0f}, 5% under {low:.0f}, 5% over {high:.0f}, longest {lengths.max()}"
        f"{cut}; {len(lengths)} looked at"
    )


# ---- mending


def write_fixed(report: FileReport, out: Path, log) -> int:
    """The file's good rows as they stand, less negatives that are positives; every other row into the log."""
    drop, mend, kept = dict(report.dropped()), dict(report.mended()), 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "xb") as good:
        try:
            for block in read_blocks(report.path):
                for number, raw in block:
                    if number in drop:
                        log.write(f"{report.path}\t{number}\tdropped\t{drop[number]}\n")
                        continue
                    if number in mend or not isinstance(raw, bytes):
                        row = decode(report.path, number, raw)
                        texts = [item if isinstance(item, str) else item[1] for item in row["pos"]]
                        known = {text.rstrip() for text in texts}
                        row["neg"] = [
                            n for n in row["neg"] if (n if isinstance(n, str) else n[1]).rstrip() not in known
                        ]
                        raw = json.dumps(row).encode() + b"\n"
                    if number in mend:
                        log.write(f"{report.path}\t{number}\tmended\t{mend[number]}\n")
                    good.write(raw if raw.endswith(b"\n") else raw + b"\n")
                    kept += 1
        except UserError as error:
            log.write(f"{report.path}\t0\tcut off\t{error}\n")
    return kept


# ---- the verb


def parse(argv: list[str]) -> argparse.Namespace:
    parser = verb_parser("check-data", __doc__, EXAMPLES)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="as --train_data of gritlm train")
    parser.add_argument("--model_name_or_path", help="count lengths in its tokens; without it, in characters")
    parser.add_argument("--query_max_len", type=int, default=512, help="default 512")
    parser.add_argument("--passage_max_len", type=int, default=512, help="default 512")
    parser.add_argument("--eval", nargs="+", type=Path, default=[], help="BEIR folders or jsonl files of queries")
    parser.add_argument("--report", type=Path, help="write every finding there: file, line, what")
    parser.add_argument("--fix", type=Path, metavar="OUT", help="new folder for the good rows and dropped.tsv")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one a core")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.fix and args.fix.exists():
        raise UserError(f"--fix {args.fix} exists; nothing is overwritten, name a new folder")
    if args.report and args.report.exists():
        raise UserError(f"--report {args.report} exists; nothing is overwritten, name a new file")
    for path in args.paths:
        if args.fix and path.is_dir() and args.fix.resolve().is_relative_to(path.resolve()):
            raise UserError(f"--fix {args.fix} is in {path}, and would be read as data; name a folder elsewhere")
    found = [(file, path) for path in args.paths for files in find_files(path).values() for file in files]
    paths, roots = [file for file, _ in found], [root for _, root in found]
    contract = TextContract(args.query_max_len, args.passage_max_len)
    text_tokenizer = (
        TextTokenizer(load_tokenizer(args.model_name_or_path, contract), contract) if args.model_name_or_path else None
    )
    evaluation = (
        EvaluationTexts(text for path in args.eval for text in read_evaluation_queries(path)) if args.eval else None
    )
    reader = BlockReader(text_tokenizer, evaluation)
    read = [read_file_stats(path, reader, args.processes) for path in paths]
    duplicates = find_duplicates([stats for stats, _ in read])
    limits = {"query": args.query_max_len, "passage": args.passage_max_len}
    reports = []
    for path, (stats, cut), lines in zip(paths, read, duplicates, strict=True):
        problems = [*([cut] if cut else []), *find_problems(stats, text_tokenizer, limits)]
        reports.append(FileReport(path, stats, problems, lines))

    for path in (path for path in args.paths if path.is_dir()):
        if others := Counter(other.suffix for other in unread(path)):
            print(f"{path}: not read, for what their names end in: {_counts(others.elements())}")
    for report in reports:
        print("\n".join(report.table("tokens" if text_tokenizer else "characters", limits)))
    bad = [message for report in reports for _, message in report.stats.bad]
    if bad:
        print("\nbad rows" + (f", the first {SHOWN} (all: --report FILE)" if len(bad) > SHOWN else "") + ":")
        print("\n".join(f"  {message}" for message in bad[:SHOWN]))
    if args.report:
        write_report(reports, args.report)
    if args.fix:
        fix(reports, args.fix, roots)
    rows, findings = sum(len(report.stats.lines) for report in reports), sum(report.findings for report in reports)
    print(f"{len(reports)} files, {rows} good rows, {findings} findings")
    return int(findings > 0)


def unread(folder: Path) -> list[Path]:
    """Files of a data folder that are no data by their names; hidden ones apart."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(SUFFIXES))
    return [path for path in files if not any(part[0] == "." for part in path.relative_to(folder).parts)]


def write_report(reports: list[FileReport], path: Path) -> None:
    with written_aside(path) as aside, open(aside, "w") as out:
        for report in reports:
            found = [(0, problem) for problem in report.problems]
            found += report.dropped() + report.mended()
            out.writelines(f"{report.path}\t{line}\t{what}\n" for line, what in sorted(found))


def fix(reports: list[FileReport], folder: Path, roots: list[Path]) -> None:
    """Write each file's good rows under the name, and in the sub-folder, that it had: data sets stay what they were."""
    said = []
    with written_aside(folder) as aside:
        aside.mkdir(parents=True)
        with open(aside / "dropped.tsv", "w") as log:
            for report, root in zip(reports, roots, strict=True):
                name = report.path.relative_to(root if root.is_dir() else root.parent)
                stem = name.name
                for suffix in SUFFIXES:
                    stem = stem.removesuffix(suffix)
                name, number = name.with_name(f"{stem}.jsonl"), 2
                while (aside / name).exists():
                    name, number = name.with_name(f"{stem}-{number}.jsonl"), number + 1
                kept = write_fixed(report, aside / name, log)
                if not kept:
                    (aside / name).unlink()
                said.append(
                    f"{kept} rows of {report.path} in {folder / name}" if kept else f"no good row in {report.path}"
                )
    print("\n".join(said))
