"""Recipes: refused with every mistake at once, overridden by flags, and equal after a round trip."""

import re
from pathlib import Path

import pytest

from dsd_refine.errors import RecipeError
from dsd_refine.recipe import (
    apply_flags,
    find_recipe,
    parse_yaml,
    read_recipe,
    recipes_folder,
    set_field,
    shipped,
    validate,
)
from dsd_refine.task_specs import TASKS

TWO = {
    "phases": [{"kind": "sparse", "epochs": 1, "lr": 0.1, "sparsity": 0.3}, {"kind": "dense", "epochs": 1, "lr": 0.01}],
}


def fresh(**more):
    return {"phases": [dict(phase) for phase in TWO["phases"]], **more}


def test_all_mistakes_come_at_once_with_the_nearest_key():
    raw = fresh(batchsize=3, augment={"flop": 1})
    raw["phases"][0] |= {"lrr": 1, "sparsity": 1.5}
    with pytest.raises(RecipeError) as error:
        validate(raw)
    text = str(error.value)
    for part in (
        "did you mean 'batch_size'",
        "augment.flop: unknown key; did you mean 'flip'",
        "did you mean 'lr'",
        "less than 1",
    ):
        assert part in text


def test_a_thousand_mistakes_are_counted():
    with pytest.raises(RecipeError) as error:
        validate(fresh(phases=[0] * 1000))
    lines = str(error.value).splitlines()
    assert len(lines) == 10
    assert lines[-1].endswith("and 991 more mistakes")


@pytest.mark.parametrize("text", ["a: 1\na: 2", "phases:\n- {kind: x, kind: y}", "x: &a 1\ny: *a", "- 1", "{", "1: 2", "\t"])
def test_yaml_that_is_no_recipe_is_refused(text):
    with pytest.raises(RecipeError):
        parse_yaml(text, "file")


def test_1e_minus_4_is_a_number():
    assert parse_yaml("a: 1e-4\nb: -2.5E+3\nc: 1e5", "file") == {"a": 1e-4, "b": -2500.0, "c": 1e5}


@pytest.mark.parametrize("value", [".nan", ".inf", "true", "'0.1'", "-0.1", "{}"])
def test_a_rate_is_a_finite_number(value):
    raw = fresh()
    set_field(raw, f"phases.0.lr={value}")
    with pytest.raises(RecipeError, match=r"phases\.0\.lr"):
        validate(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"holdout": 0.0}, "holdout 0"),
        ({"control": [], "gate": "beats-control"}, "needs a control"),
        ({"control": ["dense", "dense"]}, "twice"),
        ({"task": "poetry"}, "task: no task; known are image-classification, text-classification"),
        ({"phases": []}, "at least 1"),
        ({"phases": [{"kind": "dense", "epochs": 1, "steps": 1, "lr": 0.1}]}, "not both"),
        ({"phases": [{"kind": "dense", "epochs": 1, "lr": 0.1, "sparsity": 0.1}]}, "no mask"),
        ({"phases": [{"kind": "sparse", "epochs": 1, "lr": 0.1}]}, "needs a sparsity"),
    ],
)
def test_what_contradicts_itself_is_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        validate(fresh() | change)


def test_several_sparsities_go_with_one_sparse_phase():
    raw = fresh()
    raw["phases"][0]["sparsity"] = [0.25, 0.5]
    recipe = validate(raw)
    assert recipe.sparsities == (0.25, 0.5)
    assert recipe.phases_at(0.5)[0].sparsity == 0.5
    raw["phases"].append(dict(raw["phases"][0]))
    with pytest.raises(RecipeError, match="exactly one sparse phase"):
        validate(raw)


def test_a_recipe_written_and_read_is_equal():
    recipe = validate(fresh(seed=3, include=["a*"], max_grad_norm=0.5, name="é"))
    assert validate(parse_yaml(recipe.dump(), "file")) == recipe


def test_flags_reach_every_phase_of_their_kind():
    raw = fresh()
    raw["phases"] += [dict(phase) for phase in raw["phases"]]
    apply_flags(raw, {"lr": 0.5, "sparse_steps": 7, "sparsity": 0.4, "seed": 9, "holdout": None, "schedule": "linear"})
    recipe = validate(raw)
    assert [phase.lr for phase in recipe.phases] == [0.5, 0.05, 0.5, 0.05]
    assert [phase.steps for phase in recipe.phases] == [7, None, 7, None]
    assert [phase.schedule for phase in recipe.phases] == ["linear"] * 4
    assert recipe.seed == 9
    assert recipe.holdout == 0.1
    apply_flags(raw, {"lr": 0.5, "dense_lr": 0.2})
    assert validate(raw).phases[1].lr == 0.2


@pytest.mark.parametrize("bad", ["phases", "phases.9.lr=1", "phases.x.lr=1", "seed.x=1", "=1", "phases.0.lr={"])
def test_a_set_that_leads_nowhere_is_refused(bad):
    with pytest.raises(RecipeError):
        set_field(fresh(seed=1), bad)


@pytest.mark.parametrize(("epochs", "per_epoch", "steps"), [(0, 5, 0), (0.01, 5, 1), (1.5, 5, 8), (2, 5, 10), (0.7, 15, 11)])
def test_epochs_become_steps_by_the_stated_formula(epochs, per_epoch, steps):
    raw = fresh()
    raw["phases"][0]["epochs"] = epochs
    assert validate(raw).phases[0].total_steps(per_epoch) == steps


def test_every_shipped_recipe_validates_and_says_what_it_is():
    files = sorted(recipes_folder().rglob("*.yaml"))
    assert len(files) == len(shipped())  # no name twice
    for path in files:
        assert path.read_text().startswith("# ")
        recipe = validate(read_recipe(path))
        if recipe.name in TASKS:  # the default of a task
            assert [phase.kind for phase in recipe.phases] == ["sparse", "dense"]
            # The dense phase has a tenth of the rate, as in the paper, unless its weights are averaged.
            share = 1 if recipe.phases[1].average == "swa" else 0.1
            assert recipe.phases[1].lr == pytest.approx(share * recipe.phases[0].lr)
            assert recipe.augment.crop == "none"


ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", shipped())
def test_a_header_says_what_was_measured_and_its_figures_are_those_of_the_results(name):
    lines = shipped()[name].read_text(encoding="utf-8").splitlines()
    header = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    assert re.search(r"[Mm]easured|measures|[Uu]ntested at scale", header)
    results = re.findall(r"benchmarks/results/[\w/]+\.(?:txt|jsonl)", header)
    measured = "".join((ROOT / file).read_text(encoding="utf-8") for file in results)
    figures = re.findall(r"\b\d\.\d{4}\b", header)  # as a summary prints them
    assert all(figure in measured for figure in figures), figures
    scripts = re.findall(r"python (benchmarks/[\w/]+\.py)", header)
    assert all((ROOT / script).is_file() for script in scripts)
    assert len(scripts) == 1 or not figures


def test_an_unknown_recipe_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'digits'"):
        find_recipe("digts")


@pytest.mark.parametrize("wrong", [{"control": "random"}, {"include": "x"}, {"phases": 3}, {"augment": {"scale": 0.5}}])
def test_one_value_where_a_list_belongs_is_said(wrong):
    with pytest.raises(RecipeError, match=f"{next(iter(wrong))}.*a list is expected"):
        validate(fresh(**wrong))


@pytest.mark.parametrize("wrong", [{"seed": 2**63}, {"holdout": 0}])
def test_a_mistake_of_the_whole_and_a_seed_too_large_are_said(wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        validate(fresh(**wrong))


def test_epochs_and_steps_of_one_kind_are_refused():
    with pytest.raises(RecipeError, match="give one"):
        apply_flags(fresh(), {"sparse_epochs": 1.0, "sparse_steps": 3})
