"""Histograms in one line of text."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

BARS = " ▁▂▃▄▅▆▇█"
EDGES = np.array([16, 32, 64, 128, 256, 512, 1024, 2048, 4096])


def sparkline(counts: Iterable[int]) -> str:
    """One bar per count, its height relative to the largest. Only a count of 0 is blank."""
    counts = list(counts)
    largest = max(*counts, 1)
    return "".join(BARS[-int(-8 * count // largest)] for count in counts)


def histogram(values: Sequence[float]) -> str:
    """A histogram of 24 bars over the range of the values, with its ends and the median."""
    low, high = min(values), max(values)
    counts, edges = np.histogram(values, 24, (low, max(high, low + 1e-3 * max(1, abs(low)))))
    return f"|{sparkline(counts)}| from {edges[0]:.2f} to {edges[-1]:.2f}, median {np.median(values):.3f}"


def describe_lengths(kind: str, lengths: np.ndarray, unit: str, max_length: int) -> Iterator[str]:
    """A line on the lengths of one kind of texts; none where there are no texts."""
    if not len(lengths):
        return
    counts = np.bincount(np.searchsorted(EDGES, lengths, side="left"), minlength=len(EDGES) + 1)
    low, middle, high = np.percentile(lengths, [5, 50, 95])
    truncated = f"; {(lengths > max_length).mean():.1%} are truncated to {max_length}" if unit == "tokens" else ""
    yield (
        f"  {kind} {unit} |{sparkline(counts)}| (up to {EDGES[0]}, {EDGES[1]}, ... {EDGES[-1]}, more): "
        f"median {middle:.0f}, 5% below {low:.0f}, 5% above {high:.0f}, longest {lengths.max()}"
        f"{truncated}; {len(lengths)} measured"
    )
