"""Results of evaluation sets: their JSON files, and the table of them."""

import hashlib
import json
import math
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from gritlm.errors import UserError
from gritlm.evaluation.compressed import FLOAT_QUERIES
from gritlm.evaluation.sets import EvaluationSet, SetResult, fingerprint
from gritlm.evaluation.verdict import TITLES
from gritlm.files import write_text
from gritlm.strict_json import read_json_object

FORMAT = 1
LIBRARIES = ("gritlm", "torch", "transformers", "sentence-transformers", "bm25s", "numpy")
# Title of a column -> the key in a result's `space`; see docs/evaluation.md.
SPACE = {
    "alignment": "alignment",
    "uniformity": "uniformity_passages",
    "effective rank": "effective_rank_passages",
    "anisotropy": "anisotropy_passages",
    "false negatives?": "suspected_false_negatives",
}


@dataclass(frozen=True)
class Results:
    """What a results file holds: the numbers of each set; and the model, its lengths, prompts and versions."""

    about: dict[str, Any]
    sets: list[SetResult]


def write_results(path: str | Path, sets: Sequence[SetResult], about: dict[str, Any]) -> None:
    """Write the results of one model as strict JSON, completely or not at all.

    Args:
        path: the file. Its folder is made if need be.
        about: JSON values on the model: name, lengths, prompts. The date and the versions are added.
    Raises:
        OSError: it names `path`; for instance, the disk is full.
    """
    versions = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    about = about | {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "versions": versions}
    write_json(path, {"format": FORMAT, "about": about, "sets": [asdict(result) for result in sets]})


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    text = json.dumps(_strict(content), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(Path(path), text + "\n")


def _strict(value: Any) -> Any:
    """Lists for numpy's arrays, and null for a number that is not finite."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_results(path: str | Path) -> Results:
    """Read what `write_results` wrote.

    Raises:
        UserError: the file is missing, damaged or of another version.
    """
    content = read_json_object(str(path), wanted="results of gritlm evaluate")
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: found the format {content.get('format')!r}, wanted {FORMAT}")
    try:
        return Results(dict(content["about"]), [SetResult(**row) for row in content["sets"]])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: found no results of gritlm evaluate in it ({error})") from error


# ---- results that are kept


def result_path(folder: Path, model: str, identity: dict[str, Any], data: EvaluationSet) -> tuple[Path, dict[str, Any]]:
    """Where the result of a model on a set is kept, and all that it depends on: the model's identity and the set."""
    identity = identity | {"set": fingerprint(data)}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
    return folder / file_name(Path(model).name) / f"{file_name(data.name)}-{key}.json", identity


def read_kept(path: Path, identity: dict[str, Any]) -> Results | None:
    """The result of an earlier evaluation with this identity, or None. A damaged one is said."""
    if not path.exists():
        return None
    try:
        kept = read_results(path)
    except UserError as error:
        print(f"{error}; measured again")
        return None
    return kept if kept.about.get("identity") == identity and len(kept.sets) == 1 else None


def file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "_"


# ---- the table


def table(models: dict[str, dict[str, SetResult]], marked: set[str]) -> list[str]:
    """The lines of the results of one or more models: a block for each kind of set, and one for the space of vectors.

    Args:
        models: name -> the results by set.
        marked: sets that get a *.
    """
    results = [(model, result) for model, by_set in models.items() for result in by_set.values()]
    order = list(dict.fromkeys(result.name for _, result in results))
    results.sort(key=lambda pair: order.index(pair[1].name))  # the models of one set together
    lines: list[str] = []
    for kind in dict.fromkeys(result.kind for _, result in results):
        of_kind = [(model, result) for model, result in results if result.kind == kind]
        metrics = list(of_kind[0][1].metrics)
        rows: list[tuple[str, str, list]] = [
            (result.name + "*" * (result.name in marked), model, [result.metrics[metric] for metric in metrics])
            for model, result in of_kind
        ]
        names = dict.fromkeys(result.name for _, result in of_kind)
        common = [name for name in names if all(name in by_set for by_set in models.values())]
        for model, by_set in models.items() if len(common) > 1 else ():
            means = [float(np.mean([by_set[name].metrics[metric] for name in common])) for metric in metrics]
            rows.append((f"mean of {len(common)}", model, means))
        lines += _block(kind, [TITLES.get(metric, metric) for metric in metrics], rows, len(models) > 1)
    rows = [(r.name, model, [r.space.get(key) for key in SPACE.values()]) for model, r in results if r.space]
    lines += _block("space", list(SPACE), rows, len(models) > 1) if rows else []
    shown, titles = ("ndcg@10", "recall@10"), ("nDCG@10", "recall@10")
    rows = [
        (
            f"{result.name}, {form['width']} {form['precision']}",
            model,
            [form["bytes"], *(form[of][name] for of in ("metrics", FLOAT_QUERIES) for name in shown)],
        )
        for model, result in results
        for form in result.compressed
    ]
    columns = ["bytes", *titles, *(f"{title} of float32 queries" for title in titles)]
    return lines + (_block("vectors stored as", columns, rows, len(models) > 1) if rows else [])


def _block(title: str, columns: list[str], rows: list[tuple[str, str, list]], with_model: bool) -> list[str]:
    cells = [[title, "model", *columns]] + [[name, model, *map(_number, values)] for name, model, values in rows]
    if not with_model:
        cells = [[first, *others] for first, _, *others in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left, lines = 1 + with_model, []
    for row in cells:
        padded = [
            cell.ljust(n) if i < left else cell.rjust(n) for i, (cell, n) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return [*lines, ""]


def _number(value: float | int | None) -> str:
    if value is None or isinstance(value, int):
        return "-" if value is None else str(value)
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.4f}"
