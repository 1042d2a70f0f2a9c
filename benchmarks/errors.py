"""How often the tests call a difference that is none: `python benchmarks/errors.py [SETS] > benchmarks/results/errors.txt`.

SETS (2,000) made data sets for each line, in which no arm is better. 5 % of them may be called different. The bootstrap makes
1,000 draws here, which the first table shows to be as good as the 10,000 of a run. Lines of draws, BLEU and seeds take half
as many. About fifteen minutes on one core.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
from common import table
from scipy.stats import nct, t, ttest_1samp

from dsd_refine import compare
from dsd_refine.power import power
from dsd_refine.tasks.captions import bleu

Array = np.ndarray[Any, Any]
Draw = np.random.Generator
ROWS = (20, 60, 300)
FEW, MANY = 1_000, 10_000
MOVED = (0.005, 0.05)  # standard deviation of an arm's accuracy over seeds

# differences of two arms of which neither is better: each arm's scores come from one distribution
NULLS: dict[str, Callable[[Draw, int], Array]] = {
    "normal": lambda draw, n: draw.normal(size=n),
    "exponential": lambda draw, n: draw.exponential(size=n) - draw.exponential(size=n),
    "lognormal": lambda draw, n: draw.lognormal(size=n) - draw.lognormal(size=n),
    "1 row of 5 differs, lognormal": lambda draw, n: (draw.random(n) < 0.2) * (draw.lognormal(size=n) - draw.lognormal(size=n)),
    "1 row of 20 differs, by 1": lambda draw, n: (draw.random(n) < 0.05) * draw.choice([-1.0, 1.0], n),
}
# one arm wins often and loses much: the mean difference is 0, but the arms are not alike
SKEWED: dict[str, Callable[[Draw, int], Array]] = {
    "exponential less its mean": lambda draw, n: draw.exponential(size=n) - 1,
    "lognormal less its mean": lambda draw, n: draw.lognormal(size=n) - np.exp(0.5),
}


def main() -> None:
    sets = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    print(f"{platform.machine()}, Python {platform.python_version()}, numpy {version('numpy')}, scipy {version('scipy')}")
    print(f"{sets:,} data sets a line; two standard errors of a 5 % rate are {200 * np.sqrt(0.05 * 0.95 / sets):.1f} points")
    draws(sets // 2)
    compare.DRAWS = FEW
    head = ["differences", "rows", "paired bootstrap", "interval misses 0", "plain percentile", "Student's t"]
    table("Arms that are alike, called different, %", head, bootstraps(NULLS, sets))
    table("Mean difference 0, but skewed: no test of a mean holds for few rows, %", head, bootstraps(SKEWED, sets))
    table("BLEU of arms that are alike, called different, %", ["", "rows", "bootstrap of a corpus metric"], corpora(sets // 2))
    table("McNemar, arms that are alike, called different, %", ["rows that change", "rows", ""], right_wrong(sets))
    families(sets)
    powers(sets)
    seeds(sets // 2)


def percent(hits: float, of: int) -> str:
    return f"{100 * hits / of:.1f}"


def judged(difference: Array, seed: int) -> compare.Comparison:
    nothing, ones = np.zeros_like(difference), np.ones(len(difference))
    return compare.bootstrap(difference, nothing, ones, higher_is_better=True, seed=seed)


def draws(sets: int) -> None:
    """The same data sets, judged with few and with many draws."""
    rows = []
    for number in (FEW, MANY):
        compare.DRAWS, draw = number, np.random.default_rng(1)
        hits = [judged(NULLS["lognormal"](draw, 60), seed).p_value < 0.05 for seed in range(sets)]
        rows.append([f"{number:,}", percent(sum(hits), sets)])
    table(f"Draws of the bootstrap: {sets:,} sets of 60 lognormal rows, called different, %", ["draws", ""], rows)


def bootstraps(makers: dict[str, Callable[[Draw, int], Array]], sets: int) -> Iterator[list[str]]:
    for name, make in makers.items():
        for rows in ROWS:
            draw, hits = np.random.default_rng(rows), np.zeros(4)
            for seed in range(sets):
                difference = make(draw, rows)
                found = judged(difference, seed)
                missed = found.ci95[0] > 0 or found.ci95[1] < 0
                hits += [found.p_value < 0.05, missed, plain(difference, draw), student(difference)]
            yield [name, str(rows), *(percent(one, sets) for one in hits)]


def plain(difference: Array, draw: Draw) -> bool:
    """Does the plain percentile interval of a bootstrap miss 0?"""
    means = difference[draw.integers(0, len(difference), (FEW, len(difference)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return bool(low > 0 or high < 0)


def student(difference: Array) -> bool:
    return bool(difference.any() and ttest_1samp(difference, 0).pvalue < 0.05)


def captions(draw: Draw, hard: Array) -> Array:
    """BLEU's ten sums for one arm's captions of 12 words, whose words are found with a row's own chance."""
    written = [np.full(len(hard), 12 - order) for order in range(4)]
    found = [draw.binomial(total, hard ** (order + 1)) for order, total in enumerate(written)]
    return np.stack([written[0], written[0], *found, *written], axis=1)


def corpora(sets: int) -> Iterator[list[str]]:
    for rows in ROWS:
        draw, hits = np.random.default_rng(rows), 0
        for seed in range(sets):
            hard = draw.uniform(0.4, 0.9, rows)
            first, second = captions(draw, hard), captions(draw, hard)
            hits += compare.bootstrap_corpus(first, second, bleu, higher_is_better=True, seed=seed).p_value < 0.05
        yield ["", str(rows), percent(hits, sets)]


def flips(draw: Draw, rows: int, gained: float, lost: float) -> tuple[Array, Array]:
    """Right/wrong of two arms with these chances that a row is gained or lost."""
    place = draw.random(rows)
    return np.where(place < gained, 1, np.where(place < gained + lost, 0, 1)), np.where(place < gained, 0, 1)


def right_wrong(sets: int) -> Iterator[list[str]]:
    for share in (0.02, 0.1, 0.4):
        for rows in ROWS:
            draw = np.random.default_rng(rows)
            hits = sum(compare.mcnemar(*flips(draw, rows, share / 2, share / 2)).p_value < 0.05 for _ in range(sets))
            yield [f"{share:.0%}", str(rows), percent(hits, sets)]


def families(sets: int) -> None:
    """Three comparisons that share an arm, as a run makes them."""
    rows = []
    for test, score in (("McNemar", lambda draw, n: draw.random(n) < 0.8), ("paired bootstrap", Draw.exponential)):
        for n in ROWS:
            draw, any_called, said = np.random.default_rng(n), 0, 0
            for seed in range(sets):
                arms = [np.asarray(score(draw, n) if test == "McNemar" else score(draw, size=n), float) for _ in range(4)]
                found = compare.holm({str(i): versus(arms[0], arms[i], test, seed) for i in (1, 2, 3)})
                any_called += any(one.p_adjusted < 0.05 for one in found.values())
                said += compare.verdict(found["1"], 0.0) in ("better", "worse")
            rows.append([test, str(n), percent(any_called, sets), percent(said, sets)])
    head = ["test", "rows", "any of three called different", "verdict better or worse"]
    table("Holm over three comparisons, four arms alike, %", head, rows)


def versus(first: Array, second: Array, test: str, seed: int) -> compare.Comparison:
    return compare.compare(first, second, np.ones(len(first)), higher_is_better=test == "McNemar", seed=seed)


def powers(sets: int) -> None:
    """Known effects: how often they are called better, and the chance that was computed."""
    rows = []
    for n, gained, lost in ((300, 0.06, 0.02), (800, 0.03, 0.012)):
        draw = np.random.default_rng(n)
        found = [compare.mcnemar(*flips(draw, n, gained, lost)) for _ in range(sets)]
        computed = f"{100 * power(n, gained, lost):.1f}"
        rows.append([f"McNemar, {gained:.1%} gained, {lost:.1%} lost", str(n), called(found), computed])
    for n, effect in ((20, 0.66), (60, 0.37), (300, 0.162)):
        draw = np.random.default_rng(n)
        found = [judged(draw.normal(effect, 1, n), seed) for seed in range(sets)]
        chance = nct.sf(t.isf(0.025, n - 1), n - 1, effect * np.sqrt(n))
        rows.append([f"bootstrap, {effect} deviations", str(n), called(found), f"{100 * chance:.1f}"])
    table("Power: a better arm called better, %", ["", "rows", "found", "computed"], rows)


def called(found: list[compare.Comparison]) -> str:
    return percent(sum(one.p_value < 0.05 and one.delta > 0 for one in found), len(found))


def seeds(sets: int) -> None:
    """The interval over seeds and rows, where a seed moves an arm's accuracy by so much and neither arm is better."""
    rows = []
    for number in (2, 3, 5, 10):
        hits = [sum(misses(number, moved, seed) for seed in range(sets)) for moved in MOVED]
        rows.append([str(number), *(percent(one, sets) for one in hits)])
    head = ["seeds", *(f"a seed moves {moved:.1%}" for moved in MOVED)]
    table("Interval over seeds and 300 rows misses 0, arms alike, % (no verdict hangs on it)", head, rows)


def misses(number: int, moved: float, seed: int) -> bool:
    draw = np.random.default_rng([number, seed])
    rates = draw.normal(0.8, moved, (2, number, 1)).clip(0, 1)
    first, second = (draw.random((2, number, 300)) < rates).astype(float)
    _, (low, high), _ = compare.over_seeds(list(first), list(second), np.ones(300), higher_is_better=True, seed=seed)
    return low > 0 or high < 0


if __name__ == "__main__":
    main()
