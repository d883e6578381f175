"""Measure a model on evaluation sets and benchmarks, beside another model: `gritlm evaluate MODEL --benchmark ...`.

A path is an evaluation set of your own. Any other name is a benchmark or a task of mteb. Results are kept: what is
measured already is read again.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from gritlm.cli import home_expanded, quieten, verb_parser
from gritlm.errors import UserError, first_line
from gritlm.evaluation.benchmarks import find_tasks
from gritlm.evaluation.compressed import BITS, Form
from gritlm.evaluation.models import BM25, Model, find_model
from gritlm.evaluation.prompts import TEMPLATE, Prompts
from gritlm.evaluation.read_sets import ENDINGS, read_sets
from gritlm.evaluation.results import file_name, read_kept, result_path, table, write_json, write_results
from gritlm.evaluation.sets import EvaluationSet, RetrievalSet, SetResult, Side, StsSet
from gritlm.evaluation.trained_on import count_trained_on, find_training_data
from gritlm.evaluation.verdict import compare

EXAMPLES = """examples:
  gritlm evaluate outputs/run --benchmark data/scifact --against Qwen/Qwen3-Embedding-0.6B --max_drop 0.01
  gritlm evaluate outputs/run --benchmark "MTEB(eng, v2)" --query_max_len 512 --passage_max_len 8192
  gritlm evaluate bm25 --benchmark NanoBEIR data/pairs.jsonl
exit code: 0; 1 if a set or task fails, or --max_drop is exceeded; 2 if nothing could be measured"""


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags. `sets` are the paths in --benchmark, `benchmarks` its other names."""
    parser = verb_parser("evaluate", __doc__, EXAMPLES)
    add = parser.add_argument
    any_model = "a folder of gritlm train, any model that sentence-transformers loads, or bm25"
    names = "benchmarks or tasks of mteb, BEIR folders, files; see docs/evaluation.md"
    add("model", type=home_expanded, metavar="MODEL", help=any_model)
    add("--benchmark", nargs="+", required=True, type=home_expanded, metavar="NAME", help=names)
    add("--against", type=home_expanded, metavar="B", help="compare with this model on the same queries")
    add("--max_drop", type=float, help="exit with 1 if the mean or a set falls below --against by more than this")
    add("--output_folder", type=Path, default=Path("outputs/evaluation"), help="default outputs/evaluation")
    add("--overwrite", action="store_true", help="measure again what is measured already")
    add("--query_max_len", type=int, help="limit in tokens for queries, in place of the model's own")
    add("--passage_max_len", type=int, help="limit in tokens for passages, in place of the model's own")
    add("--prompts", type=home_expanded, metavar="FILE", help="JSON file with the instruction of each set or task")
    add("--instruction_template", help=f"what an instruction is put into, default {TEMPLATE!r}")
    add("--seed", type=int, default=42, help="seed of the bootstrap and of mteb's tasks, default 42, as mteb's")
    add("--chunk_tokens", type=int, help="tokens encoded at once, default 16384, and 1024 to 4096 on a CPU")
    # For sets of your own only.
    stored = "also search with vectors stored like this, quantised as sentence-transformers does"
    add("--precisions", nargs="+", choices=BITS, help=f"{stored}; with --truncate_dim default all")
    add("--truncate_dim", nargs="+", type=int, metavar="N", help="also search with the first N dimensions of vectors")
    # For mteb's tasks only.
    add("--langs", nargs="+", help="only these languages of mteb's tasks, such as eng deu")
    add("--published", type=home_expanded, metavar="FILE", help="scores to show beside, or a folder of mteb's results")
    add("--processes", type=int, help="how many run mteb's tasks, default one for each GPU")
    add("--cache_gb", type=float, default=8.0, help="GB of vectors that mteb's tasks share on disk, default 8; 0: none")
    args = parser.parse_args(argv)
    args.sets = [name for name in args.benchmark if Path(name).exists()]
    args.benchmarks = [name for name in args.benchmark if name not in args.sets]
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    at_least = {"query_max_len": 1, "passage_max_len": 1, "chunk_tokens": 1, "processes": 1, "seed": 0, "cache_gb": 0}
    for name, least in at_least.items():
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise UserError(f"--{name}: found {value}, wanted {least} or more")
    for name in ("langs", "published", "processes"):
        if getattr(args, name) and not args.benchmarks:
            raise UserError(f"--{name}: found no task of mteb in --benchmark, wanted one; other sets do not use it")
    for name in ("precisions", "truncate_dim"):
        if getattr(args, name) and not args.sets:
            raise UserError(f"--{name}: found no path in --benchmark, wanted a set; mteb's tasks do not use it")
    if (least_width := min(args.truncate_dim or [1])) < 1:
        raise UserError(f"--truncate_dim: found {least_width}, wanted a number of dimensions")
    paths = [name for name in args.benchmarks if name.endswith(ENDINGS) or name.startswith((".", "/"))]
    for wrong, message in (
        (int(os.environ.get("WORLD_SIZE", 1)) > 1, "found torchrun's processes, wanted gritlm evaluate in one process"),
        (args.max_drop is not None and not args.against, "--max_drop: found no --against, wanted a model to compare"),
        (not 0 <= (args.max_drop or 0) <= 1, f"--max_drop: found {args.max_drop}, wanted 0 to 1, such as 0.01"),
        (paths, f"--benchmark: found no {' '.join(paths)}, wanted a file, a folder or a name that mteb has"),
        (
            args.instruction_template and not (args.prompts or args.benchmarks),
            "--instruction_template: found no instruction to put into it, wanted --prompts FILE",
        ),
    ):
        if wrong:
            raise UserError(message)
    Prompts(args.prompts, args.instruction_template or TEMPLATE)  # what is wrong in them


def main(argv: list[str]) -> int:
    args = parse(argv)
    quieten()
    args.output_folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=args.output_folder):
        pass  # a folder that cannot be written fails before the work
    if args.sets and args.benchmarks:  # a wrong name fails before the work
        find_tasks(args.benchmarks, args.langs or (), args.seed)
    parts = [run_sets] * bool(args.sets)
    if args.benchmarks:
        from gritlm.evaluation.mteb_run import run_benchmarks

        parts.append(run_benchmarks)
    codes = set()
    for part in parts:
        try:
            codes.add(part(args))
        except UserError as error:
            if len(parts) == 1:
                raise
            print(f"gritlm: error: {error}", file=sys.stderr)
            codes.add(2)
    return codes.pop() if len(codes) == 1 else 1


def run_sets(args: argparse.Namespace) -> int:
    """Measure MODEL and B on the sets of --benchmark, and print the table and the verdict. Returns the exit code."""
    names = [args.model, *([args.against] if args.against else [])]
    limits = (args.query_max_len, args.passage_max_len, args.chunk_tokens, args.output_folder)
    models = [find_model(name, *limits) for name in names]
    if args.against and models[0].identity == models[1].identity:
        raise UserError(f"--against {args.against}: found the files of {args.model}, wanted another model")
    sets, failures = _read(args.sets)
    if args.precisions or args.truncate_dim:
        if not any(isinstance(data, RetrievalSet) for data in sets):
            raise UserError(
                "--precisions, --truncate_dim: found no retrieval set, wanted one; other sets do not use them"
            )
        for model in models:
            model.notes += [f"{BM25}: --precisions, --truncate_dim have no effect on it"] * (model.kind == BM25)
    prompts = _prompts(sets, args)
    found = []
    for model in models:
        print(*model.notes, sep="\n", end="\n" * bool(model.notes))
        found.append(measure_sets(model, sets, prompts, args, failures))
        model.unload()
    _print_results(models, sets, found)
    if args.against and found[0]:
        failures += _print_verdict(models, found, args)
    if any(found):
        print(f"results in {args.output_folder}")
    if failures or not found[0]:
        print("failed:", *(failures or [f"{args.model} has no result"]), sep="\n  ", file=sys.stderr)
    return 2 if not found[0] else 1 if failures else 0


def _read(paths: list[str]) -> tuple[list[EvaluationSet], list[str]]:
    """The sets of all paths that hold one, and a line for each of the other paths."""
    try:
        return read_sets(paths), []
    except UserError:
        good, failures = [], []
        for path in paths if len(paths) > 1 else ():
            try:
                read_sets([path])
                good.append(path)
            except UserError as error:
                failures.append(str(error))
        if not good or not failures:
            raise
        return read_sets(good), failures


def _prompts(sets: list[EvaluationSet], args: argparse.Namespace) -> dict[str, dict[Side, str]]:
    """What --prompts gives for each set. The others keep the model's own prompts, or the instructions of their file."""
    if not args.prompts:
        return {}
    prompts, found = Prompts(args.prompts, args.instruction_template or TEMPLATE), {}
    sides: tuple[Side, Side] = ("query", "passage")
    for data in sets:
        types = {RetrievalSet: "Retrieval", StsSet: "STS"}
        task = data.name, types.get(type(data), "Classification")
        if prompts.source_of(*task) == "file":
            given = {side: prompts.instruction(*task, side) for side in sides}
            found[data.name] = {side: text for side, text in given.items() if text or side == "query"}
    print(f"--prompts {args.prompts}: gives the instruction of {len(found)} of {len(sets)} sets")
    return found


def measure_sets(
    model: Model,
    sets: list[EvaluationSet],
    prompts: dict[str, dict[Side, str]],
    args: argparse.Namespace,
    failures: list[str],
) -> dict[str, SetResult]:
    """The results of one model by set. Each is written once it is known; a line for each failure goes to `failures`."""
    found: dict[str, SetResult] = {}
    for data in sets:
        if not model.measures(data):
            print(f"{data.name}: left out, {model.name} only ranks passages")
            continue
        identity = model.identity | {"prompts": prompts.get(data.name)}
        if isinstance(data, RetrievalSet) and model.kind != BM25 and (args.precisions or args.truncate_dim):
            identity |= {"precisions": args.precisions, "truncate_dim": args.truncate_dim}
        path, identity = result_path(args.output_folder, model.name, identity, data)
        if kept := None if args.overwrite else read_kept(path, identity):
            model.about |= kept.about["model"]
            found[data.name] = kept.sets[0]
            print(f"{data.name}: {model.name}: read from {path}")
            continue
        try:
            model.load()
            result = model.measure(data, prompts.get(data.name, {}), _forms(model, args))
        except Exception as error:  # of a model's own code, memory, a device; the other sets go on
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            failures.append(f"{data.name}: {model.name}: {kind}{first_line(error)}")
            continue
        found[data.name] = result
        print(f"{data.name}: {model.name}: {result.main} {result.metrics[result.main]:.4f}", flush=True)
        try:
            write_results(path, [result], {"identity": identity, "model": {"name": model.name} | model.about})
        except OSError as error:
            failures.append(f"{error.filename}: not written: {error.strerror}")
    return found


def _forms(model: Model, args: argparse.Namespace) -> list[Form]:
    """The forms that the flags ask for: the full width, and that of --truncate_dim or a Matryoshka model's own.

    Raises:
        UserError: the model has fewer dimensions.
    """
    if model.kind == BM25 or not (args.precisions or args.truncate_dim):
        return []
    width = model.about["width"]
    if wrong := [other for other in args.truncate_dim or () if other > width]:
        raise UserError(f"--truncate_dim: found {wrong[0]}, wanted at most the {width} dimensions of {model.name}")
    own = [kept for kept in model.about.get("matryoshka_dimensions") or () if kept < width]
    widths = {width, *(args.truncate_dim or own)}
    return [Form(kept, name) for kept in sorted(widths, reverse=True) for name in args.precisions or BITS]


def _print_results(models: list[Model], sets: list[EvaluationSet], found: list[dict[str, SetResult]]) -> None:
    notes, marked = [f"{data.name}: {note}" for data in sets for note in data.notes], set()
    for model, results in zip(models, found, strict=True):
        training, lines = find_training_data(model)
        notes += lines
        for data in sets:
            if data.name in results and training and (count := count_trained_on(data, training)):
                notes.append(f"* {data.name}: {count} of {model.name}")
                marked.add(data.name)
    labels = [Path(model.name).name for model in models]
    labels = labels if len(set(labels)) == len(labels) else [model.name for model in models]
    print("", *table(dict(zip(labels, found, strict=True)), marked), *notes, sep="\n")


def _print_verdict(models: list[Model], found: list[dict[str, SetResult]], args: argparse.Namespace) -> list[str]:
    """Print and write the verdict on MODEL against B. Returns a line for each drop that --max_drop forbids."""
    tuned, base = found
    widths = [model.about.get("width") for model in models]
    if None not in widths and widths[0] != widths[1]:
        print(f"{args.model} has width {widths[0]}, {args.against} {widths[1]}: compared by scores, not by vectors")
    if alone := sorted(base.keys() ^ tuned.keys()):
        print(f"not in the verdict, because one model has no result: {', '.join(alone)}")
    names = [name for name in tuned if name in base]
    if not names:
        return ["no verdict: the models have no set in common"]
    verdict = compare([base[name] for name in names], [tuned[name] for name in names], args.seed)
    for row in verdict.sets if len(names) > 1 else ():
        print(f"  {row.name}: {row.metric} {row}, {row.outcome} (Holm's p {row.p:.2g})")
    print(f"verdict: {args.against} -> {args.model}: {verdict.line()}")
    drops = [] if args.max_drop is None else verdict.drops(args.max_drop)
    path = args.output_folder / file_name(Path(args.model).name) / f"against-{file_name(args.against)}.json"
    about = {"base": args.against, "tuned": args.model, "line": verdict.line(), "drops": drops, "seed": args.seed}
    try:
        write_json(path, about | asdict(verdict))
    except OSError as error:
        return [*drops, f"{error.filename}: not written: {error.strerror}"]
    return drops
