"""The pictures and the table of docs/study.md: what a rotation, noise and so on do to each metric of `gritlm hrsa`.

`python tests/study_pictures.py` computes what assets/study.json does not hold, draws assets/study_*.svg, and prints the
table. A killed run goes on where it stopped. To compute something again, take it out of assets/study.json.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import expm

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "assets" / "study.json"
ROWS, WIDTH, LABELS, DOCUMENTS = 2000, 64, 8, 400
STRENGTHS = [i / 8 for i in range(9)]
LEVELS = {
    "representation": ("correlation", "h_inv", "sparsity", "residual", "mapped_cosine"),
    "geometry": ("cka", "cka_biased", "knn_tokens", "knn_documents", "knn_mutual_documents", "knn_labels"),
    "function": ("probe", "probe after mapping"),
    "shape": ("intrinsic_dimension", "effective_rank", "anisotropy", "alignment", "uniformity"),
}


def states() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States (2,000, 64) of 12 directions with a common shift, their documents, and the labels of these."""
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(DOCUMENTS), ROWS // DOCUMENTS)
    labels = rng.integers(LABELS, size=DOCUMENTS)[documents]
    hidden = 1.5 * rng.normal(size=(LABELS, 12))[labels] + rng.normal(size=(DOCUMENTS, 12))[documents]
    hidden += 0.7 * rng.normal(size=(ROWS, 12))
    spread = rng.normal(size=(12, WIDTH)) * np.linspace(1.5, 0.5, 12)[:, None]
    return hidden @ spread + 0.3 * rng.normal(size=(ROWS, WIDTH)) + 2 * rng.normal(size=WIDTH), documents, labels


def rotated(x: np.ndarray, t: float) -> np.ndarray:
    skew = np.random.default_rng(1).normal(size=(WIDTH, WIDTH))
    return x @ expm(t * 3 * (skew - skew.T) / math.sqrt(2 * WIDTH))


def permuted(x: np.ndarray, t: float) -> np.ndarray:
    order, moved = np.arange(WIDTH), np.random.default_rng(2).permutation(WIDTH)[: round(t * WIDTH)]
    order[moved] = np.roll(moved, 1)
    return x[:, order]


def scaled(x: np.ndarray, t: float) -> np.ndarray:
    return x * np.exp(1.5 * t * np.random.default_rng(3).normal(size=WIDTH))


def noisy(x: np.ndarray, t: float) -> np.ndarray:
    return x + 2 * t * x.std(0) * np.random.default_rng(4).normal(size=x.shape)


def shuffled(x: np.ndarray, t: float) -> np.ndarray:
    order, moved = np.arange(len(x)), np.random.default_rng(5).permutation(len(x))[: round(t * len(x))]
    order[moved] = np.roll(moved, 1)
    return x[order]


CHANGES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "rotation": rotated,
    "permutation": permuted,
    "scaling of dimensions": scaled,
    "noise": noisy,
    "shuffled copy": shuffled,
    "one scale for all": lambda x, t: x * (1 + 2 * t),
    "common shift": lambda x, t: x + 4 * t * x.std() * np.random.default_rng(6).normal(size=WIDTH),
}
# What the table shows: how strong, and what that is.
TABLE = {
    "rotation": (1.0, "random"),
    "permutation": (1.0, "all dimensions"),
    "scaling of dimensions": (1.0, "x e^(1.5 z), z normal"),
    "one scale for all": (1.0, "x 3"),
    "common shift": (1.0, "4 s.d."),
    "noise": (0.25, "half of the s.d."),
    "shuffled copy": (1.0, "all rows"),
}


def measured(x: np.ndarray, y: np.ndarray, documents: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Each metric of x and y by the functions of `gritlm hrsa`; those of one model are y's."""
    from gritlm.analysis.function import probe
    from gritlm.analysis.geometry import Neighbours
    from gritlm.analysis.representation import measure
    from gritlm.analysis.shape import shape
    from gritlm.analysis.sums import Sums

    second, device = documents % 2 == 1, torch.device("cpu")
    x_TD, y_TD, second_T = torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(second)
    found = measure(Sums().add(x_TD, y_TD, second_T), (x_TD, y_TD, second_T))
    values = {name: row["value"] for name, row in found.items() if "value" in row}
    alone = np.arange(len(x))
    by_document, by_token = (Neighbours(x, y, groups, [10], device) for groups in (alone, documents))
    values["knn_tokens"] = by_token.by_k(0, 0)["10"]["value"]
    values["knn_documents"] = by_document.by_k(0, 0)["10"]["value"]
    values["knn_mutual_documents"] = by_document.by_k(0, 0, mutual=True)["10"]["value"]
    values["knn_labels"] = by_document.by_k(0, 0, labels=labels)["10"]["value"]
    probed = probe(x, y, labels.astype(str), second, documents % 10, 0)
    values |= {"probe": probed["value"], "probe after mapping": probed["mapped"]}
    of_y = shape(y, documents, documents % 10, documents, device)
    return values | {name: row["value"] for name, row in of_y.items()}


# ---- floors


def floors() -> dict[str, list[dict[str, float]]]:
    """CKA of independent states, H_inv of random rotations and of rotations of pairs, beside closed forms."""
    from gritlm.analysis.representation import cka, h_inv
    from gritlm.analysis.sums import Sums

    rng = np.random.default_rng(7)
    found: dict[str, list[dict[str, float]]] = {"cka": [], "random rotation": [], "rotation of pairs": []}
    for count in (50, 100, 200, 500, 1000, 2000, 5000):
        drawn = []
        for _ in range(20):
            x, y = (torch.from_numpy(rng.normal(size=(count, 256))) for _ in range(2))
            sums = Sums().add(x, y, torch.arange(count) % 2 == 1)
            drawn.append((cka(sums), cka(sums, unbiased=False)))
        (unbiased, biased), error = np.mean(drawn, 0), 1.96 * np.std(drawn, 0, ddof=1) / math.sqrt(len(drawn))
        row = {"rows": count, "unbiased": unbiased, "low": unbiased - error[0], "high": unbiased + error[0]}
        found["cka"].append({key: float(value) for key, value in (row | {"biased": biased}).items()})
    for width in (16, 32, 64, 128, 256, 512, 1024):
        rotation = torch.linalg.qr(torch.from_numpy(rng.normal(size=(width, width))))[0]
        row = {"width": width, "h_inv": h_inv(rotation), "closed form": 0.7296 / math.log(width)}
        found["random rotation"].append(row)
    for degrees in range(0, 91, 15):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        rotation = torch.block_diag(*[torch.tensor([[c, s], [-s, c]], dtype=torch.float64)] * (WIDTH // 2))
        entropy = sum(p * math.log(p) for p in (c * c, s * s) if p > 1e-30)
        row = {"degrees": degrees, "h_inv": h_inv(rotation), "closed form": 1 + entropy / math.log(WIDTH)}
        found["rotation of pairs"].append(row)
    return found


# ---- pictures


LOOK = {  # Okabe and Ito
    "rotation": ("#0072b2", "-", "o"),
    "permutation": ("#d55e00", "--", "s"),
    "scaling of dimensions": ("#009e73", "-.", "^"),
    "noise": ("#cc79a7", (0, (3, 1)), "v"),
    "shuffled copy": ("#555555", ":", "D"),
}
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "study",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.markersize": 3.5,
    "lines.linewidth": 1.3,
    "grid.linewidth": 0.5,
}


def panels(path: Path, titles: list[str], draw: Callable, columns: int = 2) -> None:
    """A picture of panels; `draw(axes, title)` draws one. The legend stands below them all."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        lines = math.ceil(len(titles) / columns)
        canvas = Figure(figsize=(6.4, 2.1 * lines + 0.5), layout="constrained")
        every = canvas.subplots(lines, columns, squeeze=False).flat
        for title, axes in zip(titles, every, strict=False):
            draw(axes, title)
            axes.set_title(title, fontsize=9)
            axes.grid(axis="y")
        for axes in list(canvas.axes)[len(titles) :]:
            axes.set_axis_off()
        keys = {}
        for axes in canvas.axes:
            keys |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        canvas.legend(keys.values(), keys.keys(), loc="outside lower center", ncols=3, frameon=False)
        canvas.savefig(path, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = re.sub(
        r' id="[a-z]\w*_\d+"| clip-path="[^"]*"| transform="rotate\(-0 [^"]*"|<!--.*?-->',
        "",
        path.read_text(),
        flags=re.S,
    )
    text = re.sub(r"\d+\.\d{2,}(?=[^<]*>)", lambda found: f"{float(found[0]):.1f}", text)
    text = text.replace("; stroke-linejoin: miter", "").replace(", sans-serif; text", "; text")
    text = re.sub(r"(?<=[\dz])\n(?=[LMz\"])", "", re.sub(r"\s*\n\s*", "\n", text))
    while (shorter := re.sub(r"<g>\n(<(?:use|text|path)\b[^\n]*>)\n</g>", r"\1", text)) != text:
        text = shorter
    path.write_text(text)


def draw_level(level: str, numbers: dict) -> None:
    def draw(axes, name: str) -> None:
        for number, (change, (colour, dash, marker)) in enumerate(LOOK.items()):
            values = [numbers[f"{change} {t}"][name] for t in STRENGTHS]
            axes.plot(
                STRENGTHS, values, color=colour, linestyle=dash, marker=marker, label=change, markevery=(number % 4, 4)
            )
        axes.set_xlabel("strength", fontsize=8)

    panels(ROOT / "assets" / f"study_{level}.svg", list(LEVELS[level]), draw)


def draw_floors(found: dict[str, list[dict[str, float]]]) -> None:
    def draw(axes, title: str) -> None:
        if title.startswith("CKA"):
            rows = found["cka"]
            x = [row["rows"] for row in rows]
            axes.fill_between(x, [r["low"] for r in rows], [r["high"] for r in rows], color="#0072b2", alpha=0.25)
            axes.plot(x, [row["unbiased"] for row in rows], "o-", color="#0072b2", label="CKA, unbiased")
            axes.plot(x, [row["biased"] for row in rows], "s--", color="#d55e00", label="CKA, biased")
            axes.set_xscale("log")
            axes.set_xlabel("rows", fontsize=8)
            return
        rows = found["random rotation" if "random" in title else "rotation of pairs"]
        key = "width" if "random" in title else "degrees"
        x = [row[key] for row in rows]
        axes.plot(x, [row["closed form"] for row in rows], ":", color="#555555", label="closed form")
        axes.plot(x, [row["h_inv"] for row in rows], "^", color="#009e73", label="H_inv, computed")
        axes.set_xlabel(key, fontsize=8)
        if key == "width":
            axes.set_xscale("log", base=2)

    titles = ["CKA of independent states", "H_inv of a random rotation", "H_inv of a rotation of pairs"]
    panels(ROOT / "assets" / "study_floors.svg", titles, draw)


def table(numbers: dict) -> list[str]:
    """The table of docs/study.md: B is A after a change."""
    names = [name for level in LEVELS.values() for name in level]
    lines = [
        "| | nothing | " + " | ".join(f"{change} ({what})" for change, (_, what) in TABLE.items()) + " |",
        "|---|" + "---|" * (1 + len(TABLE)),
    ]
    for name in names:
        cells = [numbers["rotation 0.0"][name], *(numbers[f"{change} {t}"][name] for change, (t, _) in TABLE.items())]
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}".replace("-0.00", "0.00") for value in cells) + " |")
    return lines


def main() -> None:
    numbers = json.loads(NUMBERS.read_text()) if NUMBERS.is_file() else {}

    def save() -> None:
        part = NUMBERS.with_suffix(".part")
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in numbers.items())
        part.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        part.replace(NUMBERS)

    x, documents, labels = states()
    for change, apply in CHANGES.items():
        for t in STRENGTHS if change in LOOK else (TABLE[change][0],):
            if f"{change} {t}" not in numbers:
                values = measured(x, apply(x, t), documents, labels)
                numbers[f"{change} {t}"] = {name: round(value, 5) for name, value in values.items()}
                save()
    if "floors" not in numbers:
        numbers["floors"] = floors()
    save()
    for level in LEVELS:
        draw_level(level, numbers)
    draw_floors(numbers["floors"])
    print("\n".join(table(numbers)))


if __name__ == "__main__":
    main()
