"""Figures and page of a results folder that this file makes; figures are drawn once."""

import csv
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from gritlm.analysis.page import MOVES, write
from gritlm.analysis.results import read_metrics
from gritlm.errors import UserError

NAME = "_evil <b>&\t$x_1$ name"  # of a model, in legends, tables and file names
pytestmark = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="no matplotlib")


def entries(start: float, **more) -> list[dict]:
    """Three layers and the pooled vector; one value and its interval are null."""
    rows = [
        {"layer": layer, "value": start - number / 7, "low": start - 0.3, "high": start + 0.1, "floor": None} | more
        for number, layer in enumerate((0, 1, 2, "pooled"))
    ]
    rows[1] |= {"value": None, "low": None, "high": None, "why": "found 7 rows, wanted more"}
    return rows


def write_metric(folder: Path, name: str, level: str, comparisons: dict, **more) -> None:
    (folder / "metrics").mkdir(parents=True, exist_ok=True)
    found = {"metric": name, "level": level, "unit_of_analysis": "tokens", "title": f"Title of {name}"}
    found |= {"about": "What it measures.", "comparisons": comparisons, "why": None} | more
    (folder / "metrics" / f"{name}.json").write_text(json.dumps(found))


def write_results(folder: Path) -> Path:
    nothing = {"layers": None, "matrix": None, "histograms": None, "why": None, "p_value": None}
    values = [[1 / (1 + i + j) for j in range(3)] for i in range(3)]
    values[1][2] = None
    matrix = {"rows": [0, 1, 2], "columns": [0, 1, 2], "values": values}
    bars = [{"layer": layer, "edges": [-1.0, 0.0, 0.5, 1.0], "counts": [0, 3, 9]} for layer in (0, "pooled")]
    missing = nothing | {"why": "--ceiling was not given"}
    difference = {"minus_ceiling": {"value": -0.25, "low": -0.3, "high": -0.2}}
    pair = nothing | {"layers": entries(0.9, **difference), "matrix": matrix, "histograms": bars, "p_value": 0.005}
    more = {f"more:{NAME}": nothing | {"layers": entries(0.5)}}
    write_metric(folder, "correlation", "representation", {"pair": pair, "ceiling": missing, **more})
    steps = {f"more:checkpoint-{step}": nothing | {"layers": entries(step / 1000)} for step in (1000, 200)}
    h_inv = {"pair": nothing | {"layers": entries(0.8, floor=0.1)}, "ceiling": missing, **steps}
    write_metric(folder, "h_inv", "representation", h_inv)
    of_k = {"series": {str(k): entries(k / 60) for k in (5, 10, 50)}}
    write_metric(folder, "knn_tokens", "geometry", {"pair": nothing | of_k, "ceiling": missing})
    why = "found widths 8 and 16, wanted the same"
    write_metric(folder, "sparsity", "representation", {"pair": nothing | {"why": why}, "ceiling": missing}, why=why)
    models = {"a": {"name": "base", "path": "/a", "attention": "causal", "layers": 3, "width": 8}, "b": {"name": NAME}}
    (folder / "request.json").write_text(json.dumps({"models": models, "texts": {"documents": 9}}))
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = write_results(tmp_path_factory.mktemp("results"))
    (folder / "figures").mkdir()
    (folder / "figures" / "of an earlier run.svg").touch()
    assert write(folder) == folder / "index.html"
    return folder


def test_the_figures_of_each_metric(results):
    names = {path.stem for path in (results / "figures").iterdir()}
    wanted = "correlation.layers correlation.matrix.pair correlation.histogram.0 correlation.histogram.pooled "
    wanted += "knn_tokens.layers knn_tokens.k.last knn_tokens.k.pooled h_inv.layers h_inv.steps.last h_inv.steps.pooled"
    assert names == set(wanted.split())
    kinds = [path.suffix for path in (results / "figures").iterdir()]
    assert all(kinds.count(kind) == len(names) for kind in (".svg", ".png", ".tsv", ".json"))


def same(text: str, value: object) -> bool:
    return text == ("" if value is None else str(value)) and (not isinstance(value, float) or float(text) == value)


def test_the_numbers_beside_a_figure_are_those_of_the_metric(results):
    for path in (results / "figures").glob("*.json"):
        rows = json.loads(path.read_text())["rows"]
        with open(path.with_suffix(".tsv"), newline="") as file:
            lines = list(csv.DictReader(file, delimiter="\t"))
        assert len(rows) == len(lines) > 0
        assert all(same(line[key], row.get(key)) for row, line in zip(rows, lines, strict=True) for key in line)
    drawn = json.loads((results / "figures" / "correlation.layers.json").read_text())["rows"]
    measured = json.loads((results / "metrics" / "correlation.json").read_text())["comparisons"]
    assert [row["value"] for row in drawn] == [
        entry["value"] for part in measured.values() for entry in part["layers"] or []
    ]
    assert not same("0.5", 0.25) and not same("0.5", None), "control"


def outside(page: str) -> list[str]:
    """What a page loads or links to, but for its own folder and the parts of its own SVG."""
    found = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    return [target for target in found if not re.match(r"#|data:image/png|figures/[\w.]+$", target)]


def test_the_page_loads_nothing(results):
    page = (results / "index.html").read_text()
    assert outside(page) == [] and "http" not in page.replace("http-equiv", "")
    assert "<script" not in page and "<b>&" not in page
    assert page.count("<figure>") == len(list((results / "figures").glob("*.svg")))
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert outside('<img src="x.png"><a href="https://a.b/c"> url(#in) url(out)') == ["x.png", "https://a.b/c", "out"]


def test_the_page_names_what_cannot_be_had(results):
    page = (results / "index.html").read_text()
    assert "Cannot be had: found widths 8 and 16, wanted the same." in page
    assert page.count("Not everywhere: found 7 rows, wanted more.") == 3, "once for each metric"
    assert page.count("ceiling: another seed: --ceiling was not given.") == 1, "once for all metrics"
    (line,) = re.findall("Not measured: (.*?)[.]</p>", page)
    assert line.split(", ") == [name for name in MOVES if not (results / "metrics" / f"{name}.json").is_file()]
    assert MOVES["h_inv"] in page and MOVES["cka"] not in page
    differs, nothing = r"<td>-0.25 \[-0.3, -0.2\]</td>", "<td></td>"
    last = rf"last layer</th><td>0.614 \[0.6, 1\]</td>{4 * nothing}{differs}{2 * nothing}</tr>"
    pooled = rf"pooled</th><td>0.471 \[0.6, 1\]</td>{4 * nothing}{differs}{nothing}<td>0.005</td></tr>"
    assert all(re.search(f"Title of correlation, {row}", page) for row in (last, pooled))
    assert re.search(r"Title of h_inv, last layer</th><td>0.514 \[0.5, 0.9\]</td>(<td></td>){5}<td>0.1</td>", page)


def test_the_colours_are_those_of_the_page(results):
    page, svg = (results / "index.html").read_text(), (results / "figures" / "h_inv.layers.svg").read_text()
    assert "#0072b2" in svg and "var(--c0)" in page
    assert "#0072b2" not in page.split("</style>", 1)[1], "else a dark page has the light colours"


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("metrics/h_inv.json", lambda text: text[: len(text) // 2], "damaged"),
        ("metrics/h_inv.json", lambda text: text.replace("0.8", "NaN", 1), "NaN"),
        ("metrics/h_inv.json", lambda text: text.replace('"level"', '"floor"', 1), "no key 'level'"),
        ("metrics/h_inv.json", lambda text: text.replace('"representation"', '"other"'), "level 'other'"),
        ("metrics/h_inv.json", lambda text: text.replace("0.8", '"much"', 1), "neither a number nor null"),
        ("metrics/h_inv.json", lambda text: text.replace('"pooled"', '"last"', 1), "neither a number nor pooled"),
        ("metrics/h_inv.json", lambda text: "[1]", "damaged"),
        ("metrics/correlation.json", lambda text: text.replace("[0, 1, 2]", "[0, 1]", 1), "not whole"),
        ("metrics/correlation.json", lambda text: text.replace("[0, 3, 9]", "[3, 9]", 1), "not whole"),
        ("request.json", lambda text: text[:-3], "damaged"),
        ("request.json", lambda text: "{}", "no key 'models'"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, file, change, said):
    folder = write_results(tmp_path / "results")
    text = (folder / file).read_text()
    assert change(text) != text
    (folder / file).write_text(change(text))
    with pytest.raises(UserError, match=said) as error:
        write(folder)
    assert str(folder / file) in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "index.html").exists()


def test_a_folder_without_metrics(tmp_path):
    folder = write_results(tmp_path / "results")
    assert len(read_metrics(folder)) == 4, "control"
    for path in (folder / "metrics").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="found no metrics"):
        write(folder)


def test_without_matplotlib(tmp_path, monkeypatch):
    folder = write_results(tmp_path / "results")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'gritlm\[study\]'"):
        write(folder)


def test_the_table_of_the_document_is_the_computed_one():
    from study_pictures import NUMBERS, table

    numbers = json.loads(NUMBERS.read_text())
    assert "\n".join(table(numbers)) in (ROOT / "docs" / "study.md").read_text()
    numbers["rotation 0.0"]["cka"] += 0.01
    assert "\n".join(table(numbers)) not in (ROOT / "docs" / "study.md").read_text(), "control"
