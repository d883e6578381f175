"""Figures of the results of `gritlm hrsa`, each as SVG and PNG with its numbers as TSV and JSON.

A comparison has the same colour (Okabe and Ito's, as in the report), dash and marker in all figures.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from gritlm.analysis.results import LAST, POOLED, Entry, Metric, at
from gritlm.errors import UserError
from gritlm.report.style import STYLE

# The light colours of the style sheet by name; the page puts the name back, so that a dark page has dark colours.
COLOURS = dict(reversed(re.findall(r"--(\w+):(#[0-9a-f]{6})", STYLE)))
ROLES = {  # label, colour, dash, marker
    "pair": ("A and B", "c0", "-", "o"),
    "a": ("A", "c0", "-", "o"),
    "b": ("B", "c1", "--", "s"),
    "ceiling": ("ceiling: another seed", "c2", "--", "^"),
    "unrelated": ("floor: unrelated model", "c1", "-.", "s"),
    "shuffled": ("floor: shuffled", "c3", ":", "v"),
    "random": ("floor: random weights", "c6", (0, (6, 1, 1, 1, 1, 1)), "D"),
}
OTHERS = (("c4", (0, (3, 1)), "P"), ("c5", (0, (1, 1)), "X"), ("c3", "-", "*"), ("c2", "-.", "<"))
CHECKPOINT = re.compile(r"more:checkpoint-(\d+)")
SETTINGS: Any = {
    **{"svg.fonttype": "none", "text.parse_math": False, "text.color": COLOURS["ink"], "font.size": 9},
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), COLOURS["soft"]),
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.formatter.useoffset": False},
    **{"grid.color": COLOURS["line"], "grid.linewidth": 0.6, "lines.markersize": 4.5, "legend.fontsize": 8},
}


@dataclass(frozen=True)
class Figure:
    """One figure: its numbers, and what draws them on matplotlib's axes."""

    name: str
    title: str
    rows: list[dict[str, Any]]  # the numbers, one line of the TSV each
    draw: Callable[[Any], None]

    def write(self, folder: Path) -> str:
        """Write NAME.svg, .png, .tsv and .json, and give the SVG. A `UserError` says that matplotlib is missing."""
        try:
            import matplotlib
            from matplotlib.figure import Figure as Canvas
        except ImportError as error:
            raise UserError("found no matplotlib, wanted it: pip install 'gritlm[study]'") from error
        path = folder / self.name
        with open(f"{path}.tsv", "w", encoding="utf-8", errors="replace", newline="") as file:
            keys = dict.fromkeys(key for row in self.rows for key in row)
            table = csv.DictWriter(file, keys, delimiter="\t", lineterminator="\n")
            table.writeheader()
            table.writerows(self.rows)
        with open(f"{path}.json", "w", encoding="utf-8") as file:
            json.dump({"title": self.title, "rows": self.rows}, file, indent=1, allow_nan=False)
        with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": self.name}):
            canvas = Canvas(figsize=(4.0, 3.0), layout="constrained")
            axes = canvas.subplots()
            self.draw(axes)
            canvas.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False)
            canvas.savefig(f"{path}.png", dpi=150)
            canvas.set_layout_engine("none")  # it is laid out
            canvas.savefig(f"{path}.svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        return Path(f"{path}.svg").read_text(encoding="utf-8")


def label(role: str) -> str:
    """The name of a comparison in a legend."""
    return ROLES[role][0] if role in ROLES else role.removeprefix("more:").lstrip("_")[-26:]


def looks(metric: Metric) -> dict[str, dict[str, Any]]:
    """Colour, dash, marker and label of each comparison that is no checkpoint."""
    others, found = count(), {}
    for role in metric["comparisons"]:
        if not CHECKPOINT.fullmatch(role):
            colour, dash, marker = ROLES[role][1:] if role in ROLES else OTHERS[next(others) % len(OTHERS)]
            found[role] = {"color": COLOURS[colour], "linestyle": dash, "marker": marker, "label": label(role)}
    return found


def checkpoints(metric: Metric) -> dict[int, str]:
    """Step -> name of the comparison with the checkpoint of that step, in order."""
    return dict(sorted((int(m[1]), name) for name in metric["comparisons"] if (m := CHECKPOINT.fullmatch(name))))


def figures_of(metric: Metric) -> Iterator[Figure]:
    """All figures of a metric. What the results do not hold is not drawn."""
    name, title, k, ks = (metric[key] for key in ("metric", "title", "k", "ks"))
    series = [(role, of, found) for role, part in metric["comparisons"].items() for of, found in part["series"].items()]
    flat = [
        {"comparison": role} | ({"k": int(of)} if of else {}) | entry for role, of, part in series for entry in part
    ]
    if flat:
        yield Figure(f"{name}.layers", f"{title}, k = {k}" if k else title, flat, partial(layer_curves, metric=metric))
    for place in (LAST, POOLED):
        here = [(role, of, entry["layer"]) for role, of, _ in series if (entry := at(metric, role, of, place))]
        rows = [row for row in flat if (row["comparison"], str(row.get("k", "")), row["layer"]) in here]
        for what, wanted, draw in (("k", len(ks) > 1, over_k), ("steps", checkpoints(metric), over_steps)):
            if rows and wanted:
                drawn = partial(draw, metric=metric, place=place)
                yield Figure(f"{name}.{what}.{place.split()[0]}", f"{title}, {place}, over {what}", rows, drawn)
    yield from heat_maps(metric)
    bars = [found["layer"] for part in metric["comparisons"].values() for found in part["histograms"]]
    whole = [layer for layer in dict.fromkeys(bars) if layer != POOLED]
    for layer in dict.fromkeys([*whole[:1], *whole[len(whole) // 2 :][:1], *whole[-1:], *bars[-1:]]):
        yield histogram(metric, layer)


def heat_maps(metric: Metric) -> Iterator[Figure]:
    """All layers of A by all of B for each comparison, on one scale of colours."""
    found = {role: matrix for role in looks(metric) if (matrix := metric["comparisons"][role].get("matrix"))}
    every = [value for matrix in found.values() for row in matrix["values"] for value in row if value is not None]
    for number, (role, matrix) in enumerate(found.items()):
        rows = [
            {"comparison": role, "layer of A": row, "layer of B": column, "value": value}
            for row, values in zip(matrix["rows"], matrix["values"], strict=True)
            for column, value in zip(matrix["columns"], values, strict=True)
        ]
        name = f"{metric['metric']}.matrix.{role if role in ROLES else f'more{number}'}"
        draw = partial(heat, matrix=matrix, low=min(every, default=0.0), high=max(every, default=1.0))
        yield Figure(name, f"{metric['title']}, all layers: {label(role)}", rows, draw)


def histogram(metric: Metric, layer: int | str) -> Figure:
    """The histograms of all comparisons at a layer, as shares."""
    found = {
        role: bars
        for role in looks(metric)
        for bars in metric["comparisons"][role]["histograms"]
        if bars["layer"] == layer and sum(bars["counts"])
    }
    rows = [
        {"comparison": role, "from": low, "to": high, "count": number}
        for role, bars in found.items()
        for low, high, number in zip(bars["edges"], bars["edges"][1:], bars["counts"], strict=False)
    ]

    def draw(axes: Any) -> None:
        for role, bars in found.items():
            look = {key: value for key, value in looks(metric)[role].items() if key != "marker"}
            axes.stairs(np.array(bars["counts"]) / sum(bars["counts"]), bars["edges"], linewidth=1.5, **look)
        axes.set(xlabel="value", ylabel="share of dimensions")

    return Figure(f"{metric['metric']}.histogram.{layer}", f"{metric['title']}, histogram, layer: {layer}", rows, draw)


def plot(axes: Any, points: Sequence[tuple[float, Entry]], look: dict[str, Any], joined: bool = True) -> None:
    """Values with their intervals, as a curve with a band or as single points. A null leaves a gap."""
    x = [at for at, _ in points]
    value, low, high = (np.array([e[key] for _, e in points], dtype=float) for key in ("value", "low", "high"))
    if joined and points:
        axes.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)
        axes.plot(x, value, markevery=max(1, len(x) // 8), **look)
    elif points:
        axes.vlines(x, low, high, color=look["color"])
        axes.plot(x, value, **{**look, "linestyle": "", "label": None})


def finish(axes: Any, x: str, metric: Metric) -> None:
    axes.grid(axis="y")
    axes.set(xlabel=x, ylabel=metric["title"])


def layer_curves(axes: Any, metric: Metric) -> None:
    """A curve for each comparison; its pooled vector is a point on the right."""
    found = {role: metric["comparisons"][role]["series"].get(metric["k"], []) for role in looks(metric)}
    last = max((e["layer"] for entries in found.values() for e in entries if e["layer"] != POOLED), default=0)
    right, apart = last + max(1.0, last / 12), (last or 40) / 80
    for number, (role, look) in enumerate(looks(metric).items()):
        plot(axes, [(e["layer"], e) for e in found[role] if e["layer"] != POOLED], look)
        plot(axes, [(right + number * apart, e) for e in found[role] if e["layer"] == POOLED], look, joined=False)
    floors = {e["layer"]: e["floor"] for part in found.values() for e in part if e["floor"] is not None}
    if points := sorted((right if layer == POOLED else layer, floor) for layer, floor in floors.items()):
        axes.plot(*zip(*points, strict=True), ":", color=COLOURS["ink"], label="floor: by chance")
    ticks = {float(i): str(i) for i in range(0, last + 1, max(1, -(-last // 6))) if last and i < right - last / 7}
    if any(e["layer"] == POOLED for entries in found.values() for e in entries):
        ticks[right + (len(found) - 1) * apart / 2] = POOLED
    axes.set_xticks(list(ticks), list(ticks.values()))
    finish(axes, "layer", metric)


def over_k(axes: Any, metric: Metric, place: str) -> None:
    for role, look in looks(metric).items():
        plot(axes, [(int(k), entry) for k in metric["ks"] if (entry := at(metric, role, k, place))], look)
    axes.set_xscale("log")
    axes.set_xticks([int(k) for k in metric["ks"]], metric["ks"])
    axes.minorticks_off()
    finish(axes, "neighbours k", metric)


def over_steps(axes: Any, metric: Metric, place: str) -> None:
    """A compared with the checkpoints of a run; the other comparisons are lines across."""
    own = {"color": COLOURS["c5"], "linestyle": "-", "marker": "o", "label": "A and checkpoint"}
    found = {step: at(metric, role, metric["k"], place) for step, role in checkpoints(metric).items()}
    plot(axes, [(step, entry) for step, entry in found.items() if entry], own)
    for role, look in looks(metric).items():
        if (entry := at(metric, role, metric["k"], place)) and entry["value"] is not None:
            axes.axhline(entry["value"], **{key: value for key, value in look.items() if key != "marker"})
    finish(axes, "step", metric)


def heat(axes: Any, matrix: dict[str, Any], low: float, high: float) -> None:
    """A heat map, with layer 0 of A at the bottom. A null is left white."""
    values, (rows, columns) = np.array(matrix["values"], dtype=float), (matrix["rows"], matrix["columns"])
    picture = axes.imshow(values, origin="lower", aspect="auto", interpolation="nearest", vmin=low, vmax=high)
    for set_ticks, names in ((axes.set_yticks, rows), (axes.set_xticks, columns)):
        every = max(1, -(-len(names) // 6))
        set_ticks(range(0, len(names), every), names[::every])
    axes.set(ylabel="layer of A", xlabel="layer of B")
    axes.figure.colorbar(picture).solids.set_rasterized(True)
