"""Was it better, and was it the mask? The report recomputed from the predictions, seeds, and made cases."""

import json
import math
import shutil

import builders
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, SHORT
from outputs import report_of
from safetensors.torch import load_file, save_file
from scipy.optimize import brentq
from scipy.stats import binomtest, norm
from scipy.stats import t as student
from tango import deviations

DEMO = ROOT / "recipes/demo"


# ---------------------------------------------------------------- recomputed from the predictions


def finished_run(out, *args):
    from dsd_refine.cli.app import main

    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in [*args, "-o", out, *SHORT, "--control", "dense", "--control", "random", "--quiet"]])
    assert ended.value.code == 0
    return out


@pytest.fixture(scope="module")
def seeded(made, tmp_path_factory):
    """OUT of a classification run with three seeds and two sparsities."""
    more = ["--seeds", "3", "--sparsity", "0.3,0.5", "--lr", "0.05", "--holdout", "0.3"]
    return finished_run(tmp_path_factory.mktemp("seeded") / "out", made / "timm", "--data", made / "pictures", *more)


@pytest.fixture(scope="module")
def by_loss(made, tmp_path_factory):
    """OUT of a run that is judged by its loss, with two seeds."""
    place = tmp_path_factory.mktemp("by_loss")
    documents = builders.text_file(place / "documents.txt", 120)
    more = ["--seeds", "2", "--optimizer", "adamw", "--lr", "1e-4", "--sparsity", "0.2"]
    return finished_run(place / "out", made / "gpt2", "--data", documents, *more)


def ratio(table, arm):
    return sum(table[f"score_{arm}"]) / sum(table[f"count_{arm}"])


def told(mine, other, count, right_wrong):
    """(delta, low, high, p) of two arms, from the contract's words and scipy. A lower loss is a positive delta."""
    if right_wrong:
        gained, lost = int((mine > other).sum()), int((mine < other).sum())
        delta = (gained - lost) / len(mine)

        def off(at, limit):
            return deviations(gained, lost, len(mine), at) - limit

        ends = [
            brentq(off, *within, args=(limit,), xtol=1e-6)
            for within, limit in (((-0.999, delta), 1.96), ((delta, 0.999), -1.96))
        ]
        return delta, *ends, binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    drawn = np.random.default_rng(1).integers(0, len(mine), (10_000, len(mine)))
    deltas = (other - mine)[drawn].sum(1) / count[drawn].sum(1)
    m = int((mine != other).sum())
    wide = math.sqrt(m / (m - 1))
    share = norm.cdf(wide * student.ppf(0.025, m - 1))
    nearest = min((deltas <= 0).mean(), (deltas >= 0).mean())
    p = min(1.0, max(2 * student.cdf(norm.ppf(max(nearest, 1e-4)) / wide, m - 1), 2 * 0.5**m))
    return (other - mine).sum() / count.sum(), *np.quantile(deltas, [share, 1 - share]), p


@pytest.mark.parametrize("run", ["seeded", "by_loss"])
def test_the_comparisons_follow_from_the_predictions(run, request):
    """An independent look: nothing but the table, the report's names, and scipy."""
    out = request.getfixturevalue(run)
    report, table = report_of(out), pq.read_table(out / "dsd/predictions.parquet").to_pydict()
    metric, better = report["metric"]["name"], report["metric"]["higher_is_better"]
    score = {arm: np.array(table[f"score_{arm}"]) for arm in report["arms"]}
    others = {name: name.removeprefix("refined_vs_") for name in report["comparison"]}
    mine = {
        name: told(score["refined"], score[other], np.array(table["count_refined"]), better) for name, other in others.items()
    }
    ps = [p for *_, p in mine.values()]
    holm = {name: max(min(1, q * sum(r >= q for r in ps)) for q in ps if q <= p) for name, (*_, p) in mine.items()}
    chance = {"rel": 0.2, "abs": 0.005} if metric == "loss" else {}  # the draws are others than the run's
    for name, found in report["comparison"].items():
        delta, low, high, p = mine[name]
        assert found["delta"] == pytest.approx(delta)
        assert found["ci95"] == pytest.approx([low, high], abs=0.05 * (high - low) if chance else 1e-4)
        assert found["p_value"] == pytest.approx(p, **chance)
        assert found["p_adjusted"] == pytest.approx(holm[name], **chance)
    delta, low, high, _ = mine["refined_vs_baseline"]
    margin = 0.005 * (ratio(table, "baseline") if metric == "loss" else 1)
    same = "same" if -margin <= low and high <= margin else "inconclusive"
    verdict = same if holm["refined_vs_baseline"] >= 0.05 else "better" if delta > 0 else "worse"
    assert report["verdict"] == verdict
    beaten = all(holm[name] < 0.05 and mine[name][0] > 0 for name in mine if name != "refined_vs_baseline")
    assert report["credit"] == ("none" if verdict != "better" else "mask" if beaten else "training")


@pytest.mark.parametrize("run", ["seeded", "by_loss"])
def test_the_arms_and_their_seeds_follow_from_the_predictions(run, request):
    out = request.getfixturevalue(run)
    report, table = report_of(out), pq.read_table(out / "dsd/predictions.parquet").to_pydict()
    metric, seeds = report["metric"]["name"], range(1, report["seeds"]["n"] + 1)
    for arm, found in report["arms"].items():
        assert ratio(table, arm) == pytest.approx(found[metric])
        if metric == "accuracy":
            hits = [p == t for p, t in zip(table[f"prediction_{arm}"], table["target"], strict=True)]
            assert hits == [bool(score) for score in table[f"score_{arm}"]]
    for arm, spread in report["seeds"]["arms"].items():
        values = [ratio(table, f"{arm}_seed{number}") for number in seeds]
        assert spread[metric]["values"] == pytest.approx(values)
        assert spread[metric]["mean"] == pytest.approx(np.mean(values))
        assert spread[metric]["deviation"] == pytest.approx(np.std(values, ddof=1))
        assert report["arms"][arm][metric] in [pytest.approx(value) for value in values]
    sign = 1 if report["metric"]["higher_is_better"] else -1
    means = {arm: found[metric]["mean"] for arm, found in report["seeds"]["arms"].items()}
    means["baseline"] = report["arms"]["baseline"][metric]
    for name, found in report["seeds"]["comparison"].items():
        assert found["delta"] == pytest.approx(sign * (means["refined"] - means[name.removeprefix("refined_vs_")]))
        assert found["ci95"][0] <= found["delta"] <= found["ci95"][1]


# ---------------------------------------------------------------- seeds


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
    from dsd_refine.cli.app import main

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
    for name in sorted(layers):
        weights = tensors[name]
        zero = weights == 0
        least = weights[~zero].abs().sort().values[int(0.2 * int((~zero).sum()))]
        weights[zero] = (torch.rand(int(zero.sum()), generator=generator) * 2 - 1) * least
    shutil.copytree(DEMO / "checkpoint", place / "source")
    save_file(tensors, place / "source/model.safetensors")
    return place / "source"


def test_where_the_mask_truly_helps_it_gets_the_credit(command, noisy, tmp_path):
    """Nothing trains (rates 0): all that differs is the mask, and magnitude finds the noise where chance does not."""
    few = ("--lr", "0", "--sparsity", "0.4", "--sparse-steps", "1", "--dense-steps", "1")
    report = digits(command, noisy, tmp_path / "out", *few, "--control", "dense", "--control", "random")
    assert (report["verdict"], report["credit"]) == ("better", "mask")
    for control in ("dense", "random"):
        found = report["comparison"][f"refined_vs_{control}"]
        assert found["delta"] > 0
        assert found["p_adjusted"] < 0.05


def test_where_only_training_on_helps_the_control_shares_the_credit(command, tmp_path):
    few = ("--sparsity", "0.1", "--dense-steps", "15")
    report = digits(command, DEMO / "checkpoint", tmp_path / "out", *few, "--gate", "beats-control", code=3)
    assert (report["verdict"], report["credit"]) == ("better", "training")
    clauses = ("did as well", "not shown to be better than")
    for place in ("rejected/README.md", "dsd/report.html"):
        assert any(clause in (tmp_path / "out" / place).read_text() for clause in clauses), place
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
    few = ("--sparse-steps", "30", "--dense-steps", "15")
    report = digits(command, DEMO / "checkpoint", tmp_path / "out", *few, "--lr", "0.2", train=tmp_path / "wrong.parquet")
    assert (report["verdict"], report["credit"]) == ("worse", "none")
    assert report["arms"]["dense"]["accuracy"] < report["arms"]["baseline"]["accuracy"] - 0.05


# ---------------------------------------------------------------- equal rows


def test_equal_evaluation_rows_are_counted_named_and_count_once(command, tmp_path):
    """The demo's test rows, each twice: half of them tell nothing new."""
    from datasets import Dataset, concatenate_datasets

    rows = Dataset.from_parquet(str(DEMO / "test.parquet"), cache_dir=str(tmp_path / "cache")).select(range(120))
    rows.to_parquet(str(tmp_path / "once.parquet"))
    concatenate_datasets([rows, rows]).to_parquet(str(tmp_path / "twice.parquet"))
    reports = {}
    for name in ("once", "twice"):
        found = command(
            DEMO / "checkpoint", "--data", DEMO / "train.parquet", "--eval-data", tmp_path / f"{name}.parquet", "--recipe",
            "digits", "-o", tmp_path / name, "--gate", "none", "--device", "cpu", "--sparse-steps", "8", "--dense-steps", "4",
            "--control", "none",
        )  # fmt: skip
        assert found.code == 0, found.err
        reports[name] = report_of(tmp_path / name)
    distinct = len({image["bytes"] for image in pq.read_table(tmp_path / "once.parquet")["image"].to_pylist()})
    warned = f"{240 - distinct} of 240 evaluation rows repeat the content of another"
    assert any(warned in warning for warning in reports["twice"]["warnings"])
    assert warned in found.out
    once, twice = (reports[name]["comparison"]["refined_vs_baseline"] for name in ("once", "twice"))
    assert (twice["gained"], twice["lost"]) == (2 * once["gained"], 2 * once["lost"])
    assert once["gained"] + once["lost"]
    assert (twice["p_value"], twice["ci95"]) == (pytest.approx(once["p_value"]), pytest.approx(once["ci95"]))


# ---------------------------------------------------------------- what is read in the terminal, and the gate


@pytest.mark.parametrize(("margin", "code"), [("0.9", 0), ("0", 3)])
def test_the_gate_of_non_inferiority_looks_at_the_interval_s_lower_end(command, made, tmp_path, margin, code):
    found = command(
        made / "bert", "--data", made / "texts.csv", "-o", tmp_path / "out", *SHORT, "--gate", "non-inferior",
        "--margin", margin, "--lr", "0", "--sparsity", "0",
    )  # fmt: skip
    assert found.code == code, found.err
    report = report_of(tmp_path / "out")
    low, _ = report["comparison"]["refined_vs_baseline"]["ci95"]
    assert report["gate"] == {"rule": "non-inferior", "passed": low > -float(margin)}
    assert "the 95 % interval ends less than the margin below the source" in found.out


def test_without_a_control_nobody_gets_the_credit(command, noisy, tmp_path):
    found = command(
        noisy, "--data", DEMO / "train.parquet", "--eval-data", DEMO / "test.parquet", "-o", tmp_path / "out", "--recipe",
        "digits", "--control", "none", "--device", "cpu", "--lr", "0", "--sparsity", "0.4", "--sparse-steps", "1", "--dense-steps", "1",
    )  # fmt: skip
    assert found.code == 0, found.err
    assert report_of(tmp_path / "out")["credit"] == "unknown"
    assert "without a control, it is not known whether the mask helped" in found.out
