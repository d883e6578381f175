"""What a model was trained on, as far as run.json and the files it names tell: texts of evaluation sets, tasks of mteb.

Texts are compared where the files can be read. Tasks are known by the names of data sets alone.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path

import numpy as np

from gritlm.data.folders import find_files
from gritlm.data.records import RecordSet, load_records
from gritlm.data.rows import text_id
from gritlm.errors import UserError, first_line
from gritlm.evaluation.benchmarks import all_tasks, quiet_mteb
from gritlm.evaluation.models import BM25, Model
from gritlm.evaluation.sets import EvaluationSet, RetrievalSet, StsSet
from gritlm.models.hub import is_hub_name
from gritlm.report.run import Run, find_run

UNKNOWN = "whether it has seen the sets' texts is not known"
UNKNOWN_SETS = "what the model was trained on is not known"
# Words in the names of tasks and of training files that do not say which data it is.
KIND = re.compile(r"(retrieval|reranking|hardnegatives|(pair|multilabel)?classification|clustering([ps]2[ps])?)+$")
VERSION = re.compile(r"(v\d+|20\d\d|train|dev|beir)$")


def runs_of(folder: Path) -> Iterator[tuple[Run, str, str]]:
    """The runs that trained a model and the models it was trained from, each with the paths of its data and its base.

    Raises:
        UserError: a run.json is damaged.
    """
    seen: set[Path] = set()
    while (folder := folder.resolve()) not in seen and (run := find_run(folder)[0]):
        seen.add(folder)
        paths = [str(run.flags.get(name)) for name in ("train_data", "model_name_or_path")]
        data, base = (os.path.join(run.starts[0].get("folder", ""), path) for path in paths)
        yield run, data, base
        folder = Path(base)


# ---- by their texts


def find_training_data(model: Model) -> tuple[list[RecordSet], list[str]]:
    """The training data of a model and of the models it was trained from; and lines on what is not known of them."""
    records: list[RecordSet] = []
    notes: list[str] = []
    if model.kind in (BM25, "backbone") or model.folder is None:
        return records, notes
    try:
        for run, path, _ in runs_of(model.folder):
            try:
                found = load_records(path, run.flags.get("data_cache"))
            except (UserError, OSError) as error:
                why = f"cannot be read ({first_line(error)})" if os.path.exists(path) else "is not there"
                notes.append(f"{model.name}: its training data {path} {why}; {UNKNOWN}")
                continue
            rows = [f"{len(part)} rows, {part.fingerprint()}" for part in found]
            if rows != (run.settings.get("flags") or {}).get("data", rows):
                notes.append(f"{model.name}: its training data {path} has changed since it was trained")
            if run.flags.get("eval_held_out"):
                notes.append(f"{model.name}: its run held rows of {path} out; here they count as trained on")
            records += found
    except UserError as error:  # of a run.json
        notes.append(f"{model.name}: {first_line(error)}; {UNKNOWN}")
    if not records and not notes:
        notes.append(f"{model.name}: found no run.json that names its training data; {UNKNOWN}")
    return records, notes


def count_trained_on(data: EvaluationSet, records: list[RecordSet], held_out: Set[int] = frozenset()) -> str:
    """How many queries, and how many relevant passages, are queries or positives of the training data; "" for none.

    Texts that are equal up to trailing white space count. `gritlm check-data --eval` also finds nearly equal ones.

    Args:
        held_out: ids of texts, without instructions, that are in the files and are not trained on.
    """
    passages: Sequence[str] = ()
    if isinstance(data, RetrievalSet):
        relevant = {key for grades in data.grades for key, grade in grades.items() if grade > 0}
        passages = [text for key, text in zip(data.corpus_ids, data.corpus, strict=True) if key in relevant]
        queries: Sequence[str] = data.queries
    else:
        queries = [*data.first, *data.second] if isinstance(data, StsSet) else data.test_texts
    left_out = np.array(list(held_out), dtype=np.int64)
    known = np.setdiff1d(np.concatenate([part.row_texts.ids for part in records]), left_out)
    instructions = {instruction for part in records for instruction in part.instructions}
    seen = _is_known(queries, known)
    for instruction in instructions:  # a query's id is of its instruction, too
        seen |= _is_known([f"{instruction}\n{query}" for query in queries], known)
    seen &= ~_is_known(queries, left_out)
    counts = [(int(seen.sum()), len(queries), "queries" if isinstance(data, RetrievalSet) else "texts")]
    if passages:
        counts.append((int(_is_known(passages, known).sum()), len(passages), "relevant passages"))
    if not any(count for count, _, _ in counts):
        return ""
    return " and ".join(f"{count} of {all_} {name}" for count, all_, name in counts) + " are in the training data"


def _is_known(texts: Sequence[str], known: np.ndarray) -> np.ndarray:
    return np.isin(np.array([text_id(text) for text in texts], dtype=np.int64), known)


# ---- by the names of data sets


def training_sets(folder: Path) -> tuple[list[str], str | None, str]:
    """The names of a model's training data sets by its run.json, and by those of the models it was trained from.

    Returns:
        The names; the name on the hub of the model it was trained from; a line on what is not known, or "".
    """
    names: list[str] = []
    base = None
    try:
        for run, data, path in runs_of(folder):
            names += [name for name in find_files(data) if name not in names]
            given = str(run.flags.get("model_name_or_path"))
            base = given if not Path(path).exists() and is_hub_name(given) else None
    except (OSError, UserError) as error:
        return names, None, f"{folder}: {first_line(error)}; {UNKNOWN_SETS}"
    return names, base, "" if names else f"{folder}: found no run.json; {UNKNOWN_SETS}"


def known_as(sets: Iterable[str]) -> dict[str, list[str]]:
    """For each training data set mteb's tasks of its name, up to case, punctuation, kind of task and version."""
    table = json.loads(Path(__file__).with_name("trained_tasks.json").read_text(encoding="utf-8"))
    by_stem: dict[str, list[str]] = {}
    for task, _ in all_tasks():
        by_stem.setdefault(_stem(task), []).append(task)
    return {name: [*table.get(_stem(name), []), *by_stem.get(_stem(name), [])] for name in sets}


def trained_tasks(tasks: Iterable[str], sets: Sequence[str], base: str | None) -> dict[str, str]:
    """The tasks among these that a model was trained on, and why that is thought."""
    from mteb.models import ModelMeta

    found: dict[str, str] = {}
    for name, same in known_as(sets).items():
        for task in same:
            how = "the same" if _plain(task) == _plain(name) else "a similar"
            found.setdefault(task, f"trained on {name}, {how} name")
    meta = ModelMeta.create_empty({"training_datasets": set(found), "adapted_from": base})
    with quiet_mteb():
        for task in meta.get_training_datasets() or ():
            found.setdefault(task, "trained on data from which mteb says this task is made")
    return {task: found[task] for task in tasks if task in found}


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()


def _stem(name: str) -> str:
    """A name without what does not say which data it is; the whole name where nothing else is left."""
    plain, before = _plain(name), ""
    stem = plain.removeprefix("nano")
    while stem != before:
        before, stem = stem, KIND.sub("", VERSION.sub("", stem))
    return stem or plain
