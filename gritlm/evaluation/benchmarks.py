"""Names of benchmarks and tasks to mteb's task objects, without a network.

A name is a benchmark of mteb, a task of mteb, or BRIGHT: the twelve short tasks of BRIGHT(v1.1), each with its own
instruction, in place of mteb's superseded benchmark of that name. mteb is imported inside functions.
"""

import difflib
import logging
import random
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gritlm.errors import UserError

INSTALL = "this needs mteb: pip install 'gritlm[evaluate]'"
REMARKS = {
    "BRIGHT": "BRIGHT: mteb's v1.1 tasks leave a query's excluded_ids out of its ranking; "
    "instructions differ from the paper's"
}


@dataclass
class Selection:
    """What a user's names stand for.

    Attributes:
        tasks: mteb tasks, each once, in the order of the names.
        private: names of tasks whose data is not public. They are not run.
        other_languages: how many tasks have no subset in the wanted languages.
        remarks: lines that belong under the table.
    """

    tasks: list[Any] = field(default_factory=list)
    private: list[str] = field(default_factory=list)
    other_languages: int = 0
    remarks: list[str] = field(default_factory=list)


@contextmanager
def quiet_mteb() -> Iterator[None]:
    """Keep mteb's and datasets' progress and warnings off the screen."""
    import datasets
    import mteb

    logger = logging.getLogger(mteb.__name__)
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def _fast_to_make() -> Iterator[None]:
    """Let a task that is made seed only its own generators. mteb seeds again when it evaluates.

    Seeding all GPUs formats a stack trace each time. mteb makes 5,000 tasks for its benchmarks: half a minute.
    """
    from mteb.abstasks import abstask

    seed_all = abstask._set_seed
    abstask._set_seed = lambda seed: (random.Random(seed), np.random.default_rng(seed))
    try:
        yield
    finally:
        abstask._set_seed = seed_all


def import_mteb() -> Any:
    """The module mteb.

    Raises:
        UserError: it is not installed.
    """
    try:
        import mteb
    except ImportError as error:
        raise UserError(f"found no package {error.name or 'mteb'}; {INSTALL}") from error
    return mteb


def find_tasks(names: Sequence[str], languages: Sequence[str] = (), seed: int = 42) -> Selection:
    """The tasks of benchmarks and tasks by name.

    Args:
        languages: keep only subsets in one of these, such as eng or eng-Latn. Empty: all.
        seed: for tasks that draw samples.
    Raises:
        UserError: a name or a language is unknown; the message lists the nearest names.
    """
    import_mteb()
    found = Selection()
    with quiet_mteb(), _fast_to_make():
        _check_languages(languages)
        for name in names:
            for task in _tasks_of(name):
                if not task.metadata.is_public:
                    found.private.append(task.metadata.name)
                elif task.metadata.name not in {other.metadata.name for other in found.tasks}:
                    if kept := _in_languages(task, languages, seed):
                        found.tasks.append(kept)
                    else:
                        found.other_languages += 1
            if name in REMARKS:
                found.remarks.append(REMARKS[name])
    if not found.tasks:
        why = f"its {len(found.private)} tasks are private" if found.private else f"no task in {', '.join(languages)}"
        raise UserError(f"{', '.join(names)}: nothing to run: {why}")
    return found


def _tasks_of(name: str) -> Sequence[Any]:
    import mteb

    if name == "BRIGHT":
        by_length: Any = mteb.get_benchmark("BRIGHT(v1.1)").aggregations[-1]
        return next(group.tasks for group in by_length.groups if group.label == "Short")
    for find in (lambda: mteb.get_benchmark(name).tasks, lambda: [mteb.get_task(name)]):
        try:
            return find()
        except KeyError:
            pass
    names = [*(benchmark.name for benchmark in mteb.get_benchmarks()), *(task for task, _ in all_tasks())]
    known = {other.casefold(): other for other in names}
    nearest = difflib.get_close_matches(name.casefold(), known, 3, 0.4)
    nearest += [key for key in known if name and name.casefold() in key and key not in nearest][: 3 - len(nearest)]
    hint = f"; the nearest are {', '.join(known[key] for key in nearest)}" if nearest else ""
    raise UserError(f"{name!r}: found no benchmark and no task of this name in mteb{hint}")


def all_tasks() -> list[tuple[str, str]]:
    """The name and the type of every task of mteb."""
    from mteb.get_tasks import TASK_LIST

    return [(task.metadata.name, task.metadata.type) for task in TASK_LIST]


def _in_languages(task: Any, languages: Sequence[str], seed: int) -> Any | None:
    """A copy of a task, since a benchmark's are shared, with the subsets in these languages. None: it has none."""
    copy = type(task)(seed=seed)
    copy.filter_eval_splits(list(task.eval_splits))
    subsets: Any = set(task.hf_subsets)  # a list of Flores' 41,000 would take 20 seconds
    try:
        return copy.filter_languages(list(languages) or None, hf_subsets=subsets)
    except ValueError:
        return None


def _check_languages(languages: Sequence[str]) -> None:
    from mteb.get_tasks import TASK_LIST
    from mteb.languages import ISO_TO_LANGUAGE, check_language_code

    for language in languages:
        try:
            check_language_code(language)
        except ValueError as error:
            code = language.split("-")[0].casefold()
            by_name = {name.casefold(): code for code, name in ISO_TO_LANGUAGE.items()}
            used = Counter(used.split("-")[0] for task in TASK_LIST for used in task.metadata.languages)
            begin = [one for one, _ in used.most_common() if code and one.startswith(code)][:3]
            nearest = begin or difflib.get_close_matches(code, used, 3, 0.5)
            nearest = [by_name[code]] if len(code) > 3 and code in by_name else nearest
            hint = f"; the nearest are {', '.join(nearest)}" if nearest else ""
            wanted = "wanted ISO 639-3 such as eng, perhaps with a script, eng-Latn"
            raise UserError(f"--langs: found {language!r}, {wanted}{hint}") from error
