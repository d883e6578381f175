import math
import random
import re

import pytest
from reports import EVIL

from gritlm.report.figures import HEIGHT, WIDTH, Axis, curves, histograms, number, shares, smoothed, thinned, tick

RANGES = [(1, 30), (0, 1), (0.0, 3e-5), (2.3, 2.31), (-1, 1), (5, 5), (0, 0), (1e-9, 1e9), (0.02, 40), (1, 1_000_000)]


@pytest.mark.parametrize("low, high", RANGES)
@pytest.mark.parametrize("options", [{}, {"log": True}, {"whole": True}])
def test_an_axis_has_a_few_ticks_within_it(low, high, options):
    if options.get("whole") and not float(low).is_integer():
        return
    axis = Axis([low, high], 50, 400, **options)
    places = [axis(value) for value in axis.ticks()]
    assert 1 <= len(places) <= 20 and places == sorted(places)
    assert all(49.9 <= place <= 400.1 for place in places)
    assert 49.9 <= axis(low) <= axis(high) <= 400.1
    assert not options.get("whole") or all(float(value).is_integer() for value in axis.ticks())


def test_numbers_are_short():
    assert [number(x) for x in (0, 0.5, 13.8155, 1234.5, 2e-5, math.nan)] == [
        "0",
        "0.5",
        "13.82",
        "1,234",
        "2e-5",
        "nan",
    ]
    assert [tick(x) for x in (2500, 10_000, 220_000, 3e6)] == ["2,500", "10k", "220k", "3M"]


def test_a_thinned_curve_keeps_its_peaks_and_its_ends():
    points = [(step, random.Random(step).random()) for step in range(5000)]
    points[1234], points[4321] = (1234, 50.0), (4321, -50.0)
    found = thinned(points, 240)
    assert len(found) <= 240 and found == sorted(found)
    assert {points[0], points[1234], points[4321], points[-1]} <= set(found)
    assert {points[1234], points[4321]} - set(points[:: 5000 // 240]), "control: every n-th point has them, too"
    assert thinned(points[:100], 240) == points[:100]


def test_a_smoothed_curve_is_the_mean_of_neighbours():
    points = [(step, float(step % 2)) for step in range(500)]
    assert all(abs(value - 0.5) < 0.05 for _, value in smoothed(points)[20:-20])
    assert [step for step, _ in smoothed(points)] == [step for step, _ in points]


def test_curves_are_drawn_within_the_figure():
    figure = curves("Loss", {"a": {1: 3.0, 2: 2.0, 9: 1.0}, "b": {1: 1e9}, "none": {}, "bad": {1: math.nan}})
    coordinates = [pair.split() for path in re.findall(r' d="M([\d.L ]+)"', figure) for pair in path.split("L")]
    assert len(coordinates) == 4
    assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT for x, y in coordinates)
    assert "a: 3 at step 1, 1 at step 9, lowest 1 at step 9" in figure
    assert re.findall(r"</svg>(\w+)</li>", figure) == ["a", "b"]


def test_values_that_are_not_finite_are_counted_and_left_out():
    assert "2 values not finite" in curves("Loss", {"a": {1: math.nan, 2: 1.0, 3: math.inf}})
    assert "not finite" not in curves("Loss", {"a": {2: 1.0}}), "control"
    assert curves("Loss", {"a": {1: math.nan}}) == curves("Loss", {}) == ""


def test_a_curve_that_lies_on_another_is_dashed():
    same = {step: 1.0 / step for step in range(1, 9)}
    assert "stroke-dasharray" in curves("Rate", {"a": same, "b": dict(same)})
    assert "stroke-dasharray" not in curves("Rate", {"a": same, "b": {1: 2.0}}), "control"


def test_histograms_and_shares():
    figure = histograms("Similarity", [-1, -0.5, 0, 0.5, 1], {"positive": [0, 0, 1, 3], "negative": [0, 4, 0, 0]})
    assert figure.count("<path") == 2 + 1 + len(re.findall('class="grid"', figure)) + 2  # marks, axis, grid, legend
    assert "positive: mean 0.62" in figure and "negative: mean -0.25" in figure
    assert histograms("Similarity", [], {}) == histograms("Similarity", [0, 1], {"positive": [0]}) == ""
    figure = shares("Time", {"run": {"data": 0.2, "loss": 0.6}})
    assert "data 25%" in figure and "loss 75%" in figure
    assert shares("Time", {"run": {}}) == ""


def test_names_are_escaped():
    drawn = curves(EVIL, {EVIL: {1: 1.0}, "b": {1: 2.0}}) + shares(EVIL, {EVIL: {EVIL: 1.0}, "b": {EVIL: 1.0}})
    drawn += histograms(EVIL, [0, 1], {EVIL: [1]})
    assert "<script" not in drawn and drawn.count("&lt;script&gt;") >= 9
