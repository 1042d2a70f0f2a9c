"""How often the tests err: `python benchmarks/errors.py [SETS] > benchmarks/results/errors.txt`.

What is said of right/wrong rows is computed exactly, over all outcomes. Of sums, SETS (600) made data sets for each line:
in those of arms that are alike 5 % may be called different, and 95 % of the intervals should hold the true difference. The
bootstrap makes 1,000 draws here, which a table shows to be as good as the 10,000 of a run. Lines of draws, BLEU and seeds
take half as many sets. About five minutes on one core.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
from common import table
from scipy.stats import binomtest, multinomial, nct, t, ttest_1samp

from dsd_refine.evidence import compare
from dsd_refine.evidence.paired import score_interval
from dsd_refine.evidence.power import power, rows_to_decide
from dsd_refine.tasks.text_metrics import bleu

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
# the same with a mean that is not 0: how they are drawn, and the mean
EFFECTS: dict[str, tuple[Callable[[Draw, int], Array], float]] = {
    "normal, 0.4 deviations": (lambda draw, n: draw.normal(0.4, 1, n), 0.4),
    "exponential, one half more": (lambda draw, n: 1.5 * draw.exponential(size=n) - draw.exponential(size=n), 0.5),
    "1 row of 5 differs, by 1, two of three better": (lambda draw, n: sparse(draw, n, 0.2), 0.2 / 3),
    "1 row of 20 differs, by 1, two of three better": (lambda draw, n: sparse(draw, n, 0.05), 0.05 / 3),
}
# right/wrong: rows, and the shares of them that are gained and lost
CASES = [
    (50, 0.1, 0.02), (50, 0.2, 0.05), (50, 0.06, 0.02), (100, 0.1, 0.02), (100, 0.06, 0.02), (100, 0.06, 0.0),
    (100, 0.05, 0.04), (200, 0.06, 0.02), (200, 0.02, 0.01), (300, 0.03, 0.012), (360, 0.05, 0.0), (360, 0.025, 0.011),
    (1000, 0.01, 0.004), (1000, 0.005, 0.002), (3000, 0.005, 0.002),
]  # fmt: skip


def sparse(draw: Draw, rows: int, share: float) -> Array:
    """Differences of which this share is not 0: 1 twice as often as -1."""
    return np.asarray((draw.random(rows) < share) * draw.choice([1.0, 1.0, -1.0], rows))


def main() -> None:
    sets = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    print(f"{platform.machine()}, Python {platform.python_version()}, numpy {version('numpy')}, scipy {version('scipy')}")
    print(f"{sets:,} data sets a line; two standard errors of a 5 % rate are {200 * np.sqrt(0.05 * 0.95 / sets):.1f} points")
    right_wrong_exactly()
    draws(sets // 2)
    compare.DRAWS = FEW
    head = ["differences", "rows", "covered", "plain percentile", "Student's t"]
    table("Sums: 95 % intervals that hold a true difference that is not 0, %", head, coverages(sets))
    table("Sums: a true difference of the margin itself called the same, %", ["rows that change", "rows", ""], sames(sets))
    head = ["differences", "rows", "paired bootstrap", "plain percentile", "Student's t"]
    table("Arms that are alike, called different, %", head, bootstraps(NULLS, sets))
    table("Mean difference 0, but skewed: no test of a mean holds for few rows, %", head, bootstraps(SKEWED, sets))
    table("BLEU of arms that are alike, called different, %", ["", "rows", "bootstrap of a corpus metric"], corpora(sets // 2))
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
            draw, hits = np.random.default_rng(rows), np.zeros(3)
            for seed in range(sets):
                difference = make(draw, rows)
                found = judged(difference, seed)
                low, high = plain(difference, draw)
                hits += [found.p_value < 0.05, low > 0 or high < 0, student(difference)]
            yield [name, str(rows), *(percent(one, sets) for one in hits)]


def coverages(sets: int) -> Iterator[list[str]]:
    for name, (make, true) in EFFECTS.items():
        for rows in ROWS:
            draw, hits = np.random.default_rng(rows), np.zeros(3)
            for seed in range(sets):
                difference = make(draw, rows)
                found = judged(difference, seed)
                ends = (found.ci95, plain(difference, draw), ttest_1samp(difference, 0).confidence_interval())
                hits += [low <= true <= high for low, high in ends]
            yield [name, str(rows), *(percent(one, sets) for one in hits)]


def sames(sets: int) -> Iterator[list[str]]:
    """Rows of which so many change, by 1 or -1; the mean, four tenths of that share, is the margin."""
    for share in (0.01, 0.05, 0.3):
        for rows in ROWS:
            draw, hits = np.random.default_rng(rows), 0
            for seed in range(sets):
                drawn = draw.random(rows)
                found = judged(np.where(drawn < 0.7 * share, 1.0, np.where(drawn < share, -1.0, 0.0)), seed)
                hits += compare.verdict(found, 0.4 * share) == "same"
            yield [f"{share:.0%}", str(rows), percent(hits, sets)]


def plain(difference: Array, draw: Draw) -> tuple[float, float]:
    """The plain percentile interval of a bootstrap."""
    means = difference[draw.integers(0, len(difference), (FEW, len(difference)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


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


def outcomes(rows: int, gained: float, lost: float) -> tuple[Array, list[tuple[int, int]]]:
    """Chances of all (gained, lost) rows but those that come less than once in ten million."""
    most = [min(rows, int(rows * share + 6 * np.sqrt(rows * share) + 8)) if share else 0 for share in (gained, lost)]
    counts = [(g, f) for g in range(most[0] + 1) for f in range(min(rows - g, most[1]) + 1)]
    chances = multinomial.pmf([(g, f, rows - g - f) for g, f in counts], rows, (gained, lost, 1 - gained - lost))
    kept = chances > 1e-7
    return chances[kept], [count for count, keep in zip(counts, kept, strict=True) if keep]


def comparison(rows: int, gained: int, lost: int) -> compare.Comparison:
    """What a run says of so many rows that changed each way."""
    first = np.concatenate([np.ones(gained), np.zeros(lost), np.ones(rows - gained - lost)])
    second = np.concatenate([np.zeros(gained), np.ones(rows - gained)])
    return compare.mcnemar(first, second)


def clopper_pearson(rows: int, gained: int, lost: int) -> tuple[float, float]:
    """The interval of old: of the share of gained rows among those that changed, as if their number were known."""
    changed = gained + lost
    if not changed:
        return 0.0, 0.0
    low, high = binomtest(gained, changed).proportion_ci(0.95, method="exact")
    return (2 * low - 1) * changed / rows, (2 * high - 1) * changed / rows


def right_wrong_exactly() -> None:
    head = ["gained", "lost", "rows", "covered", "conditional interval, for comparison"]
    table("Right/wrong: 95 % intervals that hold the true difference, % (exact)", head, held())
    head = ["changed", "rows", "most often", "least often", "least often, 8 or more rows change on average"]
    table("Right/wrong: the same over a grid of effects, gained up to 14 rows more than lost, % (exact)", head, grid())
    head = ["lost", "rows", "called the same"]
    table("Right/wrong: a true difference of the margin itself (0.5 %) called the same, % (exact)", head, margins())
    head = ["rows that change", "rows", "called different"]
    table("Right/wrong: arms that are alike, called different, % (exact)", head, alike())
    head = ["rows", "gained", "lost", "rows to decide", "power there", "at nine tenths", "at the rows used"]
    table("Right/wrong: rows that would decide, and the exact power, %", head, deciding())


def held() -> Iterator[list[str]]:
    for rows, gained, lost in CASES:
        chances, counts = outcomes(rows, gained, lost)
        shown = []
        for interval in (lambda *found: comparison(*found).ci95, clopper_pearson):
            ends = [interval(rows, *count) for count in counts]
            shown.append(sum(c for c, (low, high) in zip(chances, ends, strict=True) if low <= gained - lost <= high))
        yield [f"{gained:.1%}", f"{lost:.1%}", f"{rows:,}", *(percent(one, 1) for one in shown)]


def grid() -> Iterator[list[str]]:
    for rows in (50, 100, 300, 1000):
        ends: dict[tuple[int, int], tuple[float, float]] = {}
        found = []
        for lost in (0.0, 0.5, 1.0, 3.0, 6.0):
            for more in np.linspace(0.25, 14, 56):
                chances, counts = outcomes(rows, (lost + more) / rows, lost / rows)
                for count in counts:
                    ends[count] = ends.get(count) or score_interval(*count, rows)
                inside = [ends[count][0] <= more / rows <= ends[count][1] for count in counts]
                found.append((2 * lost + more, float(chances @ inside)))
        many = [covered for changed, covered in found if changed >= 8]
        every = [covered for _, covered in found]
        yield ["0.25 to 26", f"{rows:,}", *(percent(one, 1) for one in (max(every), min(every), min(many)))]


def margins() -> Iterator[list[str]]:
    for lost in (0.0, 0.001, 0.005):
        for rows in (20, 50, 200, 765, 1100, 3000):
            chances, counts = outcomes(rows, 0.005 + lost, lost)
            same = [compare.verdict(comparison(rows, *count), 0.005) == "same" for count in counts]
            yield [f"{lost:.1%}", f"{rows:,}", percent(float(chances @ same), 1)]


def alike() -> Iterator[list[str]]:
    for share in (0.02, 0.1, 0.4):
        for rows in ROWS:
            chances, counts = outcomes(rows, share / 2, share / 2)
            called = [comparison(rows, *count).p_value < 0.05 for count in counts]
            yield [f"{share:.0%}", str(rows), percent(float(chances @ called), 1)]


def deciding() -> Iterator[list[str]]:
    for rows, gained, lost in ((12, 4, 0), (20, 1, 0), (100, 3, 1), (100, 9, 4), (300, 1, 0), (400, 60, 40), (1000, 22, 12)):
        needed = rows_to_decide(comparison(rows, gained, lost), rows, 0.0)
        assert needed
        chances = [power(count, gained / rows, lost / rows) for count in (needed, int(0.9 * needed), rows)]
        yield [f"{rows:,}", str(gained), str(lost), f"{needed:,}", *(percent(one, 1) for one in chances)]


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
