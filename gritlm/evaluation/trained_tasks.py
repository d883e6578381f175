"""Which tasks of mteb a model was trained on, by the names of its training data sets. No text is compared."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from gritlm.data.folders import find_files
from gritlm.errors import UserError
from gritlm.evaluation.benchmarks import all_tasks, quiet_mteb
from gritlm.models.hub import is_hub_name

# Words in the names of tasks and of training files that do not say which data it is.
KIND = re.compile(r"(retrieval|reranking|hardnegatives|(pair|multilabel)?classification|clustering([ps]2[ps])?)+$")
VERSION = re.compile(r"(v\d+|20\d\d|train|dev|beir)$")
UNKNOWN = "what the model was trained on is not known"


def training_sets(folder: Path | None) -> tuple[list[str], str | None, str]:
    """The names of a model's training data sets by its run.json, and by those of the models it was trained from.

    Returns:
        The names; the name on the hub of the model it was trained from; a line on what is not known, or "".
    """
    names: list[str] = []
    seen: set[Path] = set()
    while folder is not None and folder not in seen:
        seen.add(folder)
        places = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
        file = next((place / "run.json" for place in places if (place / "run.json").is_file()), None)
        if file is None:
            return names, None, "" if names else f"{folder}: found no run.json; {UNKNOWN}"
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
            flags = {**run.get("flags", {}), **run.get("resolved", {})}
            start = (run.get("starts") or [{}])[0].get("folder", "")
            data, base = os.path.join(start, str(flags["train_data"])), str(flags["model_name_or_path"])
            names += [name for name in find_files(data) if name not in names]
        except (OSError, ValueError, KeyError, TypeError, UserError):
            return names, None, f"{file}: names no training data that is there; {UNKNOWN}"
        path = Path(os.path.join(start, base))
        if not path.exists():
            return names, base if is_hub_name(base) else None, ""
        folder = path.resolve()
    return names, None, ""


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
