"""Read everything a run would read, and say what is wrong with it, file by file, before a GPU is waited for.

Findings (exit code 1): bad rows, rows that stand twice, positives among a row's own negatives, queries of an evaluation
set. Notes: queries with several rows and texts that answer several queries (a batch never holds two of them), negatives
a row, instructions, lengths and what would be cut off, scripts.
"""

import argparse
import json
import os
import sys
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gritlm.data.collator import TextContract, TextEncoder, load_tokenizer
from gritlm.data.overlap import TextSet, read_evaluation_queries
from gritlm.data.parallel import in_order
from gritlm.data.records import find_files
from gritlm.data.rows import Block, Text, decode, parse_row, read_blocks
from gritlm.errors import UserError, run_verb

EXAMPLES = """examples:
  gritlm check-data train.jsonl
  gritlm check-data data/ --model_name_or_path Qwen/Qwen3-0.6B --query_max_len 512 --eval beir/scifact
  gritlm check-data data/ --fix clean/      writes the good rows, and what became of the others to dropped.tsv"""

SHOWN = 20  # bad rows on the screen; all of them with --report
SAMPLED = 20_000  # rows of a file whose lengths and scripts are looked at
EDGES = np.array([16, 32, 64, 128, 256, 512, 1024, 2048, 4096])
BARS = " ▁▂▃▄▅▆▇█"


# ---- the work of one process on one stretch of a file


@dataclass
class Facts:
    """What a stretch of a file holds. Arrays have one entry a row, `pos_ids` one a positive."""

    bad: list[tuple[int, str]] = field(default_factory=list)  # line, message
    leaked: list[tuple[int, str]] = field(default_factory=list)  # line, exact or near
    repeats: list[tuple[int, int]] = field(default_factory=list)  # line, negatives that repeat a positive
    lines: array = field(default_factory=lambda: array("q"))
    row_keys: array = field(default_factory=lambda: array("q"))
    query_ids: array = field(default_factory=lambda: array("q"))
    pos_counts: array = field(default_factory=lambda: array("q"))
    pos_ids: array = field(default_factory=lambda: array("q"))
    neg_counts: array = field(default_factory=lambda: array("q"))
    query_lengths: array = field(default_factory=lambda: array("q"))
    passage_lengths: array = field(default_factory=lambda: array("q"))
    instructions: Counter = field(default_factory=Counter)
    scripts: Counter = field(default_factory=Counter)

    def add(self, other: "Facts") -> None:
        for name, value in vars(other).items():
            getattr(self, name).update(value) if isinstance(value, Counter) else getattr(self, name).extend(value)


class Worker:
    """Looks at stretches of files, in any process."""

    def __init__(self, encoder: TextEncoder | None, evaluation: TextSet | None):
        self.encoder, self.evaluation = encoder, evaluation

    def __call__(self, path: Path, block: Block, sampled_every: int) -> Facts:
        facts, sample = Facts(), []
        for number, raw in block:
            try:
                row = parse_row(decode(path, number, raw), f"{path}:{number}")
            except UserError as error:
                facts.bad.append((number, str(error)))
                continue
            facts.lines.append(number)
            facts.query_ids.append(row["query_id"])
            facts.row_keys.append(hash((row["query_id"], *sorted(set(row["pos_id"])))))
            facts.pos_counts.append(len(row["pos_id"]))
            facts.pos_ids.extend(row["pos_id"])
            facts.neg_counts.append(len(row["neg"]["text"]))
            facts.instructions[row["query"]["instruction"]] += 1
            if row["dropped_negatives"]:
                facts.repeats.append((number, row["dropped_negatives"]))
            if self.evaluation and (how := self.evaluation.find(row["query"]["text"])):
                facts.leaked.append((number, how))
            if number % sampled_every == 0:
                sample.append(row)
        self._measure(sample, facts)
        return facts

    def _measure(self, rows: list[dict], facts: Facts) -> None:
        queries = [Text(**row["query"]) for row in rows]
        passages = [
            Text(*pair)
            for row in rows
            for side in ("pos", "neg")
            for pair in list(zip(row[side]["instruction"], row[side]["text"], strict=True))[:8]
        ]
        for texts, lengths in ((queries, facts.query_lengths), (passages, facts.passage_lengths)):
            if self.encoder and texts:
                lengths.extend(len(tokens.ids) for tokens in self.encoder(texts, 1 << 30))
            else:
                lengths.extend(len(text.instruction) + len(text.text) for text in texts)
        for text in (*queries, *passages[:1000]):
            facts.scripts.update(scripts_of(text.text[:200]))


def scripts_of(text: str) -> set[str]:
    """The writing systems of a text's letters, roughly: the first word of their Unicode names."""
    return {unicodedata.name(letter, "?").split()[0] for letter in set(text) if letter.isalpha()}


def read_facts(path: Path, worker: Worker, processes: int) -> tuple[Facts, str]:
    """All facts of a file, and what is wrong with it as a whole, if anything."""
    facts, problem = Facts(), ""

    def stretches() -> Iterator[tuple]:
        nonlocal problem
        every = 0
        try:
            for block in read_blocks(path):
                every = every or _sampling(path, block)
                yield path, block, every
        except UserError as error:
            problem = str(error)

    with tqdm(desc=f"checking {path.name}", unit=" rows", delay=2) as progress:
        for part in in_order(worker, stretches(), processes):
            facts.add(part)
            progress.update(len(part.lines))
    return facts, problem


def _sampling(path: Path, block: Block) -> int:
    """Look at the lengths of every so manieth row, given the first stretch of a file."""
    taken = sum(len(raw) for _, raw in block if isinstance(raw, bytes))
    rows = len(block) * path.stat().st_size / max(taken, 1) if taken else 1000 * path.stat().st_size / 1e6
    return max(1, round(rows / SAMPLED))


# ---- what it means


@dataclass
class FileReport:
    """One file's findings and notes, ready to be said."""

    path: Path
    facts: Facts
    problem: str
    duplicates: np.ndarray  # lines that repeat a row of this file or of one before it

    @property
    def findings(self) -> int:
        facts = self.facts
        return bool(self.problem) + sum(map(len, (facts.bad, self.duplicates, facts.repeats, facts.leaked)))

    def table(self, unit: str, limits: dict[str, int]) -> Iterator[str]:
        facts, rows = self.facts, len(self.facts.lines)
        yield f"{self.path}: {rows + len(facts.bad)} rows"
        if self.problem:
            yield f"  !! {self.problem}"
        for count, what in (
            (len(facts.bad), "bad rows"),
            (len(self.duplicates), "rows that stand before, with the same query and positives"),
            (len(facts.repeats), "rows with a positive among their own negatives"),
            (len(facts.leaked), f"queries of an evaluation set ({_counts(how for _, how in facts.leaked)})"),
        ):
            if count:
                yield f"  !! {count} {what}"
        if not rows:
            return
        queries, answers = shared(facts)
        yield f"  {queries} rows repeat a query, {answers} positives answer several queries"
        negatives = np.asarray(facts.neg_counts)
        yield (
            f"  negatives a row: {negatives.min()} to {negatives.max()}, median {np.median(negatives):.0f}; "
            f"{(negatives == 0).mean():.0%} of the rows have none"
        )
        for instruction, count in facts.instructions.most_common(3):
            yield f"  instruction, {count} rows: {instruction!r}"
        if len(facts.instructions) > 3:
            yield f"  and {len(facts.instructions) - 3} more instructions"
        for side, lengths in (("query", facts.query_lengths), ("passage", facts.passage_lengths)):
            yield from _lengths(side, np.asarray(lengths), unit, limits[side])
        total = max(1, facts.scripts.total())
        yield "  scripts: " + ", ".join(f"{n} {c / total:.0%}" for n, c in facts.scripts.most_common(4))


def shared(facts: Facts) -> tuple[int, int]:
    """Rows whose query stands in a row before, and positives that stand under more than one query."""
    queries = np.asarray(facts.query_ids)
    pairs = np.stack([np.asarray(facts.pos_ids), np.repeat(queries, np.asarray(facts.pos_counts))], axis=1)
    _, under = np.unique(np.unique(pairs, axis=0)[:, 0], return_counts=True)
    return len(queries) - len(np.unique(queries)), int((under > 1).sum())


def find_duplicates(files: list[Facts]) -> list[np.ndarray]:
    """Per file, the lines of the rows that stand before, in it or in an earlier file."""
    keys = np.concatenate([np.asarray(facts.row_keys, dtype=np.int64) for facts in files])
    _, first = np.unique(keys, return_index=True)
    repeated = np.ones(len(keys), dtype=bool)
    repeated[first] = False
    ends = np.cumsum([len(facts.row_keys) for facts in files])[:-1]
    parts = np.split(repeated, ends)
    return [np.asarray(facts.lines, dtype=np.int64)[part] for facts, part in zip(files, parts, strict=True)]


def _counts(values: Iterable[str]) -> str:
    return ", ".join(f"{count} {value}" for value, count in Counter(values).most_common())


def _lengths(side: str, lengths: np.ndarray, unit: str, limit: int) -> Iterator[str]:
    if not len(lengths):
        return
    counts = np.bincount(np.searchsorted(EDGES, lengths, side="left"), minlength=len(EDGES) + 1)
    bars = "".join(BARS[int(np.ceil(8 * count / counts.max()))] for count in counts)
    low, middle, high = np.percentile(lengths, [5, 50, 95])
    cut = f"; {(lengths > limit).mean():.1%} longer than {limit} are cut" if unit == "tokens" else ""
    yield (
        f"  {side} {unit} |{bars}| (to {EDGES[0]}, {EDGES[1]}, ... {EDGES[-1]}, more): median {middle:.0f}, "
        f"5% under {low:.0f}, 5% over {high:.0f}, longest {lengths.max()}{cut}"
    )


# ---- mending


def write_fixed(report: FileReport, out: Path, log) -> int:
    """The file's good rows as they stand, less negatives that are positives; every other row into the log."""
    facts = report.facts
    drop = dict.fromkeys(report.duplicates.tolist(), "the same query and positives stand before")
    drop |= {line: f"the query stands in an evaluation set ({how})" for line, how in facts.leaked}
    drop |= {line: message.split(": ", 1)[1] for line, message in facts.bad}
    mend, kept = dict(facts.repeats), 0
    with open(out, "wb") as good:
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
                        raw = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                    if number in mend:
                        log.write(f"{report.path}\t{number}\tmended\t{mend[number]} negatives repeat a positive\n")
                    good.write(raw if raw.endswith(b"\n") else raw + b"\n")
                    kept += 1
        except UserError as error:
            log.write(f"{report.path}\t0\tcut off\t{error}\n")
    return kept


# ---- the verb


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gritlm check-data",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    paths = [file for path in args.paths for files in find_files(path).values() for file in files]
    contract = TextContract(args.query_max_len, args.passage_max_len)
    encoder = (
        TextEncoder(load_tokenizer(args.model_name_or_path, contract), contract) if args.model_name_or_path else None
    )
    evaluation = TextSet(text for path in args.eval for text in read_evaluation_queries(path)) if args.eval else None
    worker = Worker(encoder, evaluation)
    read = [read_facts(path, worker, args.processes) for path in paths]
    duplicates = find_duplicates([facts for facts, _ in read])
    reports = [FileReport(path, *part, lines) for path, part, lines in zip(paths, read, duplicates, strict=True)]

    unit = "tokens" if encoder else "characters"
    for report in reports:
        print("\n".join(report.table(unit, {"query": args.query_max_len, "passage": args.passage_max_len})))
    bad = [message for report in reports for _, message in report.facts.bad]
    if bad:
        print("\nbad rows" + (f", the first {SHOWN} (all: --report FILE)" if len(bad) > SHOWN else "") + ":")
        print("\n".join(f"  {message}" for message in bad[:SHOWN]))
    if args.report:
        write_report(reports, args.report)
    if args.fix:
        fix(reports, args.fix)
    rows, findings = sum(len(report.facts.lines) for report in reports), sum(report.findings for report in reports)
    print(f"{len(reports)} files, {rows} good rows, {findings} findings")
    return int(findings > 0)


def write_report(reports: list[FileReport], path: Path) -> None:
    with open(path, "w") as out:
        for report in reports:
            found = [(0, report.problem)] if report.problem else []
            found += [(line, message.split(": ", 1)[1]) for line, message in report.facts.bad]
            found += [(line, "the same query and positives stand before") for line in report.duplicates.tolist()]
            found += [(line, f"{count} negatives repeat a positive") for line, count in report.facts.repeats]
            found += [(line, f"the query stands in an evaluation set ({how})") for line, how in report.facts.leaked]
            out.writelines(f"{report.path}\t{line}\t{what}\n" for line, what in sorted(found))


def fix(reports: list[FileReport], folder: Path) -> None:
    names = Counter()
    folder.mkdir(parents=True)
    with open(folder / "dropped.tsv", "w") as log:
        for report in reports:
            stem = report.path.name.split(".")[0]
            names[stem] += 1
            out = folder / (f"{stem}.jsonl" if names[stem] == 1 else f"{stem}-{names[stem]}.jsonl")
            kept = write_fixed(report, out, log)
            if not kept:
                out.unlink()
            print(f"{kept} rows of {report.path} in {out}" if kept else f"no good row in {report.path}")


if __name__ == "__main__":
    sys.exit(run_verb(main))
