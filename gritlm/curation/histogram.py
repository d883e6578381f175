"""Histograms in one line of text."""

from collections.abc import Iterable

BARS = " ▁▂▃▄▅▆▇█"


def sparkline(counts: Iterable[int]) -> str:
    """One bar per count, its height relative to the largest. Only a count of 0 is blank."""
    counts = list(counts)
    largest = max(*counts, 1)
    return "".join(BARS[-int(-8 * count // largest)] for count in counts)
