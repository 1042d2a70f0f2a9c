"""`--patience`: a hopeless try is stopped early, said, and counted as lost."""

import numpy as np
import pytest
from conftest import ROOT
from outputs import report_of, same
from runs import stop_after, whole

from dsd_refine.evidence.damage import below_noise
from dsd_refine.tasks.base import Scores

DEMO = ROOT / "recipes/demo/checkpoint"
# Few steps at a rate that ruins the demo's network without making a loss infinite.
BAD = ("--lr", "2", "--dense-lr", "1", "--sparse-epochs", "1", "--dense-epochs", "4", "--batch-size", "64")
MILD = ("--lr", "0.001", "--sparsity", "0.05", "--sparse-epochs", "1", "--dense-epochs", "1", "--batch-size", "64")


@pytest.fixture
def run(tmp_path, digits):
    def go(*options, name="out"):
        return whole([*arguments(tmp_path / name, digits), *options])

    return go


def arguments(out, digits):
    return [DEMO, *digits, "--device", "cpu", "--gate", "none", "--quiet", "-o", out]


def steps(report, arm):
    return [phase["optimizer_steps"] for phase in report["phases"] if phase["arm"] == arm]


def test_a_hopeless_try_ends_after_its_first_phase(run):
    full, report = (report_of(run(*BAD, *more, name=name)) for name, more in (("full", ()), ("out", ("--patience", "1"))))
    assert full["lost"] == []
    assert [(lost["arm"], lost["try"], lost["phase"]) for lost in report["lost"]] == [
        ("refined", 1, "1-sparse"), ("dense", 1, "1-dense"),
    ]  # fmt: skip
    for lost in report["lost"]:
        assert lost["step"] == steps(full, lost["arm"])[0]
        assert "below the source on the holdout" in lost["reason"]
        assert np.isfinite(lost["loss"])
    assert steps(report, "refined") == steps(full, "refined")[:1]
    assert sum("was lost in 1-" in warning for warning in report["warnings"]) == 2


def test_patience_counts_evaluations_in_a_row(run):
    """The end of the first phase counts as one, then each epoch of the last phase."""
    report = report_of(run(*BAD, "--patience", "3"))
    per_epoch = steps(report, "refined")[0]
    assert steps(report, "refined") == [per_epoch, 2 * per_epoch]
    assert [lost["phase"] for lost in report["lost"]] == ["2-dense", "2-dense"]


def test_a_rate_that_does_not_fall_stops_nothing(run):
    report = report_of(run(*BAD, "--dense-lr", "2", "--schedule", "constant", "--patience", "1"))
    assert report["lost"] == []


def test_what_is_not_below_the_source_is_not_stopped(run):
    plain, patient = (run(*MILD, *more, name=name) for name, more in (("plain", ()), ("patient", ("--patience", "1"))))
    assert report_of(patient)["lost"] == []
    assert (plain / "model.safetensors").read_bytes() == (patient / "model.safetensors").read_bytes()


@pytest.mark.parametrize("after", [4, 5, 10])
def test_a_lost_try_is_resumed_to_the_same_bytes(run, command, tmp_path, monkeypatch, digits, after):
    options = (*BAD, "--patience", "2", "--save-every", "0")
    expected, out = run(*options, name="expected"), tmp_path / "out"
    args = (*arguments(out, digits), *options)
    with monkeypatch.context() as patched:
        stop_after(patched, after)
        assert command(*args).code == 4
    assert command(*args, "--resume").code == 0
    assert [lost["phase"] for lost in report_of(out)["lost"]] == ["2-dense", "2-dense"]
    same(expected, out)


def scores(values, losses=None):
    values = np.asarray(values, dtype=float)
    ones = np.ones(len(values))
    return Scores(values, ones, values if losses is None else np.asarray(losses, dtype=float), np.full(len(values), -1))


@pytest.mark.parametrize(
    ("lost", "rows", "below"), [(0, 100, False), (1, 100, False), (3, 100, False), (6, 100, True), (1, 1, False)]
)
def test_the_noise_is_that_of_the_rows(lost, rows, below):
    source, arm = np.ones(rows), np.ones(rows)
    arm[:lost] = 0
    assert below_noise(scores(arm), scores(source), higher_is_better=True, by_loss=False) == below
    assert not below_noise(scores(source), scores(arm), higher_is_better=True, by_loss=False)
    assert below_noise(scores(1 - arm), scores(1 - source), higher_is_better=False, by_loss=False) == below


def test_patience_needs_a_holdout(refused, tmp_path, digits):
    args = (*arguments(tmp_path / "out", digits), "--patience")
    assert "patience needs a holdout" in refused(*args, "1", "--holdout", "0", "--keep", "last")
    assert "patience" in refused(*args, "0")
