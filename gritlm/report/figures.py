"""Figures as inline SVG for the page of a run: curves, histograms, shares. Nothing but Python makes them.

A figure is drawn for a column of 440 pixels, so its text can be read on a phone. The page's style sheet has the colours
`--c0` to `--c7`; from the ninth curve on they come again, dashed.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 10, 38
COLOURS = 8
DASHES = ("", "6 3", "2 3", "9 3 2 3")
POINTS = 240  # of a curve, at most; of many curves fewer
DOTTED, SMOOTHED = 24, 60  # curves of at most, or of more than so many points
CROWDED = 4  # from more curves on, of smoothed ones only the smooth line
PALE = ' stroke-opacity=".3"'
Points = Sequence[tuple[float, float]]


class Html(str):
    """Text that is HTML already. All other text is escaped."""


def safe(value: object) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def number(value: float) -> str:
    """A number for an axis or a table."""
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def tick(value: float) -> str:
    """A number for an axis: 20k in place of 20,000."""
    if abs(value) < 1e4:
        return number(value)
    unit, size = next((unit, size) for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if abs(value) >= size)
    return f"{value / size:.4g}{unit}"


class Axis:
    """A range of values on a range of pixels, with ticks. Positive values over two decades get a logarithmic scale."""

    def __init__(self, values: Iterable[float], start: float, end: float, whole: bool = False, log: bool = False):
        values = list(values)
        low, high = min(values), max(values)
        self.log = log and low > 0 and high > 50 * low
        if self.log:
            low, high = math.log10(low), math.log10(high)
        elif 0 < low <= high / 2:
            low = 0.0
        if high == low:
            low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
        if not whole:  # room around the curve
            room = (high - low) / 25
            low, high = low - room * (low != 0), high + room
        self.low, self.high, self.start, self.end, self.whole = low, high, start, end, whole

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Three to six round values in the range."""
        if self.log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            steps = (1,) if self.high - self.low > 2.5 else (1, 3)
            found = [digit * 10.0**power for power in powers for digit in steps]
            return [value for value in found if self.low <= math.log10(value) <= self.high + 1e-9]
        rough = (self.high - self.low) / 4
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * digit for digit in (1, 2, 2.5, 5, 10) if power * digit >= rough * 0.999)
        step = max(1.0, float(round(step))) if self.whole else step
        return [step * i for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def thinned(points: Points, most: int) -> Points:
    """At most `most` points: the lowest and the highest of each stretch, so no peak is lost."""
    if len(points) <= most:
        return points
    stretch, kept = math.ceil(len(points) / (most // 2 - 1)), {0, len(points) - 1}
    for start in range(0, len(points), stretch):
        numbers = range(start, min(start + stretch, len(points)))
        kept |= {min(numbers, key=lambda i: points[i][1]), max(numbers, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def smoothed(points: Points) -> Points:
    """Each value's mean with its neighbours, a twenty-fifth of all."""
    reach = max(1, len(points) // 50)
    sums = list(accumulate((value for _, value in points), initial=0.0))
    spans = [(max(0, i - reach), min(len(points), i + reach + 1)) for i in range(len(points))]
    return [(x, (sums[b] - sums[a]) / (b - a)) for (x, _), (a, b) in zip(points, spans, strict=True)]


def sparkline(values: Sequence[float], longest: int = 24) -> str:
    """A curve as a line of blocks, each the mean of a stretch."""
    finite = [value for value in values if math.isfinite(value)]
    size = math.ceil(len(finite) / longest)
    means = [sum(part) / len(part) for i in range(0, len(finite), size or 1) if (part := finite[i : i + size])]
    low, span = min(means, default=0.0), max(means, default=0.0) - min(means, default=0.0)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / span) if span else 0] for mean in means)


def curves(title: str, series: Mapping[str, Mapping[int, float]], smooth: bool = True) -> Html:
    """Curves over steps. A series without a finite value keeps its colour for other figures, and is not drawn.

    Args:
        series: name -> step -> value.
        smooth: the values are noisy. A long curve is pale, with a smoothed one over it; values of very unequal size
            have a logarithmic scale.
    """
    finite = {name: [(x, y) for x, y in points.items() if math.isfinite(y)] for name, points in series.items()}
    everything = [point for points in finite.values() for point in points]
    if not everything:
        return Html("")
    x = Axis((step for step, _ in everything), LEFT, WIDTH - RIGHT, whole=True)
    y = Axis((value for _, value in everything), HEIGHT - BOTTOM, TOP, log=smooth)
    most, marks, said, keys = max(24, min(POINTS, 2400 // len(finite))), [], [], []
    paths: set[str] = set()
    for style, (name, points) in enumerate(finite.items()):
        if not points:
            continue
        long = smooth and len(points) > SMOOTHED
        lines = [(points, long), (smoothed(points), False)] if long else [(points, False)]
        for line, pale in lines[-1:] if len(finite) > CROWDED else lines:
            drawn = [(x(step), y(value)) for step, value in thinned(line, most)]
            path = "L".join(f"{a:.1f} {b:.1f}" for a, b in drawn)
            stroke = _stroke(style, "5 7" if path in paths else "")  # the curve below it can be seen
            paths.add(path)
            marks.append(f'<path d="M{path}" {stroke}{PALE if pale else ""}/>')
        if len(points) <= DOTTED:
            colour = f'fill="var(--c{style % COLOURS})"'
            marks += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" {colour}/>' for a, b in drawn]
        keys.append((name, style))
        lost = len(series[name]) - len(points)
        bad = f", {lost} values not finite" if lost else ""
        (first, a), (last, b), (at, least) = points[0], points[-1], min(points, key=lambda point: point[1])
        said.append(
            f"{name}: {number(a)} at step {first}, {number(b)} at step {last}, lowest {number(least)} at step {at}{bad}"
        )
    caption = f"{title} (log scale)" if y.log else title
    return _figure(caption, said, marks, keys if len(series) > 1 else [], _axes(x, y, "step"))


def histograms(title: str, edges: Sequence[float], counts: Mapping[str, Sequence[int]]) -> Html:
    """Histograms over one another, each as shares of its own sum."""
    counts = {name: row for name, row in counts.items() if sum(row)}
    if not counts:
        return Html("")
    used = [i for row in counts.values() for i, count in enumerate(row) if count]
    first, last = min(used), max(used) + 1
    x = Axis([edges[first], edges[last]], LEFT, WIDTH - RIGHT)
    y = Axis([0, *(max(row) / sum(row) for row in counts.values())], HEIGHT - BOTTOM, TOP)
    marks, said = [], []
    for style, (name, row) in enumerate(counts.items()):
        steps = "".join(f"V{y(row[i] / sum(row)):.1f}H{x(edges[i + 1]):.1f}" for i in range(first, last))
        path = f"M{x(edges[first]):.1f} {y(0):.1f}{steps}V{y(0):.1f}"
        marks.append(f'<path d="{path}" {_stroke(style)} fill="var(--c{style})" fill-opacity=".25"/>')
        mean = sum(count * (edges[i] + edges[i + 1]) / 2 for i, count in enumerate(row)) / sum(row)
        said.append(f"{name}: mean {mean:.2f}")
    return _figure(title, said, marks, [(n, s) for s, n in enumerate(counts)], _axes(x, y, "cosine"))


def shares(title: str, rows: Mapping[str, Mapping[str, float]]) -> Html:
    """A bar for each row, divided by the shares of its parts."""
    rows = {name: parts for name, parts in rows.items() if sum(parts.values()) > 0}
    names = list(dict.fromkeys(part for parts in rows.values() for part in parts))
    if not rows:
        return Html("")
    marks, height, said = [], 0, []
    for name, parts in rows.items():
        if len(rows) > 1:
            marks.append(f'<text x="0" y="{height + 12}">{safe(name if len(name) <= 48 else f"{name[:45]}...")}</text>')
            height += 18
        left, total = 0.0, sum(parts.values())
        for part, value in parts.items():
            width = value / total * WIDTH
            style = f'fill="var(--c{names.index(part) % COLOURS})"'
            marks.append(f'<rect x="{left:.1f}" y="{height}" width="{max(0.0, width - 1):.1f}" height="22" {style}/>')
            left += width
        height += 34
        said.append(f"{name}: " + ", ".join(f"{part} {value / total:.0%}" for part, value in parts.items()))
    alone = rows.popitem()[1] if len(rows) == 1 else {}  # its shares stand in the legend
    keys = [(f"{n} {alone[n] / sum(alone.values()):.0%}" if alone else n, style) for style, n in enumerate(names)]
    return _figure(title, said, marks, keys, height=height - 12)


# ---- parts of a figure


def _figure(
    title: str, said: list[str], marks: list[str], keys: list[tuple[str, int]], axes: str = "", height: int = HEIGHT
) -> Html:
    """A figure with its caption, a text in place of the picture, and a legend."""
    legend = "".join(f"<li>{swatch(style)}{safe(name)}</li>" for name, style in keys)
    return Html(
        f'<figure><figcaption>{safe(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height}" role="img">'
        f"<title>{safe(title)}</title><desc>{safe('; '.join(said))}</desc>{axes}"
        f'<g class="marks">{"".join(marks)}</g></svg>'
        + (f'<ul class="key">{legend}</ul></figure>' if legend else "</figure>")
    )


def swatch(style: int) -> Html:
    """The line of a curve, for a legend."""
    return Html(
        f'<svg class="swatch" viewBox="0 0 22 10" aria-hidden="true"><path d="M1 5H21" {_stroke(style)}/></svg>'
    )


def _stroke(style: int, dash: str = "") -> str:
    dash = dash or DASHES[style // COLOURS % len(DASHES)]
    return f'stroke="var(--c{style % COLOURS})"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _axes(x: Axis, y: Axis, label: str) -> str:
    bottom = HEIGHT - BOTTOM
    parts = [f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}"/>']
    for value in y.ticks():
        parts.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{tick(value)}</text>')
    for value in x.ticks():
        text = tick(value)
        middle = min(x(value), WIDTH - 3.5 * len(text))  # the last one inside the picture
        parts.append(f'<text x="{middle:.1f}" y="{bottom + 17}" text-anchor="middle">{text}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{label}</text>')
    return "".join(parts)
