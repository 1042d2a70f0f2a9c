"""`plan --measure`: its steps are those of a run, and its total counts what a run does."""

import json
from types import SimpleNamespace

import pytest
import torch

from dsd_refine.planning import measure
from dsd_refine.recipe import Phase, Recipe


@pytest.fixture
def planned(command, made, tmp_path, monkeypatch):
    """Measure the BERT checkpoint in an empty folder; returns the plan's totals."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        args = ["--measure", "--batch-size", "8", "--device", "cpu", "--json", *args]
        found = command("plan", made / "bert", "--data", made / "texts.csv", *args)
        assert found.code == 0, found.err
        return json.loads(found.out)["totals"]

    return run


def test_measuring_leaves_nothing_and_says_time_and_memory(planned, tmp_path):
    totals = planned()
    assert {"measured", "peak memory", "whole run"} <= totals.keys()
    assert float(totals["measured"].split()[0]) > 0
    assert "a sparse step" in totals["measured"]
    assert "a dense step" in totals["measured"]
    assert not list(tmp_path.iterdir())


def test_a_teacher_is_asked_in_the_steps_that_are_measured(planned, monkeypatch):
    asked, really = [], measure.run_phase

    def run_phase(run, phase, state):
        if state.place.phase == 1:
            run.teacher.register_forward_hook(lambda *call: asked.append(1))
        return really(run, phase, state)

    monkeypatch.setattr(measure, "run_phase", run_phase)
    planned("--set", "phases.1.distill={weight: 0.5}")
    assert len(asked) == measure.STEPS  # the sparse phase has none


def test_what_is_frozen_gets_no_gradient_and_the_phase_s_dropout_holds(planned, monkeypatch):
    moved, rates, really, current = (set(), set()), (set(), set()), measure.run_phase, []

    def run_phase(run, phase, state):
        def look(module, *_):
            if module.training:
                rates[current[-1]].add(module.p)

        current.append(state.place.phase - 1)
        if len(current) == 1:
            for name, parameter in run.loop.parameters.items():
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: moved[current[-1]].add(name))
            for module in run.loop.model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.register_forward_pre_hook(look)
        return really(run, phase, state)

    monkeypatch.setattr(measure, "run_phase", run_phase)
    planned("--set", "phases.1.frozen=[bert.encoder.*]", "--set", "phases.1.dropout=0.37")
    assert any(name.startswith("bert.encoder.") for name in moved[0])
    assert moved[1] == {name for name in moved[0] if not name.startswith("bert.encoder.")}
    assert rates[1] == {0.37}
    assert rates[0] != rates[1]


def run_of(recipe):
    part = SimpleNamespace(units=100)
    return SimpleNamespace(
        recipe=recipe, arms=("refined", *recipe.control), tries=list(recipe.tried) * recipe.seeds,
        loop=SimpleNamespace(steps_per_epoch=10, has_batchnorm=True),
        task=SimpleNamespace(train=SimpleNamespace(units=1000), holdout=part, eval=SimpleNamespace(units=50)),
    )  # fmt: skip


PHASES = (Phase(kind="sparse", epochs=2, lr=0.1, sparsity=0.3), Phase(kind="dense", epochs=3, lr=0.1))


def test_the_total_counts_the_phases_that_run():
    step, row = [1.0, 10.0], 0.001
    whole = measure.whole_run(run_of(Recipe(phases=PHASES)), step, row)
    # of two arms: the steps, the holdout after two phases and at three ends, one evaluation; and the baseline's two
    assert whole == pytest.approx(2 * (20 * 1 + 30 * 10 + 5 * 100 * row + 50 * row) + 150 * row)
    sparse = measure.whole_run(run_of(Recipe(phases=PHASES, keep="sparse")), step[:1], row)
    assert sparse == pytest.approx(2 * (20 * 1 + 2 * 100 * row + 50 * row) + 150 * row)


def test_the_total_counts_seeds_sparsities_and_averages():
    step, row = [1.0, 10.0], 0.001
    phases = (PHASES[0], PHASES[1].model_copy(update={"average": "swa"}))
    whole = measure.whole_run(run_of(Recipe(phases=phases, sparsities=(0.3, 0.5), seeds=3)), step, row)
    looks = 1000 * 4 * row  # BatchNorm goes over the training rows at three ends, and for the mean that stays
    assert whole == pytest.approx(2 * 6 * (320 + 5 * 100 * row + looks) + (1 + 2 * 3) * 50 * row + 100 * row)


def test_what_the_file_calls_otherwise_is_frozen_in_the_measured_steps_too(command, made, tmp_path, monkeypatch):
    """ViT's tensors have one name in the file and another in the model."""
    monkeypatch.chdir(tmp_path)
    args = ("--measure", "--batch-size", "8", "--device", "cpu", "--set", "phases.0.frozen=['vit.encoder.layer.0.*']")
    found = command("plan", made / "vit", "--data", made / "colours", *args)
    assert found.code == 0, found.err
    assert "a sparse step" in found.out
