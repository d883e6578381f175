"""The table of a benchmark: each task, means over tasks and types, what is missing, and published figures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gritlm.errors import UserError
from gritlm.evaluation.benchmarks import Selection, quiet_mteb
from gritlm.evaluation.results import file_name, write_json
from gritlm.files import write_text
from gritlm.strict_json import read_json_object

SHOWN = 6  # published models on the screen; the files have all
RESULTS = "https://github.com/embeddings-benchmark/results"


@dataclass
class Column:
    """A model's main scores by task; why others have none; and which tasks it was trained on, with the reason."""

    name: str
    revision: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    trained_on: dict[str, str] = field(default_factory=dict)


def published_columns(place: str | None, tasks: Sequence[Any]) -> list[Column]:
    """Published scores of these tasks, the models with most tasks first, then by mean.

    Args:
        place: a folder of mteb's results (a clone of its results repository, or the output folder of an evaluation), or
            a JSON file {"model": {"task": score}} with scores in [0, 1] or in percent.
    Raises:
        UserError: it is neither.
    """
    if place is None:
        return []
    columns = _read_file(place) if Path(place).is_file() else _read_folder(place, tasks)
    names = {task.metadata.name for task in tasks}
    for column in columns:
        column.scores = {task: score for task, score in column.scores.items() if task in names}
    columns = [column for column in columns if column.scores]
    if not columns:
        print(f"--published {place}: found no score of these tasks")
    return sorted(columns, key=lambda column: (-len(column.scores), -_mean(column.scores.values())))


def _read_file(place: str) -> list[Column]:
    columns = []
    for name, scores in read_json_object(place, "--published", '{"model": {"task": score}}').items():
        numbers: list[Any] = list(scores.values()) if isinstance(scores, dict) else [None]
        if not all(type(score) in (int, float) and abs(score) <= 100 for score in numbers):
            raise UserError(f"--published {place}: {name}: wanted a score for each task, 0 to 1 or in percent")
        percent = 100 if any(abs(score) > 1 for score in numbers) else 1
        columns.append(Column(name, scores={task: score / percent for task, score in scores.items()}))
    return columns


def _read_folder(place: str, tasks: Sequence[Any]) -> list[Column]:
    from mteb import ResultCache

    if not any((Path(place) / name).is_dir() for name in ("results", "remote")):
        wanted = f"wanted a clone of {RESULTS}, or a JSON file"
        raise UserError(f"--published {place}: found no folder named results in it, {wanted}")
    by_name = {task.metadata.name: task for task in tasks}
    with quiet_mteb():
        found = ResultCache(place).load_results(tasks=list(by_name), only_main_score=True, require_model_meta=False)
        columns = [Column(model.model_name, str(model.model_revision)) for model in found.model_results]
        for column, model in zip(columns, found.model_results, strict=True):
            for result in model.task_results:
                score = float(result.validate_and_filter_scores(by_name[result.task_name]).get_score())
                if score == score:  # all subsets are there
                    column.scores[result.task_name] = score
    return columns


def print_table(
    folder: Path,
    title: str,
    selection: Selection,
    types: dict[str, str],
    own: Sequence[Column],
    published: Sequence[Column],
) -> None:
    """Print the table, and write it as TSV and JSON into the folder's `tables`.

    Args:
        title: for the files' names.
        types: task -> its type.
        own: what was measured. Its first column has the notes.
    """
    columns = [*own, *published]
    rows = [["task", "type", *(column.name for column in columns)]]
    for task, kind in types.items():
        cells = [f"{c.scores[task]:.4f}{'*' * (task in c.trained_on)}" if task in c.scores else "-" for c in columns]
        rows.append([task, kind, *cells])
    means = [means_of(types, column.scores) for column in columns]
    rows += [[name, "mean", *(found[name][0] for found in means)] for name in means[0]] if len(types) > 1 else []
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)][: 2 + len(own) + SHOWN]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip())
    notes = [line for column in own for line in _notes(column, types)]
    if selection.private:
        notes.append(f"not runnable, their data is private: {', '.join(selection.private)}")
    if selection.other_languages:
        notes.append(f"left out, without a subset in these languages: {selection.other_languages} tasks")
    print(*notes, *selection.remarks, sep="\n")
    base = folder / "tables" / f"{file_name(title)[:80]}-{file_name(own[0].name)}-{own[0].revision[:8]}"
    models = [vars(column) | {"means": found} for column, found in zip(columns, means, strict=True)]
    write_json(Path(f"{base}.json"), {"types": types, "models": models, "notes": [*notes, *selection.remarks]})
    write_text(Path(f"{base}.tsv"), "".join("\t".join(row) + "\n" for row in rows))
    print(f"results in {folder}, the table in {base}.tsv and .json", flush=True)


def means_of(types: dict[str, str], scores: dict[str, float]) -> dict[str, tuple[str, float, int]]:
    """The means over tasks, over types, and of each type: as text, as a number, and how many tasks it lacks."""
    by_type = {kind: [scores[t] for t, of in types.items() if of == kind and t in scores] for kind in types.values()}
    lacking = {kind: list(types.values()).count(kind) - len(found) for kind, found in by_type.items()}
    total = sum(lacking.values())
    values = {"Mean(Task)": (_mean([scores[task] for task in types if task in scores]), total)}
    values["Mean(Type)"] = (_mean([_mean(found) for found in by_type.values() if found]), total)
    values |= {kind: (_mean(found), lacking[kind]) for kind, found in by_type.items()}
    return {
        name: ("-" if value != value else f"{value:.4f}" + f" ({count} missing)" * bool(count), value, count)
        for name, (value, count) in values.items()
    }


def _notes(column: Column, types: dict[str, str]) -> list[str]:
    notes, marks = [], column.trained_on
    if marks:
        others = {task: kind for task, kind in types.items() if task not in marks}
        mean = means_of(others, column.scores)["Mean(Task)"][0]
        notes.append(f"* {column.name} was trained on {len(marks)} of these tasks; Mean(Task) of the others: {mean}")
        notes += [f"  {task}: {why}" for task, why in marks.items()]
        notes.append("  This is by name: gritlm check-data --eval compares the texts.")
    if column.failed:
        notes.append(f"{column.name}: missing {len(column.failed)} of {len(types)}:")
        notes += [f"  {task}: {why}" for task, why in column.failed.items()]
    return notes


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")
