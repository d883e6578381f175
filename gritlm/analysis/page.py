"""The page of `gritlm hrsa`: figures of all metrics, with what moves each, in one HTML file that loads nothing."""

import re
import shutil
from pathlib import Path
from typing import Any

from gritlm.analysis.figures import COLOURS, Figure, figures_of, label
from gritlm.analysis.results import LAST, LEVELS, POOLED, Entry, Metric, at, read_metrics, read_part
from gritlm.files import written_aside
from gritlm.report.figures import Html, number, safe
from gritlm.report.page import document, grid, paragraph, table

ORDER = {  # names of metrics -> what moves them and what does not
    "correlation": "A rotation or a permutation of dimensions lowers it. A shift or scaling of a dimension does not.",
    "h_inv sparsity": "Mixing dimensions lowers it, down to a floor. A permutation of dimensions does not.",
    "residual": "Noise and unequal scaling of dimensions raise it. A rotation or a permutation does not.",
    "mapped_cosine": "Noise and unequal scaling of dimensions lower it. A rotation or a permutation does not.",
    "cka": "Noise and unequal scaling of dimensions lower it. A rotation, a permutation or one scale for all does not.",
    "cka_biased": "As unbiased CKA, but few texts and many dimensions raise it: unrelated states do not give 0.",
    "knn_tokens knn_documents knn_mutual_documents knn_labels": "Noise lowers it. A rotation or permutation does not.",
    "probe": "Any change of coordinates lowers it, also a rotation or a permutation that loses nothing.",
    "intrinsic_dimension effective_rank": "Noise raises it. A rotation or a permutation does not move it.",
    "anisotropy": "A common shift of all states raises it. A rotation or a permutation does not move it.",
    "alignment": "Noise raises it. A rotation or a permutation does not move it.",
    "uniformity": "States that crowd together raise it. A rotation or a permutation does not move it.",
}
MOVES = {name: text for names, text in ORDER.items() for name in names.split()}
MODEL = ("name", "attention", "layers", "width", "path")
CONTROLS = ("ceiling", "unrelated", "shuffled", "random")
READING = (
    "Read the pair against its controls, not against 0 and 1. The ceiling is another seed of the same training: what "
    "training changes by chance. The floors are an unrelated model, shuffled positions, random weights, and the value "
    "by chance in closed form. Brackets and bands are 95% intervals over documents. They do not cover seeds."
)


def write(folder: Path) -> Path:
    """Draw a results folder anew: its figures/, and its index.html, whose path is returned.

    A `UserError` names a damaged file, or says that there is none, or no matplotlib.
    """
    models, metrics = read_part(folder / "request.json", about_models), read_metrics(folder)
    metrics.sort(key=lambda metric: [*MOVES, metric["metric"]].index(metric["metric"]))
    parts: dict[str, list[Html]] = {level: [] for level in LEVELS}
    with written_aside(folder / "figures") as aside:
        aside.mkdir()
        for metric in metrics:
            drawn = [inline(figure, figure.write(aside)) for figure in figures_of(metric)]
            parts[metric["level"]] += [*section(metric), grid(drawn)]
        shutil.rmtree(folder / "figures", ignore_errors=True)  # a folder is only renamed to a free name
    absent = ", ".join(name for name in MOVES if name not in [metric["metric"] for metric in metrics])
    tables = [overview(metrics, roles) for roles in (("pair", *CONTROLS), ("a", "b"))]
    summary = [*models, paragraph(READING), *tables, paragraph(f"Not measured: {absent or 'none'}.")]
    sections = [("Summary", summary), *((f"Level: {level}", part) for level, part in parts.items())]
    with written_aside(folder / "index.html") as aside:
        page = document("Two models, layer by layer", sections, "gritlm hrsa")
        aside.write_text(page, encoding="utf-8", errors="replace")
    return folder / "index.html"


def inline(figure: Figure, svg: str) -> Html:
    """A figure of the page: matplotlib's SVG with the colours of the page, and no id that stands twice."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>| xmlns(:\w+)?=\"[^\"]*\"", "", svg, flags=re.S)
    svg = re.sub(r' id="[a-zA-Z_]+\d*_\d+"', "", svg[svg.index("<svg") :])
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    start = f'<svg class="plot" role="img" aria-label="{safe(figure.title)}"'
    svg = svg.replace("fill: #ffffff", "fill: none").replace("<svg", start, 1)
    links = " ".join(f'<a href="figures/{figure.name}.{kind}">{kind}</a>' for kind in ("tsv", "json", "svg", "png"))
    return Html(f"<figure><figcaption>{safe(figure.title)}</figcaption>{svg}<small>{links}</small></figure>")


def about_models(request: dict[str, Any]) -> list[Html]:
    """Which models and texts were compared."""
    models = [[role, *(found.get(key, "") for key in MODEL)] for role, found in request["models"].items()]
    facts = [[key.replace("_", " "), value] for key, value in request["texts"].items()]
    return [table(["", *MODEL], models, "Models"), table(["Texts", ""], facts, "Texts")]


def overview(metrics: list[Metric], roles: tuple[str, ...]) -> Html:
    """The values of all metrics at the last layer and of the pooled vector: the first role's with its interval."""
    rows = []
    for metric in metrics:
        for place in (LAST, POOLED):
            cells = [value_text(at(metric, role, metric["k"], place), role == roles[0]) for role in roles]
            if cells[0]:
                p_value = metric["comparisons"][roles[0]].get("p_value")
                of_k = f", k = {metric['k']}" if metric["k"] else ""
                rows.append([f"{metric['title']}{of_k}, {place}", *cells, "" if p_value is None else number(p_value)])
    return table(["", *map(label, roles), "p"], rows, "Values", numbers=True)


def value_text(entry: Entry | None, interval: bool) -> str:
    if not entry or entry["value"] is None:
        return ""
    bounds = [f"{entry[key]:.3g}" for key in ("low", "high") if interval and entry[key] is not None]
    return f"{entry['value']:.3g}" + (f" [{', '.join(bounds)}]" if len(bounds) == 2 else "")


def section(metric: Metric) -> list[Html]:
    """What a metric measures and what moves it, and why it or a comparison is not there."""
    whys = {"": metric.get("why")} | {f"{label(r)}: ": part.get("why") for r, part in metric["comparisons"].items()}
    text = f"{metric.get('about', '')} {MOVES.get(metric['metric'], '')} Unit: {metric.get('unit_of_analysis')}."
    notes = [Html(f'<p class="notes">{safe(f"{name}{why}")}</p>') for name, why in whys.items() if why]
    return [Html(f"<h3>{safe(metric['title'])}</h3>"), paragraph(text), *notes]
