"""Damage is noticed, and said with what to change: rows as training shows them, first steps that go up, arms below the source."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import reports
from conftest import ROOT, SHORT
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from outputs import report_of
from runs import stop_after

from dsd_refine.evidence.damage import clearly_worse, harm_warnings, memory_warnings, rising_warnings, view_warnings
from dsd_refine.recipe import Augment, Phase, Recipe
from dsd_refine.report import figures
from dsd_refine.tasks.base import ChanceBaseline, Score, Scores

DEMO = ROOT / "recipes/demo/checkpoint"
DIGITS = ("--recipe", "digits", "--device", "cpu", "--gate", "none", "--quiet")
STRONG = Augment(crop="random-resized", flip=0.5)


def recipe_with(augment):
    return Recipe(phases=(Phase(kind="dense", steps=1, lr=0.1),), augment=augment)


def pictures(classes=10, rows=500):
    guess = ChanceBaseline("accuracy", 1 / classes, "guessing", rows, higher_is_better=True)
    return SimpleNamespace(
        chance_baselines=(guess,), metric="accuracy", higher_is_better=True, augment=None, preprocessing=None
    )


def right(share, rows):
    return [Score(float(number < round(share * rows)), 1, 0.1) for number in range(rows)]


def scores_of(losses):
    return Scores.of(enumerate(Score(1.0, 1, loss) for loss in losses), len(losses))


def harm(report):
    return [
        line for line in report["warnings"] if "ends below the source" in line or "with the preprocessing of training" in line
    ]


# ---------------------------------------------------------------- through the command


def test_augmentation_that_the_source_does_not_know_is_said(command, tmp_path):
    """Mirrored digits: half of what the source knows is lost before the first step."""
    strong = ["--set", "augment.crop=random-resized", "--set", "augment.flip=0.5", "--sparse-steps", "3", "--dense-steps", "0"]
    strong += ["--control", "none"]
    found = command(DEMO, *DIGITS, "-o", tmp_path / "out", *strong)
    assert found.code == 0, found.err
    report = report_of(tmp_path / "out")
    first = harm(report)[0]
    assert "on 192 training rows is 0." in first
    assert "--set augment.crop=none --set augment.flip=0" in first


def test_nothing_is_said_of_a_run_that_does_no_harm(command, tmp_path):
    mild = ["--sparse-steps", "2", "--dense-steps", "1", "--lr", "0.001", "--sparsity", "0.1", "--control", "none"]
    found = command(DEMO, *DIGITS, "-o", tmp_path / "out", *mild)
    assert found.code == 0, found.err
    report = report_of(tmp_path / "out")
    assert harm(report) == []
    assert not any("rate is too high" in line for line in report["warnings"])


def test_a_rate_that_is_too_high_is_said_while_it_trains(command, tmp_path):
    steep = ["--sparse-steps", "26", "--dense-steps", "1", "--lr", "2", "--batch-size", "4", "--control", "dense"]
    steep += ["--schedule", "constant", "--warmup-steps", "0", "--set", "max_grad_norm=null"]
    found = command(DEMO, *DIGITS, *steep, "-o", tmp_path / "out")
    assert found.code == 0, found.err
    lines = [line for line in report_of(tmp_path / "out")["warnings"] if "rate is too high" in line]
    assert [line.split(":")[0] for line in lines] == ["refined", "dense"]
    [below] = harm(report_of(tmp_path / "out"))
    assert "with a mask and without one" in below
    assert "a lower --lr" in below
    assert "augment" not in below  # there is none


def test_the_source_is_seen_on_the_holdout_once(command, made, tmp_path):
    """In log, report and page, also of a run that was stopped; a run that changes nothing ends there too."""
    args = [made / "timm", "--data", made / "pictures", *SHORT, "--quiet", "--holdout", "0.3", "--control", "random"]
    args += ["--sparsity", "0", "--sparse-steps", "2", "--lr", "0", "--set", "weight_decay=0"]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        assert command(*args, "-o", tmp_path / "out").code == 4
    assert command(*args, "-o", tmp_path / "out", "--resume").code == 0
    log = [json.loads(line) for line in (tmp_path / "out/dsd/log.jsonl").read_text().splitlines()]
    [entry] = [
        line for line in log if line["event"] == "evaluation" and line["arm"] == "baseline" and line["part"] == "holdout"
    ]
    assert log.index(entry) < min(number for number, line in enumerate(log) if line["event"] == "step")
    report = report_of(tmp_path / "out")
    assert report["holdout"].keys() == {"baseline", "refined", "random"}
    assert report["holdout"]["baseline"] == {name: entry[name] for name in ("accuracy", "loss")}
    assert report["holdout"]["refined"] == report["phases"][1]["holdout"]
    page = (tmp_path / "out/dsd/report.html").read_text()
    panel = page.partition("holdout accuracy")[2].partition("</figure>")[0]
    assert 'class="bold level baseline"' in panel


def test_a_holdout_that_the_source_knows_is_said(command, tmp_path):
    """Of the evaluation rows a third has a wrong label, so the source knows the carved holdout far better."""
    rows = Dataset.from_parquet(str(ROOT / "recipes/demo/test.parquet"), cache_dir=str(tmp_path)).select(range(120))
    wrong = [(label + (number % 3 == 0)) % 10 for number, label in enumerate(rows["label"])]
    rows.remove_columns("label").add_column("label", wrong, feature=rows.features["label"]).to_parquet(
        tmp_path / "wrong.parquet"
    )
    short = ["--sparse-steps", "1", "--dense-steps", "0", "--control", "none"]
    found = command(DEMO, *DIGITS, "--eval-data", tmp_path / "wrong.parquet", "-o", tmp_path / "out", *short)
    assert found.code == 0, found.err
    [line] = [line for line in report_of(tmp_path / "out")["warnings"] if "carved from the training rows" in line]
    assert "--holdout-split" in line


@given(st.integers(60, 200), st.integers(60, 200), st.integers(0, 2**32 - 1))
def test_a_holdout_like_the_evaluation_rows_is_no_reason_to_warn(first, second, seed):
    """Losses of the same kind: the difference of their means passes five standard errors hardly ever, whatever the sizes."""
    draw = np.random.default_rng(seed)
    holdout, evaluation = (scores_of(draw.normal(1, 1, size)) for size in (first, second))
    assert memory_warnings(pictures(), holdout, evaluation) == []


def test_without_a_holdout_there_is_none_of_the_source(command, made, tmp_path):
    args = [made / "timm", "--data", made / "pictures", *SHORT, "--quiet", "--holdout", "0", "--keep", "last"]
    assert command(*args, "-o", tmp_path / "out", "--control", "none").code == 0
    assert report_of(tmp_path / "out")["holdout"] is None


def test_a_look_at_the_source_changes_no_byte(command, made, tmp_path, monkeypatch):
    """Dropout, BatchNorm, order and augmentation are what they are without it."""
    from dsd_refine.run import judge as method

    outs = [tmp_path / "with", tmp_path / "without"]
    args = [made / "timm", "--data", made / "pictures", *SHORT, "--quiet", "--set", "augment.flip=0.5"]
    assert command(*args, "-o", outs[0]).code == 0
    monkeypatch.setattr(method, "first_items", lambda *given: [])
    assert command(*args, "-o", outs[1]).code == 0
    assert len({(out / "model.safetensors").read_bytes() for out in outs}) == 1


# ---------------------------------------------------------------- where the line is


@given(rows=st.integers(20, 300), before=st.floats(0.2, 1.0), after=st.floats(0.0, 1.0))
def test_a_source_that_keeps_half_of_what_it_knows_is_not_warned_of(rows, before, after):
    lines = view_warnings(pictures(), right(before, rows), right(after, rows), recipe_with(STRONG))
    known, kept = (round(share * rows) / rows - 0.1 for share in (before, after))
    if known <= 0 or kept >= known / 2:
        assert not lines
    if known > 0.5 and kept <= known / 4 and rows >= 60:
        assert len(lines) == 1


@pytest.mark.parametrize("rows", [5, 19])
def test_few_rows_say_nothing(rows):
    assert not view_warnings(pictures(), right(1.0, rows), right(0.0, rows), recipe_with(STRONG))


def test_a_source_that_knows_nothing_cannot_lose_it():
    assert not view_warnings(pictures(), right(0.1, 100), right(0.0, 100), recipe_with(STRONG))


def test_a_metric_that_is_no_row_s_own_is_not_looked_at():
    task = pictures()
    task.chance_baselines = (ChanceBaseline("bleu4", 0.0, "writing nothing", higher_is_better=True),)
    assert not view_warnings(task, right(1.0, 100), right(0.0, 100), recipe_with(STRONG))


@given(source=st.floats(0.0, 5.0), level=st.floats(0.0, 20.0), noise=st.floats(0.0, 0.5), seed=st.integers(0, 99))
def test_only_losses_far_above_the_source_s_are_a_rise(source, level, noise, seed):
    losses = list(np.random.default_rng(seed).normal(level, noise, 25).clip(0))
    lines = rising_warnings("dense", losses, source)
    limit = max(2 * source, source + 1)
    above = sum(loss > limit for loss in losses[5:])
    if above <= 14:  # of 20
        assert not lines
    if above >= 18:
        assert len(lines) == 1
        assert f"{source:.4f}" in lines[0]
    assert not rising_warnings("dense", losses[:24], source)  # too few


def test_a_loss_that_the_mask_raised_is_no_rate_too_high():
    """A mask of 95 % makes the loss twenty times the source's at once; it only falls from there."""
    losses = list(np.linspace(4.0, 3.0, 25))
    assert not rising_warnings("refined", losses, 0.2, masked=True)
    assert rising_warnings("dense", losses, 0.2)
    assert rising_warnings("refined", [0.5, *losses[1:]], 0.2, masked=True)


@pytest.mark.parametrize(
    ("refined", "dense", "warned"), [(0.8, 0.8, True), (0.8, 0.91, False), (0.9, 0.9, False), (0.95, 0.8, False)]
)
def test_harm_is_said_where_all_arms_are_below(refined, dense, warned):
    found = {"baseline": {"accuracy": 0.9}, "refined": {"accuracy": refined}, "dense": {"accuracy": dense}}
    lines = harm_warnings(pictures(), recipe_with(STRONG), "holdout", found, lambda arm: True)
    assert len(lines) == warned
    assert not harm_warnings(pictures(), recipe_with(STRONG), "holdout", found, lambda arm: arm != "dense")


def test_harm_in_a_loss_is_a_higher_one():
    task = SimpleNamespace(metric="loss", higher_is_better=False, chance_baselines=())
    found = {"baseline": {"loss": 3.0}, "refined": {"loss": 3.2}}
    [line] = harm_warnings(task, recipe_with(Augment()), "evaluation split", found, lambda arm: True)
    assert "a lower --sparsity" in line  # no arm without a mask tells the two apart
    found["refined"]["loss"] = 2.9
    assert not harm_warnings(task, recipe_with(Augment()), "evaluation split", found, lambda arm: True)


@pytest.mark.parametrize(
    ("mine", "rows", "worse"), [(0.88, 100, False), (0.88, 5000, True), (0.7, 100, True), (0.9, 5000, False)]
)
def test_a_holdout_s_share_is_lower_only_beyond_chance(mine, rows, worse):
    found = clearly_worse({"accuracy": mine}, {"accuracy": 0.9}, pictures(), recipe_with(Augment()), rows)
    assert found == worse


# ---------------------------------------------------------------- the page


@pytest.mark.parametrize("value", [0.5, 0.91, 0.99])
def test_the_source_is_a_level_line_within_the_panel(value):
    tries = figures.read_log(reports.log())
    drawn = figures.curves(tries, "accuracy", True, {"accuracy": value, "loss": 1.0})
    [level] = [curve for panel in drawn.panels for curve in panel.curves if curve.arm == "baseline"]
    points = [tuple(map(float, point.split())) for point in level.bold.removeprefix("M").split("L")]
    assert [x for x, _ in points] == [0, 1000]
    assert points[0][1] == points[1][1]
    assert 0 <= points[0][1] <= 1000
    assert not [c for p in figures.curves(tries, "accuracy", True).panels for c in p.curves if c.arm == "baseline"]
