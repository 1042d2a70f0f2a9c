"""How many evaluation rows would give a clear verdict: the power of the paired tests at the
observed rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import binom, norm
from scipy.stats import t as student

from dsd_refine.evidence.compare import FEWEST_CHANGED, Comparison
from dsd_refine.evidence.paired import ALPHA, Z, score

POWER = 0.8
MOST_ROWS = 10**8  # a larger number of rows is not reported
MANY = 400  # from this number of changed rows on, the normal approximation is used

Chance = Callable[[int], float]  # number of rows -> chance of a clear verdict


def critical(changed: Any, alpha: float = ALPHA) -> Any:
    """Return the critical value of the exact two-sided sign test over `changed` rows.

    The test rejects if the less frequent sign has at most this many rows. -1: it never rejects.
    `changed` is a number or an array of numbers.
    """
    counts = np.asarray(changed, dtype=np.int64)
    values = np.where(counts > 0, binom.ppf(alpha / 2, np.maximum(counts, 1), 0.5), -1).astype(np.int64)
    while (over := (values >= 0) & (2 * binom.cdf(values, counts, 0.5) >= alpha)).any():
        values = np.where(over, values - 1, values)
    return values[()]


def power(rows: int, gained: float, lost: float, alpha: float = ALPHA) -> float:
    """Return the chance that the exact McNemar test over `rows` rows finds the better arm better.

    `gained` and `lost` are shares of rows, gained > lost. In a `gained` row only the better arm is
    right.
    """
    share = gained + lost
    changed = _likely(rows, share)
    weights = binom.pmf(changed, rows, share)
    return float(weights @ binom.cdf(critical(changed, alpha), changed, lost / share))


def chance_of_same(rows: int, gained: float, lost: float, margin: float) -> float:
    """Return the chance that the score interval over `rows` rows lies within +-margin.

    `gained` and `lost` are the shares of rows that only one of the arms has right.
    """
    share, delta = gained + lost, gained - lost
    if rows * share > MANY:
        error = math.sqrt((share - delta**2) / rows)
        inside = norm.cdf((margin - delta) / error - Z) + norm.cdf((margin + delta) / error - Z) - 1
        return max(0.0, float(inside))
    changed = _likely(rows, share)[:, None]
    won = np.arange(changed.max() + 1)[None, :]
    weights = binom.pmf(changed, rows, share) * binom.pmf(won, changed, gained / share if share else 0.5)
    below, above = (score(won, changed - won, rows, end) for end in (margin, -margin))
    return float(weights[(won <= changed) & (below <= -Z) & (above >= Z)].sum())


def _likely(rows: int, share: float) -> np.ndarray[Any, Any]:
    """The numbers of changed rows whose chance is not negligible, in increasing order."""
    spread = 8 * math.sqrt(rows * share * max(0.0, 1 - share)) + 2
    return np.arange(max(0, int(rows * share - spread)), min(rows, int(rows * share + spread)) + 1)


def rows_to_decide(observed: Comparison, rows: int, margin: float, comparisons: int = 1) -> int | None:
    """Return how many evaluation rows would give a clear verdict with a chance of POWER.

    A verdict is clear if the difference is significant, or if the interval lies within the margin.
    The case that needs fewer rows counts. The true difference is taken to be the observed one.

    Args:
        observed: The comparison on the rows at hand.
        rows: The number of these rows. The result is larger.
        margin: Absolute, in the metric's unit.
        comparisons: How many comparisons Holm's method corrects for.

    Returns:
        None if no row differs, because then the rate of change is unknown, or if MOST_ROWS are too
        few.
    """
    chances = (_bootstrap_chances if observed.gained is None else _mcnemar_chances)(observed, rows, margin, comparisons)
    needed = [_fewest(chance, rows) for chance in chances]
    return min((count for count in needed if count is not None), default=None)


def _mcnemar_chances(observed: Comparison, rows: int, margin: float, comparisons: int) -> tuple[Chance, ...]:
    """The chances that the exact test is significant and that the score interval lies within the
    margin.
    """
    gained, lost = (count / rows for count in sorted((observed.gained or 0, observed.lost or 0), reverse=True))
    if not gained:
        return ()

    def differs(count: int) -> float:
        return power(int(count / observed.repeats), gained, lost, ALPHA / comparisons)

    def same(count: int) -> float:
        return chance_of_same(int(count / observed.repeats), gained, lost, margin)

    return (*((differs,) if gained > lost else ()), *((same,) if gained - lost < margin else ()))


def _bootstrap_chances(observed: Comparison, rows: int, margin: float, comparisons: int) -> tuple[Chance, ...]:
    """The same for a bootstrap: the difference is a mean with the observed standard error, tested
    by Student's t.
    """
    delta, deviation, share = abs(observed.delta), observed.error * math.sqrt(rows), observed.changed / rows

    def clears(distance: float, count: int, alpha: float) -> float:
        degrees = max(1.0, count * share - 1)  # of freedom
        limit = student.isf(alpha / 2, degrees)
        spread = math.sqrt(1 + limit**2 / (2 * degrees))
        return float(norm.cdf((distance * math.sqrt(count) / deviation - limit) / spread))

    def enough(count: int) -> float:
        return float(binom.sf(FEWEST_CHANGED - 1, count, share))

    def differs(count: int) -> float:
        return enough(count) * clears(delta, count, ALPHA / comparisons)

    def same(count: int) -> float:
        return enough(count) * max(0.0, clears(margin - delta, count, ALPHA) + clears(margin + delta, count, ALPHA) - 1)

    if not deviation:
        return ()
    return (*((differs,) if delta else ()), *((same,) if delta < margin else ()))


def _fewest(chance: Chance, above: int) -> int | None:
    """The smallest number of rows above `above` with a chance of POWER, to a thousandth.

    None: more than MOST_ROWS.
    """
    low, high = above, above + 1
    while chance(high) < POWER:
        low, high = high, 2 * high
        if high > MOST_ROWS:
            return None
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        low, high = (low, middle) if chance(middle) >= POWER else (middle, high)
    return high
