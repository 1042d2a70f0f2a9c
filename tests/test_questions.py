"""question-answering: spans over windows, judged as SQuAD's script judges."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SHORT
from heads import write
from outputs import report_of, same
from questions import answerer_checkpoint, asked_rows, squad_file
from runs import stop_after

from dsd_refine.errors import DataError
from dsd_refine.tasks.answers import exact_match, f1, read_answers
from dsd_refine.tasks.inputs.spans import LONGEST_ANSWER, WindowCutter, best_spans
from dsd_refine.tasks.inputs.tokens import load_tokenizer

QUIET = (*SHORT, "--batch-size", "4", "--control", "none", "--quiet")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A model, its tokenizer, and rows of which some have no answer."""
    place = tmp_path_factory.mktemp("questions")
    answerer_checkpoint(place / "model")
    write(place / "d.jsonl", asked_rows(answered=0.7))
    return place


@pytest.fixture(scope="module")
def tokenizer(seen):
    return load_tokenizer(seen / "model")


def run(command, model, data, out, *more):
    found = command(model, "--data", data, "-o", out, *QUIET, *more)
    assert found.code == 0, found.err
    return report_of(out), pq.read_table(out / "dsd/predictions.parquet").to_pydict()


@pytest.mark.parametrize(
    ("answer", "right", "f", "exact"),
    [
        ("The cat!", ["cat"], 1.0, 1.0),
        ("a big cat", ["cat", "a dog"], 2 / 3, 0.0),
        ("cat cat", ["cat"], 2 / 3, 0.0),
        ("dog", ["cat"], 0.0, 0.0),
        ("", [], 1.0, 1.0),
        ("cat", [], 0.0, 0.0),
        ("", ["cat"], 0.0, 0.0),
        ("3,000", ["3000"], 1.0, 1.0),
    ],
)
def test_answers_are_judged_as_squads_script_does(answer, right, f, exact):
    assert f1(answer, right) == pytest.approx(f)
    assert exact_match(answer, right) == exact


def test_the_best_span_is_that_of_all_spans():
    draw = torch.Generator().manual_seed(0)
    starts, ends = (torch.randn(6, 50, generator=draw) for _ in range(2))
    allowed = torch.rand(6, 50, generator=draw) < 0.8
    sums, tokens = best_spans(starts, ends, allowed)
    for row in range(6):
        every = {
            (a, b): float(starts[row, a] + ends[row, b])
            for a in range(50)
            for b in range(a, min(50, a + LONGEST_ANSWER))
            if allowed[row, a] and allowed[row, b]
        }
        assert tuple(tokens[row].tolist()) == max(every, key=every.__getitem__)
        assert float(sums[row]) == max(every.values())


def test_windows_cover_the_context_and_know_where_the_answer_stands(tokenizer):
    context = " ".join(["the cat eats red", *["and"] * 9, "a dog sees blue fish", *["then"] * 5])
    windows = WindowCutter(tokenizer, 16, 5).cut("the dog sees", context)
    begin = context.index("blue fish")
    spans = [window.span(begin, begin + 9) for window in windows]
    assert None in spans
    assert any(spans)
    for window, span in zip(windows, spans, strict=True):
        if span:
            assert (window.places[span[0], 0], window.places[span[1], 1]) == (begin, begin + 9)
    starts = [window.places[window.places[:, 1] > 0][0, 0] for window in windows]
    words = np.cumsum([0, *[len(word) + 1 for word in context.split()]])
    assert np.diff(np.searchsorted(words, starts)).tolist() == [5] * (len(windows) - 1)  # the stride, in tokens
    assert max(window.places.max() for window in windows) == len(context)
    with pytest.raises(DataError, match="leaves no room for the context"):
        WindowCutter(tokenizer, 6, 5).cut("the dog sees", context)


def test_answers_of_every_layout():
    context = "the cat eats red fish"
    one = read_answers({"text": ["red fish", "fish"], "answer_start": [13, 17]}, context)
    assert (one.texts, one.begin, one.end) == (("red fish", "fish"), 13, 21)
    assert read_answers([{"text": "red fish", "answer_start": 13}, {"text": "fish", "answer_start": 17}], context) == one
    assert read_answers({"text": "red fish", "answer_start": 13}, context).begin == 13
    assert read_answers({"text": [" red"], "answer_start": [12]}, context).begin == 13
    for empty in ({"text": [], "answer_start": []}, [], {"text": [""], "answer_start": [0]}):
        assert read_answers(empty, context).texts == ()
    # the first one that stands where its start says trains, and all of them judge
    assert read_answers({"text": ["cat", "fish"], "answer_start": [0, 17]}, context).texts == ("fish", "cat")


def test_the_command_refines_and_its_figures_follow_from_the_predictions(command, seen, tmp_path):
    report, table = run(command, seen / "model", seen / "d.jsonl", tmp_path / "out", "--max-length", 14, "--stride", 4)
    assert (report["task"], report["metric"]["name"]) == ("question-answering", "f1")
    assert report["data"]["columns"] == {"text": "question,context", "label": "answers"}
    assert report["preprocessing"] == {"window": 14, "stride": 4, "longest_answer": 30, "may_be_unanswerable": True}
    assert command("verify", seen / "model", tmp_path / "out").code == 0
    rights = [target.split(" | ") if target else [] for target in table["target"]]
    assert any(not right for right in rights)
    for arm in ("baseline", "refined"):
        figures, stats = report["arms"][arm], np.array(table[f"stats_{arm}"])
        answers = table[f"prediction_{arm}"]
        pairs = list(zip(answers, rights, strict=True))
        assert figures["f1"] == pytest.approx(np.mean([f1(*pair) for pair in pairs]))
        assert figures["f1"] == pytest.approx(np.mean(table[f"score_{arm}"]))
        assert figures["exact_match"] == pytest.approx(np.mean([exact_match(*pair) for pair in pairs]))
        assert stats[:, 2].max() > 1
        assert figures["loss"] == pytest.approx(sum(table[f"loss_{arm}"]) / stats[:, 2].sum())


def test_the_score_of_a_row_does_not_depend_on_the_batch(command, seen, tmp_path):
    """And exact match may decide, by the exact test of right and wrong rows."""
    zero = ("--sparse-steps", 0, "--dense-steps", 0, "--max-length", 14, "--sparsity", 0, "--set", "metric=exact_match")
    tables = []
    for size in (1, 7):
        report, table = run(command, seen / "model", seen / "d.jsonl", tmp_path / str(size), *zero, "--batch-size", size)
        tables.append(table)
    assert tables[0]["prediction_baseline"] == tables[1]["prediction_baseline"]
    assert np.allclose(tables[0]["loss_baseline"], tables[1]["loss_baseline"], atol=1e-6)
    assert next(iter(report["arms"]["refined"])) == "exact_match"
    assert report["comparison"]["refined_vs_baseline"]["test"].startswith("mcnemar-exact")


def test_a_model_learns_to_answer(command, seen, tmp_path):
    steps = ("--sparse-steps", 100, "--dense-steps", 40, "--lr", "3e-3", "--warmup-steps", 0, "--batch-size", 16)
    report, _ = run(command, seen / "model", write(tmp_path / "d.jsonl", asked_rows(120)), tmp_path / "out", *steps)
    assert report["arms"]["refined"]["f1"] > report["arms"]["baseline"]["f1"] + 0.2
    assert not report["preprocessing"]["may_be_unanswerable"]


def test_squads_own_file_gives_the_same_rows(command, seen, tmp_path):
    rows = [json.loads(line) for line in (seen / "d.jsonl").read_text().splitlines()]
    one, _ = run(command, seen / "model", squad_file(tmp_path / "train-v2.0.json", rows), tmp_path / "one")
    two, _ = run(command, seen / "model", seen / "d.jsonl", tmp_path / "two")
    assert one["data"]["eval"]["fingerprint"] == two["data"]["eval"]["fingerprint"]
    assert one["arms"] == two["arms"]


def test_stopped_and_resumed(command, seen, tmp_path):
    one, two = ([seen / "model", "--data", seen / "d.jsonl", "-o", tmp_path / name, *QUIET] for name in ("one", "two"))
    assert command(*one).code == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        assert command(*two, "--resume").code == 4
    assert command(*two, "--resume").code == 0
    same(tmp_path / "one", tmp_path / "two")


def test_unusable_rows_are_skipped_and_named(command, seen, tmp_path):
    rows = [json.loads(line) for line in (seen / "d.jsonl").read_text().splitlines()]
    answers = {"text": ["red"], "answer_start": [0]}
    odd = [
        {"context": "the cat eats red", "question": "the cat eats", "answers": answers},
        {"context": " ", "question": "the cat eats", "answers": answers},
        {"context": "the cat", "question": None, "answers": answers},
        {"context": "the cat", "question": "the cat eats", "answers": None},
        {"context": "red " * 20, "question": "the cat", "answers": {"text": ["red " * 20], "answer_start": [0]}},
        {"context": "the cat", "question": "the cat " * 9, "answers": answers},
    ]
    data = write(tmp_path / "d.jsonl", rows + odd)
    report, _ = run(command, seen / "model", data, tmp_path / "out", "--max-length", 16)
    assert {item["row"]: item["reason"] for item in report["data"]["train"]["skipped"]} == {
        24: "its answer 'red' is not in the context at character 0",
        25: "no context",
        26: "no question",
        27: "no answers",
        28: "its answer '" + "red " * 10 + "' does not fit into a window of 16 tokens",
        29: "its answer 'red' is not in the context at character 0",
    }
    assert any("6 training rows skipped" in line for line in report["warnings"])


def test_a_test_split_with_hidden_answers_is_not_used(command, seen, tmp_path):
    write(tmp_path / "d/train.jsonl", asked_rows())
    write(tmp_path / "d/test.jsonl", asked_rows(8, seed=1, answered=0.0))
    report, _ = run(command, seen / "model", tmp_path / "d", tmp_path / "out")
    assert any("the test split has no usable rows" in line for line in report["warnings"])


def test_data_without_the_columns_are_refused(refused, seen, tmp_path):
    data = write(tmp_path / "d.jsonl", [{"context": "the cat", "text": "a"}] * 9)
    said = refused(seen / "model", "--data", data, *QUIET)
    assert "no text column found (looked for question+context)" in said
    said = refused(seen / "model", "--data", seen / "d.jsonl", *QUIET, "--set", "metric=accuracy")
    assert "metric: accuracy: question-answering is measured by f1, exact_match here" in said
