"""The page of one run or of several side by side: one HTML file that needs no network and no script."""

import json
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gritlm.report.figures import Html, curves, histograms, number, safe, shares, swatch
from gritlm.report.run import Run
from gritlm.report.style import STYLE

FIGURES = 12  # of one kind where several runs are compared: a figure for each data set
PATHS = ("output_dir", "data_cache", "run_name", "resume_from_checkpoint")  # of no interest between runs
OPTIMISATION = {"grad_norm": "Gradient norm", "learning_rate": "Learning rate"}
HEALTH = {
    "alignment": "Alignment",
    "uniformity_passages": "Uniformity",
    "effective_rank_passages": "Effective rank",
    "anisotropy_passages": "Anisotropy",
    "suspected_false_negatives": "Suspected false negatives",
}


def make_page(runs: dict[str, Run]) -> str:
    """The page. `runs` has a name for each run, different from the others."""
    title = f"Training report: {', '.join(runs)}"
    sections = [
        ("Summary", [summary(runs), *notes(runs)]),
        ("Settings that differ", [differing_settings(runs)] if len(runs) > 1 else []),
        ("Loss", losses(runs)),
        ("Optimisation", [grid(curve_of(runs, key, title) for key, title in OPTIMISATION.items())]),
        ("Speed", speed(runs)),
        ("Evaluation", evaluation(runs)),
        ("Space", space(runs)),
        ("Data", data(runs)),
        ("Texts", texts(runs)),
        ("To repeat", [part for name, run in runs.items() for part in to_repeat(name, run, len(runs) > 1)]),
    ]
    return document(title, sections, "gritlm report")


def document(title: str, sections: Iterable[tuple[str, Sequence[Html]]], made_by: str) -> str:
    """A whole page that loads nothing. Sections without parts are left out."""
    body = "".join(
        f"<section><h2>{name}</h2>{''.join(filter(None, parts))}</section>" for name, parts in sections if any(parts)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{safe(title)}</title><style>{STYLE}</style></head><body><main><h1>{safe(title)}</h1>{body}"
        f"<footer>Made by {made_by} on {time.strftime('%Y-%m-%d %H:%M')}.</footer></main></body></html>\n"
    )


# ---- parts


def table(header: Sequence[object], rows: Iterable[Sequence[object]], name: str, numbers: bool = False) -> Html:
    """A table that scrolls in its own box where it is too wide. The first column names the row.

    Args:
        numbers: of short cells, which are not broken into lines.
    """
    head = "".join(f'<th scope="col">{safe(cell)}</th>' for cell in header)
    lines = [
        f'<tr><th scope="row">{safe(row[0])}</th>{"".join(f"<td>{safe(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    ]
    if not lines:
        return Html("")
    kind = ' class="numbers"' if numbers else ""
    return Html(
        f'<div class="scroll" role="region" aria-label="{safe(name)}" tabindex="0"><table{kind}>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def grid(figures: Iterable[Html]) -> Html:
    inside = "".join(figures)
    return Html(f'<div class="grid">{inside}</div>') if inside else Html("")


def paragraph(text: object) -> Html:
    return Html(f"<p>{safe(text)}</p>")


def curve_of(runs: dict[str, Run], key: str, title: str) -> Html:
    """A figure of an entry of the log, with a curve for each run."""
    return curves(title, {name: run.curves.get(key, {}) for name, run in runs.items()}, smooth=key != "learning_rate")


def by_name(runs: dict[str, Run], title: str, found: Mapping[str, Mapping[str, Mapping[int, float]]]) -> list[Html]:
    """Of one run, one figure with a curve for each name. Of several, a figure for each name with a curve for each run.

    Args:
        found: name of the run -> name of the curve -> step -> value.
    """
    names = sorted({name for of_run in found.values() for name in of_run})
    if len(runs) == 1:
        (only,) = found.values()
        return [curves(title, {name: only[name] for name in names})]
    drawn = [curves(f"{title}: {name}", {run: found[run].get(name, {}) for run in runs}) for name in names[:FIGURES]]
    left_out = ", ".join(names[FIGURES:])
    return [*drawn, *([paragraph(f"{title}, not drawn: {left_out}")] if left_out else [])]


def labelled(name: str, number_of_run: int, several: bool) -> Html:
    return Html(f"{swatch(number_of_run)}{safe(name)}") if several else safe(name)


# ---- sections


def summary(runs: dict[str, Run]) -> Html:
    """A column for each run."""
    header = ["", *(labelled(name, i, len(runs) > 1) for i, name in enumerate(runs))]
    columns = [facts(run) for run in runs.values()]
    rows = [[key, *(column[key] for column in columns)] for key in columns[0]]
    return table(header, [row for row in rows if any(row[1:])], "Summary")


def facts(run: Run) -> dict[str, str]:
    def last(key: str, unit: str = "") -> str:
        values = list(run.curves.get(key, {}).values())
        return f"{number(values[-1])}{unit}" if values else ""

    start, rates = run.starts[-1], sorted(run.curves.get("tokens_per_second", {}).values())
    most = run.flags.get("max_steps") or 0
    wanted = f" of {most}" if isinstance(most, int) and most > 0 else ""
    resumed = f", {len(run.starts)} starts" if len(run.starts) > 1 else ""
    padding = list(run.curves.get("real_token_share", {}).values())
    return {
        "State": ("finished" if run.settings.get("finished") else "not finished") + resumed,
        "Base": str(run.flags.get("model_name_or_path") or "unknown"),
        "Steps logged": f"{run.last_step}{wanted}" if run.last_step else f"none{wanted}",
        "Epochs": last("epoch"),
        "Last loss": last("loss"),
        "Verdict": str((run.settings.get("evaluation") or {}).get("verdict") or ""),
        "Tokens per second, median": number(rates[len(rates) // 2]) if rates else "",
        "Tokens that are no padding": f"{sum(padding) / len(padding):.1%}" if padding else "",
        "Peak memory": last("peak_memory_gb", " GB"),
        "Started": str(run.starts[0].get("time") or "unknown").replace("T", " "),
        "Last line of the log": run.times[-1].replace("T", " ") if run.times else "",
        "Device": f"{start.get('ranks', '?')} × {start.get('device') or 'unknown'}",
        "System": " ".join(str(start[key]) for key in ("host", "system") if key in start),
        "Folder": str(run.folder),
    }


def notes(runs: dict[str, Run]) -> list[Html]:
    found = [f"{name}: {note}" if len(runs) > 1 else note for name, run in runs.items() for note in run.notes]
    return [Html(f'<ul class="notes">{"".join(f"<li>{safe(note)}</li>" for note in found)}</ul>')] if found else []


def differing_settings(runs: dict[str, Run]) -> Html:
    """The flags, versions and machines that are not the same for all runs."""
    columns = [
        run.flags
        | {f"{name}, version": text for name, text in (run.starts[-1].get("versions") or {}).items()}
        | {key: run.starts[-1].get(key) for key in ("ranks", "device")}
        | {"data": [f"{row['rows']} rows, {row['fingerprint']}" for row in run.data_sets()]}
        for run in runs.values()
    ]
    keys = [key for key in dict.fromkeys(key for column in columns for key in column) if key not in PATHS]
    rows = [
        [key, *(shown(column.get(key)) or "not set" for column in columns)]
        for key in keys
        if any(column.get(key) != columns[0].get(key) for column in columns)
    ]
    header = ["", *(labelled(name, i, True) for i, name in enumerate(runs))]
    return table(header, rows, "Settings that differ") or paragraph(
        "None: flags, versions, devices and data are alike."
    )


def losses(runs: dict[str, Run]) -> list[Html]:
    if not any(run.curves.get("loss") for run in runs.values()):
        return [paragraph("No step has been logged yet.")]
    parts = [curve_of(runs, "loss", "Loss")]
    if any(len(run.terms) > 1 for run in runs.values()):
        terms = {name: {term: run.curves[term] for term in run.terms} for name, run in runs.items()}
        parts += by_name(runs, "Loss terms", terms)
    by_set = {name: run.under("loss/") for name, run in runs.items()}
    if len({data_set for of_run in by_set.values() for data_set in of_run}) > 1:
        parts += by_name(runs, "Loss by data set", by_set)
    return [grid(parts)]


def speed(runs: dict[str, Run]) -> list[Html]:
    parts = {
        name: {part.replace("_", " "): sum(c.values()) / len(c) for part, c in run.under("time_share/").items()}
        for name, run in runs.items()
    }
    rates = curve_of(runs, "tokens_per_second", "Tokens per second")
    return [grid([rates, shares("Where the time of a step goes, mean", parts)])]


def evaluation(runs: dict[str, Run]) -> list[Html]:
    if not any(run.evaluations for run in runs.values()):
        return [paragraph("Not evaluated: the folder has no results in evaluation/.")]
    found = {name: run.evaluation_curves() for name, run in runs.items()}
    columns: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        label = f"{name}, " if len(runs) > 1 else ""
        columns |= {f"{label}base": metrics(run.results(0)), f"{label}trained": metrics(run.results())}
    rows = [
        [key, *(f"{column[key]:.4f}" if key in column else "" for column in columns.values())]
        for key in dict.fromkeys(key for column in columns.values() for key in column)
    ]
    return [
        grid([*by_name(runs, "Evaluation", found), curve_of(runs, "eval_loss", "Loss of held-out rows")]),
        table(["", *columns], rows, "Evaluation", numbers=True),
    ]


def metrics(results: list[dict[str, Any]]) -> dict[str, float]:
    return {f"{row['name']}, {metric}": value for row in results for metric, value in row["metrics"].items()}


def space(runs: dict[str, Run]) -> list[Html]:
    """Histograms of similarity for each retrieval set of the published model, and the health of its space."""
    figures, rows = [], []
    for name, run in runs.items():
        for step, which in ((0, "base"), (None, "trained")):
            for result in run.results(step):
                found = result.get("space") or {}
                label = f"{name}, {result['name']}" if len(runs) > 1 else result["name"]
                if health := {key: found[key] for key in HEALTH if isinstance(found.get(key), (int, float))}:
                    cells = (number(health[key]) if key in health else "" for key in HEALTH)
                    rows.append([f"{label}, {which}", *cells])
                pairs = {kind: found.get(f"{kind}_similarity") or [] for kind in ("positive", "negative")}
                bins = max(map(len, pairs.values())) if which == "trained" else 0
                edges = [-1 + 2 * i / bins for i in range(bins + 1)] if bins else []
                figures.append(histograms(f"Similarity: {label}", edges, {k: row for k, row in pairs.items() if bins}))
    return [grid(figures), table(["", *HEALTH.values()], sorted(rows), "Health of the space", numbers=True)]


def data(runs: dict[str, Run]) -> list[Html]:
    rows = []
    for name, run in runs.items():
        for found in run.data_sets():
            losses = list(run.curves.get(f"loss/{found['name']}", {}).values())
            label = (f"{name}: " if len(runs) > 1 else "") + (found["name"] or "name unknown")
            rows.append([label, found["rows"], found["fingerprint"], number(losses[-1]) if losses else ""])
    return [table(["", "rows", "fingerprint", "last loss"], rows, "Data sets", numbers=True)]


def texts(runs: dict[str, Run]) -> list[Html]:
    """The first rows as the model has seen them. Runs with the same examples share a block."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, run in runs.items():
        if examples := tuple(map(str, run.starts[0].get("examples") or ())):
            groups.setdefault(examples, []).append(name)
    return [
        Html(paragraph(f"{', '.join(names)}: {lines[0]}" if len(runs) > 1 else lines[0]) + block(lines[1:]))
        for lines, names in groups.items()
    ]


def block(lines: Iterable[str]) -> Html:
    return Html(f"<pre>{safe(chr(10).join(line.strip() for line in lines))}</pre>")


def to_repeat(name: str, run: Run, several: bool) -> list[Html]:
    """Commands, versions and all flags of a run."""
    commands = list(dict.fromkeys(str(start["command"]) for start in run.starts if "command" in start))
    again = f"gritlm train {shlex.quote(str(run.folder / 'run.json'))} --output_dir NEW"
    versions = run.starts[-1].get("versions") or {}
    flags = [[key, shown(value)] for key, value in run.flags.items()]
    return [
        Html(f"<h3>{safe(name)}</h3>") if several else Html(""),
        block(commands) if commands else paragraph("The command is unknown."),
        paragraph("The same run again:"),
        block([again]),
        table(["", "version"], list(versions.items()), f"Versions of {name}"),
        Html(f"<details><summary>All flags</summary>{table(['', 'value'], flags, f'Flags of {name}')}</details>"),
    ]


def shown(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
