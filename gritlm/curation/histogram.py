"""Small pictures for the terminal."""

from collections.abc import Sequence

BARS = " ▁▂▃▄▅▆▇█"


def sparkline(counts: Sequence[float]) -> str:
    """One character a count, as high as its share of the largest; only nothing is a blank."""
    largest = max(*counts, 1)
    return "".join(BARS[-int(-8 * count // largest)] for count in counts)
