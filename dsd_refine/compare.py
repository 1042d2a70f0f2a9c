"""Was it better? Paired tests on per-row scores, the verdict, the gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm
from scipy.stats import t as student

DRAWS = 10_000
ALPHA = 0.05

Array = np.ndarray[Any, Any]
Corpus = Callable[[Array], Array]  # sums of statistics (…, statistics) -> the metric of each (…)


@dataclass(frozen=True)
class Comparison:
    """`delta` > 0: the first arm is better, also for losses and error rates. `gained`/`lost` rows only for right/wrong."""

    delta: float
    ci95: tuple[float, float]
    p_value: float
    p_adjusted: float
    gained: int | None
    lost: int | None
    test: str

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ci95": list(self.ci95)}


def compare(
    first: Array, second: Array, count: Array, *, higher_is_better: bool, seed: int = 0, corpus: Corpus | None = None
) -> Comparison:
    """Compare two arms by their per-row `score` arrays over the same `count` array (equal length, one row each).

    Right/wrong scores (0 or 1, count 1) take the exact McNemar test, everything else the paired bootstrap. With `corpus`
    the arrays are rows x statistics, and it makes the metric of their sums.
    """
    if corpus is not None:
        return bootstrap_corpus(first, second, corpus, higher_is_better=higher_is_better, seed=seed)
    binary = bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all() and (count == 1).all())
    if binary and higher_is_better:
        return mcnemar(first, second)
    return bootstrap(first, second, count, higher_is_better=higher_is_better, seed=seed)


def mcnemar(first: Array, second: Array) -> Comparison:
    """Exact McNemar test; the interval inverts it (Clopper-Pearson on gained / (gained + lost))."""
    n = len(first)
    gained, lost = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
    changed = gained + lost
    if not changed:
        return Comparison(0.0, (0.0, 0.0), 1.0, 1.0, 0, 0, "mcnemar-exact")
    found = binomtest(gained, changed, 0.5)
    interval = found.proportion_ci(0.95, method="exact")
    low, high = ((2 * share - 1) * changed / n for share in interval)
    p_value = float(found.pvalue)
    return Comparison((gained - lost) / n, (low, high), p_value, p_value, gained, lost, "mcnemar-exact")


def bootstrap(first: Array, second: Array, count: Array, *, higher_is_better: bool, seed: int = 0) -> Comparison:
    """Paired bootstrap over rows of the difference of sum(score) / sum(count): DRAWS seeded draws, judged as `_judged` says."""
    difference = (1.0 if higher_is_better else -1.0) * (first - second).astype(np.float64)
    drawn = np.empty(DRAWS)
    for place, times in _draws(len(first), seed):
        drawn[place] = (times @ difference) / np.maximum(1, times @ count)
    return _judged(float(difference.sum() / max(1, count.sum())), drawn, int(np.count_nonzero(difference)))


def bootstrap_corpus(first: Array, second: Array, corpus: Corpus, *, higher_is_better: bool, seed: int = 0) -> Comparison:
    """The paired bootstrap of a metric that is no ratio of sums (BLEU): rows are drawn, their statistics added up.

    `first` and `second` are rows x statistics. Draws, interval and p are those of `bootstrap`.
    """
    sign = 1.0 if higher_is_better else -1.0
    both = np.concatenate([first, second], axis=1).astype(np.float64)
    width, drawn = first.shape[1], np.empty(DRAWS)

    def difference(sums: Array) -> Array:
        return sign * (corpus(sums[..., :width]) - corpus(sums[..., width:]))

    for place, times in _draws(len(first), seed):
        drawn[place] = difference(times @ both)
    return _judged(float(difference(both.sum(0))), drawn, int((first != second).any(1).sum()))


def _judged(delta: float, drawn: Array, changed: int) -> Comparison:
    """Interval and p of a bootstrap in which `changed` rows, m, differ between the arms; the others tell nothing.

    The interval is the expanded percentile one (Hesterberg 2015, The American Statistician 69:371-386): plain
    percentiles of m rows are too narrow by sqrt((m - 1) / m) and by Student's t against the normal. p is the level at which
    the interval ends at 0, and at least 2 / 2**m, the chance that m fair signs are all the same. A difference of 0 that is
    not rejected lies in the interval.
    """
    free = max(changed, 2) - 1
    wide = math.sqrt((free + 1) / free)
    share = norm.sf(wide * student.isf(ALPHA / 2, free))
    low, high = (float(end) for end in np.quantile(drawn, [share, 1 - share]))
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p_value = float(2 * student.sf(norm.isf((tail + 1) / (DRAWS + 1)) / wide, free))
    p_value = min(1.0, max(p_value, 2.0 ** (1 - changed)))
    if p_value >= ALPHA:
        low, high = min(low, 0.0), max(high, 0.0)
    return Comparison(delta, (low, high), p_value, p_value, None, None, "paired-bootstrap")


def _draws(rows: int, seed: int) -> Iterator[tuple[slice, Array]]:
    """DRAWS samples of rows with replacement, some at a time: where they go, and how often each row is in each."""
    generator, chunk = np.random.default_rng(seed), max(1, min(DRAWS, 2_000_000 // rows))
    for start in range(0, DRAWS, chunk):
        size = min(chunk, DRAWS - start)
        yield slice(start, start + size), generator.multinomial(rows, np.full(rows, 1 / rows), size=size)


def over_seeds(
    first: Sequence[Array], second: Sequence[Array], count: Array, *, higher_is_better: bool, seed: int = 0
) -> tuple[float, tuple[float, float], float]:
    """Mean difference over seeds, its 95 % interval over seeds and rows, and its deviation between seeds.

    Arrays of one length, one a seed; seed i of the first arm is paired with seed i of the second. The interval is a
    percentile bootstrap that draws seeds and rows, each with replacement.
    """
    sign = 1.0 if higher_is_better else -1.0
    difference = sign * (np.stack(first) - np.stack(second)).astype(np.float64)
    seeds, rows = difference.shape
    each = difference.sum(1) / max(1, count.sum())
    generator, drawn = np.random.default_rng(seed), np.empty(DRAWS)
    chunk = max(1, min(DRAWS, 2_000_000 // rows))
    for start in range(0, DRAWS, chunk):
        size = min(chunk, DRAWS - start)
        times = generator.multinomial(rows, np.full(rows, 1 / rows), size=size)
        of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=size) / seeds
        sums = (times @ difference.T) / np.maximum(1, times @ count)[:, None]
        drawn[start : start + size] = (sums * of_seeds).sum(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(each.mean()), (float(low), float(high)), float(each.std(ddof=1)) if seeds > 1 else 0.0


def corpus_over_seeds(
    first: Sequence[Array], second: Sequence[Array], corpus: Corpus, *, higher_is_better: bool, seed: int = 0
) -> tuple[float, tuple[float, float], float]:
    """`over_seeds` for a metric that `corpus` makes of summed statistics; the arrays are rows x statistics, one a seed."""
    sign = 1.0 if higher_is_better else -1.0
    one, two = np.stack(first).astype(np.float64), np.stack(second).astype(np.float64)
    each = sign * (corpus(one.sum(1)) - corpus(two.sum(1)))
    generator, drawn = np.random.default_rng([seed, len(each)]), np.empty(DRAWS)
    for place, times in _draws(one.shape[1], seed):
        found = sign * (corpus(np.matmul(times, one)) - corpus(np.matmul(times, two)))  # seeds x draws
        of_seeds = generator.multinomial(len(each), np.full(len(each), 1 / len(each)), size=len(times)) / len(each)
        drawn[place] = (found.T * of_seeds).sum(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(each.mean()), (float(low), float(high)), float(each.std(ddof=1)) if len(each) > 1 else 0.0


def holm(comparisons: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """Fill `p_adjusted` by Holm's step-down over all comparisons made."""
    ordered = sorted(comparisons, key=lambda name: comparisons[name].p_value)
    adjusted, highest = dict(comparisons), 0.0
    for rank, name in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - rank) * comparisons[name].p_value))
        adjusted[name] = replace(comparisons[name], p_adjusted=highest)
    return adjusted


def verdict(found: Comparison, margin: float) -> str:
    """better | worse | same | inconclusive. `margin` is absolute, in the metric's own unit."""
    if found.p_adjusted < ALPHA:
        return "better" if found.delta > 0 else "worse"
    return "same" if -margin <= found.ci95[0] and found.ci95[1] <= margin else "inconclusive"


def gate_passed(rule: str, comparisons: Mapping[str, Comparison], margin: float, controls: Sequence[str]) -> bool:
    """Is the gate met? `not-worse`: delta >= 0 · `better`: verdict better · `beats-control`: that, and against each control."""
    against_source = comparisons["refined_vs_baseline"]
    if rule == "none":
        return True
    if rule == "not-worse":
        return against_source.delta >= 0
    better = verdict(against_source, margin) == "better"
    if rule == "better":
        return better
    others = [comparisons[f"refined_vs_{control}"] for control in controls]
    return better and all(other.p_adjusted < ALPHA and other.delta > 0 for other in others)
