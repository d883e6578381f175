"""Keep the rows whose positives and negatives are right by the scores of a model, or by scores from a file.

Each rule drops rows, or removes negatives that may be positives. All scores of a row are with its query. A margin and a
rank are those of the row's lowest-scored positive.
"""

import argparse
import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gritlm.cli import home_expanded, quieten, verb_parser
from gritlm.curation.embedding import nearest_passages, other_negatives, passages_of
from gritlm.curation.fix import keep_negatives
from gritlm.curation.histogram import histogram
from gritlm.curation.model_run import ModelRun, add_flags, hash_of, open_run
from gritlm.curation.row_spool import text_of
from gritlm.curation.rules import RowRules, RowScores, Verdict, number, share_or_none
from gritlm.curation.scores_file import PairScores, raw_rows
from gritlm.data.folders import find_files
from gritlm.data.records import Record, RecordSet
from gritlm.data.rows import text_id
from gritlm.errors import UserError
from gritlm.files import content_hash, publish, write_text

EXAMPLES = """examples:
  gritlm filter mined/ clean/ --model Qwen/Qwen3-Embedding-0.6B
  gritlm filter pairs.jsonl clean/ --model outputs/run --corpus corpus.jsonl --max_rank 2 --max_samples 100000
  gritlm filter mined/ clean/ --scores judged.jsonl --min_positive 0.5 --false_negatives relabel
after an interruption, the same command continues the run"""

ScoredRow = tuple[str, dict[str, Any], Record, RowScores]  # file:line, the row in the file, as training reads it


# ---- scores


def score_rows(run: ModelRun, records: RecordSet, files: list[Path], pairs: PairScores | None) -> Iterator[ScoredRow]:
    """Each row, in order, with its scores: those of `pairs` if there are any, else the model's.

    Ranks are always the model's.
    """
    rows = zip(raw_rows(files), (records[row] for row in range(len(records))), strict=True)
    if run.encoder is None:
        assert pairs is not None
        yield from ((where, row, record, pairs.of(record, where)) for (where, row), record in rows)
        return
    passages = passages_of(records, run.corpus, corpus_only=False)
    queries_BD, corpus_ND = run.vectors(records, passages)
    negatives_ND = corpus_ND[:0]
    if len(other := other_negatives(records, passages)) and not pairs:
        negatives_ND = run.embed(records, other, "passage", "negatives")

    def scores_of(keys: list[int], query_D: np.ndarray) -> np.ndarray:
        in_corpus = [passages.number_of.get(key) for key in keys]
        numbers = zip(keys, in_corpus, strict=True)
        vectors = [negatives_ND[other.number_of[key]] if n is None else corpus_ND[n] for key, n in numbers]
        return np.array([vector @ query_D for vector in vectors])

    rank, nearest = run.args.max_rank or 0, None
    if rank:  # the other positives of a query, and its own text, may come before its lowest-scored positive
        nearest = nearest_passages(queries_BD, corpus_ND, rank + records.most_positives + 1, "ranking")
    for ((where, row), record), query_D in zip(rows, queries_BD, strict=True):
        positives = scores_of(record.positive_ids, query_D)
        found = pairs.of(record, where) if pairs else RowScores(positives, scores_of(record.negative_ids, query_D))
        if nearest:
            lowest = passages.number_of[record.positive_ids[int(positives.argmin())]]
            passed = {passages.number_of.get(key) for key in (*record.known_positives, text_id(record.query.text))}
            numbers = [number for number in next(nearest)[2].tolist() if number not in passed - {lowest}]
            found.rank = numbers.index(lowest) + 1 if lowest in numbers else np.inf
        yield where, row, record, found


# ---- one data set


def rewrite(row: dict[str, Any], record: Record, verdict: Verdict, relabel: bool) -> tuple[dict, str]:
    """A row with the negatives that stay; `relabel` makes the suspected ones positives. Scores stay in step.

    Returns:
        the row, and a note on scores that were out of step.
    """
    ids = [text_id(text_of(text)) for text in row["neg"]]
    stay, suspected = ({record.negative_ids[i] for i in numbers} for numbers in (verdict.kept, verdict.suspected))
    found, lost = keep_negatives(row, [key in stay for key in ids])
    if relabel:
        moved = [ids.index(key) for key in dict.fromkeys(ids) if key in suspected]
        places = [(found, row, "pos", "neg"), (found, row, "pos_scores", "neg_scores")]
        if isinstance(row.get("scores"), dict):
            places.append((found["scores"], row["scores"], "pos", "neg"))
        for new, old, pos, neg in places:
            if new.get(pos) and len(old.get(neg) or ()) == len(ids):
                new[pos] = [*new[pos], *(old[neg][i] for i in moved)]
    return found, lost


@dataclass
class Report:
    """What the rules did to a data set."""

    dropped: Counter[str] = field(default_factory=Counter)  # rows by rule
    negatives: Counter[str] = field(default_factory=Counter)
    values: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # for histograms

    def add(self, scores: RowScores, verdict: Verdict) -> None:
        self.dropped[verdict.dropped_by] += 1
        self.negatives["all"] += len(scores.negatives)
        self.negatives["suspected"] += len(verdict.suspected)
        rows = "rows dropped by a rule" if verdict.dropped_by else "rows that stay"
        self.values[f"positive scores of {rows}"].append(scores.positive)
        if np.isfinite(verdict.margin):
            self.values[f"margins of {rows}"].append(verdict.margin)
        elif len(scores.negatives) and not verdict.dropped_by:
            self.negatives["rows left without"] += 1

    def lines(self, target: Path, picked: int, args: argparse.Namespace) -> Iterator[str]:
        rows, found = self.dropped.total(), self.negatives
        yield f"{target}: kept {picked} of {rows} rows"
        for name in (*RowRules.__dataclass_fields__, "max_samples"):
            if count := self.dropped[name] if name != "max_samples" else self.dropped[""] - picked:
                yield f"    {name:24}{count:10d}  {count / rows:6.1%} of the rows dropped"
        done = {"remove": "removed", "relabel": "made positives", "keep": "kept"}[args.false_negatives]
        if found["all"] and args.relative_margin is not None:
            yield (
                f"  {found['suspected']} of {found['all']} negatives ({found['suspected'] / found['all']:.1%}) score "
                f"above the relative margin: {done}; {found['rows left without']} rows that stay have none left"
            )
        elif not found["all"] and (args.relative_margin is not None or args.min_margin is not None):
            yield "  no row has a negative: --relative_margin and --min_margin had no effect"
        for name, values in sorted(self.values.items(), reverse=True):
            yield f"  {name} {histogram(values)}"


def filter_set(run: ModelRun, records: RecordSet, files: list[Path], pairs: PairScores | None) -> None:
    """Write OUT/NAME.jsonl and OUT/NAME.dropped.tsv for one data set, and print what each rule did."""
    if run.is_done(records):
        return
    args, work = run.args, run.work(records)
    rules = RowRules(**{name: getattr(args, name) for name in RowRules.__dataclass_fields__})
    report, sort_keys = Report(), array("d")
    with open(work / "kept", "w", encoding="utf-8") as kept, open(work / "dropped", "w", encoding="utf-8") as dropped:
        for where, row, record, scores in score_rows(run, records, files, pairs):
            verdict = rules.judge(scores)
            report.add(scores, verdict)
            if verdict.dropped_by:
                dropped.write(f"{where}\t{verdict.dropped_by}\t{verdict.value:.4f}\n")
                continue
            sort_keys.append(-verdict.margin if args.sort_by == "margin" else -scores.positive)
            row, lost = rewrite(row, record, verdict, args.false_negatives == "relabel")
            if lost:
                dropped.write(f"{where}\tscores removed{lost}\n")
            row = {key: None if value != value else value for key, value in row.items()}  # NaN is not JSON
            kept.write(f"{json.dumps(row, ensure_ascii=False, default=str)}\t{where}\n")  # JSON has no tab
        picked = set(np.argsort(sort_keys, kind="stable")[: args.max_samples].tolist())
    print("\n".join(report.lines(run.target(records), len(picked), args)))
    if not picked:
        raise UserError(f"{records.name}: found no row that all rules keep, wanted one or more; see the scores above")
    with (
        open(work / "kept", encoding="utf-8", newline="\n") as kept,
        open(work / "rows.jsonl", "w", encoding="utf-8") as out,
        open(work / "dropped", "a", encoding="utf-8") as dropped,
    ):
        for place, line in enumerate(kept):
            text, where = line.rstrip("\n").split("\t", 1)
            if place in picked:
                out.write(text + "\n")
            else:
                dropped.write(f"{where}\tmax_samples\t{-sort_keys[place]:.4f}\n")
    publish(work / "dropped", args.output / f"{records.name}.dropped.tsv")
    run.finish(records, work / "rows.jsonl")


# ---- the verb


def parse(argv: list[str]) -> argparse.Namespace:
    parser = verb_parser("filter", __doc__, EXAMPLES)
    add_flags(parser, model_is_required=False)
    add = parser.add_argument
    add("--scores", type=home_expanded, metavar="FILE", help="scores of pairs, or DATA that mine --output_scores wrote")
    add("--min_positive", type=number, help="drop rows whose positive scores less")
    add(
        "--min_margin",
        type=number,
        help="drop rows whose positive is less than this above the best negative that stays",
    )
    add("--max_rank", type=int, metavar="K", help="drop rows whose positive is not among the K nearest passages")
    add(
        "--relative_margin",
        type=share_or_none,
        default=0.05,
        help="default 0.05: suspect negatives that score above 95%% of the positive; none: no such rule",
    )
    add(
        "--false_negatives",
        choices=("remove", "relabel", "keep"),
        default="remove",
        help="what becomes of suspected negatives; relabel makes them positives; default remove",
    )
    add(
        "--max_false_negatives",
        type=number,
        metavar="SHARE",
        help="drop rows with more than this share of suspected ones",
    )
    add("--max_samples", type=int, help="keep only this many rows of each data set, the best by --sort_by")
    add(
        "--sort_by",
        choices=("positive", "margin"),
        default="positive",
        help="what makes a row better, default positive",
    )
    args = parser.parse_args(argv)
    if not args.model and not args.scores:
        raise UserError("found neither --model nor --scores, wanted one of them, or both")
    if (args.max_rank or args.corpus) and not args.model:
        raise UserError("--max_rank, --corpus: found no --model, wanted one: ranks are by its vectors")
    if args.corpus and not args.max_rank:
        raise UserError("--corpus: found no --max_rank, wanted it: the corpus has no other use here")
    for name in ("max_rank", "max_samples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: wanted 1 or more")
    if args.max_false_negatives is not None and not 0 <= args.max_false_negatives < 1:
        raise UserError(f"--max_false_negatives {args.max_false_negatives}: wanted a share from 0 to below 1")
    if args.relative_margin is None and (args.max_false_negatives is not None or args.false_negatives != "remove"):
        raise UserError(
            "--relative_margin none: found a rule on suspected negatives, wanted a margin to suspect them by"
        )
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    quieten()
    files = find_files(args.input)
    scores = sorted(path for paths in find_files(args.scores).values() for path in paths) if args.scores else []
    run = open_run("filter", args, **{"scores of": hash_of([content_hash(path) for path in scores])})
    pairs = PairScores(args.scores) if args.scores else None
    for records in run.data:
        filter_set(run, records, files[records.name], pairs)
    for name in files if len(files) > 1 else ():
        write_text(args.output / f"without-{name}.json", json.dumps({name: 0}) + "\n")
    if len(files) > 1:
        print(f"for an ablation, gritlm train --num_samples {args.output}/without-NAME.json leaves one data set out")
    return 0
