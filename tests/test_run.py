"""Whole runs of the three tasks with tiny models: the output, the report, the numbers in it, and what must repeat."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import copy_folder, image_folder, text_file, timm_checkpoint
from conftest import SHORT, hashes
from outputs import report_of, strip
from safetensors.torch import load_file, save_file

FIELDS = [
    "schema",
    "argv",
    "seed",
    "exit_code",
    "environment",
    "source",
    "output",
    "task",
    "metric",
    "labels",
    "data",
    "phases",
    "layers",
    "masked_share",
    "maskable_share",
    "arms",
    "comparison",
    "verdict",
    "gate",
    "selected",
    "warnings",
]
PHASE = [
    "arm",
    "kind",
    "sparsity",
    "measured_sparsity",
    "epochs",
    "optimizer_steps",
    "samples",
    "lr_first",
    "lr_peak",
    "lr_last",
    "loss_first",
    "loss_last",
    "seconds",
    "samples_per_second",
    "holdout",
]
LAYER = ["name", "shape", "weights", "source_zeros", "masked", "zeros_in_sparse", "excluded"]
ENVIRONMENT = [
    "python",
    "torch",
    "timm",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "device",
    "processes",
    "sharded",
]
COMPARISON = ["delta", "ci95", "p_value", "p_adjusted", "gained", "lost", "test"]
DATA = {"timm": "pictures", "vit": "colours", "bert": "texts.csv", "gpt2": "documents.txt"}
STRONG = ("--optimizer", "adamw", "--lr", "0.01", "--warmup-steps", "0")


@pytest.fixture
def go(command, made, tmp_path):
    """Run a tiny model on its data: `go("bert", "--seed", 1)` -> OUT; `code` is the exit code expected."""
    count = iter(range(100))

    def run(model, *options, code=0, out=None):
        out = out or tmp_path / f"out{next(count)}"
        source = model if isinstance(model, Path) else made / model
        data = [] if "--data" in options or "--recipe" in options else ["--data", made / DATA[source.name.split("-")[0]]]
        found = command(source, *data, "-o", out, *SHORT, "--quiet", *options)
        assert found.code == code, found.err
        assert not out.with_name(out.name + ".partial").exists()
        return out

    return run


@pytest.fixture(scope="module")
def runs(made, finished, tmp_path_factory):
    """A finished run with its phases of each tiny model, at rates that move its predictions."""
    from dsd_refine.cli.app import main

    found = {"timm": finished}
    for model in ("vit", "bert", "gpt2"):
        found[model] = tmp_path_factory.mktemp(model) / "out"
        where = [made / model, "--data", made / DATA[model], "-o", found[model]]
        with pytest.raises(SystemExit) as ended:
            main(
                [
                    str(a)
                    for a in [*where, *SHORT, *STRONG, "--save-phases", "--quiet", "--control", "dense", "--control", "random"]
                ]
            )
        assert ended.value.code == 0
    return found


MODELS = pytest.mark.parametrize("model", list(DATA))


# ---------------------------------------------------------------- the report


@MODELS
def test_the_report_has_the_contracts_fields(runs, model):
    report = report_of(runs[model])
    assert [name for name in report if name != "preprocessing"] == [
        *FIELDS,
        "credit",
        "rows_to_decide",
        "seeds",
        "holdout",
        "cost",
        "published",
        "published_name",
        "lost",
        "interpolated",
        "search",
        "rate_tests",
        "soups",
        "rounds",
    ]
    assert ("preprocessing" in report) == (model in ("timm", "vit"))
    assert list(report["environment"]) == ENVIRONMENT
    assert list(report["source"]) == ["model", "resolved", "revision", "library", "weights_key", "files"]
    assert list(report["output"]) == ["path", "files"]
    assert list(report["metric"]) == ["name", "higher_is_better"]
    assert list(report["data"]) == ["train", "holdout", "eval", "sources", "columns", "rule", "unused", "notes"]
    for source in report["data"]["sources"]:
        part = report["data"][source["part"]]
        assert list(part) == ["rows", "skipped", "fingerprint"]
        assert part["rows"] == source["rows"]
    for phase in report["phases"]:
        assert list(phase) == [*PHASE, "seed", "batchnorm_reestimated"]
    for layer in report["layers"]:
        assert list(layer) == LAYER
    for name, found in report["comparison"].items():
        assert list(found) == COMPARISON
        assert name.startswith("refined_vs_")
    assert list(report["gate"]) == ["rule", "passed"]
    assert list(report["selected"]) == ["sparsity", "epoch"]
    assert report["schema"] == 1
    assert (report["labels"] is None) == (model == "gpt2")
    controls = [] if model == "timm" else ["random"]
    assert list(report["arms"]) == ["baseline", "refined", "dense", *controls]
    assert list(report["comparison"]) == ["refined_vs_baseline", "refined_vs_dense", *(f"refined_vs_{c}" for c in controls)]
    assert report["environment"]["device"] == "cpu"
    assert report["environment"]["processes"] == 1


@MODELS
def test_zeros_are_counted_on_the_sparse_weights(runs, made, model):
    report = report_of(runs[model])
    sparse = load_file(runs[model] / "dsd/phases/1-sparse/model.safetensors")
    source = load_file(made / model / "model.safetensors")
    maskable = masked = zeros = 0
    for layer in report["layers"]:
        found = int((sparse[layer["name"]] == 0).sum())
        uncounted = layer["zeros_in_sparse"] is None and "tied" in (layer["excluded"] or "")
        assert uncounted or layer["zeros_in_sparse"] == found, layer["name"]
        assert layer["source_zeros"] == int((source[layer["name"]] == 0).sum())
        assert layer["weights"] == source[layer["name"]].numel()
        assert layer["shape"] == list(source[layer["name"]].shape)
        if layer["excluded"] is None:
            assert layer["masked"] == round(report["selected"]["sparsity"] * layer["weights"])
            assert found >= layer["masked"]
            maskable, masked, zeros = maskable + layer["weights"], masked + layer["masked"], zeros + found
        else:
            assert layer["masked"] == 0
    first = next(phase for phase in report["phases"] if phase["arm"] == "refined")
    assert first["measured_sparsity"] == zeros / maskable
    outside = sum(
        x["weights"] for x in report["layers"] if not (x["excluded"] or "").startswith(("embedding", "the same storage"))
    )
    assert report["masked_share"] == pytest.approx(masked / outside)
    assert report["maskable_share"] == pytest.approx(maskable / outside)


@MODELS
def test_phases_report_what_the_log_holds(runs, model):
    report, out = report_of(runs[model]), runs[model]
    lines = [json.loads(line) for line in (out / "dsd/log.jsonl").read_text().splitlines()]
    arms = list(dict.fromkeys(phase["arm"] for phase in report["phases"]))
    for number, phase in enumerate(report["phases"]):
        name = f"{number % 2 + 1}-{phase['kind']}"
        steps = [x for x in lines if x["event"] == "step" and (x["arm"], x["phase"]) == (phase["arm"], name)]
        assert [x["step"] for x in steps] == list(range(1, phase["optimizer_steps"] + 1))
        assert phase["samples"] == sum(x["samples"] for x in steps)
        assert (phase["lr_first"], phase["lr_last"]) == (steps[0]["lr"], steps[-1]["lr"])
        assert phase["lr_peak"] == max(x["lr"] for x in steps)
        assert (phase["loss_first"], phase["loss_last"]) == (steps[0]["loss"], steps[-1]["loss"])
        assert list(steps[0]) == ["event", "arm", "phase", "step", "epoch", "lr", "loss", "samples", "skipped"]
        assert not any(x["skipped"] for x in steps)
        assert report["metric"]["name"] in phase["holdout"]
    assert [(p["arm"], p["kind"]) for p in report["phases"]] == [
        (arm, kind) for arm in arms for kind in (("dense" if arm == "dense" else "sparse"), "dense")
    ]
    evaluations = [x for x in lines if x["event"] == "evaluation" and x["part"] == "eval"]
    assert [x["arm"] for x in evaluations] == ["baseline", *arms]  # once each
    for line in evaluations:
        assert {name: line[name] for name in report["arms"][line["arm"]]} == report["arms"][line["arm"]]


@MODELS
def test_predictions_recompute_every_figure(runs, made, model):
    report, table = report_of(runs[model]), pq.read_table(runs[model] / "dsd/predictions.parquet").to_pydict()
    rows = len(table["row"])
    assert rows == report["data"]["eval"]["rows"]
    scores = {arm: np.array(table[f"score_{arm}"]) for arm in report["arms"]}
    counts = {arm: np.array(table[f"count_{arm}"]) for arm in report["arms"]}
    name = report["metric"]["name"]
    for arm, figures in report["arms"].items():
        assert figures[name] == pytest.approx(scores[arm].sum() / counts[arm].sum(), rel=1e-12)
        if model == "gpt2":
            assert figures["perplexity"] == pytest.approx(np.exp(figures["loss"]), rel=1e-12)
            continue
        hits = [p == t for p, t in zip(table[f"prediction_{arm}"], table["target"], strict=True)]
        assert scores[arm].tolist() == [float(hit) for hit in hits]
        assert counts[arm].tolist() == [1] * rows
        assert set(table["target"]) <= set(report["labels"]["model"])
    for pair, found in report["comparison"].items():
        other = pair.removeprefix("refined_vs_")
        sign = 1 if report["metric"]["higher_is_better"] else -1
        assert found["delta"] == pytest.approx(
            sign * (report["arms"]["refined"][name] - report["arms"][other][name]), abs=1e-12
        )
        low, high = found["ci95"]
        assert low <= found["delta"] <= high
        assert found["p_value"] <= found["p_adjusted"] <= 1
        if model == "gpt2":
            assert (found["gained"], found["lost"]) == (None, None)
        else:
            change = scores["refined"] - scores[other]
            assert (found["gained"], found["lost"]) == (int((change > 0).sum()), int((change < 0).sum()))


@pytest.mark.parametrize("model", ["timm", "vit"])
def test_picture_rows_go_by_file_name(runs, made, model):
    table = pq.read_table(runs[model] / "dsd/predictions.parquet").to_pydict()
    for name, target in zip(table["row"], table["target"], strict=True):
        assert (made / DATA[model] / name).is_file()
        assert name.split("/")[:2] == ["test", target]


@MODELS
def test_hashes_are_of_the_files_as_written(runs, made, model):
    report, written, source = report_of(runs[model]), hashes(runs[model]), hashes(made / model)
    listed = {side: {x["name"]: x["sha256"] for x in report[side]["files"]} for side in ("source", "output")}
    assert listed["source"] == source
    ours = ("dsd/", "README", ".eval_results/")
    assert listed["output"] == {name: digest for name, digest in written.items() if not name.startswith(ours)}
    assert listed["output"].keys() == source.keys()
    changed = {name for name in source if source[name] != written[name]}
    assert changed == {"model.safetensors"}


@MODELS
def test_the_output_is_published_whole(runs, model):
    out = runs[model]
    names = {path.name for path in (out / "dsd").iterdir()}
    assert {"report.json", "report.html", "recipe.yaml", "log.jsonl", "predictions.parquet", "phases"} <= names
    assert {path.name for path in (out / "dsd/phases").iterdir()} == {"1-sparse", "2-dense"}
    assert (out / "README.md").is_file()
    assert not out.with_name("out.partial").exists()


@MODELS
def test_verify_passes_and_finds_a_changed_byte(command, runs, made, tmp_path, model):
    assert command("verify", made / model, runs[model]).code == 0
    spoiled = copy_folder(runs[model], tmp_path / "spoiled")
    path = spoiled / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    found = command("verify", made / model, spoiled)
    assert found.code == 3
    assert "SHA-256 of the output's file" in found.out


def test_verify_tells_the_output_of_another_source(command, runs, made):
    found = command("verify", made / "timm", runs["vit"])
    assert found.code == 3
    assert "header (names, shapes, dtypes, order, metadata) differs" in found.out


def test_others_load_the_output(runs):
    import timm
    import transformers

    assert timm.create_model(f"local-dir:{runs['timm']}", pretrained=True).num_classes == 3
    for model, auto in (
        ("vit", transformers.AutoModelForImageClassification),
        ("bert", transformers.AutoModelForSequenceClassification),
        ("gpt2", transformers.AutoModelForCausalLM),
    ):
        _, info = auto.from_pretrained(runs[model], output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]


def test_the_plain_library_repeats_the_predictions(runs, made):
    """What is published is what was judged: transformers by itself, on the rows as listed, finds the same classes."""
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(runs["vit"]).eval()
    processor = AutoImageProcessor.from_pretrained(runs["vit"])
    table = pq.read_table(runs["vit"] / "dsd/predictions.parquet").to_pydict()
    images = [Image.open(made / "colours" / name).convert("RGB") for name in table["row"]]
    with torch.no_grad():
        found = model(**processor(images, return_tensors="pt")).logits.argmax(-1).tolist()
    assert [model.config.id2label[i] for i in found] == table["prediction_refined"]
    assert len(set(table["prediction_baseline"])) <= 3


def test_the_metric_of_a_language_model_is_its_librarys_loss(runs, made):
    """The baseline's loss, by transformers' own labels, one window at a time, weighted by target tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(made / "gpt2").eval()
    tokenizer = AutoTokenizer.from_pretrained(made / "gpt2")
    table = pq.read_table(runs["gpt2"] / "dsd/predictions.parquet").to_pydict()
    documents = (made / "documents.txt").read_text().split("\n\n")
    for row, score, count in zip(table["row"], table["score_baseline"], table["count_baseline"], strict=True):
        ids = tokenizer(documents[row].strip())["input_ids"]
        windows = [torch.tensor([ids[i : i + 32]]) for i in range(0, len(ids), 32)]
        windows = [window for window in windows if window.shape[1] > 1]
        with torch.no_grad():
            sums = [float(model(w, labels=w).loss) * (w.shape[1] - 1) for w in windows]
        assert count == sum(w.shape[1] - 1 for w in windows)
        assert score == pytest.approx(sum(sums), rel=1e-5)


@MODELS
def test_masked_weights_come_back(runs, model):
    report = report_of(runs[model])
    sparse = load_file(runs[model] / "dsd/phases/1-sparse/model.safetensors")
    dense = load_file(runs[model] / "dsd/phases/2-dense/model.safetensors")
    moved = sum(
        int(((sparse[x["name"]] == 0) & (dense[x["name"]] != 0)).sum()) for x in report["layers"] if x["excluded"] is None
    )
    assert moved > 0.2 * sum(x["masked"] for x in report["layers"])


def test_the_card_keeps_the_sources_text(go, made, tmp_path):
    source = copy_folder(made / "bert", tmp_path / "bert-card")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Our model\n\nKnows two things.\n")
    (source / "notes.txt").write_text("kept")
    (source / "pytorch_model.bin").write_bytes(b"stale")
    out = go(source)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    assert "# Our model\n\nKnows two things." in card
    assert report_of(out)["verdict"] in card
    assert (out / "notes.txt").read_text() == "kept"
    assert not (out / "pytorch_model.bin").exists()
    assert any("pytorch_model.bin" in line for line in report_of(out)["warnings"])


# ---------------------------------------------------------------- nothing done is nothing changed


@MODELS
def test_no_steps_and_no_sparsity_give_the_sources_bytes(go, made, model):
    out = go(model, "--sparsity", "0", "--sparse-steps", "0", "--dense-steps", "0", "--gate", "not-worse")
    written = hashes(out)
    assert {name: written[name] for name in hashes(made / model)} == hashes(made / model)
    report = report_of(out)
    assert report["comparison"]["refined_vs_baseline"]["delta"] == 0
    assert [phase["optimizer_steps"] for phase in report["phases"]] == [0] * 4
    assert report["verdict"] == "inconclusive"  # so few rows cannot show that none would change
    assert (report["credit"], report["rows_to_decide"]) == ("none", None)


@MODELS
def test_no_rate_and_no_sparsity_leave_every_parameter(go, made, model):
    out = go(model, "--sparsity", "0", "--lr", "0", "--weight-decay", "0")
    source, found = (load_file(folder / "model.safetensors") for folder in (made / model, out))
    moved = {name for name in source if not torch.equal(source[name], found[name])}
    assert all("running_" in name or "num_batches" in name for name in moved)
    assert bool(moved) == (model == "timm")


def test_a_phase_of_no_steps_still_masks(go, made):
    out = go("vit", "--sparsity", "0.5", "--sparse-steps", "0", "--dense-steps", "0", "--save-phases", "--keep", "last")
    report, source, found = report_of(out), load_file(made / "vit/model.safetensors"), load_file(out / "model.safetensors")
    assert report["phases"][0]["measured_sparsity"] == pytest.approx(0.5, abs=0.01)
    for layer in report["layers"]:
        name, k = layer["name"], layer["masked"]
        kept = source[name].clone().flatten()
        kept[kept.abs().sort(stable=True).indices[:k]] = 0  # the smallest, ties by position
        assert torch.equal(found[name].flatten(), kept), name
    assert (out / "dsd/phases/1-sparse/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


# ---------------------------------------------------------------- the gate, the target directory


def test_a_gate_not_met_rejects(command, go, made):
    out = go("gpt2", *STRONG, "--gate", "better", "--lr", "3", code=3)
    report = report_of(out)
    assert report["exit_code"] == 3
    assert report["gate"] == {"rule": "better", "passed": False}
    assert sorted(path.name for path in out.iterdir()) == ["dsd", "rejected"]
    assert hashes(made / "gpt2").keys() | {"README.md"} == hashes(out / "rejected").keys()
    assert command("verify", made / "gpt2", out).code == 0


def test_not_worse_looks_at_the_sign_alone(go, tmp_path):
    """Two documents cannot show that it got worse; twelve can. Neither meets the gate."""
    bad = [*STRONG, "--gate", "not-worse", "--lr", "3"]
    assert report_of(go("gpt2", *bad, code=3))["verdict"] == "inconclusive"
    many = text_file(tmp_path / "many.txt", paragraphs=12, seed=1)
    assert report_of(go("gpt2", *bad, "--eval-data", many, code=3))["verdict"] == "worse"


def test_overwrite_replaces_ours_and_only_with_a_finished_run(command, go, made, tmp_path):
    out = go("bert", "--seed", "1")
    before = hashes(out)
    refused = command(made / "bert", "--data", made / "texts.csv", "-o", out, *SHORT)
    assert refused.code == 2
    broken = command(made / "bert", "--data", made / "texts.csv", "-o", out, *SHORT, "--overwrite", "--label-column", "x")
    assert broken.code == 2
    assert hashes(out) == before
    go("bert", "--seed", "2", "--overwrite", out=out)
    assert report_of(out)["seed"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name]


def test_modes_follow_the_umask(go):
    import os

    before = os.umask(0o027)
    try:
        out = go("bert", "--save-phases")
    finally:
        os.umask(before)
    for path in [out, *out.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


# ---------------------------------------------------------------- the same again


def same(one, two):
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert (one / "dsd/predictions.parquet").read_bytes() == (two / "dsd/predictions.parquet").read_bytes()
    assert (one / "dsd/log.jsonl").read_bytes() == (two / "dsd/log.jsonl").read_bytes()
    assert strip(report_of(one)) == strip(report_of(two))


CROPS = ("--set", "augment={crop: random-resized, flip: 0.5}")


@MODELS
def test_the_same_command_twice(go, model):
    options = [*STRONG, "--control", "random"]
    same(go(model, *options), go(model, *options))


@pytest.mark.parametrize("model", ["timm", "bert"])
def test_workers_change_nothing(go, model):
    same(go(model, *STRONG, "--workers", "0"), go(model, *STRONG, "--workers", "2"))


def test_another_seed_is_another_run(go):
    one, two = (go("bert", *STRONG, "--seed", seed) for seed in (0, 1))
    assert (one / "model.safetensors").read_bytes() != (two / "model.safetensors").read_bytes()
    assert report_of(one)["data"] == report_of(two)["data"]


@pytest.mark.parametrize("model", ["timm", "gpt2"])
def test_the_written_recipe_repeats_the_run(command, made, go, tmp_path, model, monkeypatch):
    out = go(model, *STRONG, "--sparsity", "0.2,0.4", "--seed", "3", "--margin", "0.01")
    monkeypatch.chdir(tmp_path)
    found = command(made / model, "--recipe", out / "dsd/recipe.yaml", "-o", "again", "--device", "cpu", "--quiet")
    assert found.code == 0, found.err
    same(out, tmp_path / "again")
    assert (out / "dsd/recipe.yaml").read_bytes() == (tmp_path / "again/dsd/recipe.yaml").read_bytes()


# ---------------------------------------------------------------- what the options do


def test_several_sparsities_are_tried_and_the_holdout_picks(go):
    out = go("vit", *STRONG, "--sparsity", "0.25,0.9", "--control", "dense", "--control", "random", "--save-phases")
    report = report_of(out)
    tried = [(p["arm"], p["sparsity"]) for p in report["phases"] if p["kind"] == "sparse"]
    assert tried == [("refined", 0.25), ("refined", 0.9), ("random", 0.25), ("random", 0.9)]
    assert sum(p["arm"] == "dense" for p in report["phases"]) == 4
    chosen = report["selected"]["sparsity"]
    assert chosen in (0.25, 0.9)
    ends = [p["holdout"] for p in report["phases"] if p["arm"] == "refined" and p["kind"] == "dense"]
    best = max((end["accuracy"], -end["loss"]) for end in ends)
    picked = ends[[0.25, 0.9].index(chosen)]
    assert (picked["accuracy"], -picked["loss"]) == best
    sparse = load_file(out / "dsd/phases/1-sparse/model.safetensors")
    for layer in report["layers"]:
        if layer["excluded"] is None:
            assert layer["masked"] == round(chosen * layer["weights"])
            assert layer["zeros_in_sparse"] == int((sparse[layer["name"]] == 0).sum()) >= layer["masked"]
    dense = [p["loss_first"] for p in report["phases"] if p["arm"] == "dense"]
    assert dense[0] != dense[2]  # tries of a control have their own seeds


def test_the_holdout_picks_the_best_epoch_of_the_last_phase(go):
    out = go("timm", *STRONG, "--dense-steps", "9", "--dense-lr", "0.02")
    report = report_of(out)
    lines = [json.loads(line) for line in (out / "dsd/log.jsonl").read_text().splitlines()]
    ends = [x for x in lines if x["event"] == "evaluation" and (x["arm"], x["phase"]) == ("refined", "2-dense")]
    assert len(ends) == 3
    ranked = sorted(range(3), key=lambda i: (-ends[i]["accuracy"], ends[i]["loss"], i))
    assert report["selected"]["epoch"] == ranked[0] + 1


def test_the_evaluation_rows_select_nothing(go, tmp_path):
    """The same training rows beside rows that want the opposite: each choice, and each figure it was made by, stays."""
    texts = [f"{word} cat {word} dog" for word in ("good", "bad", "old", "new", "red", "blue", "small", "large")]
    outs = []
    for number, names in enumerate((("neg", "pos"), ("pos", "neg"))):
        lines = [f"{text},{names[row % 2]}" for row, text in enumerate(texts)]
        judge = tmp_path / f"judge{number}.csv"
        judge.write_text("\n".join(["text,label", *lines]) + "\n")
        options = ["--eval-data", judge, *STRONG, "--sparsity", "0.25,0.8", "--seeds", "2", "--control", "none"]
        outs.append(go("bert", *options, "--dense-lr", "0.01", "--dense-steps", "9", "--holdout", "0.4"))
    one, two = (report_of(out) for out in outs)
    assert one["arms"] != two["arms"]
    assert one["selected"] == two["selected"]
    assert [phase["holdout"] for phase in one["phases"]] == [phase["holdout"] for phase in two["phases"]]
    assert (outs[0] / "model.safetensors").read_bytes() == (outs[1] / "model.safetensors").read_bytes()


def test_among_equals_the_first_is_selected(go):
    """At rate 0 every epoch, sparsity (neither masks a weight) and seed ends the same: what came first is kept."""
    still = ["--lr", "0", "--dense-lr", "0", "--weight-decay", "0", "--dense-steps", "9"]
    out = go("vit", *still, "--sparsity", "0,1e-9", "--seeds", "2", "--control", "none")
    report = report_of(out)
    ends = [phase["holdout"] for phase in report["phases"] if phase["arm"] == "refined"]
    assert all(end == ends[0] for end in ends)
    assert len({phase["seed"] for phase in report["phases"]}) > 1
    assert report["selected"] == {"sparsity": 0.0, "epoch": 1, "seed": report["seed"]}


def test_a_bfloat16_source_is_judged_and_selected_as_it_is_written(go, made, tmp_path):
    """The loss of the published weights, by transformers itself, is the one reported; of the unrounded ones it is not."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = copy_folder(made / "gpt2", tmp_path / "gpt2-half")
    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    out = go(source, *STRONG, "--keep", "last")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer, losses = AutoTokenizer.from_pretrained(made / "gpt2"), {}
    for row, text in enumerate((made / "documents.txt").read_text().split("\n\n")):
        ids = torch.tensor([tokenizer(text.strip())["input_ids"]])
        windows = [window for window in ids.split(32, dim=1) if window.shape[1] > 1]
        with torch.no_grad():
            losses[row] = sum(float(model(w, labels=w).loss) * (w.shape[1] - 1) for w in windows)
    table = pq.read_table(out / "dsd/predictions.parquet").to_pydict()
    for row, score in zip(table["row"], table["score_refined"], strict=True):
        assert score == pytest.approx(losses[row], rel=1e-6)


def test_random_masks_have_the_same_counts(go):
    report = report_of(go("timm", "--control", "random", "--control", "dense"))
    sparse = {p["arm"]: p["measured_sparsity"] for p in report["phases"] if p["kind"] == "sparse"}
    assert sparse["refined"] == sparse["random"]
    losses = {p["arm"]: p["loss_first"] for p in reversed(report["phases"])}
    assert len(set(losses.values())) == 3


def test_arms_share_rates_rows_and_steps(go):
    phases = report_of(go("bert", *STRONG, "--control", "dense", "--control", "random"))["phases"]
    shared = ("optimizer_steps", "samples", "lr_first", "lr_peak", "lr_last", "epochs")
    arms = [[tuple(p[key] for key in shared) for p in phases if p["arm"] == arm] for arm in ("refined", "dense", "random")]
    assert arms[0] == arms[1] == arms[2]


def test_without_a_holdout_the_end_is_kept(go):
    out = go("timm", "--holdout", "0", "--keep", "last", "--save-phases")
    report = report_of(out)
    assert report["data"]["holdout"] is None
    assert report["data"]["train"]["rows"] == 24
    assert all(phase["holdout"] is None for phase in report["phases"])
    assert (out / "dsd/phases/2-dense/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_keep_sparse_publishes_the_sparse_weights(go):
    out = go("bert", "--keep", "sparse", "--sparsity", "0.6", "--save-phases")
    report, found = report_of(out), load_file(out / "model.safetensors")
    assert {p["kind"] for p in report["phases"] if p["arm"] == "refined"} == {"sparse"}
    for layer in report["layers"]:
        if layer["excluded"] is None:
            assert int((found[layer["name"]] == 0).sum()) >= layer["masked"] > 0
    assert (out / "dsd/phases/1-sparse/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_bfloat16_source_stays_bfloat16(go, command, made, tmp_path):
    source = copy_folder(made / "gpt2", tmp_path / "gpt2-half")
    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(source / "model.safetensors").items()}
    tensors["transformer.ln_f.weight"] = tensors["transformer.ln_f.weight"].float()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    out = go(source, *STRONG)
    found = load_file(out / "model.safetensors")
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in tensors.items()}
    assert any(not torch.equal(found[name], tensors[name]) for name in tensors)
    assert command("verify", source, out).code == 0


def test_accumulation_is_one_larger_batch(go):
    options = [
        "--optimizer",
        "sgd",
        "--lr",
        "0.05",
        "--warmup-steps",
        "0",
        "--sparse-steps",
        "4",
        "--set",
        "max_grad_norm=null",
    ]
    whole, parts = (
        go("vit", *options, "--batch-size", b, "--gradient-accumulation-steps", n) for b, n in ((8, 1), (3, 3))
    )  # 21 rows: 8 + 8 + 5 and (3 + 3 + 3) + (3 + 3 + 3) + 3
    samples = [[p["samples"] for p in report_of(out)["phases"]] for out in (whole, parts)]
    assert samples[0] != samples[1]
    whole, parts = (go("vit", *options, "--batch-size", b, "--gradient-accumulation-steps", n) for b, n in ((9, 1), (3, 3)))
    one, two = (load_file(out / "model.safetensors") for out in (whole, parts))
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-6) for name in one)
    assert [p["samples"] for p in report_of(whole)["phases"]] == [p["samples"] for p in report_of(parts)["phases"]]


def test_the_evaluation_batch_size_changes_no_figure(go):
    figures = [
        report_of(go("gpt2", "--batch-size", size, "--sparse-steps", "0", "--dense-steps", "0"))["arms"] for size in (1, 7)
    ]
    for arm in figures[0]:
        assert figures[0][arm] == pytest.approx(figures[1][arm], rel=1e-6)


@pytest.mark.parametrize("momentum", ["0", "0.9"])  # whose first step is a plain one
def test_a_restored_weight_is_minus_rate_times_gradient(go, made, momentum):
    """re-Dense begins at 0 with a new optimizer: after one plain SGD step a restored weight is exactly -lr * g."""
    options = [
        "--optimizer",
        "sgd",
        "--momentum",
        momentum,
        "--weight-decay",
        "0",
        "--set",
        "max_grad_norm=null",
        "--warmup-steps",
        "0",
    ]
    out = go("vit", *options, "--set", "augment={crop: none, flip: 0.0}", "--sparse-steps", "2", "--dense-steps", "1", "--lr", "0.1", "--dense-lr", "0.25", "--batch-size", "64",
             "--save-phases", "--keep", "last")  # fmt: skip
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(out / "dsd/phases/1-sparse")
    processor = AutoImageProcessor.from_pretrained(out)
    dense = dict(AutoModelForImageClassification.from_pretrained(out / "dsd/phases/2-dense").named_parameters())
    train = _training_files(made, report_of(out)["data"]["train"]["rows"])
    images = [Image.open(made / "colours" / name).convert("RGB") for name in train]
    targets = torch.tensor(["abc".index(name.split("/")[1]) for name in train])
    model.eval()
    torch.nn.functional.cross_entropy(model(**processor(images, return_tensors="pt")).logits, targets).backward()
    checked = 0
    for name, parameter in model.named_parameters():
        there = (parameter == 0) & (dense[name] != 0)
        if parameter.ndim > 1 and there.any():
            assert torch.allclose(dense[name][there], -0.25 * parameter.grad[there], rtol=1e-3, atol=1e-7), name
            checked += int(there.sum())
    assert checked > 1000


def _training_files(made, rows):
    """The pictures that train: all but those that the holdout took, by the rule of the contract."""
    import hashlib

    from dsd_refine.data.splits import SALT

    kept = []
    for name in "abc":
        files = sorted((made / "colours/train" / name).glob("*.png"))
        files.sort(key=lambda path: hashlib.sha256(SALT + hashlib.sha256(path.read_bytes()).digest()).digest())
        kept += [f"train/{name}/{path.name}" for path in files[round(0.1 * len(files)) :]]
    assert len(kept) == rows
    return kept


def test_unlike_data_do_not_move_the_holdout(go, made, tmp_path):
    image_folder(tmp_path / "d", per_class=12, splits=["train"])
    image_folder(tmp_path / "d", per_class=4, splits=["test"], seed=9)
    one = report_of(go("timm", "--data", tmp_path / "d"))["data"]
    two = report_of(go("timm", "--data", tmp_path / "d", "--seed", "5", "--batch-size", "4"))["data"]
    assert one == two
    assert [one[part]["rows"] for part in ("train", "holdout", "eval")] == [33, 3, 12]


def test_skipped_rows_are_in_the_report(go, tmp_path):
    image_folder(tmp_path / "d")
    (tmp_path / "d/train/b/003.png").write_bytes(b"no picture")
    report = report_of(go("timm", "--data", tmp_path / "d"))
    assert report["data"]["train"]["rows"] + report["data"]["holdout"]["rows"] == 23
    assert [row["row"] for row in report["data"]["train"]["skipped"]] == ["train/b/003.png"]


def test_a_models_own_placeholder_names_need_equal_counts(go, tmp_path):
    source = timm_checkpoint(tmp_path / "timm-nameless", classes=3)
    report = report_of(go(source))
    assert report["labels"]["model"] == ["a", "b", "c"]
    assert "sorted" in report["labels"]["rule"]


def test_the_epoch_that_was_kept_is_reported_and_log_lines_name_the_arm(go):
    out = go("timm", "--keep", "last", "--sparsity", "0.3,0.5", "--dense-steps", "7")
    report = report_of(out)
    steps = -(-report["data"]["train"]["rows"] // 8)
    assert report["selected"]["epoch"] == -(-7 // steps) > 1
    lines = [json.loads(line) for line in (out / "dsd/log.jsonl").read_text().splitlines()]
    assert {line["arm"] for line in lines} == {"baseline", "refined", "dense"}
    assert {line.get("try") for line in lines if line["event"] == "step"} == {1, 2}
    table = pq.read_table(out / "dsd/predictions.parquet").to_pydict()
    for arm, found in report["arms"].items():
        assert sum(table[f"loss_{arm}"]) / len(table["row"]) == pytest.approx(found["loss"])


def test_a_plan_s_disk_is_what_a_run_looks_for(command, made):
    """More seeds keep more weights."""
    told = [command("plan", made / "timm", "--seeds", seeds, "--json").out for seeds in ("1", "50")]
    one, fifty = (json.loads(text)["totals"]["disk"] for text in told)
    assert float(fifty.split()[0]) > float(one.split()[0])
