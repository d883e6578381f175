"""Read the results of `gritlm hrsa`: one file for each metric, checked before anything is drawn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gritlm.errors import UserError, one_line
from gritlm.strict_json import parse_json

LAST, POOLED = "last layer", "pooled"  # the second is also the name of the layer that is the model's vector
LEVELS = ("representation", "geometry", "function", "shape")
Metric = dict[str, Any]  # a file; each comparison has "series": number of neighbours, or "", -> entries of layers
Entry = dict[str, Any]  # of one layer: "layer", "value", and perhaps "low", "high", "floor" and more numbers


def read_metrics(folder: Path) -> list[Metric]:
    """The metrics in a results folder. A `UserError` says that there is none, or names a damaged file."""
    paths = sorted((folder / "metrics").glob("*.json"))
    if not paths:
        raise UserError(f"{folder}: found no metrics/*.json, wanted a folder that gritlm hrsa has written")
    return [{"title": path.stem} | read_part(path, _checked) | {"metric": path.stem} for path in paths]


def read_part(path: Path, parse: Callable[[Any], Any]) -> Any:
    """What `parse` makes of a JSON file. A `UserError` says that the file is damaged."""
    try:
        return parse(parse_json(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"no key {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"{path}: damaged ({what}); delete it and run gritlm hrsa again") from error


def at(metric: Metric, role: str, k: str, place: str) -> Entry | None:
    """A comparison's entry of the pooled vector, or of its last layer."""
    of_layer = {e["layer"]: e for e in metric["comparisons"].get(role, {"series": {}})["series"].get(k, [])}
    last = max((layer for layer in of_layer if layer != POOLED), default=None)
    return of_layer.get(POOLED if place == POOLED else last)


def _checked(metric: Any) -> Metric:
    """The metric with "series", "ks", and "k", the one number of neighbours that most figures show."""
    if metric["level"] not in LEVELS:
        raise ValueError(f"level {metric['level']!r}")
    for part in metric["comparisons"].values():
        part["series"] = part.get("series") or {"": part.get("layers") or []}
        part["histograms"] = part.get("histograms") or []
        entries = [entry for found in part["series"].values() for entry in found]
        numbers = [entry.setdefault(key, None) for entry in entries for key in ("value", "low", "high", "floor")]
        matrix = part.get("matrix") or {"rows": [], "columns": [], "values": []}
        numbers += [part.get("p_value"), *(value for row in matrix["values"] for value in row)]
        if not all(type(number) in (int, float, type(None)) for number in numbers):
            raise ValueError("a value is neither a number nor null")
        if not all(
            type(entry["layer"]) is int or entry["layer"] == POOLED for entry in [*entries, *part["histograms"]]
        ):
            raise ValueError("a layer is neither a number nor pooled")
        sizes = [(len(row), len(matrix["columns"])) for row in matrix["values"]]
        sizes += [(len(bars["edges"]), len(bars["counts"]) + 1) for bars in part["histograms"]]
        if any(found != wanted for found, wanted in [*sizes, (len(matrix["values"]), len(matrix["rows"]))]):
            raise ValueError("a matrix or a histogram is not whole")
    ks = sorted({k for part in metric["comparisons"].values() for k in part["series"] if k}, key=int)
    return metric | {"ks": ks, "k": ks[len(ks) // 2] if ks else ""}
