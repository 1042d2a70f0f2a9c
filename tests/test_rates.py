"""`lr: auto`: a range test on the source finds the rate, the same for every arm."""

import itertools
import math
import re
from types import SimpleNamespace as Fake

import pytest
import torch
from outputs import report_of, same
from runs import stop_after, whole

from dsd_refine.errors import RecipeError
from dsd_refine.recipe import AutoRate, Phase, Recipe, apply_flags, validate
from dsd_refine.run import rates
from dsd_refine.run.rates import BELOW_EDGE, HIGHEST, LOWEST, MOST_MOVED, NEAR, RISEN, edge_of, moved, rises
from dsd_refine.search import default_space

SHORT = (
    "--sparse-steps",
    "2",
    "--dense-steps",
    "2",
    "--warmup-steps",
    "0",
    "--batch-size",
    "8",
    "--device",
    "cpu",
    "--gate",
    "none",
    "--quiet",
)
PHASES = [{"kind": "sparse", "lr": "auto", "epochs": 1, "sparsity": 0.3}, {"kind": "dense", "lr": "auto/10", "epochs": 1}]


FEW = 24  # rates of a test here


def arguments(made, out, *options):
    return [made / "timm", "--data", made / "pictures", "-o", out, *SHORT, "--save-every", "0", *options]


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """A range test of FEW rates, to save time, also of short runs."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rates, "STEPS", FEW)
        patched.setattr(rates, "MEASURED", 4)
        patched.setattr(rates, "SHORTEST_RUN", 0)
        yield


@pytest.fixture(scope="module")
def tested(made, tmp_path_factory):
    """OUT of a run with `--lr auto`."""
    return whole(arguments(made, tmp_path_factory.mktemp("tested") / "out", "--lr", "auto"))


def test_a_short_run_has_the_usual_rate_and_no_test(made, tmp_path, monkeypatch):
    """Its bytes are those of a run with that rate."""
    monkeypatch.setattr(rates, "SHORTEST_RUN", 5)
    report = report_of(whole(arguments(made, tmp_path / "auto", "--lr", "auto")))
    assert report["rate_tests"] is None
    assert {phase["lr_peak"] for phase in report["phases"] if phase["kind"] == "sparse"} == {rates.USUAL["sgd"]}
    usual = report_of(whole(arguments(made, tmp_path / "usual", "--lr", str(rates.USUAL["sgd"]))))
    assert report["output"]["files"] == usual["output"]["files"]


# ---------------------------------------------------------------- in a recipe


def test_auto_is_read_and_written():
    recipe = validate({"phases": PHASES})
    assert [isinstance(phase.lr, AutoRate) for phase in recipe.phases] == [True, True]
    assert [float(phase.lr) for phase in recipe.phases] == [1, 0.1]
    assert validate(recipe.model_dump(mode="json", exclude_none=True)) == recipe
    assert "lr: auto*0.1" in recipe.dump()
    assert [phase.lr for phase in recipe.at_rates({"sgd": 0.2}).phases] == [0.2, pytest.approx(0.02)]


@pytest.mark.parametrize("wrong", ["fast", "auto*0", "auto/0", "auto*-1", "auto*", "auto*1e999", "auto 3", -0.1, None])
def test_other_texts_are_refused(wrong):
    with pytest.raises(RecipeError, match=r"phases\.0\.lr"):
        validate({"phases": [{**PHASES[0], "lr": wrong}]})


def test_the_flag_sets_the_dense_phases_to_a_tenth():
    raw = {"phases": [dict(phase) for phase in PHASES]}
    apply_flags(raw, {"lr": "auto*0.5"})
    assert [phase.lr for phase in validate(raw).phases] == [AutoRate(0.5), AutoRate(0.05)]
    apply_flags(raw, {"lr": 0.5})
    assert [phase.lr for phase in validate(raw).phases] == [0.5, 0.05]


def test_the_default_space_lies_around_the_tested_rate():
    space = default_space(validate({"phases": PHASES}))
    assert space["phases.0.lr"] == ("auto*0.1", "auto*0.3", "auto", "auto*3")
    assert space["phases.1.lr"] == ("auto*0.03", "auto*0.1", "auto*0.3")
    numbers = Recipe(phases=(Phase(kind="dense", epochs=1, lr=0.5),))
    assert default_space(numbers)["phases.0.lr"] == (0.15, 0.5, 1.5)


# ---------------------------------------------------------------- the rule


def test_the_edge_is_the_last_rate_before_the_loss_rises():
    tried, level = [1.0, 2.0, 3.0, 4.0], [2.0] * 4
    assert edge_of(tried, [2.0, 2.0, 2.0, 2.0], level) is None
    assert edge_of(tried, [2.0, 1.9, 99.0], level) == 2.0
    assert edge_of(tried, [2.0, 1.9], level) == 2.0  # the third loss was not finite
    assert edge_of(tried, [99.0], level) == 0
    assert edge_of(tried, [], level) == 0
    assert rises([2.0, 3.0], [1.0, 1.0])[0] == pytest.approx(1.0)


def test_the_median_layer_says_what_a_step_moves():
    before = {name: torch.full((4,), 2.0) for name in "abc"} | {"zero": torch.zeros(4)}
    now = {"a": before["a"] * 1.1, "b": before["b"] * 0.8, "c": before["c"], "zero": before["zero"]}
    run = Fake(loop=Fake(parameters=now, shards=None))
    assert moved(run, before) == pytest.approx(0.1)  # of 0.1, 0.2 and 0; a layer of zeros has no share


# ---------------------------------------------------------------- through the command


def test_every_rate_that_was_tried_is_reported(tested):
    [found] = report_of(tested)["rate_tests"]
    assert found["optimizer"] == "sgd"
    assert len(found["rates"]) == len(found["losses"]) == len(found["source_losses"]) <= FEW
    assert found["rates"][0] == LOWEST
    measured = found["moves"]
    assert measured[0][0] == pytest.approx(BELOW_EDGE * (found["edge"] or HIGHEST))
    for (rate, move), (lower, _) in itertools.pairwise(measured):
        assert move > NEAR * MOST_MOVED
        assert lower == pytest.approx(rate * MOST_MOVED / move)
    rate, move = measured[-1]
    assert move <= NEAR * MOST_MOVED  # this source has no gradient that a hundredth of the rate would not tame
    assert found["rate"] == float(f"{rate:.2g}")
    risen = [rise > RISEN for rise in rises(found["losses"], found["source_losses"])]
    assert not any(risen[:-1])
    assert math.isclose(found["losses"][0], found["source_losses"][0], rel_tol=1e-6)


def test_all_arms_have_the_tested_rate_and_it_is_counted(tested):
    report = report_of(tested)
    [found] = report["rate_tests"]
    for arm in ("refined", "dense"):
        peaks = [phase["lr_peak"] for phase in report["phases"] if phase["arm"] == arm]
        assert peaks == pytest.approx([found["rate"], found["rate"] / 10])
    assert report["cost"]["samples"] == found["samples"] + sum(phase["samples"] for phase in report["phases"])
    assert "was tested on the source" in (tested / "dsd/report.html").read_text()


def test_nothing_else_of_the_run_is_changed_by_the_test(tested, made, tmp_path):
    [found] = report_of(tested)["rate_tests"]
    again = whole(arguments(made, tmp_path / "out", "--lr", repr(found["rate"]), "--dense-lr", f"{found['rate'] / 10:.9g}"))
    for name in ("model.safetensors", "dsd/predictions.parquet"):
        assert (tested / name).read_bytes() == (again / name).read_bytes()
    assert report_of(again)["rate_tests"] is None


@pytest.mark.parametrize("steps_after_the_test", [-7, 3])
def test_a_stopped_test_ends_in_the_same_bytes(tested, command, made, tmp_path, monkeypatch, steps_after_the_test):
    args = arguments(made, tmp_path / "out", "--lr", "auto")
    [found] = report_of(tested)["rate_tests"]
    with monkeypatch.context() as patched:
        stop_after(patched, FEW + len(found["rates"]) + steps_after_the_test)
        assert command(*args).code == 4
    assert command(*args, "--resume").code == 0
    same(tested, tmp_path / "out")


def test_plan_names_the_test(command, made):
    planned = command("plan", made / "timm", "--data", made / "pictures", "--lr", "auto", "--device", "cpu")
    assert re.search(r"in at most \d+ steps \(sgd\)", planned.out)
    assert "peak rate auto," in planned.out
