"""Was it better? Paired tests on per-row scores, the verdict, the gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from dsd_refine.evidence.paired import ALPHA, Z, score_interval, sign_flips

DRAWS = 10_000
FEWEST = 6  # rows that differ by which a test of signs can reject: 2 / 2**6 < ALPHA

Array = np.ndarray[Any, Any]

Corpus = Callable[[Array], Array]  # sums of statistics (…, statistics) -> the metric of each (…)

REPORTED = ("delta", "ci95", "p_value", "p_adjusted", "gained", "lost", "test")


@dataclass(frozen=True)
class Comparison:
    """`delta` > 0: the first arm is better, also for losses and error rates. `gained`/`lost` rows only for right/wrong.

    Not reported, for `dsd_refine.power`: `changed` rows that differ, equal ones counted once; `repeats` rows of right/wrong
    that weigh as one; of a bootstrap, `error`: the standard error of `delta`.
    """

    delta: float
    ci95: tuple[float, float]
    p_value: float
    p_adjusted: float
    gained: int | None
    lost: int | None
    test: str
    changed: int = 0
    repeats: float = 1.0
    error: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in REPORTED} | {"ci95": list(self.ci95)}


def groups_of(contents: Iterable[bytes]) -> Array:
    """Each row's group, numbered from 0 in order: rows with equal content are one group."""
    numbers: dict[bytes, int] = {}
    return np.asarray([numbers.setdefault(content, len(numbers)) for content in contents], dtype=np.int64)


def add_up(values: Array, groups: Array | None) -> Array:
    """The sums of rows (or rows x statistics) over groups of equal rows; the values themselves where there are no groups."""
    if groups is None:
        return values
    sums = np.zeros((int(groups.max()) + 1, *values.shape[1:]), dtype=values.dtype)
    np.add.at(sums, groups, values)
    return sums


def compare(
    first: Array,
    second: Array,
    count: Array,
    *,
    higher_is_better: bool,
    seed: int = 0,
    corpus: Corpus | None = None,
    groups: Array | None = None,
) -> Comparison:
    """Compare two arms by their per-row `score` arrays over the same `count` array (equal length, one row each).

    Right/wrong scores (0 or 1, count 1) take the exact McNemar test, everything else the paired bootstrap. With `corpus`
    the arrays are rows x statistics, and it makes the metric of their sums. Rows of one group (`groups_of`) are one witness.
    """
    if corpus is not None:
        return bootstrap_corpus(first, second, corpus, higher_is_better=higher_is_better, seed=seed, groups=groups)
    binary = bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all() and (count == 1).all())
    if binary and higher_is_better:
        return mcnemar(first, second, groups)
    return bootstrap(first, second, count, higher_is_better=higher_is_better, seed=seed, groups=groups)


def mcnemar(first: Array, second: Array, groups: Array | None = None) -> Comparison:
    """The exact McNemar test, and Tango's score interval of the difference.

    Of rows that are equal to others, the test flips the signs of whole groups, and the interval is that of as many fewer
    rows as `_repeats` says.
    """
    net = np.asarray(first, dtype=np.int64) - np.asarray(second, dtype=np.int64)
    rows, gained, lost = len(net), int((net > 0).sum()), int((net < 0).sum())
    sums, repeats = add_up(net, groups), _repeats(net, groups)
    interval, p_value = score_interval(gained / repeats, lost / repeats, rows / repeats), sign_flips(sums)
    test = "mcnemar-exact" if len(sums) == rows else "mcnemar-exact-grouped"
    changed = int(np.count_nonzero(sums))
    return Comparison((gained - lost) / rows, interval, p_value, p_value, gained, lost, test, changed, repeats)


def _repeats(net: Array, groups: Array | None) -> float:
    """How many rows weigh as one, where rows of a group change together (1: no two rows are equal).

    The larger of rows to groups, for equal rows are one witness, and of what is seen in those that changed: the variance of
    a sum over groups against that of as many rows by themselves.
    """
    if groups is None:
        return 1.0
    apart = int(groups.max()) + 1
    seen = float((add_up(net, groups) ** 2).sum()) / max(1, int(np.count_nonzero(net)))
    return max(len(net) / apart, seen)


def bootstrap(
    first: Array, second: Array, count: Array, *, higher_is_better: bool, seed: int = 0, groups: Array | None = None
) -> Comparison:
    """Paired bootstrap over rows of the difference of sum(score) / sum(count): DRAWS seeded draws, judged as `_judged` says.

    Equal rows are drawn together.
    """
    sign = 1.0 if higher_is_better else -1.0
    difference, counts = add_up(sign * (first - second).astype(np.float64), groups), add_up(count, groups)
    drawn = np.empty(DRAWS)
    for place, times in _draws(len(difference), seed):
        drawn[place] = (times @ difference) / np.maximum(1, times @ counts)
    total = max(1, float(counts.sum()))
    largest = max(1.0, *(abs(float(arm.sum())) / total for arm in (first, second)))
    largest = max(largest, float(np.abs(difference).max()) * len(difference) / total)
    unseen = largest * _unseen(len(first), groups)
    return _judged(float(difference.sum() / total), drawn, int(np.count_nonzero(difference)), unseen)


def bootstrap_corpus(
    first: Array, second: Array, corpus: Corpus, *, higher_is_better: bool, seed: int = 0, groups: Array | None = None
) -> Comparison:
    """The paired bootstrap of a metric that is no ratio of sums (BLEU): rows are drawn, their statistics added up.

    `first` and `second` are rows x statistics. Draws, interval and p are those of `bootstrap`.
    """
    sign = 1.0 if higher_is_better else -1.0
    both = add_up(np.concatenate([first, second], axis=1).astype(np.float64), groups)
    width, drawn = first.shape[1], np.empty(DRAWS)

    def difference(sums: Array) -> Array:
        return sign * (corpus(sums[..., :width]) - corpus(sums[..., width:]))

    for place, times in _draws(len(both), seed):
        drawn[place] = difference(times @ both)
    changed = int((both[:, :width] != both[:, width:]).any(1).sum())
    arms = (abs(float(corpus(arm.sum(0)))) for arm in (first, second))
    unseen = max(1.0, *arms) * _unseen(len(first), groups)
    return _judged(float(difference(both.sum(0))), drawn, changed, unseen)


def _unseen(rows: int, groups: Array | None) -> float:
    """The largest share of rows that may differ although none was seen to (the score interval of no changed row)."""
    apart = rows if groups is None else int(groups.max()) + 1
    return Z**2 / (apart + Z**2)


def _judged(delta: float, drawn: Array, changed: int, unseen: float) -> Comparison:
    """Interval and p of a bootstrap in which `changed` rows, m, differ between the arms; the others tell nothing.

    The interval is the expanded percentile one (Hesterberg 2015, The American Statistician 69:371-386): plain
    percentiles of m rows are too narrow by sqrt((m - 1) / m) and by Student's t against the normal. p is the level at which
    the interval ends at 0, and at least 2 / 2**m, the chance that m fair signs are all the same. A difference of 0 that is
    not rejected lies in the interval. Draws from fewer than FEWEST rows that differ cannot show what a further one would be:
    there the interval reaches at least `unseen` to either side.
    """
    free = max(changed, 2) - 1
    wide = math.sqrt((free + 1) / free)
    share = norm.sf(wide * student.isf(ALPHA / 2, free))
    low, high = (float(end) for end in np.quantile(drawn, [share, 1 - share]))
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p_value = float(2 * student.sf(norm.isf((tail + 1) / (DRAWS + 1)) / wide, free))
    p_value = min(1.0, max(p_value, 2.0 ** (1 - changed)))
    if changed < FEWEST:
        low, high = min(low, delta - unseen), max(high, delta + unseen)
    if p_value >= ALPHA:
        low, high = min(low, 0.0), max(high, 0.0)
    error = float(drawn.std())
    return Comparison(delta, (low, high), p_value, p_value, None, None, "paired-bootstrap", changed, error=error)


def _draws(rows: int, seed: int) -> Iterator[tuple[slice, Array]]:
    """DRAWS samples of rows with replacement, some at a time: where they go, and how often each row is in each."""
    generator, chunk = np.random.default_rng(seed), max(1, min(DRAWS, 2_000_000 // rows))
    for start in range(0, DRAWS, chunk):
        size = min(chunk, DRAWS - start)
        yield slice(start, start + size), generator.multinomial(rows, np.full(rows, 1 / rows), size=size)


def over_seeds(
    first: Sequence[Array],
    second: Sequence[Array],
    count: Array,
    *,
    higher_is_better: bool,
    seed: int = 0,
    groups: Array | None = None,
) -> tuple[float, tuple[float, float], float]:
    """Mean difference over seeds, its 95 % interval over seeds and rows, and its deviation between seeds.

    Arrays of one length, one a seed; seed i of the first arm is paired with seed i of the second. The interval is a
    percentile bootstrap that draws seeds and rows, each with replacement, equal rows together.
    """
    sign = 1.0 if higher_is_better else -1.0
    pairs = zip(first, second, strict=True)
    difference = np.stack([add_up(sign * (mine - theirs).astype(np.float64), groups) for mine, theirs in pairs])
    count = add_up(count, groups)
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
    first: Sequence[Array],
    second: Sequence[Array],
    corpus: Corpus,
    *,
    higher_is_better: bool,
    seed: int = 0,
    groups: Array | None = None,
) -> tuple[float, tuple[float, float], float]:
    """`over_seeds` for a metric that `corpus` makes of summed statistics; the arrays are rows x statistics, one a seed."""
    sign = 1.0 if higher_is_better else -1.0
    one, two = (np.stack([add_up(sums.astype(np.float64), groups) for sums in arm]) for arm in (first, second))
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
    """Is the gate met? `none`: always · `not-worse`: delta >= 0 on these rows, be it by chance · `non-inferior`: the interval
    lies above -margin · `better`: verdict better · `beats-control`: that, and against each control.
    """
    against_source = comparisons["refined_vs_baseline"]
    if rule == "none":
        return True
    if rule == "not-worse":
        return against_source.delta >= 0
    if rule == "non-inferior":
        return against_source.ci95[0] > -margin
    better = verdict(against_source, margin) == "better"
    return better and (rule == "better" or beats_all(comparisons, controls))


def beats_all(comparisons: Mapping[str, Comparison], controls: Sequence[str]) -> bool:
    """Is the refined arm better than every control?"""
    others = [comparisons[f"refined_vs_{control}"] for control in controls]
    return all(other.p_adjusted < ALPHA and other.delta > 0 for other in others)


def credit(said: str, comparisons: Mapping[str, Comparison], controls: Sequence[str]) -> str:
    """Whose doing a verdict is: `mask` (better than every control too), `training` (not than each), `unknown` (no control was
    run), `none` (not better than the source).
    """
    if said != "better":
        return "none"
    if not controls:
        return "unknown"
    return "mask" if beats_all(comparisons, controls) else "training"
