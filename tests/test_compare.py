"""The paired tests against scipy, statsmodels and numbers worked out by hand; the verdict; the gates."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm, t
from scipy.stats import bootstrap as scipy_bootstrap
from statsmodels.stats import contingency_tables
from statsmodels.stats.multitest import multipletests
from tango import deviations

from dsd_refine.evidence.compare import (
    Comparison,
    bootstrap,
    bootstrap_corpus,
    compare,
    credit,
    gate_passed,
    groups_of,
    holm,
    mcnemar,
    over_seeds,
    verdict,
)
from dsd_refine.evidence.paired import sign_flips


def rows(gained, lost, same, n_right=0):
    first = np.array([1.0] * gained + [0.0] * lost + [1.0] * n_right + [0.0] * (same - n_right))
    second = np.array([0.0] * gained + [1.0] * lost + [1.0] * n_right + [0.0] * (same - n_right))
    return first, second


@pytest.mark.parametrize(("gained", "lost"), [(9, 0), (8, 20), (15, 14), (1, 1), (40, 12)])
def test_mcnemar_is_the_exact_binomial_test(gained, lost):
    first, second = rows(gained, lost, 200, 150)
    found = mcnemar(first, second)
    changed, n = gained + lost, len(first)
    tail = binom.cdf(min(gained, lost), changed, 0.5)
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))
    assert (found.gained, found.lost, found.delta) == (gained, lost, pytest.approx((gained - lost) / n))


@pytest.mark.parametrize(("gained", "lost"), [(9, 0), (8, 20), (15, 14), (40, 12)])
def test_mcnemar_is_statsmodels(gained, lost):
    found = mcnemar(*rows(gained, lost, 200, 150))
    assert found.p_value == pytest.approx(contingency_tables.mcnemar([[150, gained], [lost, 50]], exact=True).pvalue)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 500))
@settings(deadline=None, max_examples=60)
def test_the_interval_of_right_and_wrong_ends_where_the_score_is_rejected(gained, lost, same):
    n = gained + lost + same
    if n == 0:
        return
    low, high = mcnemar(*rows(gained, lost, same)).ci95
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    for end, sign in ((low, 1), (high, -1)):
        if -1 < end < 1:
            assert sign * deviations(gained, lost, n, end) == pytest.approx(norm.isf(0.025), abs=1e-3)


def test_the_interval_is_the_published_one():
    """Fagerland, Lydersen and Laake 2014 (Statistics in Medicine 33:2850-2875): 1 and 7 of 21 pairs, Tango's interval."""
    assert mcnemar(*rows(1, 7, 13, 1)).ci95 == pytest.approx((-0.517, -0.026), abs=6e-4)


@pytest.mark.parametrize("n", [1, 20, 50, 700])
def test_no_changed_row_leaves_room_for_some(n):
    found = mcnemar(*rows(0, 0, n, n // 2))
    assert (found.delta, found.p_value, found.gained, found.lost) == (0.0, 1.0, 0, 0)
    room = norm.isf(0.025) ** 2 / (n + norm.isf(0.025) ** 2)
    assert found.ci95 == pytest.approx((-room, room))
    assert verdict(found, 0.005) == "inconclusive"


def test_no_changed_row_among_enough_is_the_same():
    assert verdict(mcnemar(*rows(0, 0, 800, 400)), 0.005) == "same"


# ---------------------------------------------------------------- equal rows


@given(st.lists(st.integers(-4, 4), max_size=11))
@settings(deadline=None)
def test_flipping_signs_counts_every_way(sums):
    ways = [sum(s * f for s, f in zip(sums, flips, strict=True)) for flips in itertools.product((1, -1), repeat=len(sums))]
    counted = sum(abs(way) >= abs(sum(sums)) for way in ways) / len(ways)
    assert sign_flips(np.array(sums, dtype=np.int64)) == pytest.approx(counted)


@pytest.mark.parametrize("times", [2, 3, 10])
@pytest.mark.parametrize(("gained", "lost", "same"), [(5, 0, 45), (9, 2, 89), (0, 0, 20), (20, 6, 4)])
def test_rows_given_several_times_show_no_more_than_once(times, gained, lost, same):
    once = rows(gained, lost, same)
    groups = groups_of([bytes([row]) for row in range(len(once[0]))] * times)
    found, single = mcnemar(*(np.tile(arm, times) for arm in once), groups), mcnemar(*once)
    assert (found.gained, found.lost) == (times * gained, times * lost)
    assert (found.delta, found.p_value) == (pytest.approx(single.delta), pytest.approx(single.p_value))
    assert found.ci95 == pytest.approx(single.ci95)


def test_five_rows_twice_are_no_ten():
    first, second = (np.repeat(arm, 2) for arm in rows(5, 0, 45))
    alone = mcnemar(first, second)
    known = mcnemar(first, second, groups_of([bytes([row // 2]) for row in range(100)]))
    assert (verdict(alone, 0.005), verdict(known, 0.005)) == ("better", "inconclusive")
    assert known.test != alone.test


def test_a_row_that_is_most_of_the_split_is_one_row():
    """One row 40 times, lost, and ten rows gained: no sign could make the ten outweigh it."""
    first, second = rows(10, 40, 50)
    found = mcnemar(first, second, np.concatenate([np.arange(10), np.full(40, 10), np.arange(11, 61)]))
    assert (found.delta, found.p_value) == (pytest.approx(-0.3), 1.0)
    assert found.ci95[1] > 0


def test_equal_rows_of_different_labels_pull_both_ways():
    found = mcnemar(*rows(6, 6, 88), np.concatenate([np.arange(6), np.arange(6), np.arange(6, 94)]))
    assert (found.gained, found.lost, found.delta, found.p_value, found.changed) == (6, 6, 0.0, 1.0, 0)


def test_groups_of_one_change_nothing():
    generator = np.random.default_rng(0)
    arms = generator.normal(size=(2, 80))
    right = arms > 0
    stats = generator.integers(1, 9, (2, 80, 2)).astype(float)
    apart, count = groups_of(generator.bytes(32) for _ in range(80)), np.ones(80)
    assert mcnemar(*right, apart) == mcnemar(*right)
    both = {"higher_is_better": True}
    assert bootstrap(*arms, count, **both, groups=apart) == bootstrap(*arms, count, **both)
    assert bootstrap_corpus(*stats, quotient, **both, groups=apart) == bootstrap_corpus(*stats, quotient, **both)
    seeds = ([arms[0]] * 2, [arms[1]] * 2, count)
    assert over_seeds(*seeds, **both, groups=apart) == over_seeds(*seeds, **both)


def quotient(sums):
    return sums[..., 0] / sums[..., 1]


def test_the_bootstrap_draws_equal_rows_together():
    generator = np.random.default_rng(1)
    arms, count = generator.normal((0.3, 0.0), 1, (40, 2)).T, generator.integers(1, 5, 40).astype(float)
    groups, both = np.tile(np.arange(40), 3), {"higher_is_better": True}
    thrice = [np.tile(arm, 3) for arm in (*arms, count)]
    once, known, alone = bootstrap(*arms, count, **both), bootstrap(*thrice, **both, groups=groups), bootstrap(*thrice, **both)
    assert (known.delta, known.ci95, known.p_value) == (
        pytest.approx(once.delta),
        pytest.approx(once.ci95),
        pytest.approx(once.p_value),
    )
    assert np.diff(alone.ci95) < 0.7 * np.diff(known.ci95)
    stats = [np.stack([arm, count], axis=1) for arm in arms]
    corpus = bootstrap_corpus(*(np.tile(one, (3, 1)) for one in stats), quotient, **both, groups=groups)
    assert corpus.ci95 == pytest.approx(bootstrap_corpus(*stats, quotient, **both).ci95)


# ---------------------------------------------------------------- the bootstrap


@pytest.mark.parametrize("changed", [0, 1, 3, 5])
def test_few_changed_rows_are_no_evidence_of_none(changed):
    """Errors of a hundred transcripts of ten words, of which hardly one changed: another could change wholly."""
    errors = np.repeat([1.0, 0.0], [changed, 100 - changed])
    found = bootstrap(errors, np.zeros(100), np.full(100, 10.0), higher_is_better=False)
    assert found.ci95[0] < -0.03
    assert found.ci95[1] > 0.03
    assert verdict(found, 0.01) == "inconclusive"
    stats = np.stack([errors, np.full(100, 10.0)], axis=1), np.stack([np.zeros(100), np.full(100, 10.0)], axis=1)
    assert verdict(bootstrap_corpus(*stats, quotient, higher_is_better=False), 0.01) == "inconclusive"


def test_no_changed_row_among_a_thousand_is_the_same_for_sums_too():
    same = np.zeros(1000), np.zeros(1000), np.full(1000, 10.0)
    assert verdict(bootstrap(*same, higher_is_better=False), 0.005) == "same"


def test_a_lower_loss_is_a_positive_delta_and_the_bootstrap_is_seeded():
    generator = np.random.default_rng(0)
    worse = generator.normal(10, 1, 200)
    count = generator.integers(1, 9, 200).astype(float)
    found = compare(worse - 1, worse, count, higher_is_better=False)
    assert found.test == "paired-bootstrap"
    assert found.delta == pytest.approx(200 / count.sum())
    assert found.ci95[0] > 0
    assert found.p_value < 0.001
    assert found == compare(worse - 1, worse, count, higher_is_better=False)


def test_the_bootstrap_is_scipy_s_of_many_rows():
    generator = np.random.default_rng(1)
    first, second = generator.normal(0.1, 1, 500), generator.exponential(size=500)
    found = bootstrap(first, second, np.ones(500), higher_is_better=True)
    told = scipy_bootstrap((first - second,), np.mean, method="percentile", n_resamples=9999, rng=2).confidence_interval
    assert found.delta == pytest.approx((first - second).mean())
    assert found.ci95 == pytest.approx((told.low, told.high), abs=0.03 * (told.high - told.low))


@pytest.mark.parametrize("changed", [6, 15, 200])
def test_of_few_rows_that_differ_the_interval_is_student_s(changed):
    """However many rows there are that do not."""
    difference = np.concatenate([np.random.default_rng(changed).normal(0.2, 1, changed), np.zeros(1000 - changed)])
    found = bootstrap(difference, np.zeros(1000), np.ones(1000), higher_is_better=True)
    spread = difference.std() * np.sqrt(changed / (changed - 1)) * t.isf(0.025, changed - 1)
    assert np.diff(found.ci95) == pytest.approx(2 * spread / np.sqrt(1000), rel=0.15)


def some(p, delta=0.01, ci=(-0.02, 0.04)):
    return Comparison(delta, ci, p, p, 1, 0, "mcnemar-exact")


def test_holm_steps_down():
    found = holm({"a": some(0.01), "b": some(0.04), "c": some(0.03)})
    assert {name: one.p_adjusted for name, one in found.items()} == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_holm_is_statsmodels():
    generator = np.random.default_rng(0)
    for size in (1, 2, 3, 3, 6):
        values = generator.choice([0.001, 0.01, 0.02, 0.05, 0.3, 1.0, *generator.random(3) / 10], size)
        found = holm({str(number): some(p) for number, p in enumerate(values)})
        assert [one.p_adjusted for one in found.values()] == pytest.approx(multipletests(values, method="holm")[1])


def test_every_control_must_be_beaten():
    found = {"refined_vs_baseline": some(0.01), "refined_vs_dense": some(0.01), "refined_vs_random": some(0.2)}
    assert not gate_passed("beats-control", found, 0.005, ["dense", "random"])
    found["refined_vs_random"] = some(0.01)
    assert gate_passed("beats-control", found, 0.005, ["dense", "random"])


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (some(0.01), "better"),
        (some(0.01, -0.01), "worse"),
        (some(0.5, 0.0, (-0.004, 0.004)), "same"),
        (some(0.5, 0.0, (-0.006, 0.004)), "inconclusive"),
        (Comparison(0.01, (-0.02, 0.04), 0.03, 0.06, 1, 0, "mcnemar-exact"), "inconclusive"),
    ],
)
def test_the_verdict(found, said):
    assert verdict(found, 0.005) == said


@pytest.mark.parametrize(
    ("rule", "baseline", "dense", "met"),
    [
        ("none", some(0.01, -0.1), some(1), True),
        ("not-worse", some(0.9, 0.0), some(1), True),
        ("not-worse", some(0.9, -0.001), some(1), False),
        ("non-inferior", some(0.9, 0.0, (-0.004, 0.03)), some(1), True),
        ("non-inferior", some(0.9, 0.02, (-0.005, 0.04)), some(1), False),
        ("non-inferior", some(0.9, 0.02, (-0.2, 0.3)), some(1), False),
        ("non-inferior", some(0.001, -0.003, (-0.0045, -0.001)), some(1), True),
        ("better", some(0.2), some(1), False),
        ("better", some(0.01), some(1), True),
        ("beats-control", some(0.01), some(0.2), False),
        ("beats-control", some(0.01), some(0.01, -0.1), False),
        ("beats-control", some(0.01), some(0.01), True),
    ],
)
def test_the_gates(rule, baseline, dense, met):
    assert gate_passed(rule, {"refined_vs_baseline": baseline, "refined_vs_dense": dense}, 0.005, ["dense"]) is met


@pytest.mark.parametrize(
    ("said", "controls", "whose"),
    [
        ("better", {"dense": some(0.01)}, "mask"),
        ("better", {"dense": some(0.2)}, "training"),
        ("better", {"dense": some(0.01, -0.1)}, "training"),
        ("better", {"dense": some(0.01), "random": some(0.2)}, "training"),
        ("better", {"dense": some(0.01), "random": some(0.03)}, "mask"),
        ("better", {}, "unknown"),
        ("same", {"dense": some(0.01)}, "none"),
        ("inconclusive", {}, "none"),
        ("worse", {"dense": some(0.01)}, "none"),
    ],
)
def test_whose_doing_it_is(said, controls, whose):
    assert credit(said, {f"refined_vs_{name}": found for name, found in controls.items()}, list(controls)) == whose


def test_a_block_of_equal_rows_that_did_not_change_costs_a_row_each_and_no_more():
    """1,000 rows, 300 of them equal and right in both arms, 30 gained and 5 lost: better by p, and by the interval too."""
    first, second = np.ones(1000), np.ones(1000)
    second[300:330], first[330:335] = 0, 0
    groups = np.concatenate([np.zeros(300, dtype=np.int64), np.arange(1, 701)])
    alone, grouped = mcnemar(first, second), mcnemar(first, second, groups)
    assert grouped.p_value == pytest.approx(alone.p_value)
    assert grouped.ci95[0] > 0
    assert alone.ci95[0] > grouped.ci95[0]
