"""`--publish best`: the output has the weights of the arm that the holdout prefers, under its true name."""

import pytest
from outputs import report_of
from safetensors.torch import load_file

BASE = ("--batch-size", "8", "--device", "cpu", "--optimizer", "adamw", "--warmup-steps", "0", "--quiet")
# The refined arm ends with nearly all weights 0, so that the holdout prefers its control.
CONTROL = ("--sparsity", "0.99", "--sparse-steps", "12", "--dense-steps", "0", "--lr", "0.003")
REFINED = ("--sparsity", "0.1", "--sparse-steps", "12", "--dense-steps", "4", "--lr", "0.003", "--control", "none")
NOBODY = ("--sparsity", "0", "--sparse-steps", "2", "--dense-steps", "1", "--lr", "0", "--dense-lr", "0")


@pytest.fixture
def go(command, made, tmp_path):
    """Run with `--publish best`; returns the exit code, OUT and the report."""

    def run(*options, name="out", publish="best"):
        out = tmp_path / name
        found = command(made / "vit", "--data", made / "colours", "-o", out, "--publish", publish, *BASE, *options)
        assert (out / "dsd/report.json").is_file(), found.err
        return found.code, out, report_of(out)

    return run


def same_weights(one, two):
    one, two = load_file(one), load_file(two)
    return one.keys() == two.keys() and all(bool((one[name] == two[name]).all()) for name in one)


def test_the_arm_that_the_holdout_prefers_is_published_under_its_true_name(go, command, made):
    code, out, report = go(*CONTROL, "--gate", "none", "--set", "phases.1.average=none")
    holdout = report["holdout"]
    assert holdout["dense"]["loss"] < holdout["refined"]["loss"]
    assert (code, report["published"], report["published_name"]) == (0, "dense", "more training, no mask")
    assert set(report["comparison"]) == {"refined_vs_baseline", "refined_vs_dense", "dense_vs_baseline"}
    page, card = (out / "dsd/report.html").read_text(), (out / "README.md").read_text()
    assert "More training, no mask: " in page
    assert "more training, no mask: " in card
    assert "as a control of Dense-Sparse-Dense training" in card
    accuracy = report["arms"]["dense"]["accuracy"]
    assert f"value: {accuracy}" in card
    assert command("verify", made / "vit", out).code == 0
    refined = go(*CONTROL, "--gate", "none", name="refined", publish="refined")[1]
    assert not same_weights(out / "model.safetensors", refined / "model.safetensors")
    assert report_of(refined)["published"] == "refined"
    assert "dense_vs_baseline" not in report_of(refined)["comparison"]


def test_verdict_and_gate_are_those_of_the_published_arm(go):
    code, _, report = go(*CONTROL, "--gate", "not-worse")
    delta = report["comparison"]["dense_vs_baseline"]["delta"]
    assert report["gate"]["passed"] == (delta >= 0) == (code == 0)
    assert report["comparison"]["refined_vs_baseline"]["delta"] < delta


def test_an_average_is_part_of_the_true_name(go):
    _, _, report = go(*CONTROL, "--gate", "none", "--dense-steps", "2", "--set", "phases.1.average=swa")
    assert report["published_name"] == {"dense": "SWA, no mask", "refined": "SWA, 99 % masked"}.get(
        report["published"], "the source itself"
    )


def test_the_refined_arm_is_published_where_it_is_preferred(go):
    _, _, report = go(*REFINED, "--gate", "none")
    assert report["holdout"]["refined"]["loss"] < report["holdout"]["baseline"]["loss"]
    assert (report["published"], report["published_name"]) == ("refined", "DSD, 10 % masked")


@pytest.mark.parametrize(("gate", "code"), [("not-worse", 0), ("better", 3), ("beats-control", 3), ("none", 0)])
def test_the_source_is_a_candidate_and_wins_among_equals(go, made, gate, code):
    found, out, report = go(*NOBODY, "--gate", gate)
    assert (found, report["published"], report["verdict"], report["credit"]) == (code, "baseline", "same", "none")
    folder = out if code == 0 else out / "rejected"
    assert (folder / "model.safetensors").read_bytes() == (made / "vit/model.safetensors").read_bytes()
    page, card = (out / "dsd/report.html").read_text(), (folder / "README.md").read_text()
    assert "The source itself: the holdout prefers it to every trained arm" in page
    assert "unchanged: no arm of Dense-Sparse-Dense training" in card


def test_the_choice_does_not_look_at_the_evaluation_rows(go):
    """The published arm follows from `holdout` in the report alone."""
    for options in (CONTROL, REFINED, NOBODY):
        _, _, report = go(*options, "--gate", "none", name=f"out{len(options)}")
        keys = {arm: (metrics["accuracy"], -metrics["loss"]) for arm, metrics in report["holdout"].items()}
        assert report["published"] == max(keys, key=keys.__getitem__)  # the first of equals: the source


def test_best_needs_a_holdout(refused, made, tmp_path):
    options = ("--holdout", "0", "--keep", "last", "--publish", "best")
    message = refused(made / "vit", "--data", made / "colours", "-o", tmp_path / "out", *options)
    assert "publish: best needs a holdout" in message


def test_best_repeats_from_its_written_recipe(go, command, made, tmp_path):
    _, out, report = go(*CONTROL, "--gate", "none")
    again = tmp_path / "again"
    assert (
        command("run", made / "vit", "--recipe", out / "dsd/recipe.yaml", "-o", again, "--device", "cpu", "--quiet").code == 0
    )
    assert report_of(again)["published"] == report["published"]
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
