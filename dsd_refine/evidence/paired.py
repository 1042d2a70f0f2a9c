"""What paired right/wrong rows can show: the exact test of no difference, and the score interval of the difference."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, norm

ALPHA = 0.05
Z = float(norm.isf(ALPHA / 2))
FAR = 1e9  # deviations; a solver wants finite numbers

Array = np.ndarray[Any, Any]


def sign_flips(sums: Array) -> float:
    """p of the exact two-sided test that each sum might as well have had the other sign (whole numbers; 0 tells nothing).

    Of sums that are all 1 or -1 it is the exact McNemar test.
    """
    sizes, counts = np.unique(np.abs(sums[sums != 0]).astype(np.int64), return_counts=True)
    chances = np.ones(1)  # of each sum of those that are flipped to the positive
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        of_size = np.zeros(size * count + 1)
        of_size[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, of_size)
    total = len(chances) - 1
    as_far = np.abs(2 * np.arange(total + 1) - total) >= abs(int(sums.sum()))
    return min(1.0, float(chances[as_far].sum()))


def score(gained: Any, lost: Any, rows: float, difference: float) -> Array:
    """Tango's score statistic (1998, Statistics in Medicine 17:891-908) of `difference` = (gained - lost) / rows.

    About standard normal where that is the true difference. It looks at the likeliest chances with this difference, so it
    knows that rows could have changed where none did. Counts need not be whole.
    """
    middle = (2 * rows - gained + lost) * difference - gained - lost
    root = np.sqrt(np.maximum(0, middle**2 + 8 * rows * lost * difference * (1 - difference)))
    lost_share = np.maximum(0, (root - middle) / (4 * rows))
    variance = rows * (2 * lost_share + difference * (1 - difference))
    off = gained - lost - rows * difference
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(variance > 0, off / np.sqrt(np.maximum(variance, 0)), np.sign(off) * np.inf)
    return np.where(off == 0, 0.0, found)


def score_interval(gained: float, lost: float, rows: float) -> tuple[float, float]:
    """The differences that `score` does not reject at 5 %. Counts need not be whole.

    Of no changed row among n it is +- 3.84 / (n + 3.84), and never [0, 0].
    """
    found = (gained - lost) / rows

    def beyond(difference: float, limit: float) -> float:
        return float(np.clip(score(gained, lost, rows, difference), -FAR, FAR)) - limit

    low = brentq(beyond, -1.0, found, args=(Z,), xtol=1e-15) if found > -1 else -1.0
    high = brentq(beyond, found, 1.0, args=(-Z,), xtol=1e-15) if found < 1 else 1.0
    return low, high
