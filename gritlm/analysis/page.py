"""The page of `gritlm hrsa`: figures of all metrics, with what moves each, in one HTML file that loads nothing."""

import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

from gritlm.analysis.figures import COLOURS, Figure, figures_of, label
from gritlm.analysis.results import LAST, LEVELS, POOLED, Entry, Metric, at, read_metrics, read_part
from gritlm.files import written_aside
from gritlm.report.figures import Html, safe
from gritlm.report.page import document, grid, paragraph, table

ORDER = {  # names of metrics -> what moves them and what does not
    "correlation": "A rotation or a permutation of dimensions lowers it. A scaling or a shift of dimensions does not.",
    "h_inv sparsity": "A rotation and noise lower it, down to a floor. A permutation of dimensions does not.",
    "residual": "Noise and unequal scaling of dimensions raise it. A rotation or a permutation does not.",
    "mapped_cosine": "Noise and unequal scaling of dimensions lower it. A rotation or a permutation does not.",
    "cka": "Noise and unequal scaling of dimensions lower it. A rotation, a permutation or a shift does not.",
    "cka_biased": "As unbiased CKA, but few texts and many dimensions raise it: unrelated states do not give 0.",
    "knn_tokens knn_documents knn_mutual_documents knn_labels": "Noise or a common shift lowers it, no rotation does.",
    "probe": "Any change of coordinates lowers it, also a rotation or a permutation that loses nothing.",
    "intrinsic_dimension": "Noise raises it. A rotation, a permutation or a shift does not move it.",
    "effective_rank": "Noise raises it; unequal scaling and a common shift lower it. A rotation does not move it.",
    "anisotropy uniformity": "Unequal scaling and a common shift raise it. A rotation does not move it.",
    "alignment": "Noise raises it, a common shift lowers it. A rotation or a permutation does not move it.",
}
MOVES = {name: text for names, text in ORDER.items() for name in names.split()}
MODEL = ("name", "attention", "layers", "width", "path")
PAIR, CONTROLS = "pair", ("ceiling", "unrelated", "shuffled", "random")
READING = (
    "Read the pair between its controls, not between 0 and 1. The ceiling is another seed of the same training; the "
    "floors have nothing of A but the texts. Brackets and bands are 95% intervals over documents, not over seeds."
)


def write(folder: Path) -> Path:
    """Draw a results folder: figures/, and index.html, which is returned. A `UserError` names a damaged file."""
    models, metrics = read_part(folder / "request.json", about_models), read_metrics(folder)
    metrics.sort(key=lambda metric: [*MOVES, metric["metric"]].index(metric["metric"]))
    shared = [why for why in reasons(metrics[0]) if all(why in reasons(metric) for metric in metrics)]
    parts: dict[str, list[Html]] = {level: [] for level in LEVELS}
    with written_aside(folder / "figures") as aside:
        aside.mkdir()
        for metric in metrics:
            drawn = [inline(figure, figure.write(aside)) for figure in figures_of(metric)]
            parts[metric["level"]] += [*section(metric, shared), grid(drawn)]
        shutil.rmtree(folder / "figures", ignore_errors=True)  # a folder is only renamed to a free name
    absent = ", ".join(name for name in MOVES if name not in [metric["metric"] for metric in metrics])
    tables = [overview(metrics, roles) for roles in ((PAIR, *CONTROLS), ("a", "b"))]
    notes = [*map(paragraph, shared), paragraph(f"Not measured: {absent or 'none'}.")]
    summary = [*models, paragraph(READING), *tables, *notes]
    sections = [("Summary", summary), *((f"Level: {level}", part) for level, part in parts.items())]
    with written_aside(folder / "index.html") as aside:
        page = document("Two models, layer by layer", sections, "gritlm hrsa")
        aside.write_text(page, encoding="utf-8", errors="replace")
    return folder / "index.html"


def inline(figure: Figure, svg: str) -> Html:
    """A figure of the page: matplotlib's SVG with the colours of the page, and no id that stands twice."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>| xmlns(:\w+)?=\"[^\"]*\"", "", svg, flags=re.S)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg[svg.index("<svg") :])
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
    for metric, place in product(metrics, (LAST, POOLED)):
        first, *others = (at(metric, role, metric["k"], place) for role in roles)
        if first and first["value"] is not None:
            name = metric["title"] + (f", k = {metric['k']}" if metric["k"] else "")
            p_value = metric["comparisons"][roles[0]].get("p_value") if place == POOLED else None
            tested = [value_text({"value": value}) for value in (first["floor"], p_value)]
            cells = [value_text(entry and {"value": entry["value"]}) for entry in others]
            cells += [value_text(first.get("minus_ceiling"))] if roles[0] == PAIR else []
            rows.append([f"{name}, {place}", value_text(first), *cells, *tested])
    differs = ["pair - ceiling"] if roles[0] == PAIR else []
    return table(["", *map(label, roles), *differs, "by chance", "p"], rows, "Values", numbers=True)


def value_text(entry: Entry | None) -> str:
    if not entry or entry["value"] is None:
        return ""
    bounds = [f"{entry[key]:.3g}" for key in ("low", "high") if entry.get(key) is not None]
    return f"{entry['value']:.3g}" + (f" [{', '.join(bounds)}]" if len(bounds) == 2 else "")


def section(metric: Metric, shown: list[str]) -> list[Html]:
    """What a metric measures and what moves it, and the reasons that are not `shown` above."""
    text = f"{metric.get('about', '')} {MOVES.get(metric['metric'], '')} Unit: {metric.get('unit_of_analysis')}."
    notes = [paragraph(why) for why in reasons(metric) if why not in shown]
    return [Html(f"<h3>{safe(metric['title'])}</h3>"), paragraph(text), *notes]


def reasons(metric: Metric) -> list[str]:
    """Why the metric or one of its comparisons cannot be had."""
    whole, parts = metric.get("why"), metric["comparisons"].items()
    some = [f"{label(role)}: {why}." for role, part in parts if (why := part.get("why")) and why != whole]
    entries = [entry for _, part in parts for of_k in part["series"].values() for entry in of_k]
    some += dict.fromkeys(f"Not everywhere: {why}." for entry in entries if (why := entry.get("why")) and why != whole)
    return [f"Cannot be had: {whole}.", *some] if whole else some
