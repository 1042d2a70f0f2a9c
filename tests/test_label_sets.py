"""Images with several labels a row, of every library; how it is told that a row has several."""

import json

import builders
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import SHORT
from heads import striped_folder, write
from outputs import report_of, same
from runs import stop_after
from sklearn import metrics as judge

QUIET = (*SHORT, "--batch-size", "6", "--control", "none", "--quiet")
ANIMALS = ("cat", "dog", "bird")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Models of the three libraries, and pictures with lists of labels, or with columns of 0 and 1."""
    place = tmp_path_factory.mktemp("sets")
    builders.timm_checkpoint(place / "timm", ANIMALS)
    builders.torchvision_checkpoint(place / "torchvision", classes=ANIMALS)
    builders.vit_checkpoint(place / "vit", ANIMALS, problem_type="multi_label_classification")
    striped_folder(place / "lists", ANIMALS)
    striped_folder(place / "flags", ANIMALS, flags=True)
    return place


def run(command, model, data, out, *more):
    found = command(model, "--data", data, "-o", out, *QUIET, *more)
    assert found.code == 0, found.err
    return report_of(out), pq.read_table(out / "dsd/predictions.parquet").to_pydict()


@pytest.mark.parametrize("library", ["timm", "torchvision", "vit"])
def test_the_command_refines_and_sklearn_gives_its_figures(command, seen, tmp_path, library):
    report, table = run(command, seen / library, seen / "lists", tmp_path / "out")
    assert (report["task"], report["metric"]["name"]) == ("image-classification", "f1_micro")
    assert report["data"]["columns"] == {"image": "image", "label": "labels"}
    assert command("verify", seen / library, tmp_path / "out").code == 0
    flags = [
        [[name in text.split(", ") for name in ANIMALS] for text in table[column]]
        for column in ("target", "prediction_refined")
    ]
    true, guessed = np.array(flags)
    figures = report["arms"]["refined"]
    assert figures["f1_micro"] == pytest.approx(judge.f1_score(true, guessed, average="micro", zero_division=0))
    scores = np.array(table["stats_refined"])[:, 9:]
    assert figures["map"] == pytest.approx(judge.average_precision_score(true, scores))
    losses = [judge.log_loss(true[:, k], 1 / (1 + np.exp(-scores[:, k])), labels=[False, True]) for k in range(3)]
    assert figures["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert report["comparison"]["refined_vs_baseline"]["test"] == "paired-bootstrap"


def test_lists_and_columns_of_flags_say_the_same(command, seen, tmp_path):
    one, _ = run(command, seen / "timm", seen / "lists", tmp_path / "one")
    two, _ = run(command, seen / "timm", seen / "flags", tmp_path / "two")
    assert two["data"]["columns"]["label"] == ",".join(ANIMALS)
    assert one["arms"] == two["arms"]


def test_a_model_learns_several_labels(command, seen, tmp_path):
    steps = ("--sparse-steps", 40, "--dense-steps", 10, "--lr", "0.02", "--batch-size", 12, "--set", "augment={}")
    report, _ = run(command, seen / "timm", striped_folder(tmp_path / "d", ANIMALS, 60), tmp_path / "out", *steps)
    assert report["arms"]["refined"]["map"] > report["arms"]["baseline"]["map"]
    assert report["arms"]["refined"]["loss"] < report["arms"]["baseline"]["loss"]


def test_stopped_and_resumed(command, seen, tmp_path):
    one, two = ([seen / "timm", "--data", seen / "lists", "-o", tmp_path / name, *QUIET] for name in ("one", "two"))
    assert command(*one).code == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        assert command(*two, "--resume").code == 4
    assert command(*two, "--resume").code == 0
    same(tmp_path / "one", tmp_path / "two")


def test_what_could_mean_two_things_is_refused(refused, seen, tmp_path):
    """One label in each list; a single label beside flags; a config and data that contradict each other."""
    rows = [json.loads(line) for line in (seen / "lists/metadata.jsonl").read_text().splitlines()]

    def data(name, change):
        folder = striped_folder(tmp_path / name, ANIMALS)
        write(folder / "metadata.jsonl", [{"file_name": row["file_name"], **change(row["labels"])} for row in rows])
        return folder

    one = data("one", lambda labels: {"labels": [*labels, "cat"][:1]})
    assert "holds one label in a list" in refused(seen / "timm", "--data", one, *QUIET)
    plain = data("plain", lambda labels: {"label": [*labels, "cat"][0]})
    said = refused(seen / "vit", "--data", plain, *QUIET)
    assert "the model gives several labels a row: write a list" in said
    both = data("both", lambda labels: {"label": [*labels, "cat"][0], **{name: int(name in labels) for name in ANIMALS}})
    said = refused(seen / "timm", "--data", both, *QUIET)
    assert "could each be the label: name what is meant, as --label-column cat,dog,bird" in said
    single = builders.vit_checkpoint(tmp_path / "single", ANIMALS, problem_type="single_label_classification")
    said = refused(single, "--data", seen / "lists", *QUIET)
    assert "need a text or image model whose config says `problem_type: multi_label_classification`" in said
    other = data("other", lambda labels: {"labels": [*labels, "horse", "cat"]})
    assert "no class names of the model: horse" in refused(seen / "timm", "--data", other, *QUIET)
