"""Before anything is trained: what is expected, what the source's card says, and the score of a trivial predictor."""

import json
import math
from types import SimpleNamespace

import builders
import pytest
import torch
import yaml
from conftest import SHORT
from outputs import report_of
from safetensors.torch import load_file, save_file

from dsd_refine.evidence.baseline_checks import check_baseline
from dsd_refine.evidence.card_results import CardResult, read_card_results
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.report.card import data_name
from dsd_refine.tasks.base import ChanceBaseline

# ---------------------------------------------------------------- what is expected


def test_an_expected_figure_that_is_not_reached_stops_the_run(refused, command, made, tmp_path):
    args = [made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", *SHORT, "--quiet"]
    message = refused(*args, "--expect", "accuracy=0.98")
    assert "accuracy=0.98" in message
    assert "preprocessing, the labels or the rows" in message.replace("\n", " ")
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


# ---------------------------------------------------------------- guessing


def warned(tmp_path, found, *, guesses=(), metric="accuracy", data="pictures", **recipe):
    """The warnings of `check_baseline` of a source in `tmp_path` that reaches `found`."""
    task = SimpleNamespace(metric=metric, chance_baselines=guesses)
    phases = (Phase(kind="dense", steps=1, lr=0.1),)
    return check_baseline(task, found, Recipe(phases=phases, data=data, **recipe), tmp_path)


HALF = ChanceBaseline("accuracy", 0.5, "guessing", 100, higher_is_better=True)
MOST = ChanceBaseline("accuracy", 0.8, "always naming 'x'", 100, higher_is_better=True)


@pytest.mark.parametrize(
    ("value", "says"), [(0.3, "guessing (0.5000)"), (0.57, "guessing"), (0.6, "always"), (0.85, "always"), (0.9, None)]
)
def test_an_accuracy_must_surely_beat_guessing_and_the_commonest_class(tmp_path, value, says):
    """Of 100 rows: 58 and 88 would be reached by chance less than once in twenty."""
    lines = warned(tmp_path, {"accuracy": value}, guesses=(HALF, MOST))
    assert len(lines) == (says is not None)
    assert says is None or f"is not clearly better than {says}" in lines[0]


@pytest.mark.parametrize(
    ("guess", "at", "beaten"),
    [
        (ChanceBaseline("loss", 5.0, "guessing"), (7.0, 5.0, 4.98), (4.9, 0.1)),
        (ChanceBaseline("wer", 1.0, "hearing nothing"), (1.4, 1.0), (0.9, 0.0)),
        (ChanceBaseline("bleu4", 0.0, "writing nothing", higher_is_better=True), (0.0,), (0.01, 0.4)),
    ],
)
def test_a_sum_must_beat_its_guess_by_the_margin(tmp_path, guess, at, beaten):
    for value in at:
        assert len(warned(tmp_path, {guess.metric: value}, guesses=(guess,))) == 1
    for value in beaten:
        assert warned(tmp_path, {guess.metric: value}, guesses=(guess,)) == []


@pytest.fixture
def warnings_of(command, tmp_path):
    """Run the command; returns the lines that speak of guessing."""

    def run(*args):
        found = command(*args, "-o", tmp_path / "out", *SHORT, "--control", "none")
        assert found.code == 0, found.err
        lines = [line for line in report_of(tmp_path / "out")["warnings"] if "is not clearly better" in line]
        assert all(f"warning: {line}" in found.err for line in lines)
        return lines

    return run


def changed(source, target, **values):
    """A copy of a source in which the named tensors hold one value each."""
    builders.copy_folder(source, target)
    tensors = load_file(target / "model.safetensors")
    for name, value in values.items():
        tensors[name.replace("__", ".")].copy_(torch.as_tensor(value))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_a_source_that_guesses_is_warned_of(warnings_of, made):
    (line,) = warnings_of(made / "timm", "--data", made / "pictures")
    assert "is not clearly better than guessing (0.3333)" in line


def test_a_source_that_always_names_the_commonest_class_is_warned_of(warnings_of, made, tmp_path):
    source = changed(made / "bert", tmp_path / "m", classifier__weight=0.0, classifier__bias=[-9.0, 9.0])
    rows = builders.text_csv(tmp_path / "all.csv", 80).read_text().splitlines()
    (tmp_path / "few.csv").write_text("\n".join([rows[0], *rows[1:9:2], *rows[2:34:2]]) + "\n")  # 4 neg, 16 pos
    (line,) = warnings_of(source, "--data", made / "texts.csv", "--eval-data", tmp_path / "few.csv")
    assert "accuracy of 0.8000 is not clearly better than always naming 'pos', the commonest class here, (0.8000)" in line


def test_language_models_that_hold_all_tokens_for_equal_are_warned_of(warnings_of, made, tmp_path):
    source = changed(made / "gpt2", tmp_path / "m", transformer__wte__weight=0.0)
    (line,) = warnings_of(source, "--data", made / "documents.txt")
    size = len(builders.SPECIAL) + len(builders.WORDS)
    assert f"is not clearly better than guessing among the tokenizer's {size} tokens ({math.log(size):.4f})" in line


def test_masked_ones_and_captioners_too(warnings_of, made, tmp_path):
    model = builders.masked_checkpoint(tmp_path / "masked")
    source = changed(model, tmp_path / "m", bert__embeddings__word_embeddings__weight=0.0)
    (line,) = warnings_of(source, "--data", made / "documents.txt")
    assert "the source's loss of" in line
    model, data = builders.caption_checkpoint(tmp_path / "captioner"), builders.caption_folder(tmp_path / "shown", rows=8)
    source = changed(model, tmp_path / "c", decoder__transformer__wte__weight=0.0)
    (line,) = warnings_of(source, "--data", data, "--overwrite")
    assert "the source's loss of" in line


def test_speech_that_hears_nothing_is_warned_of(warnings_of, tmp_path):
    model = builders.ctc_checkpoint(tmp_path / "ctc")
    (line,) = warnings_of(model, "--data", builders.speech_folder(tmp_path / "speech", rows=8))
    assert "is not clearly better than hearing nothing (1.0000)" in line


# ---------------------------------------------------------------- what a card read_card_results


def write_card(folder, dataset, metric="accuracy", value=99.5):
    front = {"model-index": [{"name": "x", "results": [{"dataset": dataset, "metrics": [{"type": metric, "value": value}]}]}]}
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n# Card\n")


def write_results(folder, dataset, value, **more):
    (folder / ".eval_results").mkdir(parents=True, exist_ok=True)
    (folder / ".eval_results/x.yaml").write_text(yaml.safe_dump([{"dataset": dataset, "value": value, **more}]))


@pytest.mark.parametrize(
    "text",
    ["---\n- a\n---\n", "---\na: [\n---\n", "no front matter", "---\nmodel-index: 3\n---\n", "", "---\na: &a [*a]\n---\n"],
)
def test_a_card_that_cannot_be_read_says_nothing(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    (tmp_path / ".eval_results").mkdir()
    (tmp_path / ".eval_results/x.yaml").write_text(text.strip("-"))
    assert read_card_results(tmp_path) == []


def test_figures_of_a_card(tmp_path):
    write_card(tmp_path, {"name": "Pictures!", "type": "pictures", "config": "small"}, "Accuracy")
    write_results(tmp_path, {"id": "org/board", "task_id": "default", "revision": "abc"}, 20.9, notes="no tools")
    found = read_card_results(tmp_path)
    assert found == [
        CardResult("pictures", "small", "accuracy", 99.5, found[0].notes),
        CardResult("org/board", None, None, 20.9, "no tools"),
    ]


@pytest.mark.parametrize(
    ("dataset", "given", "same"),
    [
        ({"type": "glue", "config": "sst2"}, "nyu-mll/glue:sst2", True),
        ({"type": "glue", "args": "sst2"}, "nyu-mll/glue:sst2", True),
        ({"type": "glue"}, "nyu-mll/glue:sst2", True),
        ({"type": "glue", "config": "mrpc"}, "nyu-mll/glue:sst2", False),
        ({"type": "glue", "config": "sst2"}, "glue", True),
        ({"id": "nyu-mll/glue", "task_id": "sst2"}, "nyu-mll/glue:sst2", True),
        ({"id": "nyu-mll/glue", "task_id": "default"}, "nyu-mll/glue:sst2", True),
        ({"id": "other/glue", "task_id": "sst2"}, "nyu-mll/glue:sst2", False),
        ({"id": "local:glue", "task_id": "sst2"}, "nyu-mll/glue:sst2", False),
        ({"id": "local:demo", "task_id": "default"}, "some/where/demo/test.csv", True),
        ({"type": "imdb", "config": "plain_text"}, "stanfordnlp/imdb", True),
        ({"type": "cifar10"}, "some/cifar-10", True),
        ({"type": "cifar10"}, "some/folder/cifar-100/", False),
        ({"type": "数据"}, "some/folder/资料", False),
        ({"name": "Pictures", "type": "pictures"}, "some/pictures/validation", True),
    ],
)  # fmt: skip
def test_which_data_a_figure_is_of(tmp_path, dataset, given, same):
    write_card(tmp_path, dataset)
    (claim,) = read_card_results(tmp_path)
    assert claim.is_of(data_name(given)) is same
    lines = warned(tmp_path, {"accuracy": 0.5, "loss": 1.0}, data=given)
    assert len(lines) == same
    assert not same or "card says accuracy 0.9950" in lines[0]


def test_a_figure_of_the_training_data_is_none_of_other_evaluation_data(tmp_path):
    write_card(tmp_path, {"type": "pictures"})
    assert warned(tmp_path, {"accuracy": 0.5}, data="pictures")
    assert not warned(tmp_path, {"accuracy": 0.5}, data="pictures", eval_data="others")


@pytest.mark.parametrize("value", [0.913, 91.3])
def test_a_figure_without_a_metric_s_name_is_of_the_task_s_metric(tmp_path, value):
    write_results(tmp_path, {"id": "org/pictures", "task_id": "default"}, value)
    (line,) = warned(tmp_path, {"accuracy": 0.5, "loss": 1.0})
    assert "card says accuracy 0.9130 on org/pictures, measured here is 0.5000" in line
    assert warned(tmp_path, {"accuracy": 0.913, "loss": 1.0}) == []
    assert warned(tmp_path, {"loss": 2.0, "perplexity": 7.4}, metric="loss") == []  # which it may well not be


def test_our_own_card_is_read_back(command, finished, made, tmp_path):
    """An output refined again on the same data reaches its figures; changed ones are noticed, once; other data have none."""
    source = builders.copy_folder(finished, tmp_path / "first")
    (file,) = (source / ".eval_results").iterdir()
    value = report_of(finished)["arms"]["refined"]["accuracy"]

    def says(out, data):
        found = command(source, "--data", data, "-o", tmp_path / out, *SHORT, "--control", "none")
        assert found.code == 0, found.err
        return [line for line in report_of(tmp_path / out)["warnings"] if "card says" in line]

    assert f"value: {value}" in file.read_text()
    assert says("second", made / "pictures") == []
    for written in (file, source / "README.md"):
        written.write_text(written.read_text().replace(f"value: {value}", f"value: {value / 2 + 0.01}"))
    (line,) = says("third", made / "pictures")
    assert f"card says accuracy {value / 2 + 0.01:.4f} on pictures" in line
    builders.image_folder(tmp_path / "others")
    assert says("fourth", tmp_path / "others") == []
