"""`gritlm evaluate MODEL --benchmark NAME` for names that mteb has: find the tasks, run them, print one table."""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence

from gritlm.evaluation.benchmark_table import Column, print_table, published_columns
from gritlm.evaluation.benchmarks import all_tasks, find_tasks, import_mteb
from gritlm.evaluation.models import BM25, find_model
from gritlm.evaluation.mteb_model import MTEB_BM25, Job, name_for_mteb
from gritlm.evaluation.mteb_tasks import run_tasks
from gritlm.evaluation.prompts import TEMPLATE, Prompts
from gritlm.evaluation.trained_on import trained_tasks, training_sets
from gritlm.models.text import CONTRACT_FILE, TextContract

SEED = 42  # mteb's own


def run_benchmarks(args: argparse.Namespace) -> int:
    """Run the tasks of `args.benchmarks` with MODEL, and with --against; print and write the table.

    Returns:
        The exit code: 2 if a model has no score at all, 1 if tasks are missing or --max_drop is exceeded, else 0.
    Raises:
        UserError: a name is unknown, a model does not load, or mteb is not installed.
    """
    selection = find_tasks(args.benchmarks, args.langs or (), args.seed)
    types = {task.metadata.name: task.metadata.type for task in selection.tasks}
    published = published_columns(args.published, selection.tasks)
    jobs = [make_job(name, args, list(types.items())) for name in (args.model, args.against) if name]
    columns: list[Column] = []
    for job in jobs:
        print(f"{job.name}: {len(types)} tasks, revision {job.revision}", flush=True)
        outcomes = run_tasks(job, selection.tasks, args.processes)
        scores = {outcome.task: outcome.score for outcome in outcomes if outcome.score is not None}
        failed = {outcome.task: outcome.why for outcome in outcomes if outcome.score is None}
        columns.append(Column(job.name, job.revision, scores, failed, trained_tasks(types, job.sets, job.base)))
    written = True
    try:
        print_table(args.output_folder, "-".join(args.benchmarks), selection, types, columns, published)
    except OSError as error:
        written = False
        print(f"{error.filename}: not written: {error.strerror}", file=sys.stderr)
    drops = []
    if args.against and args.max_drop is not None:
        tuned, base = (column.scores for column in columns)
        fallen = [task for task in tuned if task in base and tuned[task] < base[task] - args.max_drop]
        drops = [f"{task}: {base[task]:.4f} -> {tuned[task]:.4f}, more than --max_drop" for task in fallen]
        print(*drops, sep="\n", end="\n" * bool(drops), file=sys.stderr)
    if not all(column.scores for column in columns):
        return 2
    return 1 if drops or not written or any(column.failed for column in columns) else 0


def make_job(name: str, args: argparse.Namespace, tasks: Sequence[tuple[str, str]]) -> Job:
    """Find a model, and name its evaluation by all that its scores depend on. `tasks` are names and types."""
    model = find_model(name, args.query_max_len, args.passage_max_len, args.chunk_tokens, args.output_folder)
    print(*model.notes, sep="\n", end="\n" * bool(model.notes))
    own_prompts = bool(args.prompts or args.instruction_template)
    prompts: Prompts | None = Prompts(args.prompts, args.instruction_template or TEMPLATE)
    limits = (args.query_max_len, args.passage_max_len)
    sets: list[str] = []
    base, unknown = None, ""
    identity = {key: model.identity.get(key) for key in ("kind", "files", "dtype")}
    if model.kind in ("gritlm", "backbone"):
        assert model.folder is not None
        contract = TextContract.load(model.folder) if (model.folder / CONTRACT_FILE).is_file() else TextContract()
        limits = (limits[0] or contract.query_max_len, limits[1] or contract.passage_max_len)
        sets, base, unknown = training_sets(model.folder.resolve())
    elif model.kind == BM25 or not own_prompts:
        prompts = None
        if own_prompts:
            print(f"{name}: --prompts and --instruction_template have no effect on it")
    if prompts:
        print(*prompts.notes(tasks), *([unknown] if unknown else []), sep="\n")
        identity["prompts"] = prompts.fingerprint(all_tasks())  # of all: runs with other tasks add to the results
    if limits[0] != limits[1] and model.kind == "sentence-transformers":
        print(f"{name}: mteb's wrapper has one limit for queries and passages, the larger one is used")
    text = json.dumps(identity | {"limits": limits}, sort_keys=True)
    revision = hashlib.sha256(text.encode()).hexdigest()[:16]
    revision = import_mteb().get_model_meta(MTEB_BM25).revision if model.kind == BM25 else revision
    revision += "" if args.seed == SEED else f"-seed{args.seed}"
    cache_bytes = int(1e9 * args.cache_gb)
    where = args.output_folder, args.overwrite
    return Job(model, name_for_mteb(name, model.folder), revision, limits, prompts, *where, cache_bytes, sets, base)
