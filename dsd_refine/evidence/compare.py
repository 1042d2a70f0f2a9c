"""Compare two arms row by row: paired tests, the verdict, the gate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from dsd_refine.evidence.paired import ALPHA, Z, score_interval, sign_flips
from dsd_refine.tasks.base import Corpus, RowMetric, corpus_value

DRAWS = 10_000
FEWEST_CHANGED = 6  # fewer changed rows can never be significant in a sign test: 2 / 2**6 < ALPHA < 2 / 2**5

Array = np.ndarray[Any, Any]

REPORTED = ("delta", "ci95", "p_value", "p_adjusted", "gained", "lost", "test")


@dataclass(frozen=True)
class Comparison:
    """The result of comparing a first arm with a second one.

    Attributes:
        delta: The difference of the metric. > 0: the first arm is better, also for losses and error
            rates.
        ci95: The 95 % interval of `delta`.
        p_value: Two-sided p of no difference.
        p_adjusted: The same after Holm's correction over all comparisons of a run.
        gained: Rows that only the first arm has right. None if rows are not right or wrong.
        lost: Rows that only the second arm has right.
        test: The name of the test.
        changed: Rows whose scores differ. Equal rows count once. Used by `evidence/power.py` only.
        repeats: How many equal rows count as one observation, in right/wrong scores. For power
            only.
        error: The standard error of `delta`, in a bootstrap. For power only.
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
        """Return the fields that the report contains."""
        return {name: getattr(self, name) for name in REPORTED} | {"ci95": list(self.ci95)}


UNCHANGED = Comparison(0.0, (0.0, 0.0), 1.0, 1.0, None, None, "same-weights")  # the source with itself


def groups_of(contents: Iterable[bytes]) -> Array:
    """Return the number of each row's group, from 0. Rows with equal content form one group."""
    numbers: dict[bytes, int] = {}
    return np.asarray([numbers.setdefault(content, len(numbers)) for content in contents], dtype=np.int64)


def add_up(values: Array, groups: Array | None) -> Array:
    """Sum values, shape (rows,) or (rows, statistics), over the groups of equal rows.

    Without groups: return the values.
    """
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
    """Compare two arms by the scores of the same rows.

    Right/wrong scores (0 or 1, with count 1) are compared by the exact McNemar test, all others by
    the paired bootstrap.

    Args:
        first: Scores of the first arm, shape (rows,); with `corpus` statistics, shape (rows,
            statistics).
        second: Scores of the second arm, of the same shape.
        count: What each score is divided by, shape (rows,). The metric is sum(score) / sum(count).
        higher_is_better: False for losses and error rates.
        seed: What the bootstrap draws from.
        corpus: Computes a metric that is no ratio of sums from the summed statistics (BLEU), or from those of all
            rows (a rank correlation).
        groups: What `groups_of` returns. The rows of one group count as one observation.
    """
    if corpus is not None:
        return bootstrap_corpus(first, second, corpus, higher_is_better=higher_is_better, seed=seed, groups=groups)
    binary = bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all() and (count == 1).all())
    if binary and higher_is_better:
        return mcnemar(first, second, groups)
    return bootstrap(first, second, count, higher_is_better=higher_is_better, seed=seed, groups=groups)


def mcnemar(first: Array, second: Array, groups: Array | None = None) -> Comparison:
    """Compare right/wrong scores by the exact McNemar test, with Tango's score interval of the
    difference.

    Where rows are equal, the test flips the signs of whole groups. The interval is that of fewer
    rows: their number is divided by `_repeats`.
    """
    net = np.asarray(first, dtype=np.int64) - np.asarray(second, dtype=np.int64)
    rows, gained, lost = len(net), int((net > 0).sum()), int((net < 0).sum())
    sums, repeats = add_up(net, groups), _repeats(net, groups)
    interval, p_value = score_interval(gained / repeats, lost / repeats, rows / repeats), sign_flips(sums)
    test = "mcnemar-exact" if len(sums) == rows else "mcnemar-exact-grouped"
    changed = int(np.count_nonzero(sums))
    return Comparison((gained - lost) / rows, interval, p_value, p_value, gained, lost, test, changed, repeats)


def _repeats(net: Array, groups: Array | None) -> float:
    """How many rows count as one observation, because equal rows change together.

    1: no two rows are equal.

    It is the larger of two ratios: rows to groups, and the variance of the sums over groups to the
    variance of as many independent rows.
    """
    if groups is None:
        return 1.0
    group_count = int(groups.max()) + 1
    variance_ratio = float((add_up(net, groups) ** 2).sum()) / max(1, int(np.count_nonzero(net)))
    return max(len(net) / group_count, variance_ratio)


def bootstrap(
    first: Array, second: Array, count: Array, *, higher_is_better: bool, seed: int = 0, groups: Array | None = None
) -> Comparison:
    """Compare sum(score) / sum(count) by a paired bootstrap over rows.

    Equal rows are drawn together.
    """
    sign = 1.0 if higher_is_better else -1.0
    difference, counts = add_up(sign * (first - second).astype(np.float64), groups), add_up(count, groups)
    deltas = np.empty(DRAWS)
    for samples, times in _draws(len(difference), seed):
        deltas[samples] = (times @ difference) / np.maximum(1, times @ counts)
    total = max(1, float(counts.sum()))
    largest = max(1.0, *(abs(float(arm.sum())) / total for arm in (first, second)))
    largest = max(largest, float(np.abs(difference).max()) * len(difference) / total)
    unseen = largest * _unseen_share(len(first), groups)
    return _of_draws(float(difference.sum() / total), deltas, int(np.count_nonzero(difference)), unseen)


def bootstrap_corpus(
    first: Array, second: Array, corpus: Corpus, *, higher_is_better: bool, seed: int = 0, groups: Array | None = None
) -> Comparison:
    """Compare a metric that is no ratio of sums (BLEU) by a paired bootstrap.

    `first` and `second` have shape (rows, statistics). Rows are drawn and their statistics summed.
    """
    if isinstance(corpus, RowMetric):
        return _bootstrap_rows(first, second, corpus, higher_is_better=higher_is_better, seed=seed, groups=groups)
    sign = 1.0 if higher_is_better else -1.0
    both = add_up(np.concatenate([first, second], axis=1).astype(np.float64), groups)
    width, deltas = first.shape[1], np.empty(DRAWS)

    def difference(sums: Array) -> Array:
        return sign * (corpus(sums[..., :width]) - corpus(sums[..., width:]))

    for samples, times in _draws(len(both), seed):
        deltas[samples] = difference(times @ both)
    changed = int((both[:, :width] != both[:, width:]).any(1).sum())
    arms = (abs(float(corpus(arm.sum(0)))) for arm in (first, second))
    unseen = max(1.0, *arms) * _unseen_share(len(first), groups)
    return _of_draws(float(difference(both.sum(0))), deltas, changed, unseen)


def _bootstrap_rows(
    first: Array, second: Array, metric: RowMetric, *, higher_is_better: bool, seed: int, groups: Array | None
) -> Comparison:
    """The same for a metric that needs all rows together. Equal rows are drawn together."""
    sign = 1.0 if higher_is_better else -1.0
    differ = add_up((first != second).any(1).astype(np.int64), groups) > 0
    deltas = np.empty(DRAWS)
    for samples, times in _draws(len(differ), seed):
        of_rows = times if groups is None else times[:, groups]
        deltas[samples] = sign * (metric.of_samples(first, of_rows) - metric.of_samples(second, of_rows))
    values = [corpus_value(metric, arm) for arm in (first, second)]
    unseen = max(1.0, *map(abs, values)) * _unseen_share(len(first), groups)
    return _of_draws(sign * (values[0] - values[1]), deltas, int(differ.sum()), unseen)


def _unseen_share(rows: int, groups: Array | None) -> float:
    """The largest share of rows that may truly differ, at 95 %, although no row of the sample does."""
    observations = rows if groups is None else int(groups.max()) + 1
    return Z**2 / (observations + Z**2)


def _of_draws(delta: float, deltas: Array, changed: int, unseen: float) -> Comparison:
    """Make the interval and p from the `deltas` of a bootstrap with `changed` rows that differ
    between the arms.

    The interval is the expanded percentile interval (Hesterberg 2015, The American Statistician
    69:371-386). Plain percentiles of m changed rows are too narrow by sqrt((m - 1) / m). They also
    use the normal distribution in place of Student's t. p is the level at which the interval ends
    at 0. It is at least 2 / 2**m, the chance that m random signs are all equal. If p >= ALPHA, the
    interval contains 0. If m < FEWEST_CHANGED, draws cannot show what one more changed row would
    do. Then the interval reaches at least `unseen` to both sides.
    """
    degrees = max(changed, 2) - 1  # of freedom
    widening = math.sqrt((degrees + 1) / degrees)
    share = norm.sf(widening * student.isf(ALPHA / 2, degrees))
    low, high = (float(end) for end in np.quantile(deltas, [share, 1 - share]))
    tail = min(int((deltas <= 0).sum()), int((deltas >= 0).sum()))
    p_value = float(2 * student.sf(norm.isf((tail + 1) / (DRAWS + 1)) / widening, degrees))
    p_value = min(1.0, max(p_value, 2.0 ** (1 - changed)))
    if changed < FEWEST_CHANGED:
        low, high = min(low, delta - unseen), max(high, delta + unseen)
    if p_value >= ALPHA:
        low, high = min(low, 0.0), max(high, 0.0)
    error = float(deltas.std())
    return Comparison(delta, (low, high), p_value, p_value, None, None, "paired-bootstrap", changed, error=error)


def _draws(rows: int, seed: int) -> Iterator[tuple[slice, Array]]:
    """Draw DRAWS samples of rows with replacement.

    Yields the numbers of some samples, and how often each row is in each of them, shape (samples,
    rows).
    """
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
    """Compare two arms that were each trained with several seeds.

    `first` and `second` have one array of scores for each seed, shape (rows,). Seed i of one is
    paired with seed i of the other. The interval is a percentile bootstrap that draws seeds and
    rows, each with replacement. Equal rows are drawn together.

    Returns:
        The mean difference, its 95 % interval, and the standard deviation between seeds.
    """
    sign = 1.0 if higher_is_better else -1.0
    pairs = zip(first, second, strict=True)
    difference = np.stack([add_up(sign * (mine - theirs).astype(np.float64), groups) for mine, theirs in pairs])
    count = add_up(count, groups)
    seeds, rows = difference.shape
    by_seed = difference.sum(1) / max(1, count.sum())
    generator, deltas = np.random.default_rng(seed), np.empty(DRAWS)
    chunk = max(1, min(DRAWS, 2_000_000 // rows))
    for start in range(0, DRAWS, chunk):
        size = min(chunk, DRAWS - start)
        times = generator.multinomial(rows, np.full(rows, 1 / rows), size=size)
        of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=size) / seeds
        sums = (times @ difference.T) / np.maximum(1, times @ count)[:, None]
        deltas[start : start + size] = (sums * of_seeds).sum(1)
    low, high = np.quantile(deltas, [0.025, 0.975])
    return float(by_seed.mean()), (float(low), float(high)), float(by_seed.std(ddof=1)) if seeds > 1 else 0.0


def corpus_over_seeds(
    first: Sequence[Array],
    second: Sequence[Array],
    corpus: Corpus,
    *,
    higher_is_better: bool,
    seed: int = 0,
    groups: Array | None = None,
) -> tuple[float, tuple[float, float], float]:
    """Do what `over_seeds` does for a metric of summed statistics or of all rows (`corpus`).

    `first` and `second` have one array of statistics for each seed, shape (rows, statistics).
    """
    sign = 1.0 if higher_is_better else -1.0
    is_of_rows = isinstance(corpus, RowMetric)  # then equal rows are drawn together, and not added up
    mine, theirs = (
        np.stack([add_up(of_rows.astype(np.float64), None if is_of_rows else groups) for of_rows in arm])
        for arm in (first, second)
    )

    def values(stats: Array, times: Array) -> Array:
        if not isinstance(corpus, RowMetric):
            return corpus(np.matmul(times, stats))
        times = times if groups is None else times[:, groups]
        return np.stack([corpus.of_samples(of_seed, times) for of_seed in stats])

    by_seed = sign * np.array([corpus_value(corpus, a) - corpus_value(corpus, b) for a, b in zip(mine, theirs, strict=True)])
    seeds = len(by_seed)
    generator, deltas = np.random.default_rng([seed, seeds]), np.empty(DRAWS)
    for samples, times in _draws(mine.shape[1] if groups is None else int(groups.max()) + 1, seed):
        of_sample = sign * (values(mine, times) - values(theirs, times))  # (seeds, samples)
        of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=len(times)) / seeds
        deltas[samples] = (of_sample.T * of_seeds).sum(1)
    low, high = np.quantile(deltas, [0.025, 0.975])
    return float(by_seed.mean()), (float(low), float(high)), float(by_seed.std(ddof=1)) if seeds > 1 else 0.0


def holm(comparisons: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """Return the comparisons with `p_adjusted`, by Holm's step-down method over all of them."""
    ordered = sorted(comparisons, key=lambda name: comparisons[name].p_value)
    adjusted, highest = dict(comparisons), 0.0
    for rank, name in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - rank) * comparisons[name].p_value))
        adjusted[name] = replace(comparisons[name], p_adjusted=highest)
    return adjusted


def verdict(comparison: Comparison, margin: float) -> str:
    """Return better, worse, same or inconclusive. `margin` is absolute, in the metric's unit."""
    if comparison.p_adjusted < ALPHA:
        return "better" if comparison.delta > 0 else "worse"
    return "same" if -margin <= comparison.ci95[0] and comparison.ci95[1] <= margin else "inconclusive"


def with_source(comparisons: Mapping[str, Comparison], arm: str = "refined") -> Comparison:
    """Return the comparison of an arm with the source. For "baseline", the source itself, it is UNCHANGED."""
    return UNCHANGED if arm == "baseline" else comparisons[f"{arm}_vs_baseline"]


def gate_passed(
    rule: str, comparisons: Mapping[str, Comparison], margin: float, controls: Sequence[str], published: str = "refined"
) -> bool:
    """Return whether the gate is met.

    Args:
        rule: "none": always met. "not-worse": delta >= 0 on these rows, even if by chance.
            "non-inferior": the interval lies above -margin. "better": the verdict is better.
            "beats-control": the verdict is better, and the refined arm is better than every
            control. A published control or source cannot meet it.
        comparisons: By name, such as `refined_vs_baseline`, with `p_adjusted`.
        margin: Absolute, in the metric's unit.
        controls: Names of the control arms.
        published: The arm whose weights are published; "baseline": the source.
    """
    result = with_source(comparisons, published)
    if rule == "none":
        return True
    if rule == "not-worse":
        return result.delta >= 0
    if rule == "non-inferior":
        return result.ci95[0] > -margin
    better = verdict(result, margin) == "better"
    return better and (rule == "better" or (published == "refined" and beats_all(comparisons, controls)))


def beats_all(comparisons: Mapping[str, Comparison], controls: Sequence[str]) -> bool:
    """Return whether the refined arm is significantly better than every control."""
    others = [comparisons[f"refined_vs_{control}"] for control in controls]
    return all(other.p_adjusted < ALPHA and other.delta > 0 for other in others)


def credit(of_verdict: str, comparisons: Mapping[str, Comparison], controls: Sequence[str], published: str = "refined") -> str:
    """Return what made the result better.

    "mask": the refined arm is published, and is better than every control too. "training": else.
    "unknown": no control was run. "none": the verdict is not better.
    """
    if of_verdict != "better":
        return "none"
    if not controls:
        return "unknown"
    return "mask" if published == "refined" and beats_all(comparisons, controls) else "training"
