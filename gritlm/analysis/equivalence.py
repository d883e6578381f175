"""Do two models differ, and are they equivalent? Paired t-tests over seeds: of a difference, and TOST."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05  # of both tests


@dataclass(frozen=True)
class PairedTest:
    """The mean difference of two models over seeds, tested both ways. What needs two seeds is None with one.

    Attributes:
        low, high: the 95% t-interval of the mean.
        p_difference: of "the mean is 0", two-sided.
        p_equivalent: of "the mean is `margin` or farther from 0": the larger p-value of two one-sided t-tests.
        smallest_margin: the smallest margin that this spread could show if the mean were 0.
    """

    mean: float
    margin: float
    low: float | None = None
    high: float | None = None
    p_difference: float | None = None
    p_equivalent: float | None = None
    smallest_margin: float | None = None

    @property
    def outcome(self) -> str:
        if self.p_difference is None or self.p_equivalent is None:
            return "one seed, no test"
        calls = [("higher" if self.mean > 0 else "lower")] * (self.p_difference < LEVEL)
        return ", ".join(calls + ["equivalent"] * (self.p_equivalent < LEVEL)) or "undecided"


def paired_test(differences: Sequence[float], margin: float) -> PairedTest:
    """Test the mean of differences, one for each seed, against 0 and against `margin`, both in one unit.

    TOST (Schuirmann, 1987) rejects at 5% where the 90% interval lies within the margin. Where all differences are equal
    the mean is taken as known.

    Raises:
        ValueError: there is no difference, one is not finite, or the margin is not above 0.
    """
    from scipy.stats import t

    values_N = np.asarray(differences, float)
    if not len(values_N) or not np.isfinite(values_N).all() or not margin > 0:
        raise ValueError(f"found {differences} and the margin {margin}, wanted finite numbers and a margin above 0")
    mean = float(values_N.mean())
    if len(values_N) == 1:
        return PairedTest(mean, margin)
    error, freedom = float(values_N.std(ddof=1)) / math.sqrt(len(values_N)), len(values_N) - 1
    if error < 1e-12 * max(1.0, abs(mean)):  # rounding only
        return PairedTest(mean, margin, mean, mean, float(abs(mean) < 1e-9), float(abs(mean) >= margin), 0.0)
    half, reach = (float(t.ppf(1 - share, freedom)) * error for share in (LEVEL / 2, LEVEL))
    different = float(2 * t.sf(abs(mean) / error, freedom))
    equivalent = float(t.sf((margin - abs(mean)) / error, freedom))
    return PairedTest(mean, margin, mean - half, mean + half, different, equivalent, reach)
