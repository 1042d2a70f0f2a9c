"""Statistics of paired right/wrong rows: the exact test of no difference, and the score interval."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, norm

ALPHA = 0.05  # the level of all tests
Z = float(norm.isf(ALPHA / 2))
FAR = 1e9  # replaces infinity, because the solver needs finite numbers

Array = np.ndarray[Any, Any]


def sign_flips(sums: Array) -> float:
    """Return p of the exact two-sided test that each sum could have had the other sign just as
    well.

    `sums` are whole numbers, and zeros do not count. If all are 1 or -1, it is the exact McNemar
    test.
    """
    sizes, counts = np.unique(np.abs(sums[sums != 0]).astype(np.int64), return_counts=True)
    chances = np.ones(1)  # chances[k]: that the sums with a positive sign add up to k
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        of_size = np.zeros(size * count + 1)
        of_size[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, of_size)
    total = len(chances) - 1
    as_far = np.abs(2 * np.arange(total + 1) - total) >= abs(int(sums.sum()))
    return min(1.0, float(chances[as_far].sum()))


def score(gained: Any, lost: Any, rows: float, difference: float) -> Array:
    """Return Tango's score statistic (1998, Statistics in Medicine 17:891-908) for a true
    `difference`.

    The observed difference is (gained - lost) / rows. The statistic is about standard normal if
    `difference` is the true one. Its variance is that of the most likely rates with this
    difference, so it is not 0 where no row changed. The counts may be fractions.
    """
    middle = (2 * rows - gained + lost) * difference - gained - lost
    root = np.sqrt(np.maximum(0, middle**2 + 8 * rows * lost * difference * (1 - difference)))
    lost_share = np.maximum(0, (root - middle) / (4 * rows))
    variance = rows * (2 * lost_share + difference * (1 - difference))
    off = gained - lost - rows * difference
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = np.where(variance > 0, off / np.sqrt(np.maximum(variance, 0)), np.sign(off) * np.inf)
    return np.where(off == 0, 0.0, statistic)


def score_interval(gained: float, lost: float, rows: float) -> tuple[float, float]:
    """Return the lowest and the highest difference that `score` does not reject at 5 %.

    The counts may be fractions. If none of n rows changed, it is +- 3.84 / (n + 3.84), never [0,
    0].
    """
    observed = (gained - lost) / rows

    def beyond(difference: float, limit: float) -> float:
        return float(np.clip(score(gained, lost, rows, difference), -FAR, FAR)) - limit

    low = brentq(beyond, -1.0, observed, args=(Z,), xtol=1e-15) if observed > -1 else -1.0
    high = brentq(beyond, observed, 1.0, args=(-Z,), xtol=1e-15) if observed < 1 else 1.0
    return low, high
