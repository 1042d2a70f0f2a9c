"""Was it better, and was it the mask? Statistics on data made with a known effect, seeds, preflight, and made cases."""

import json
import math
import shutil

import builders
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, SHORT
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from test_run import report_of

from dsd_refine.compare import Comparison, bootstrap, mcnemar, over_seeds
from dsd_refine.power import critical, power, rows_to_decide
from dsd_refine.preflight import card_figures

DEMO = ROOT / "recipes/demo"


# ---------------------------------------------------------------- statistics


def right_wrong(generator, rows, gained, lost):
    """Paired 0/1 scores of two arms with given shares of rows that change each way."""
    drawn = generator.random(rows)
    first = np.where(drawn < gained, 1, np.where(drawn < gained + lost, 0, 1))
    return first, np.where(drawn < gained, 0, 1)


def test_a_known_effect_is_found_as_often_as_computed():
    generator, draws = np.random.default_rng(0), 1000
    found = [mcnemar(*right_wrong(generator, 800, 0.03, 0.012)) for _ in range(draws)]
    hits = sum(one.p_value < 0.05 and one.delta > 0 for one in found)
    chance = power(800, 0.03, 0.012)
    assert abs(hits / draws - chance) < 4 * math.sqrt(chance * (1 - chance) / draws)
    covered = sum(one.ci95[0] <= 0.018 <= one.ci95[1] for one in found)
    assert covered / draws >= 0.94


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
def test_no_effect_is_called_one_at_most_once_in_twenty(share):
    generator, draws = np.random.default_rng(1), 1000
    calls = sum(mcnemar(*right_wrong(generator, 500, share, share)).p_value < 0.05 for _ in range(draws))
    assert calls / draws <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)


def test_the_bootstrap_calls_no_effect_one_about_once_in_twenty():
    generator, draws = np.random.default_rng(7), 200
    count = np.ones(60)
    calls = 0
    for number in range(draws):
        first, second = generator.exponential(size=(2, 60))
        calls += bootstrap(first, second, count, higher_is_better=False, seed=number).p_value < 0.05
    assert calls / draws <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)


def test_the_critical_value_is_the_exact_test_s():
    for changed in range(0, 60):
        at = critical(changed)
        assert at < 0 or binomtest(at, changed, 0.5).pvalue < 0.05
        assert not changed or binomtest(at + 1, changed, 0.5).pvalue >= 0.05


def test_that_many_rows_decide_four_times_of_five():
    found = Comparison(0.01, (-0.002, 0.022), 0.1, 0.1, 22, 12, "mcnemar-exact")
    rows = rows_to_decide(found, 1000, 0.0)
    assert power(rows, 0.022, 0.012) == pytest.approx(0.8, abs=0.04)
    assert rows_to_decide(found, 1000, 0.0, comparisons=3) > rows
    assert rows_to_decide(found, 1000, 0.03) < rows  # the margin is nearer than 0
    same = Comparison(0.0, (0.0, 0.0), 1.0, 1.0, 0, 0, "mcnemar-exact")
    assert rows_to_decide(same, 1000, 0.005) is None


def test_seeds_and_rows_both_widen_the_interval():
    generator = np.random.default_rng(3)
    count, base = np.ones(200), generator.random(200) < 0.8
    steady = [base.astype(float)] * 4
    delta, interval, deviation = over_seeds(steady, [np.zeros(200)] * 4, count, higher_is_better=True)
    assert (delta, deviation) == (pytest.approx(base.mean()), 0.0)
    assert interval[0] < delta < interval[1]
    wild = [np.full(200, value) for value in (0.0, 0.2, 0.4, 0.6)]
    delta, interval, deviation = over_seeds(wild, [np.zeros(200)] * 4, count, higher_is_better=True)
    assert delta == pytest.approx(0.3)
    assert deviation == pytest.approx(np.std([0, 0.2, 0.4, 0.6], ddof=1))
    assert interval[1] - interval[0] > 0.3
    assert over_seeds(wild, [np.zeros(200)] * 4, count, higher_is_better=False)[0] == pytest.approx(-0.3)


# ---------------------------------------------------------------- seeds, recomputed from the predictions


@pytest.fixture(scope="module")
def seeded(made, tmp_path_factory):
    from dsd_refine.app import main

    out = tmp_path_factory.mktemp("seeded") / "out"
    args = [made / "timm", "--data", made / "pictures", "-o", out, *SHORT, "--seeds", "3", "--sparsity", "0.3,0.5", "--quiet"]
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in [*args, "--control", "dense", "--control", "random", "--lr", "0.05", "--holdout", "0.3"]])
    assert ended.value.code == 0
    return out


def recomputed(table, arm):
    return sum(table[f"score_{arm}"]) / sum(table[f"count_{arm}"])


def test_the_figures_follow_from_the_predictions(seeded):
    """An independent look: nothing but the table, the report and scipy."""
    report, table = report_of(seeded), pq.read_table(seeded / "dsd/predictions.parquet").to_pydict()
    for arm, found in report["arms"].items():
        assert recomputed(table, arm) == pytest.approx(found["accuracy"])
        hits = [p == t for p, t in zip(table[f"prediction_{arm}"], table["target"], strict=True)]
        assert hits == [bool(score) for score in table[f"score_{arm}"]]
    for name, found in report["comparison"].items():
        mine, other = table["score_refined"], table[f"score_{name.removeprefix('refined_vs_')}"]
        gained = sum(a > b for a, b in zip(mine, other, strict=True))
        lost = sum(a < b for a, b in zip(mine, other, strict=True))
        assert (found["gained"], found["lost"]) == (gained, lost)
        assert found["delta"] == pytest.approx((gained - lost) / len(mine))
        p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        assert found["p_value"] == pytest.approx(p)
    for arm, spread in report["seeds"]["arms"].items():
        values = [recomputed(table, f"{arm}_seed{number}") for number in (1, 2, 3)]
        assert spread["accuracy"]["values"] == pytest.approx(values)
        assert spread["accuracy"]["mean"] == pytest.approx(np.mean(values))
        assert spread["accuracy"]["deviation"] == pytest.approx(np.std(values, ddof=1))
        assert report["arms"][arm]["accuracy"] in [pytest.approx(value) for value in values]
    for name, found in report["seeds"]["comparison"].items():
        other = report["seeds"]["arms"].get(name.removeprefix("refined_vs_"))
        base = other["accuracy"]["mean"] if other else report["arms"]["baseline"]["accuracy"]
        assert found["delta"] == pytest.approx(report["seeds"]["arms"]["refined"]["accuracy"]["mean"] - base)
        assert found["ci95"][0] <= found["delta"] <= found["ci95"][1]


def test_every_arm_gets_as_many_tries_and_arms_share_the_seeds(seeded):
    phases = report_of(seeded)["phases"]
    tries = {arm: [p["seed"] for p in phases if p["arm"] == arm and p["kind"] != "x"] for arm in ("refined", "dense", "random")}
    assert {arm: len(seeds) for arm, seeds in tries.items()} == dict.fromkeys(tries, 3 * 2 * 2)
    assert len(set(tries["refined"])) == 3  # its tries differ by sparsity
    assert len(set(tries["dense"])) == 6  # a control's by seed
    assert set(tries["refined"]) < set(tries["dense"])
    assert tries["dense"] == tries["random"]


def test_the_holdout_picks_the_seed_that_is_written(seeded):
    log = [json.loads(line) for line in (seeded / "dsd/log.jsonl").read_text().splitlines()]
    looked = [e for e in log if e["event"] == "evaluation" and e["part"] == "holdout" and e["arm"].startswith("refined")]
    best = max(looked, key=lambda e: (e["accuracy"], -e["loss"]))
    report = report_of(seeded)
    chosen = [p for p in report["phases"] if p["arm"] == "refined" and p["kind"] == "dense"]
    tries = [(p["seed"], s) for p, s in zip(chosen, [0.3, 0.5] * 3, strict=True)]
    number = best["try"] - 1
    assert (report["selected"]["seed"], report["selected"]["sparsity"]) == tries[number]


# ---------------------------------------------------------------- preflight


def test_an_expected_figure_that_is_not_reached_stops_the_run(refused, command, made, tmp_path):
    args = [made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", *SHORT, "--quiet"]
    message = refused(*args, "--expect", "accuracy=0.98")
    assert "accuracy=0.98" in message
    assert "preprocessing or the labels" in message.replace("\n", " ")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    baseline = command(*args, "--json")
    value = json.loads(baseline.out)["arms"]["baseline"]["accuracy"]
    again = [*args[:3], "-o", tmp_path / "again", *SHORT, "--quiet"]
    assert command(*again, "--expect", f"accuracy={value:.4f}").code == 0


@pytest.mark.parametrize(
    ("given", "says"), [("top1=0.5", "measures accuracy"), ("accuracy", "METRIC=VALUE"), ("accuracy=x", "METRIC=")]
)
def test_an_expectation_that_is_none_is_refused(refused, made, tmp_path, given, says):
    message = refused(made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", *SHORT, "--expect", given)
    assert says in message


CARD = """---
model-index:
- name: x
  results:
  - task: {type: image-classification}
    dataset: {name: Pictures!, type: pictures}
    metrics:
    - {type: accuracy, value: 99.5}
---
# Card
"""


def test_a_card_that_says_otherwise_and_a_baseline_at_chance_are_warned_of(command, made, tmp_path):
    source = builders.copy_folder(made / "timm", tmp_path / "timm")
    (source / "README.md").write_text(CARD)
    found = command(source, "--data", made / "pictures", "-o", tmp_path / "out", *SHORT)
    assert found.code == 0, found.err
    warnings = " ".join(report_of(tmp_path / "out")["warnings"])
    assert "card says accuracy 0.9950" in warnings
    assert "cannot be told from guessing" in warnings
    assert "warning: " in found.err


@pytest.mark.parametrize("text", ["---\n- a\n---\n", "---\na: [\n---\n", "no front matter", "---\nmodel-index: 3\n---\n", ""])
def test_a_card_that_cannot_be_read_says_nothing(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert card_figures(tmp_path) == []


def test_figures_of_a_card(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    assert card_figures(tmp_path) == [("pictures", "accuracy", 99.5)]


# ---------------------------------------------------------------- plan --measure


def test_measuring_leaves_nothing_and_says_time_and_memory(command, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = command("plan", made / "timm", "--data", made / "pictures", "--measure", "--device", "cpu", "--json")
    assert found.code == 0, found.err
    totals = json.loads(found.out)["totals"]
    assert {"measured", "peak memory", "whole run"} <= totals.keys()
    assert float(totals["measured"].split()[0]) > 0
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- made cases


def digits(command, source, out, *more, train="train.parquet", code=None):
    found = command(
        source, "--data", DEMO / train, "--eval-data", DEMO / "test.parquet", "-o", out, "--recipe", "digits", "--gate", "none",
        "--device", "cpu", "--quiet", *more,
    )  # fmt: skip
    assert found.code == (code or 0), found.err
    return report_of(out)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """The demo's checkpoint, sparse at heart: half of each layer carries nothing, and then small noise is laid on that half."""
    from dsd_refine.app import main

    place = tmp_path_factory.mktemp("noisy")
    args = [
        DEMO / "checkpoint",
        "--recipe",
        "digits",
        "-o",
        place / "sparse",
        "--keep",
        "sparse",
        "--sparsity",
        "0.5",
        "--quiet",
    ]
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in [*args, "--control", "none", "--gate", "none", "--device", "cpu"]])
    assert ended.value.code == 0
    layers = {layer["name"] for layer in report_of(place / "sparse")["layers"] if layer["masked"]}
    tensors = load_file(place / "sparse/model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in layers:
        weights = tensors[name]
        zero = weights == 0
        least = weights[~zero].abs().sort().values[int(0.2 * int((~zero).sum()))]
        weights[zero] = (torch.rand(int(zero.sum()), generator=generator) * 2 - 1) * least
    shutil.copytree(DEMO / "checkpoint", place / "source")
    save_file(tensors, place / "source/model.safetensors")
    return place / "source"


def test_where_the_mask_truly_helps_it_gets_the_credit(command, noisy, tmp_path):
    """Nothing trains (rates 0): all that differs is the mask, and magnitude finds the noise where chance does not."""
    report = digits(
        command, noisy, tmp_path / "out", "--lr", "0", "--sparsity", "0.4", "--control", "dense", "--control", "random"
    )
    assert report["verdict"] == "better"
    for control in ("dense", "random"):
        found = report["comparison"][f"refined_vs_{control}"]
        assert found["delta"] > 0
        assert found["p_adjusted"] < 0.05


def test_where_only_training_on_helps_the_control_shares_the_credit(command, tmp_path):
    report = digits(command, DEMO / "checkpoint", tmp_path / "out", "--gate", "beats-control", "--sparsity", "0.1", code=3)
    assert report["verdict"] == "better"
    assert report["gate"] == {"rule": "beats-control", "passed": False}
    against = report["comparison"]["refined_vs_dense"]
    assert against["p_adjusted"] >= 0.05
    assert against["ci95"][0] < 0 < against["ci95"][1]


def test_where_all_hurt_all_are_worse(command, tmp_path, monkeypatch):
    """Labels shifted by one in half of the training rows."""
    from datasets import Dataset

    rows = Dataset.from_parquet(str(DEMO / "train.parquet"), cache_dir=str(tmp_path / "cache"))
    labels = [(label + 1) % 10 if number % 2 else label for number, label in enumerate(rows["label"])]
    features = rows.features
    wrong = rows.remove_columns("label").add_column("label", labels).cast(features)
    wrong.to_parquet(str(tmp_path / "wrong.parquet"))
    report = digits(command, DEMO / "checkpoint", tmp_path / "out", "--lr", "0.2", train=tmp_path / "wrong.parquet")
    assert report["verdict"] == "worse"
    assert report["arms"]["dense"]["accuracy"] < report["arms"]["baseline"]["accuracy"] - 0.05
