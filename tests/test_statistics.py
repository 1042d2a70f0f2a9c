"""On data made with a known effect: the tests err as often as they say and find as often as was computed.

The long form is benchmarks/errors.py, recorded in benchmarks/results/. It shows too that 1,000 draws of the bootstrap, which these
tests make, call as many differences as the 10,000 of a run.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest, multinomial, nct, t

from dsd_refine.evidence import compare
from dsd_refine.evidence.compare import bootstrap, bootstrap_corpus, holm, mcnemar, over_seeds, verdict
from dsd_refine.evidence.power import chance_of_same, critical, power, rows_to_decide
from dsd_refine.tasks.text_metrics import bleu

SETS = 1000
MOST = 0.05 + 3 * math.sqrt(0.05 * 0.95 / SETS)  # what a rate of 5 % stays below


@pytest.fixture
def fewer_draws(monkeypatch):
    monkeypatch.setattr(compare, "DRAWS", 1000)


def right_wrong(generator, rows, gained, lost):
    """Paired 0/1 scores of two arms with given shares of rows that change each way."""
    drawn = generator.random(rows)
    first = np.where(drawn < gained, 1, np.where(drawn < gained + lost, 0, 1))
    return first, np.where(drawn < gained, 0, 1)


def lognormal(generator, rows):
    return generator.lognormal(size=rows)


def judged(difference, seed):
    return bootstrap(difference, np.zeros(len(difference)), np.ones(len(difference)), higher_is_better=True, seed=seed)


def excludes_zero(found):
    return found.ci95[0] > 0 or found.ci95[1] < 0


# ---------------------------------------------------------------- arms that are alike


@pytest.mark.parametrize(("rows", "share"), [(20, 0.2), (60, 0.1), (300, 0.02), (300, 0.2)])
def test_mcnemar_calls_no_effect_one_at_most_once_in_twenty(rows, share):
    generator = np.random.default_rng(1)
    calls = sum(mcnemar(*right_wrong(generator, rows, share, share)).p_value < 0.05 for _ in range(SETS))
    assert calls / SETS <= MOST


ALIKE = {
    "normal": lambda generator, rows: generator.normal(size=rows) - generator.normal(size=rows),
    "exponential": lambda generator, rows: generator.exponential(size=rows) - generator.exponential(size=rows),
    "lognormal": lambda generator, rows: lognormal(generator, rows) - lognormal(generator, rows),
    "few differ": lambda generator, rows: (
        (generator.random(rows) < 0.2) * (lognormal(generator, rows) - lognormal(generator, rows))
    ),
}


@pytest.mark.parametrize(("kind", "rows"), [*((kind, rows) for kind in ALIKE for rows in (20, 60)), ("few differ", 300)])
def test_the_bootstrap_calls_no_effect_one_at_most_once_in_twenty(fewer_draws, kind, rows):
    generator = np.random.default_rng(7)
    found = [judged(ALIKE[kind](generator, rows), seed) for seed in range(SETS)]
    assert sum(one.p_value < 0.05 for one in found) / SETS <= MOST
    assert all((one.p_value < 0.05) == excludes_zero(one) for one in found)


def test_p_and_interval_agree_at_the_border_and_for_few_rows(fewer_draws):
    """The p of each is near 0.05, where rounding would show, or its rows are few and all of one sign."""
    generator = np.random.default_rng(3)
    found = []
    for seed in range(400):
        difference = generator.normal(size=30)
        difference += -difference.mean() + difference.std(ddof=1) / math.sqrt(30) * t.isf(0.025, 29) * generator.normal(1, 0.02)
        found.append(judged(difference, seed))
    for rows in range(1, 12):
        found.append(judged(np.repeat([1.0, 0.0], [rows, 100]), rows))
    assert {one.p_value < 0.05 for one in found[:400]} == {True, False}
    assert {one.p_value < 0.05 for one in found[400:]} == {True, False}
    assert all((one.p_value < 0.05) == excludes_zero(one) for one in found)


def captions(generator, hard):
    """BLEU's sums of captions of 12 words, each word found with a row's own chance."""
    written = [np.full(len(hard), 12 - order) for order in range(4)]
    found = [generator.binomial(total, hard ** (order + 1)) for order, total in enumerate(written)]
    return np.stack([written[0], written[0], *found, *written], axis=1)


@pytest.mark.parametrize("rows", [20, 60])
def test_the_bootstrap_of_bleu_calls_no_effect_one_at_most_once_in_twenty(fewer_draws, rows):
    generator, found = np.random.default_rng(5), []
    for seed in range(SETS):
        hard = generator.uniform(0.4, 0.9, rows)
        found.append(
            bootstrap_corpus(captions(generator, hard), captions(generator, hard), bleu, higher_is_better=True, seed=seed)
        )
    assert sum(one.p_value < 0.05 for one in found) / SETS <= MOST
    assert all((one.p_value < 0.05) == excludes_zero(one) for one in found)


@pytest.mark.parametrize(("score", "right"), [(lognormal, False), (lambda generator, rows: generator.random(rows) < 0.7, True)])
def test_of_a_run_s_three_comparisons_any_errs_at_most_once_in_twenty(fewer_draws, score, right):
    """Four arms alike, each with the refined one: Holm, and the verdict with it."""
    generator, any_called, said = np.random.default_rng(11), 0, 0
    for seed in range(SETS):
        refined, *others = (score(generator, 40).astype(float) for _ in range(4))
        pairs = {
            str(i): compare.compare(refined, o, np.ones(40), higher_is_better=right, seed=seed) for i, o in enumerate(others)
        }
        found = holm(pairs)
        any_called += any(one.p_adjusted < 0.05 for one in found.values())
        said += verdict(found["0"], 0.0) in ("better", "worse")
    assert said <= any_called
    assert any_called / SETS <= MOST


@pytest.mark.parametrize("rows", [12, 20])
def test_the_interval_of_few_rows_is_widened_to_student_s(rows):
    """A plain percentile interval is sqrt((m - 1) / m) of it in the mean, with the normal's 1.96 narrower still."""
    generator, share = np.random.default_rng(4), []
    for seed in range(40):
        difference = generator.normal(3, 1, rows)
        found = judged(difference, seed)
        student = t.isf(0.025, rows - 1) * difference.std(ddof=1) / math.sqrt(rows)
        share.append((found.ci95[1] - found.ci95[0]) / (2 * student))
    assert np.mean(share) == pytest.approx(1, abs=0.025)


# ---------------------------------------------------------------- a known effect


def test_a_known_effect_is_found_as_often_as_computed():
    generator = np.random.default_rng(0)
    found = [mcnemar(*right_wrong(generator, 800, 0.03, 0.012)) for _ in range(SETS)]
    hits = sum(one.p_value < 0.05 and one.delta > 0 for one in found)
    chance = power(800, 0.03, 0.012)
    assert abs(hits / SETS - chance) < 4 * math.sqrt(chance * (1 - chance) / SETS)


def outcomes(rows, gained, lost):
    """(chance, gained rows, lost rows) of all outcomes but those that together come less than once in a million."""
    most = [int(rows * share + 6 * math.sqrt(rows * share) + 8) for share in (gained, lost)]
    counts = [(g, f) for g in range(min(rows, most[0]) + 1) for f in range(min(rows - g, most[1] if lost else 0) + 1)]
    chances = multinomial.pmf([(g, f, rows - g - f) for g, f in counts], rows, (gained, lost, 1 - gained - lost))
    found = [(chance, *count) for chance, count in zip(chances, counts, strict=True) if chance > 1e-9]
    assert sum(chance for chance, _, _ in found) > 1 - 1e-6
    return found


def counted(rows, gained, lost):
    """The comparison of so many rows that changed each way."""
    ones, none = np.ones(gained + lost), np.zeros(rows - gained - lost)
    first = np.concatenate([ones, none])
    first[:lost] = 0
    second = np.concatenate([ones - first[: gained + lost], none])
    return mcnemar(first, second)


@pytest.mark.parametrize(
    ("rows", "gained", "lost"),
    [
        (50, 0.1, 0.02), (50, 0.2, 0.05), (50, 0.06, 0.02), (100, 0.1, 0.05), (100, 0.06, 0.0), (200, 0.02, 0.01),
        (200, 0.06, 0.02), (300, 0.03, 0.012), (300, 0.001, 0.03), (1000, 0.01, 0.004), (1000, 0.005, 0.002),
    ],
)  # fmt: skip
def test_the_interval_holds_a_true_difference_nineteen_times_of_twenty(rows, gained, lost):
    """Exactly, over all outcomes, with the real interval."""
    true, covered = gained - lost, 0.0
    for chance, won, gone in outcomes(rows, gained, lost):
        low, high = counted(rows, won, gone).ci95
        covered += chance * (low <= true <= high)
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize("rows", [20, 50, 200, 765, 766, 1100, 2000])
@pytest.mark.parametrize("lost", [0.0, 0.0005, 0.004])
def test_a_difference_outside_the_margin_is_seldom_called_the_same(rows, lost):
    """Exactly, at the true difference that is the hardest to tell: the margin itself."""
    wrong = sum(c for c, won, gone in outcomes(rows, 0.005 + lost, lost) if verdict(counted(rows, won, gone), 0.005) == "same")
    assert wrong <= 0.05
    assert wrong == pytest.approx(chance_of_same(rows, 0.005 + lost, lost, 0.005), abs=1e-5)


@pytest.mark.parametrize(("rows", "share"), [(20, 0.05), (20, 0.3), (60, 0.01), (60, 0.3), (200, 0.02)])
def test_sums_outside_the_margin_are_seldom_called_the_same(fewer_draws, rows, share):
    """Rows of which so many change, by 1 or by -1, with a mean that is the margin."""
    generator, wrong = np.random.default_rng(rows), 0
    for seed in range(200):
        drawn = generator.random(rows)
        difference = np.where(drawn < 0.7 * share, 1.0, np.where(drawn < share, -1.0, 0.0))
        wrong += verdict(judged(difference, seed), 0.4 * share) == "same"
    assert wrong / 200 <= 0.05


@pytest.mark.parametrize(("rows", "effect"), [(20, 0.66), (60, 0.37)])
def test_the_bootstrap_finds_and_covers_a_known_effect_as_often_as_student_s_t(fewer_draws, rows, effect):
    """Of normal differences, for which t is exact."""
    generator = np.random.default_rng(1)
    found = [judged(generator.normal(effect, 1, rows), seed) for seed in range(SETS)]
    chance = nct.sf(t.isf(0.025, rows - 1), rows - 1, effect * math.sqrt(rows))
    hits = sum(one.p_value < 0.05 and one.delta > 0 for one in found)
    assert abs(hits / SETS - chance) < 4 * math.sqrt(chance * (1 - chance) / SETS)
    covered = sum(one.ci95[0] <= effect <= one.ci95[1] for one in found)
    assert abs(covered / SETS - 0.95) < 4 * math.sqrt(0.05 * 0.95 / SETS)


def test_the_rows_that_decide_a_bootstrap_do_so_four_times_of_five(fewer_draws):
    found = judged(np.tile([1.4, -0.6], 5), 0)  # ten rows, mean 0.4, deviation 1
    assert found.error == pytest.approx(1 / math.sqrt(10), rel=0.1)
    rows = rows_to_decide(replace(found, delta=0.4, error=1 / math.sqrt(10)), 10, 0.0)
    generator = np.random.default_rng(2)
    hits = sum(judged(generator.normal(0.4, 1, rows), seed).p_value < 0.05 for seed in range(SETS))
    assert hits / SETS == pytest.approx(0.8, abs=0.05)


def test_the_critical_value_is_the_exact_test_s():
    for changed in range(0, 60):
        at = critical(changed)
        assert at < 0 or binomtest(at, changed, 0.5).pvalue < 0.05
        assert not changed or binomtest(at + 1, changed, 0.5).pvalue >= 0.05


TABLES = [(12, 4, 0), (12, 5, 0), (20, 1, 0), (20, 0, 1), (100, 3, 1), (100, 9, 4), (300, 1, 0), (400, 60, 40), (1000, 12, 22)]


@pytest.mark.parametrize(("rows", "gained", "lost"), TABLES)
def test_that_many_rows_decide_four_times_of_five(rows, gained, lost):
    """By the exact power, of the test as it is; nine tenths of them are too few."""
    found = counted(rows, gained, lost)
    shares = max(gained, lost) / rows, min(gained, lost) / rows
    assert verdict(found, 0.0) == "inconclusive"
    needed = rows_to_decide(found, rows, 0.0)
    assert needed > rows
    assert 0.795 <= power(needed, *shares) <= 0.84
    assert power(int(0.9 * needed), *shares) < 0.8
    assert rows_to_decide(found, rows, 0.0, comparisons=3) > needed


def test_the_rows_are_those_of_the_real_test():
    """4 rows of 12, all one way: by simulation, with the comparison that a run makes."""
    needed = rows_to_decide(counted(12, 4, 0), 12, 0.005)
    generator, calls = np.random.default_rng(4), {}
    for rows in (needed, 12):
        calls[rows] = sum(verdict(mcnemar(*right_wrong(generator, rows, 4 / 12, 0)), 0.005) == "better" for _ in range(400))
    assert calls[needed] / 400 == pytest.approx(power(needed, 1 / 3, 0), abs=0.08)
    assert calls[12] / 400 < 0.4


@pytest.mark.parametrize(("rows", "gained", "lost"), [(1000, 4, 3), (1000, 2, 1), (1000, 0, 1), (100, 5, 5), (2000, 20, 20)])
def test_that_many_rows_show_that_it_is_the_same_four_times_of_five(rows, gained, lost):
    needed, margin = rows_to_decide(counted(rows, gained, lost), rows, 0.005), 0.005
    assert needed > rows
    assert 0.795 <= chance_of_same(needed, gained / rows, lost / rows, margin) <= 0.86
    assert chance_of_same(int(0.9 * needed), gained / rows, lost / rows, margin) < 0.8


def test_where_nothing_is_known_no_number_is_said():
    assert rows_to_decide(counted(50, 0, 0), 50, 0.005) is None
    assert rows_to_decide(counted(50, 5, 5), 50, 0.0) is None  # no number of rows shows a difference of 0
    assert rows_to_decide(judged(np.zeros(50), 0), 50, 0.005) is None


def test_equal_rows_do_not_make_the_number_smaller():
    first, second = np.repeat([1.0, 0.0, 1.0], [8, 3, 89]), np.repeat([0.0, 1.0], [8, 92])
    once, twice = mcnemar(first, second), mcnemar(np.repeat(first, 2), np.repeat(second, 2), np.repeat(np.arange(100), 2))
    assert (once.gained, once.lost) == (8, 3)
    assert rows_to_decide(twice, 200, 0.005) == pytest.approx(2 * rows_to_decide(once, 100, 0.005), rel=0.01)


@pytest.mark.parametrize(("rows", "changed"), [(40, [1, 2, -1, 1, 2, -1, 1, 2]), (20, [1, 2, -1.5, 1, 2, -1.5])])
def test_the_rows_that_decide_sums_do_so_four_times_of_five(fewer_draws, rows, changed):
    """Drawn from the rows that were found."""
    sizes = np.concatenate([changed, np.zeros(rows - len(changed))])
    needed, generator = rows_to_decide(judged(sizes, 0), rows, 0.005), np.random.default_rng(1)
    assert needed > rows
    hits = sum(judged(generator.choice(sizes, needed), seed).p_value < 0.05 for seed in range(100)) / 100
    assert hits == pytest.approx(0.8, abs=0.1)


def test_seeds_and_rows_both_widen_the_interval():
    generator = np.random.default_rng(3)
    count, base = np.ones(200), generator.random(200) < 0.8
    steady = [base.astype(float)] * 4
    delta, interval, deviation = over_seeds(steady, [np.zeros(200)] * 4, count, higher_is_better=True)
    assert (delta, deviation) == (pytest.approx(base.mean()), 0.0)
    assert interval[0] < delta < interval[1]
    wild = [np.full(200, value) for value in (0.0, 0.2, 0.4, 0.6)]
    delta, interval, deviation = over_seeds(wild, [np.zeros(200)] * 4, count, higher_is_better=True)
    assert delta == pytest.approx(0.3)
    assert deviation == pytest.approx(np.std([0, 0.2, 0.4, 0.6], ddof=1))
    assert interval[1] - interval[0] > 0.3
    assert over_seeds(wild, [np.zeros(200)] * 4, count, higher_is_better=False)[0] == pytest.approx(-0.3)


@pytest.mark.parametrize("sizes", [[1] * 60 + [2] * 20 + [4] * 10, [3] * 50])
def test_equal_rows_neither_call_differences_nor_narrow_intervals(sizes):
    """Rows in groups of these sizes, which change together."""
    generator, groups, calls, covered = np.random.default_rng(9), np.repeat(np.arange(len(sizes)), sizes), 0, 0
    for _ in range(400):
        drawn = generator.random(len(sizes))[groups]
        alike = mcnemar(drawn < 0.1, (drawn >= 0.1) & (drawn < 0.2), groups)
        low, high = mcnemar(drawn < 0.1, (drawn >= 0.1) & (drawn < 0.14), groups).ci95
        calls, covered = calls + (alike.p_value < 0.05), covered + (low <= 0.06 <= high)
    assert calls / 400 <= 0.05
    assert covered / 400 >= 0.93
