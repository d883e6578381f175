"""The table of a study: `gritlm study-table FOLDER --pair NAME BASE REASONING ...`; scripts/study.sh calls it last.

FOLDER has runs/MODEL-SEED of gritlm train, evaluation/MODEL-SEED/BENCHMARK of gritlm evaluate, and hrsa/PAIR/before and
after of gritlm hrsa. It gets table.md, table.tsv and table.json.
"""

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gritlm.analysis.equivalence import LEVEL, paired_test
from gritlm.analysis.results import LAST, at, read_metrics
from gritlm.cli import verb_parser
from gritlm.errors import UserError
from gritlm.evaluation.results import read_results, write_json
from gritlm.evaluation.verdict import holm
from gritlm.files import written_aside
from gritlm.strict_json import read_json_object

EXAMPLES = """examples:
  gritlm study-table outputs/study --pair sft Qwen3-0.6B-Base Qwen3-0.6B --seeds 1 2 3 --benchmark BRIGHT BRIGHT"""
MEAN = "Mean(Task)"
FREE = {"seed", "model_name_or_path", "base's config and tokenizer", "base's weights"}  # in which runs may differ
INSIDE = ("h_inv", "correlation", "cka", "knn_tokens", "knn_documents", "probe")  # metrics of gritlm hrsa
COLUMNS = (
    "pair",
    "benchmark",
    "task",
    "base",
    "reasoning",
    "difference",
    "p",
    "p of TOST",
    "outcome",
    "smallest margin",
)


def main(argv: list[str]) -> int:
    parser = verb_parser("study-table", __doc__, EXAMPLES)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER")
    add("--pair", nargs=3, action="append", required=True, metavar=("NAME", "BASE", "REASONING"))
    add("--seeds", nargs="+", required=True, metavar="SEED")
    add("--benchmark", nargs=2, action="append", required=True, metavar=("FOLDER", "TITLE"))
    margin = f"points of {MEAN} within which two models count as equivalent, default 0.5"
    add("--equivalence_margin", type=float, default=0.5, metavar="POINTS", help=margin)
    args = parser.parse_args(argv)
    if not 0 < args.equivalence_margin < math.inf:
        raise UserError(f"--equivalence_margin: found {args.equivalence_margin}, wanted points above 0")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds: found {' '.join(args.seeds)}, wanted different seeds")
    for name, *models in args.pair:
        check_recipe(name, [args.folder / "runs" / f"{model}-{seed}" for model in models for seed in args.seeds])
    rows = [row for pair in args.pair for folder, title in args.benchmark for row in compare(args, pair, folder, title)]
    rows.sort(key=lambda row: row["tasks"] is None)  # the means first
    inside = [row for name, *_ in args.pair for row in read_inside(args.folder / "hrsa" / name, name)]
    lines = describe(rows, inside, args)
    print("", *lines, sep="\n")
    write_json(args.folder / "table.json", {"seeds": args.seeds, "scores": rows, "inside": inside})
    cells = [[" ".join(map(str, v)) if isinstance(v, list) else str(v) for v in row.values()] for row in rows]
    for name, text in (("md", lines), ("tsv", map("\t".join, [list(rows[0]), *cells]))):
        with written_aside(args.folder / f"table.{name}") as aside:
            aside.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(f"\nthe table is in {args.folder / 'table.md'}, .tsv and .json")
    return 0


# ---- what the parts have written


def check_recipe(pair: str, runs: list[Path]) -> None:
    """Refuse runs that are not finished, or were trained with unlike settings.

    Raises:
        UserError: it names the first setting that differs.
    """
    first: dict[str, Any] = {}
    for run in runs:
        found = read_json_object(str(run / "run.json"), f"pair {pair}:", "what gritlm train writes")
        if found.get("finished") is not True or not isinstance(found.get("flags"), dict):
            raise UserError(f"pair {pair}: {run}: found a run that is not finished; the study goes on with it")
        settings = {key: value for key, value in found["flags"].items() if key not in FREE}
        first = first or settings
        for key in sorted(first.keys() | settings.keys()):
            if first.get(key) != settings.get(key):
                values = f"{first.get(key)} in {runs[0]} and {settings.get(key)} in {run}"
                raise UserError(f"pair {pair}: {key}: found {values}, wanted one recipe")


def read_scores(folder: Path) -> dict[str, float]:
    """Task -> its main score in points, of all tasks that `gritlm evaluate` has measured into a folder.

    Raises:
        UserError: there is no result, one is damaged, a task has none or two.
    """
    tables = sorted(folder.glob("tables/*.json"))  # of mteb's tasks
    pairs = [pair for path in tables for pair in _mteb_scores(path)]
    for path in () if tables else sorted(folder.glob("*/*.json")):
        pairs += [(result.name, result.metrics.get(result.main)) for result in read_results(path).sets]
    if not pairs:
        raise UserError(f"{folder}: found no result of gritlm evaluate, wanted some")
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise UserError(f"{folder}: found {count} results of {name}, wanted one; remove it to measure again")
    for name, score in pairs:
        if not isinstance(score, int | float):
            raise UserError(f"{folder}: {name}: found the score {score}, wanted a number; remove it to measure again")
    return {name: 100 * score for name, score in pairs}


def _mteb_scores(path: Path) -> Iterator[tuple[str, Any]]:
    found = read_json_object(str(path), wanted="a table of gritlm evaluate")
    try:
        scores = found["models"][0]["scores"]
        yield from [(task, scores.get(task)) for task in found["types"]]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: found no table of gritlm evaluate in it ({error})") from error


def compare(args: argparse.Namespace, pair: list[str], folder: str, title: str) -> Iterator[dict[str, Any]]:
    """The rows of a pair on a benchmark: the mean over tasks, then each task, tested over seeds."""
    runs = [f"{model}-{seed}" for model in pair[1:] for seed in args.seeds]
    scores = [read_scores(args.folder / "evaluation" / run / folder) for run in runs]
    for run, found in zip(runs, scores, strict=True):
        if other := sorted(found.keys() ^ scores[0].keys()):
            raise UserError(f"{title}: found {other[0]} in one of {runs[0]} and {run}, wanted the same tasks in both")
    values_TR = np.array([[found[task] for found in scores] for task in scores[0]])
    sides = np.split(np.vstack([values_TR.mean(0), values_TR]), 2, axis=1)
    tests = [paired_test(differences.tolist(), args.equivalence_margin) for differences in sides[1] - sides[0]]
    corrected = holm([test.p_difference or 0.0 for test in tests[1:]])
    for number, (task, test) in enumerate(zip([MEAN, *scores[0]], tests, strict=True)):
        row: dict[str, Any] = {"pair": pair[0], "benchmark": title, "task": task}
        row["tasks"] = None if number else len(scores[0])
        row |= {"base": sides[0][number].tolist(), "reasoning": sides[1][number].tolist()}
        row |= asdict(test) | {"outcome": test.outcome}
        if number:  # the margin is one of the mean
            row |= {"margin": None, "p_equivalent": None, "smallest_margin": None}
            if test.p_difference is not None:
                row["p_difference"] = p = corrected[number - 1]
                row["outcome"] = "same" if p >= LEVEL else "higher" if test.mean > 0 else "lower"
        yield row


def read_inside(folder: Path, pair: str) -> list[dict[str, Any]]:
    """What gritlm hrsa found of a pair in the last layer, before and after training: a row for each metric."""
    rows: dict[str, dict[str, Any]] = {name: {} for name in INSIDE}
    for when in ("before", "after"):
        for metric in read_metrics(folder / when) if any(folder.glob(f"{when}/metrics/*")) else ():
            for role in ("pair", "ceiling", "shuffled") if metric["metric"] in rows else ():
                rows[metric["metric"]][f"{role} {when}"] = at(metric, role, metric["k"], LAST)
    return [{"pair": pair, "metric": name} | row for name, row in rows.items() if any(row.values())]


# ---- for people


def describe(rows: list[dict[str, Any]], inside: list[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    """The tables in Markdown: means over tasks, tasks, and what gritlm hrsa found."""
    lines = [
        f"Points: 100 x the main score of a task. Mean ± standard deviation over the seeds {', '.join(args.seeds)}.",
        "Difference: reasoning - base, paired by seed, with its 95% t-interval. Tasks are fixed, seeds are the sample.",
        f"Equivalent: {MEAN} differs by less than {args.equivalence_margin:g} points (--equivalence_margin) by two",
        "one-sided t-tests (TOST) at 5%. Smallest margin: the best that this many seeds, with their spread, can show.",
        f"The p-values of {MEAN} are not corrected for their number, those of a benchmark's tasks are (Holm).",
    ]
    if len(args.seeds) == 1:
        lines.append("One seed: no interval and no test. They need two seeds or more.")
    if any(row["smallest_margin"] == 0 for row in rows):
        lines.append("A smallest margin of 0: the seeds differ in nothing, so they say nothing of chance.")
    lines += _markdown(COLUMNS, [_cells(row) for row in rows])
    if inside:
        lines += ["", "gritlm hrsa, last layer: base against reasoning model, the base with another seed, and chance."]
        shown = {
            "before": "pair before",
            "after": "pair after",
            "ceiling": "ceiling after",
            "shuffled": "shuffled after",
        }
        cells = [[row["pair"], row["metric"], *(_interval(row.get(key)) for key in shown.values())] for row in inside]
        lines += _markdown(("pair", "metric", *shown), cells)
    return lines


def _cells(row: dict[str, Any]) -> list[str]:
    task = f"{MEAN} of {row['tasks']}" if row["tasks"] else row["task"]
    sides = (row["base"], row["reasoning"])
    means = [f"{np.mean(s):.2f}" + (f" ± {np.std(s, ddof=1):.2f}" if len(s) > 1 else "") for s in sides]
    p_values = [_number(row[key], ".2g") for key in ("p_difference", "p_equivalent")]
    last = [row["outcome"], _number(row["smallest_margin"], ".2f")]
    return [
        row["pair"],
        row["benchmark"],
        task,
        *means,
        _interval({"value": row["mean"]} | row, "+.2f"),
        *p_values,
        *last,
    ]


def _interval(entry: dict[str, Any] | None, form: str = ".3f") -> str:
    value, low, high = ((entry or {}).get(key) for key in ("value", "low", "high"))
    return _number(value, form) + ("" if None in (low, high) else f" [{low:{form}}, {high:{form}}]")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _markdown(columns: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (columns, ["---"] * len(columns), *rows)]
    return ["", *(f"| {' | '.join(row)} |" for row in cells)]
