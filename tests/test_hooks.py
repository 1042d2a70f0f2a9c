"""Hooks: a caller hears of a run as it goes, stops it, has it saved, and changes no byte by listening."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import hashes

from dsd_refine.checkpoint.libraries.open import open_library
from dsd_refine.checkpoint.source import find_source
from dsd_refine.errors import Interrupted
from dsd_refine.method import refine
from dsd_refine.recipe import Recipe
from dsd_refine.run.run import Options
from dsd_refine.training.hooks import Hooks, Together

EPOCHS, STEPS = 2, 5  # of a phase; 18 training rows in batches of 4: five steps an epoch


class Told(Hooks):
    """Writes down every call; stops or saves after the step that it was given."""

    def __init__(self, stop=None, save=None):
        self.calls, self.stop, self.save_at, self.steps = [], stop, save, []

    def on_phase_begin(self, place):
        self.calls.append(("begin", place.arm, place.kind))

    def on_masked(self, place):
        self.calls.append(("masked", place.arm, place.kind))

    def on_step(self, step):
        self.steps.append(step)

    def on_epoch_end(self, place, epoch):
        self.calls.append(("epoch", place.arm, epoch))

    def on_phase_end(self, place):
        self.calls.append(("end", place.arm, place.kind))

    def should_stop(self):
        return self.stop is not None and len(self.steps) >= self.stop

    def should_save(self):
        return self.save_at is not None and len(self.steps) == self.save_at

    def save(self):
        self.calls.append(("save", len(self.steps)))


def refined(made, out, *hooks, resume=False):
    source = find_source(str(made / "timm"))
    library = open_library(source)
    recipe = Recipe.model_validate(
        {
            "data": str(made / "pictures"), "batch_size": 4, "gate": "none", "holdout": 0.25,
            "phases": [
                {"kind": "sparse", "epochs": EPOCHS, "lr": 0.01, "sparsity": 0.3},
                {"kind": "dense", "epochs": 1, "lr": 0.001},
            ],
        }
    )  # fmt: skip
    return refine(source, library, recipe, Options(Path(out), device="cpu", hooks=hooks, resume=resume))


def weights(out):
    return hashes(out)["model.safetensors"]


@pytest.fixture(scope="module")
def plain(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "out"
    refined(made, out)
    return out


def test_every_moment_is_told_in_order_and_nothing_changes(made, plain, tmp_path):
    told = Told()
    refined(made, tmp_path / "out", told)
    assert weights(tmp_path / "out") == weights(plain)
    heard = [call for call in told.calls if call[0] != "save"]
    assert heard == [
        ("begin", "refined", "sparse"), ("masked", "refined", "sparse"), ("epoch", "refined", 1), ("epoch", "refined", 2),
        ("end", "refined", "sparse"), ("begin", "refined", "dense"), ("epoch", "refined", 1), ("end", "refined", "dense"),
        ("begin", "dense", "dense"), ("epoch", "dense", 1), ("epoch", "dense", 2), ("end", "dense", "dense"),
        ("begin", "dense", "dense"), ("epoch", "dense", 1), ("end", "dense", "dense"),
    ]  # fmt: skip
    total = told.steps[0].place.all_steps
    assert [step.done for step in told.steps] == list(range(1, total + 1))
    assert {step.place.phases for step in told.steps} == {2}


def test_a_hook_stops_the_run_and_it_goes_on_to_the_same_bytes(made, plain, tmp_path):
    told = Told(stop=7)
    with pytest.raises(Interrupted):
        refined(made, tmp_path / "out", told)
    assert len(told.steps) == 7
    assert told.calls[-1] == ("save", 7)
    later = Told()
    refined(made, tmp_path / "out", later, resume=True)
    assert later.steps[0].done == 8
    assert weights(tmp_path / "out") == weights(plain)


def test_a_hook_has_the_state_saved(made, tmp_path):
    told = Told(save=3)
    refined(made, tmp_path / "out", told)
    assert ("save", 3) in told.calls


def test_any_object_with_some_of_the_methods_will_do(made, plain, tmp_path):
    class Counter:
        steps = 0

        def on_step(self, step):
            self.steps += 1

    counter = Counter()
    refined(made, tmp_path / "out", counter)
    assert counter.steps == 2 * (EPOCHS + 1) * STEPS
    assert weights(tmp_path / "out") == weights(plain)


def test_what_is_not_overridden_is_not_called():
    both = Together([Hooks(), SimpleNamespace()])
    assert not any(both._called.values())
    assert not both.should_stop()
    assert not both.should_save()
