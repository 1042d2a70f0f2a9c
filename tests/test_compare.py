"""The paired tests against scipy, statsmodels and numbers worked out by hand; the verdict; the gates."""

import numpy as np
import pytest
from scipy.stats import beta, binom, t
from scipy.stats import bootstrap as scipy_bootstrap
from statsmodels.stats import contingency_tables
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from dsd_refine.compare import Comparison, bootstrap, compare, gate_passed, holm, mcnemar, verdict


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
    low = 0.0 if gained == 0 else beta.ppf(0.025, gained, lost + 1)
    high = 1.0 if lost == 0 else beta.ppf(0.975, gained + 1, lost)
    assert found.ci95 == pytest.approx(((2 * low - 1) * changed / n, (2 * high - 1) * changed / n))
    assert (found.gained, found.lost, found.delta) == (gained, lost, pytest.approx((gained - lost) / n))


@pytest.mark.parametrize(("gained", "lost"), [(9, 0), (8, 20), (15, 14), (40, 12)])
def test_mcnemar_is_statsmodels(gained, lost):
    found = mcnemar(*rows(gained, lost, 200, 150))
    assert found.p_value == pytest.approx(contingency_tables.mcnemar([[150, gained], [lost, 50]], exact=True).pvalue)
    low, high = proportion_confint(gained, gained + lost, method="beta")
    n = 200 + gained + lost
    assert found.ci95 == pytest.approx(tuple((2 * share - 1) * (gained + lost) / n for share in (low, high)))


def test_arms_that_agree_everywhere_are_the_same():
    found = mcnemar(*rows(0, 0, 50, 30))
    assert (found.delta, found.p_value, found.ci95) == (0.0, 1.0, (0.0, 0.0))


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
        ("better", some(0.2), some(1), False),
        ("better", some(0.01), some(1), True),
        ("beats-control", some(0.01), some(0.2), False),
        ("beats-control", some(0.01), some(0.01, -0.1), False),
        ("beats-control", some(0.01), some(0.01), True),
    ],
)
def test_the_gates(rule, baseline, dense, met):
    assert gate_passed(rule, {"refined_vs_baseline": baseline, "refined_vs_dense": dense}, 0.005, ["dense"]) is met
