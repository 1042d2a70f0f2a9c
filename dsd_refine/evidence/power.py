"""How many rows would decide: power of the paired test, at the rates that were found."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import binom, norm
from scipy.stats import t as student

from dsd_refine.evidence.compare import FEWEST, Comparison
from dsd_refine.evidence.paired import ALPHA, Z, score

POWER = 0.8
MOST = 10**8  # rows beyond which it is not said how many would decide
MANY = 400  # changed rows from which the score interval is as good as normal

Chance = Callable[[int], float]


def critical(changed: Any, alpha: float = ALPHA) -> Any:
    """The largest smaller count of a split of `changed` rows at which the exact two-sided test rejects (-1: none does).

    `changed` is a number or an array of them.
    """
    counts = np.asarray(changed, dtype=np.int64)
    at = np.where(counts > 0, binom.ppf(alpha / 2, np.maximum(counts, 1), 0.5), -1).astype(np.int64)
    while (over := (at >= 0) & (2 * binom.cdf(at, counts, 0.5) >= alpha)).any():
        at = np.where(over, at - 1, at)
    return at[()]


def power(rows: int, gained: float, lost: float, alpha: float = ALPHA) -> float:
    """Chance that the exact McNemar test over `rows` rows calls the better arm better.

    `gained` and `lost` are the shares of rows that change each way (gained > lost: the first arm is better).
    """
    share = gained + lost
    changed = _likely(rows, share)
    weights = binom.pmf(changed, rows, share)
    return float(weights @ binom.cdf(critical(changed, alpha), changed, lost / share))


def chance_of_same(rows: int, gained: float, lost: float, margin: float) -> float:
    """Chance that the score interval over `rows` rows lies within +-margin, where these shares of rows change each way."""
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
    """The counts of changed rows that occur at all often."""
    spread = 8 * math.sqrt(rows * share * max(0.0, 1 - share)) + 2
    return np.arange(max(0, int(rows * share - spread)), min(rows, int(rows * share + spread)) + 1)


def rows_to_decide(found: Comparison, rows: int, margin: float, comparisons: int = 1) -> int | None:
    """Evaluation rows, more than the `rows` of `found`, at which a comparison like it would be decided four times of five.

    Decided: the difference shows (if it is what was found; at the level that Holm leaves the smallest p of so many
    `comparisons`), or the interval lies within the margin, whichever needs fewer rows. None where no row differs, for then
    nothing is known of how often one does, or where MOST would not do.
    """
    chances = (_sums if found.gained is None else _right_wrong)(found, rows, margin, comparisons)
    needed = [_fewest(chance, rows) for chance in chances]
    return min((count for count in needed if count is not None), default=None)


def _right_wrong(found: Comparison, rows: int, margin: float, comparisons: int) -> tuple[Chance, ...]:
    """Chances, by the number of rows, that the exact test and the score interval decide. Equal rows weigh as they did."""
    gained, lost = (count / rows for count in sorted((found.gained or 0, found.lost or 0), reverse=True))
    if not gained:
        return ()

    def differs(count: int) -> float:
        return power(int(count / found.repeats), gained, lost, ALPHA / comparisons)

    def same(count: int) -> float:
        return chance_of_same(int(count / found.repeats), gained, lost, margin)

    return (*((differs,) if gained > lost else ()), *((same,) if gained - lost < margin else ()))


def _sums(found: Comparison, rows: int, margin: float, comparisons: int) -> tuple[Chance, ...]:
    """The same of the bootstrap, whose difference is a mean with the error that was found, tested by Student's t."""
    delta, deviation, share = abs(found.delta), found.error * math.sqrt(rows), found.changed / rows

    def clears(distance: float, count: int, alpha: float) -> float:
        free = max(1.0, count * share - 1)
        limit = student.isf(alpha / 2, free)
        return float(norm.cdf((distance * math.sqrt(count) / deviation - limit) / math.sqrt(1 + limit**2 / (2 * free))))

    def enough(count: int) -> float:
        return float(binom.sf(FEWEST - 1, count, share))

    def differs(count: int) -> float:
        return enough(count) * clears(delta, count, ALPHA / comparisons)

    def same(count: int) -> float:
        return enough(count) * max(0.0, clears(margin - delta, count, ALPHA) + clears(margin + delta, count, ALPHA) - 1)

    if not deviation:
        return ()
    return (*((differs,) if delta else ()), *((same,) if delta < margin else ()))


def _fewest(chance: Chance, above: int) -> int | None:
    """The smallest number of rows above `above`, to a thousandth, at which the chance reaches POWER; None: not by MOST."""
    low, high = above, above + 1
    while chance(high) < POWER:
        low, high = high, 2 * high
        if high > MOST:
            return None
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        low, high = (low, middle) if chance(middle) >= POWER else (middle, high)
    return high
