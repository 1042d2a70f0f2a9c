"""How many rows would decide: power of the paired test, at the rates that were found."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from scipy.stats import binom, binomtest, norm

from dsd_refine.compare import ALPHA, Comparison

POWER = 0.8


@cache
def critical(changed: int, alpha: float = ALPHA) -> int:
    """The largest smaller count of a split of `changed` rows at which the exact two-sided test rejects (-1: none does)."""
    at = int(binom.ppf(alpha / 2, changed, 0.5)) if changed else -1
    while at >= 0 and binomtest(at, changed, 0.5).pvalue >= alpha:
        at -= 1
    return at


def power(rows: int, gained: float, lost: float, alpha: float = ALPHA) -> float:
    """Chance that the exact McNemar test over `rows` rows calls the better arm better.

    `gained` and `lost` are the shares of rows that change each way (gained > lost: the first arm is better).
    """
    share = gained + lost
    spread = 8 * math.sqrt(rows * share * (1 - share)) + 2
    low, high = max(0, int(rows * share - spread)), min(rows, int(rows * share + spread))
    changed = np.arange(low, high + 1)
    weights = binom.pmf(changed, rows, share)
    rejects = [binom.cdf(critical(int(n), alpha), n, lost / share) for n in changed]
    return float(weights @ np.asarray(rejects))


def rows_to_decide(found: Comparison, rows: int, margin: float, comparisons: int = 1) -> int | None:
    """Evaluation rows at which a comparison like this one would be decided four times of five.

    Decided: the difference shows (if it is what was found; at the level that Holm leaves the smallest p of so many
    `comparisons`), or the interval lies within the margin, whichever needs fewer rows. Both from the normal approximation,
    scaled from the interval found over `rows` rows. None where nothing differs.
    """
    error = (found.ci95[1] - found.ci95[0]) / (2 * norm.ppf(1 - ALPHA / 2))
    if not error:
        return None
    targets = ((abs(found.delta), ALPHA / comparisons), (margin - abs(found.delta), ALPHA))
    needed = [
        rows * ((norm.ppf(1 - alpha / 2) + norm.ppf(POWER)) * error / target) ** 2 for target, alpha in targets if target > 0
    ]
    return math.ceil(min(needed)) if needed else None
