"""`soup` and `average: rounds`: means of weights, if the holdout prefers them."""

import json

import pytest
import torch
from conftest import ROOT
from outputs import report_of, same
from runs import stop_after, whole

from dsd_refine.errors import RecipeError, UsageError
from dsd_refine.recipe import validate
from dsd_refine.training.average import between

DEMO = ROOT / "recipes/demo/checkpoint"
STEPS = ("--sparse-steps", "3", "--dense-steps", "3", "--lr", "0.1", "--batch-size", "64", "--save-every", "0")
TWICE = (
    "--set=phases=[{kind: sparse, steps: 2, lr: 0.1, sparsity: 0.3}, {kind: dense, steps: 2, lr: 0.05},"
    "{kind: sparse, steps: 2, lr: 0.1, sparsity: 0.2}, {kind: dense, steps: 2, lr: 0.05}]"
)
SEEDS = (
    TWICE, "--lr", "0.1", "--dense-lr", "0.05", "--batch-size", "64", "--save-every", "0", "--set=average=rounds",
    "--set=soup=uniform", "--seeds", "2", "--publish", "best",
)  # fmt: skip
SPACE = '--set=search.space={"phases.0.lr": [0.05, 0.2], "phases.1.average": [none, swa]}'
PHASES = [{"kind": "sparse", "lr": 0.1, "epochs": 1, "sparsity": 0.3}, {"kind": "dense", "lr": 0.1, "epochs": 1}]


def arguments(out, digits, *options):
    return [DEMO, *digits, "--device", "cpu", "--gate", "none", "--quiet", "-o", out, *options]


def better(new, old):
    return (new["accuracy"], -new["loss"]) > (old["accuracy"], -old["loss"])


@pytest.fixture(scope="module")
def seeds(tmp_path_factory, digits):
    """OUT of a run of two rounds with a uniform soup of two seeds."""
    return whole(arguments(tmp_path_factory.mktemp("seeds") / "out", digits, *SEEDS))


@pytest.fixture(scope="module")
def searched(tmp_path_factory, digits):
    """OUT of a search with a greedy soup."""
    search = (*STEPS, "--search", "3", SPACE, "--set=soup=greedy")
    return whole(arguments(tmp_path_factory.mktemp("searched") / "out", digits, *search))


def logged(out, word):
    """The lines of the log that have a word."""
    return [json.loads(line) for line in (out / "dsd/log.jsonl").read_text().splitlines() if f'"{word}"' in line]


def test_a_soup_of_seeds_is_offered_to_every_arm(seeds):
    report = report_of(seeds)
    assert [line["arm"] for line in logged(seeds, "soup")] == ["refined", "dense"]
    for arm in ("refined", "dense"):
        found = report["soups"][arm]
        assert sorted(found["tries"]) == [1, 2]
        assert (report["holdout"][arm] == found["holdout"]) == found["chosen"]
        assert len(report["seeds"]["arms"][arm]["accuracy"]["values"]) == 2
    chosen = report["soups"].get(report["published"], {"chosen": False})["chosen"]
    assert ("mean of 2 tries" in report["published_name"]) == chosen


def test_rounds_are_averaged_in_every_arm(seeds):
    report = report_of(seeds)
    assert [line["arm"] for line in logged(seeds, "rounds")] == ["refined"] * 2 + ["dense"] * 2
    assert {line["rounds"] for line in logged(seeds, "rounds")} == {2}
    assert set(report["rounds"]) == {"refined", "dense"}
    assert set(report["rounds"].values()) <= {1, 2}


def test_a_greedy_soup_takes_what_improves_it(searched):
    report = report_of(searched)
    for arm, found in report["soups"].items():
        tries = {each["try"]: each["holdout"] for each in report["search"]["tries"] if each["arm"] == arm}
        best = max(tries.values(), key=lambda each: (each["accuracy"], -each["loss"]))
        if found is None:
            assert report["holdout"][arm] == best
        else:
            assert len(found["tries"]) > 1
            assert tries[found["tries"][0]] == best
            assert better(found["holdout"], best)
            assert found["chosen"]
            assert report["holdout"][arm] == found["holdout"]


def test_a_stopped_run_ends_in_the_same_bytes(seeds, command, digits, tmp_path, monkeypatch):
    args = arguments(tmp_path / "out", digits, *SEEDS)
    with monkeypatch.context() as patched:
        stop_after(patched, 14)  # in the last phase of the second try, whose mean over the rounds has begun
        assert command(*args).code == 4
    assert command(*args, "--resume").code == 0
    same(seeds, tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"soup": "uniform"}, "mixes several tries, and here is one: give --search N"),
        ({"soup": "greedy", "seeds": 2, "holdout": 0, "keep": "last"}, "soup: greedy needs a holdout"),
        ({"soup": "greedy", "seeds": 2, "keep": "sparse"}, "use keep: best"),
        ({"average": "rounds"}, "needs two or more rounds"),
        ({"soup": "thick"}, "soup"),
    ],
)
def test_what_cannot_be_mixed_is_refused(fields, says):
    with pytest.raises(RecipeError, match=says):
        validate({"phases": PHASES, **fields})


def test_weights_of_different_shapes_have_no_mean():
    with pytest.raises(UsageError, match=r"w: weights of different shapes have no mean \(\[2\] and \[3\]\)"):
        between({"w": torch.zeros(2)}, {"w": torch.zeros(3)}, 0.5)
    with pytest.raises(UsageError, match="none and"):
        between({}, {"w": torch.zeros(3)}, 0.5)
