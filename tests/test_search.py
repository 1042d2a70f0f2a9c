"""`--search N`: several settings in each arm by successive halving; the holdout chooses."""

from itertools import pairwise

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from outputs import report_of, same
from runs import stop_after, whole

from dsd_refine.errors import RecipeError
from dsd_refine.recipe import Phase, Recipe, Search, read_recipe, shipped, validate
from dsd_refine.search import (
    check_space,
    default_space,
    resized,
    rung_of,
    rungs_of,
    setting_of,
    settings_of,
    with_changes,
)

DEMO = ROOT / "recipes/demo/checkpoint"
SHORT = ("--sparse-steps", "9", "--dense-steps", "9", "--batch-size", "64")
RATES = '--set=search.space={"phases.0.lr": [0.001, 0.01, 0.03], "phases.0.sparsity": [0.1, 0.5], "augment.flip": [0.0, 0.5]}'
PHASES = (Phase(kind="sparse", epochs=2, lr=0.1, sparsity=0.3), Phase(kind="dense", epochs=2, lr=0.01))


def arguments(out, digits, *options):
    return [DEMO, *digits, "--device", "cpu", "--gate", "none", "--quiet", "-o", out, *SHORT, *options]


@pytest.fixture(scope="module")
def searched(tmp_path_factory, digits):
    """OUT of a search over four settings."""
    return whole(arguments(tmp_path_factory.mktemp("searched") / "out", digits, RATES, "--search", "4", "--publish", "best"))


def recipe_of(tries=4, **changes):
    return Recipe(phases=PHASES, search=Search(tries=tries), **changes)


# ---------------------------------------------------------------- settings and rungs


def test_the_first_setting_is_the_recipe_and_all_differ():
    recipe = recipe_of(20)
    settings = settings_of(recipe)
    assert len(settings) == 20
    assert settings[0].changes == {}
    assert settings[0].recipe == recipe
    assert len({setting.recipe.model_dump_json() for setting in settings}) == 20
    assert [dict(each.changes) for each in settings] == [dict(each.changes) for each in settings_of(recipe)]
    assert settings_of(recipe_of(20, seed=1))[1].changes != settings[1].changes


def test_values_of_the_space_occur_about_equally_often():
    recipe = recipe_of(13).model_copy(
        update={"search": Search(tries=13, space={"phases.0.lr": (1, 2, 3), "phases.1.lr": tuple(range(4, 16))})}
    )
    rates = [setting.changes["phases.0.lr"] for setting in settings_of(recipe)[1:]]
    assert sorted(map(rates.count, (1, 2, 3))) == [4, 4, 4]


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_has_a_default_space(name):
    recipe = validate({**read_recipe(shipped()[name]), "search": 3})
    if not recipe.sparsities and recipe.holdout:
        assert check_space(recipe) == default_space(recipe)
        assert len(settings_of(recipe)) == 3


@pytest.mark.parametrize(
    ("tries", "factor", "sizes"),
    [(1, 3, [1]), (2, 3, [2, 1]), (9, 3, [9, 3, 1]), (8, 2, [8, 4, 2, 1]), (100, 3, [100, 34, 12, 4])],
)
def test_rungs(tries, factor, sizes):
    rungs = rungs_of(Recipe(phases=PHASES, search=Search(tries=tries, factor=factor)))
    assert [rung.size for rung in rungs] == sizes
    assert [rung.first for rung in rungs] == [sum(sizes[:number]) for number in range(len(sizes))]
    assert rungs[-1].share == 1
    assert all(later.share == pytest.approx(factor * rung.share) for rung, later in pairwise(rungs))


def test_the_best_settings_go_on():
    rungs = rungs_of(recipe_of(9))
    assert [setting_of(rungs, number, []) for number in range(9)] == list(range(9))
    assert [setting_of(rungs, number, [[7, 2]]) for number in (9, 10, 11)] == [7, 2, None]
    assert [rung_of(rungs, number) for number in (0, 8, 9, 11, 12)] == [0, 0, 1, 1, 2]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.integers(0, 200))
def test_resized_phases_have_the_steps_exactly(lengths, steps):
    phases = [Phase(kind="dense", steps=length, lr=0.1, warmup_steps=3) for length in lengths]
    made = resized(phases, steps, 10)
    total = sum(phase.total_steps(10) for phase in made)
    assert total == (steps if sum(lengths) else 0)
    assert all(phase.warmup_steps <= phase.total_steps(10) for phase in made) or made == tuple(phases)
    assert resized(phases, sum(lengths), 10) == tuple(phases)


# ---------------------------------------------------------------- through the command


def test_arms_have_as_many_tries_of_the_same_steps(searched):
    search = report_of(searched)["search"]
    assert search["rungs"] == [{"tries": 4, "steps": 2}, {"tries": 2, "steps": 6}, {"tries": 1, "steps": 18}]
    by_arm = {arm: [each for each in search["tries"] if each["arm"] == arm] for arm in ("refined", "dense")}
    for tries in by_arm.values():
        assert [each["steps"] for each in tries] == [2] * 4 + [6] * 2 + [18]
        assert [each["rung"] for each in tries] == [1] * 4 + [2] * 2 + [3]
        assert [each["setting"] for each in tries[:4]] == [0, 1, 2, 3]
    assert search["settings"][0] == {}
    assert len(search["settings"]) == search["n"] == 4


def test_the_holdout_chooses_who_goes_on_and_what_is_published(searched):
    report = report_of(searched)
    for arm, chosen in report["search"]["chosen"].items():
        tries = [each for each in report["search"]["tries"] if each["arm"] == arm]
        for rung in (1, 2):
            ranked = sorted((each for each in tries if each["rung"] == rung), key=key, reverse=True)
            after = [each["setting"] for each in tries if each["rung"] == rung + 1]
            assert after == [each["setting"] for each in ranked][: len(after)]
        best = max(tries, key=key)
        assert chosen == best["setting"]
        assert report["holdout"][arm] == best["holdout"]


def key(tried):
    return tried["holdout"]["accuracy"], -tried["holdout"]["loss"]


def test_settings_reach_the_training(searched):
    report = report_of(searched)
    tries = [each for each in report["search"]["tries"] if each["arm"] == "refined"]
    first = [phase for phase in report["phases"] if phase["arm"] == "refined" and phase["kind"] == "sparse"]
    for tried, phase in zip(tries, first, strict=True):
        changes = report["search"]["settings"][tried["setting"]]
        assert phase["lr_peak"] == changes.get("phases.0.lr", 0.02)
        assert phase["sparsity"] == changes.get("phases.0.sparsity", 0.3)


def test_every_try_is_on_the_page(searched):
    page, report = (searched / "dsd/report.html").read_text(), report_of(searched)
    section = page.split('id="search"')[1].split("</section>")[0]
    assert section.count('class="try') == len(report["search"]["tries"])
    assert "phases.0.lr" in section


def test_a_search_of_one_is_the_run_without_a_search(digits, tmp_path):
    plain, one = (
        whole(arguments(tmp_path / str(number), digits, *more)) for number, more in enumerate(((), ("--search", "1")))
    )
    for name in ("model.safetensors", "dsd/predictions.parquet"):
        assert (plain / name).read_bytes() == (one / name).read_bytes()


def test_the_written_recipe_repeats_the_search(searched, digits, tmp_path):
    out = tmp_path / "again"
    whole([DEMO, "--recipe", searched / "dsd/recipe.yaml", "--device", "cpu", "--quiet", "-o", out])
    same(searched, out)


@pytest.mark.parametrize("after", [9, 40])
def test_a_stopped_search_ends_in_the_same_bytes(searched, command, digits, tmp_path, monkeypatch, after):
    args = arguments(tmp_path / "out", digits, RATES, "--search", "4", "--publish", "best", "--save-every", "0")
    with monkeypatch.context() as patched:
        stop_after(patched, after)
        assert command(*args).code == 4
    assert command(*args, "--resume").code == 0
    same(searched, tmp_path / "out")


def diverging(*rates):
    return f'--set=search.space={{"phases.0.lr": {list(rates)}}}'


def test_a_try_that_diverges_is_lost_and_the_others_go_on(command, digits, tmp_path, monkeypatch):
    out, again = tmp_path / "out", tmp_path / "again"
    args = (diverging(0.001, 1e20, 1e30), "--search", "3", "--save-every", "0")
    whole(arguments(out, digits, *args))
    report = report_of(out)
    tries = [each for each in report["search"]["tries"] if each["arm"] == "refined"]
    lost = [each for each in tries if each["lost"]]
    assert lost
    assert all("is nan" in each["lost"] or "is inf" in each["lost"] or "finite" in each["lost"] for each in lost)
    assert not {each["setting"] for each in lost} & {each["setting"] for each in tries if each["rung"] > 1}
    assert [each["try"] for each in report["lost"] if each["arm"] == "refined"] == [each["try"] for each in lost]
    with monkeypatch.context() as patched:
        stop_after(patched, 10)
        assert command(*arguments(again, digits, *args)).code == 4
    assert command(*arguments(again, digits, *args), "--resume").code == 0
    same(out, again)


def test_all_diverged_is_a_failure_with_the_rates(command, digits, tmp_path):
    found = command(*arguments(tmp_path / "out", digits, diverging(1e20, 1e25, 1e30), "--search", "4", "--lr", "1e22"))
    assert found.code == 5
    assert "refined: all tries diverged, with rates from " in found.err
    assert "to 1e+30" in found.err
    assert "Traceback" not in found.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--search", "0"], "search.tries"),
        (["--search", "-3"], "search.tries"),
        (["--search", "4", "--holdout", "0", "--keep", "last"], "a search needs a holdout"),
        (["--search", "4", "--sparsity", "0.2,0.3"], "exclude each other"),
        (["--search", "4", '--set=search.space={"phases.0.ratio": [1]}'], "phases.0.ratio: unknown key"),
        (["--search", "4", '--set=search.space={"phases.7.lr": [1]}'], "'7' is not a number from 0 to 1"),
        (["--search", "4", '--set=search.space={"batch_size": [8]}'], "batch_size cannot be searched"),
        (["--search", "4", '--set=search.space={"phases.0.lr": [fast]}'], "phases.0.lr"),
        (["--search", "4", '--set=search.space={"phases.0.lr": []}'], "search.space"),
        (["--search", "4", '--set=search.space={"phases.0.lr": [0.1]}'], "only 2 were found"),
        (["--set=search.tires=4"], "did you mean 'tries'"),
    ],
)
def test_a_search_that_cannot_be_is_refused(refused, digits, tmp_path, options, says):
    assert says in refused(*arguments(tmp_path / "out", digits, *options))


def test_a_plan_counts_the_steps_of_a_search(command, digits, tmp_path):
    found = command("plan", *arguments(tmp_path / "out", digits, "--search", "4"))
    assert found.code == 0, found.err
    assert f"{2 * (4 * 2 + 2 * 6 + 18)} steps" in found.out
    assert "4 of 0.111 of the steps, then 2 of 0.333" in found.out


def test_a_change_outside_the_space_is_not_taken_over():
    recipe = recipe_of()
    assert with_changes(recipe, {"phases.1.lr": 0.5}).phases[1].lr == 0.5
    with pytest.raises(RecipeError, match="cannot be searched"):
        check_space(recipe.model_copy(update={"search": Search(tries=2, space={"seed": (1,)})}))


def test_seeds_controls_and_other_metrics_go_with_a_search(command, made, tmp_path):
    """A language model (metric: loss), two seeds, two controls, patience, and only the sparse phase kept."""
    space = '--set=search.space={"phases.0.lr": [0.0001, 0.001, 0.01], "phases.0.sparsity": [0.2, 0.6]}'
    options = ["--search", "3", space, "--seeds", "2", "--control", "dense", "--control", "random", "--patience", "1"]
    options += ["--sparse-steps", "6", "--dense-steps", "3", "--batch-size", "4", "--keep", "sparse", "--publish", "best"]
    out = tmp_path / "out"
    args = [
        made / "gpt2",
        "--data",
        made / "documents.txt",
        "-o",
        out,
        "--device",
        "cpu",
        "--gate",
        "none",
        "--quiet",
        *options,
    ]
    assert command(*args).code == 0
    report = report_of(out)
    for arm in ("refined", "dense", "random"):
        tries = [each for each in report["search"]["tries"] if each["arm"] == arm]
        assert [(each["seed"], each["steps"]) for each in tries] == [(n, s) for n in (1, 2) for s in (2, 2, 2, 6)]
        assert tries[3]["setting"] == min(tries[:3], key=lambda each: each["holdout"]["loss"])["setting"]
    assert report["published"] == min(report["holdout"], key=lambda arm: report["holdout"][arm]["loss"])
    assert {phase["kind"] for phase in report["phases"] if phase["arm"] == "random"} == {"sparse"}
    assert (out / "dsd/report.html").read_text().count('class="try') == 24
