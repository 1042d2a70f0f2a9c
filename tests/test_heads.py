"""text-classification with other heads than one label a row: scores, pairs of answers, several labels; and its metrics."""

import json
import math

import builders
import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from chats import MARKED
from conftest import SHORT
from heads import labelled_rows, preference_rows, scored_file, write
from outputs import report_of, same
from runs import stop_after
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics as judge

from dsd_refine.evidence.compare import compare
from dsd_refine.tasks.base import corpus_value
from dsd_refine.tasks.class_counts import CLASS_METRICS, average_precision, class_stats, f1_macro, f1_micro
from dsd_refine.tasks.text_scores import SPEARMAN, pearson, spearman

QUIET = (*SHORT, "--batch-size", "4", "--control", "none", "--quiet")
ANIMALS = ("cat", "dog", "bird")


def run(command, model, data, out, *more):
    found = command(model, "--data", data, "-o", out, *QUIET, *more)
    assert found.code == 0, found.err
    assert command("verify", model, out).code == 0
    return report_of(out), pq.read_table(out / "dsd/predictions.parquet").to_pydict()


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Models with one output and with several labels a row."""
    place = tmp_path_factory.mktemp("heads")
    builders.bert_checkpoint(place / "one", 1)
    builders.bert_checkpoint(place / "regression", 1, problem_type="regression")
    builders.bert_checkpoint(place / "several", ANIMALS, problem_type="multi_label_classification")
    builders.bert_checkpoint(place / "unnamed", 3, problem_type="multi_label_classification")
    scored_file(place / "graded.jsonl")
    scored_file(place / "binary.jsonl", binary=True, column="label")
    write(place / "pairs.jsonl", preference_rows())
    write(place / "sets.jsonl", labelled_rows(ANIMALS))
    return place


def numbers(texts):
    return np.array([float(text) for text in texts])


def test_graded_scores_are_a_regression(command, heads, tmp_path):
    report, table = run(command, heads / "one", heads / "graded.jsonl", tmp_path / "out")
    assert report["metric"] == {"name": "pearson", "higher_is_better": True}
    assert report["data"]["columns"] == {"text": "sentence1,sentence2", "label": "score"}
    x, y = np.array(table["stats_refined"])[:, 1], numbers(table["target"])
    figures = report["arms"]["refined"]
    assert figures["pearson"] == pytest.approx(pearsonr(x, y).statistic, abs=1e-6)
    assert figures["spearman"] == pytest.approx(spearmanr(x, y).statistic)
    assert figures["mse"] == pytest.approx(judge.mean_squared_error(y, x), rel=1e-4)
    assert figures["loss"] == pytest.approx(figures["mse"], rel=1e-4)
    assert np.allclose(numbers(table["prediction_refined"]), x, atol=1e-4)
    assert report["comparison"]["refined_vs_baseline"]["test"] == "paired-bootstrap"


def test_the_squared_error_may_decide(command, heads, refused, tmp_path):
    report, table = run(command, heads / "regression", heads / "binary.jsonl", tmp_path / "out", "--set", "metric=mse")
    assert report["metric"] == {"name": "mse", "higher_is_better": False}
    assert report["arms"]["refined"]["mse"] == pytest.approx(np.mean(table["score_refined"]))
    said = refused(heads / "one", "--data", heads / "graded.jsonl", *QUIET, "-o", tmp_path / "x", "--set", "metric=accuracy")
    assert "metric: accuracy: a head with one output is measured by pearson, spearman, mse here" in said


def test_yes_and_no_train_a_cross_encoder(command, heads, tmp_path):
    report, table = run(command, heads / "one", heads / "binary.jsonl", tmp_path / "out")
    assert report["metric"]["name"] == "accuracy"
    x, y = np.array(table["stats_baseline"])[:, 1], numbers(table["target"])
    figures = report["arms"]["baseline"]
    assert figures["accuracy"] == judge.accuracy_score(y, x >= 0.5)
    assert figures["loss"] == pytest.approx(judge.log_loss(y, x, labels=[0, 1]), rel=1e-4)
    assert report["comparison"]["refined_vs_baseline"]["test"] == "mcnemar-exact"
    assert "binary cross-entropy" in report["preprocessing"]["loss"]


def test_graded_scores_of_a_cross_encoder_with_a_sigmoid_are_learned_as_such(command, heads, tmp_path):
    model = builders.bert_checkpoint(tmp_path / "m", 1)
    config = json.loads((model / "config.json").read_text())
    config["sentence_transformers"] = {"activation_fn": "torch.nn.modules.activation.Sigmoid"}
    (model / "config.json").write_text(json.dumps(config))
    report, table = run(command, model, heads / "graded.jsonl", tmp_path / "out")
    assert report["metric"]["name"] == "pearson"
    assert "binary cross-entropy" in report["preprocessing"]["loss"]
    assert all(0 < x < 1 for x in np.array(table["stats_refined"])[:, 1])


def test_a_score_learns(command, heads, tmp_path):
    scored_file(tmp_path / "d.jsonl", rows=64)
    steps = ("--sparse-steps", 60, "--dense-steps", 20, "--lr", "2e-3", "--warmup-steps", 0)
    report, _ = run(command, heads / "regression", tmp_path / "d.jsonl", tmp_path / "out", *steps)
    assert report["arms"]["refined"]["mse"] < report["arms"]["baseline"]["mse"]


def test_pairs_of_answers_train_a_reward_model(command, heads, tmp_path):
    report, table = run(command, heads / "one", heads / "pairs.jsonl", tmp_path / "out")
    assert report["metric"]["name"] == "accuracy"
    assert report["data"]["columns"] == {"text": "chosen,rejected"}
    pairs = [tuple(map(float, text.split(" to "))) for text in table["prediction_refined"]]
    assert all(hit == (a > b) for hit, (a, b) in zip(table["score_refined"], pairs, strict=True) if a != b)
    losses = [math.log1p(math.exp(b - a)) for a, b in pairs]
    assert np.allclose(table["loss_refined"], losses, atol=1e-3)


def test_a_reward_model_learns(command, heads, tmp_path):
    write(tmp_path / "d.jsonl", preference_rows(64))
    steps = ("--sparse-steps", 60, "--dense-steps", 20, "--lr", "2e-3", "--warmup-steps", 0)
    report, _ = run(command, heads / "one", tmp_path / "d.jsonl", tmp_path / "out", *steps)
    assert report["arms"]["refined"]["accuracy"] == 1.0


def test_the_scores_of_a_pair_are_those_of_its_answers_alone(command, heads, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    _, table = run(command, heads / "one", heads / "pairs.jsonl", tmp_path / "out", "--sparse-steps", 0, "--dense-steps", 0)
    rows = [json.loads(line) for line in (heads / "pairs.jsonl").read_text().splitlines()]
    model, reader = (c.from_pretrained(heads / "one") for c in (AutoModelForSequenceClassification, AutoTokenizer))
    for row, text in zip(table["row"], table["prediction_baseline"], strict=True):
        with torch.no_grad():
            found = [float(model(**reader(rows[row][side], return_tensors="pt")).logits) for side in ("chosen", "rejected")]
        assert np.allclose([float(part) for part in text.split(" to ")], found, atol=1e-3)


@pytest.mark.parametrize("form", ["prompt", "prompt and template", "messages", "whole conversations"])
def test_pairs_with_a_prompt(command, tmp_path, form):
    model = builders.bert_checkpoint(tmp_path / "m", 1, max_position_embeddings=64)
    if form != "prompt":
        reader = builders.word_tokenizer()
        reader.chat_template, reader.model_max_length = MARKED, 64
        reader.save_pretrained(model)
    rows = preference_rows(16, prompt=True)
    if "template" not in form and form != "prompt":
        asked = [{"role": "user", "content": "the cat"}]
        for row in rows:
            for side in ("chosen", "rejected"):
                row[side] = [{"role": "assistant", "content": row[side]}]
                row[side] = asked + row[side] if form == "whole conversations" else row[side]
            row["prompt"] = asked
        if form == "whole conversations":
            rows = [{side: row[side] for side in ("chosen", "rejected")} for row in rows]
    report, _ = run(command, model, write(tmp_path / "d.jsonl", rows), tmp_path / "out")
    assert report["data"]["train"]["skipped"] == []


def test_pairs_that_teach_nothing_are_skipped_and_named(command, heads, tmp_path):
    rows = preference_rows()
    odd = [
        {"chosen": "the cat", "rejected": "the cat"},
        {"chosen": " ", "rejected": "the"},
        {"chosen": "the", "rejected": None},
    ]
    report, _ = run(command, heads / "one", write(tmp_path / "d.jsonl", rows + odd), tmp_path / "out")
    reasons = {item["row"]: item["reason"] for item in report["data"]["train"]["skipped"]}
    assert reasons == {24: "chosen and rejected are the same", 25: "no chosen answer", 26: "no rejected answer"}


def test_a_padded_pair_is_scored_as_alone_by_a_decoder(command, tmp_path):
    """A decoder reads its score at the last token that is no padding."""
    import small
    from transformers import LlamaConfig, LlamaForSequenceClassification

    with builders.seeded(0):
        model = LlamaForSequenceClassification(LlamaConfig(**small.GROUPED, num_labels=1))
    builders.save_transformers(model, tmp_path / "m", builders.word_tokenizer())
    report, _ = run(command, tmp_path / "m", write(tmp_path / "d.jsonl", preference_rows()), tmp_path / "out")
    assert not any("padded" in line for line in report["warnings"])


def test_rows_without_a_score_are_skipped_and_others_than_numbers_refused(command, refused, heads, tmp_path):
    rows = [json.loads(line) for line in (heads / "graded.jsonl").read_text().splitlines()]
    odd = [{**rows[0], "score": None}, {**rows[1], "sentence1": ""}]
    report, _ = run(command, heads / "one", write(tmp_path / "d.jsonl", rows + odd), tmp_path / "out")
    assert {item["reason"] for item in report["data"]["train"]["skipped"]} == {"no score", "no text"}
    named = [{"text": "the cat", "label": "good"}, {"text": "a dog", "label": "bad"}]
    said = refused(heads / "one", "--data", write(tmp_path / "n.jsonl", named * 6), *QUIET)
    assert "'label' is 'good', which is no number. Heads with one output" in said
    said = refused(heads / "one", "--data", heads / "graded.jsonl", *QUIET, "--set", "label_map={good: '1'}")
    assert "label_names and label_map are of classes" in said


def test_a_regression_with_several_outputs_is_refused_by_name(refused, heads, tmp_path):
    model = builders.bert_checkpoint(tmp_path / "m", 2, problem_type="regression")
    said = refused(model, "--data", heads / "graded.jsonl", *QUIET)
    assert "a regression with 2 outputs is not supported; supported are heads with one output" in said


@pytest.mark.parametrize("form", ["names", "flags", "columns", "numbers"])
def test_several_labels_a_row(command, heads, tmp_path, form):
    rows = labelled_rows(ANIMALS)
    model, more = heads / "several", ()
    if form == "flags":
        data = write(tmp_path / "d.jsonl", [{**row, "labels": [int(a in row["labels"]) for a in ANIMALS]} for row in rows])
    elif form == "columns":
        data = write(
            tmp_path / "d.jsonl", [{"text": r["text"], **{a.title(): int(a in r["labels"]) for a in ANIMALS}} for r in rows]
        )
    elif form == "numbers":
        kinds = datasets.Features(
            {"text": datasets.Value("string"), "labels": datasets.List(datasets.ClassLabel(names=["bird", "cat", "dog"]))}
        )
        datasets.Dataset.from_list(rows, kinds).save_to_disk(tmp_path / "d")
        data = tmp_path / "d"
    else:
        data = heads / "sets.jsonl"
    report, table = run(command, model, data, tmp_path / "out", *more)
    assert report["metric"] == {"name": "f1_micro", "higher_is_better": True}
    assert report["labels"]["model"] == list(ANIMALS)
    truths, guesses = ([text.split(", ") if text else [] for text in table[name]] for name in ("target", "prediction_refined"))
    assert truths == [[a for a in ANIMALS if a in rows[row]["labels"]] for row in table["row"]]
    true, guess = (np.array([[a in row for a in ANIMALS] for row in texts]) for texts in (truths, guesses))
    figures, stats = report["arms"]["refined"], np.array(table["stats_refined"])
    assert figures["f1_micro"] == pytest.approx(judge.f1_score(true, guess, average="micro", zero_division=0))
    assert figures["map"] == pytest.approx(judge.average_precision_score(true, stats[:, 9:], average="macro"))
    losses = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(stats[:, 9:]), torch.tensor(true).double())
    assert figures["loss"] == pytest.approx(float(losses), rel=1e-4)


def test_classes_without_names_are_numbers(command, heads, tmp_path):
    rows = [
        {"text": row["text"], "labels": [ANIMALS.index(a) for a in row["labels"] if a != "bird"]}
        for row in labelled_rows(ANIMALS)
    ]
    report, table = run(command, heads / "unnamed", write(tmp_path / "d.jsonl", rows), tmp_path / "out")
    assert report["labels"]["model"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert set(", ".join(table["target"]).split(", ")) <= {"LABEL_0", "LABEL_1", ""}


def test_labels_that_the_model_lacks_are_refused_or_left_out(command, refused, heads, tmp_path):
    rows = labelled_rows((*ANIMALS, "fish"))
    data = write(tmp_path / "d.jsonl", rows)
    assert "no class names of the model: fish" in refused(heads / "several", "--data", data, *QUIET)
    report, _ = run(command, heads / "several", data, tmp_path / "out", "--set", "label_map={fish: null}")
    assert "fish" not in report["labels"]["data"]
    single = write(tmp_path / "s.jsonl", [{"text": row["text"], "labels": "cat"} for row in rows])
    assert "the model gives several labels a row: write a list" in refused(heads / "several", "--data", single, *QUIET)


@pytest.mark.parametrize(("model", "data"), [("one", "graded"), ("one", "binary"), ("one", "pairs"), ("several", "sets")])
def test_stopped_and_resumed(command, heads, tmp_path, model, data):
    one, two = ([heads / model, "--data", heads / f"{data}.jsonl", "-o", tmp_path / name, *QUIET] for name in ("one", "two"))
    assert command(*one).code == 0
    for at in (2, 2):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, at)
            assert command(*two, "--resume").code == 4
    assert command(*two, "--resume").code == 0
    same(tmp_path / "one", tmp_path / "two")


def one_hot(ids, classes):
    return torch.nn.functional.one_hot(torch.tensor(ids), classes).bool()


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_metrics_of_classes_are_scikit_learns(classes, seed):
    draw = np.random.default_rng(seed)
    true = draw.integers(0, classes, 60)
    guess = np.where(draw.random(60) < 0.6, true, draw.integers(0, classes, 60))
    sums = class_stats(one_hot(guess, classes), one_hot(true, classes), torch.zeros(60, classes)).sum(0)
    assert CLASS_METRICS["f1_macro"](sums) == pytest.approx(judge.f1_score(true, guess, average="macro"))
    assert CLASS_METRICS["balanced_accuracy"](sums) == pytest.approx(judge.balanced_accuracy_score(true, guess))
    assert CLASS_METRICS["matthews"](sums) == pytest.approx(judge.matthews_corrcoef(true, guess))
    if classes == 2:
        assert CLASS_METRICS["f1"](sums) == pytest.approx(judge.f1_score(true, guess))


@pytest.mark.parametrize("seed", range(5))
def test_metrics_of_several_labels_are_scikit_learns(seed):
    draw = np.random.default_rng(seed)
    true, scores = draw.random((50, 4)) < 0.4, draw.normal(size=(50, 4)).round(1)
    stats = class_stats(torch.tensor(scores > 0), torch.tensor(true), torch.tensor(scores))
    assert f1_micro(stats.sum(0)) == pytest.approx(judge.f1_score(true, scores > 0, average="micro"))
    assert f1_macro(stats.sum(0)) == pytest.approx(judge.f1_score(true, scores > 0, average="macro"))
    assert corpus_value(average_precision, stats) == pytest.approx(judge.average_precision_score(true, scores, average="macro"))


def test_metrics_of_nothing_are_0_and_many_sums_are_taken_at_once():
    assert [float(metric(np.zeros(8))) for metric in CLASS_METRICS.values()] == [0.0] * len(CLASS_METRICS)
    assert float(pearson(np.zeros(6))) == 0.0
    assert spearman(np.ones(4), np.arange(4.0)) == 0.0
    draw = np.random.default_rng(0)
    sums = draw.integers(1, 9, (5, 3, 8)).astype(float)
    for metric in CLASS_METRICS.values():
        assert np.allclose(metric(sums).reshape(-1), [metric(row) for row in sums.reshape(-1, 8)])


@pytest.mark.parametrize("metric", ["f1", "f1_macro", "balanced_accuracy", "matthews"])
def test_another_metric_decides_for_classes(command, made, tmp_path, metric):
    report, table = run(command, made / "bert", made / "texts.csv", tmp_path / "out", "--set", f"metric={metric}")
    assert report["metric"]["name"] == metric
    assert list(report["arms"]["refined"]) == [metric, "accuracy", "loss"]
    true, guess = ([("neg", "pos").index(text) for text in table[name]] for name in ("target", "prediction_refined"))
    scores = {
        "f1": judge.f1_score(true, guess), "f1_macro": judge.f1_score(true, guess, average="macro"),
        "balanced_accuracy": judge.balanced_accuracy_score(true, guess), "matthews": judge.matthews_corrcoef(true, guess),
    }  # fmt: skip
    assert report["arms"]["refined"][metric] == pytest.approx(scores[metric])
    assert report["comparison"]["refined_vs_baseline"]["test"] == "paired-bootstrap"


def test_pictures_have_these_metrics_too_and_no_others(command, refused, made, tmp_path):
    args = (made / "timm", "--data", made / "pictures", *QUIET, "-o", tmp_path / "out")
    assert command(*args, "--set", "metric=f1_macro").code == 0
    said = refused(made / "timm", "--data", made / "pictures", *QUIET, "-o", tmp_path / "x", "--set", "metric=f1")
    assert "measured by accuracy, f1_macro, balanced_accuracy, matthews here" in said
    said = refused(made / "gpt2", "--data", made / "documents.txt", *QUIET, "-o", tmp_path / "x", "--set", "metric=f1")
    assert "metric: causal-lm has no use for it" in said


def test_several_runs_are_compared_by_any_metric(command, heads, tmp_path):
    from dsd_refine import compare as compare_runs

    for model, data, metric in (("one", "graded", "spearman"), ("several", "sets", "map")):
        for seed in (0, 1):
            more = ("--seed", seed, "--set", f"metric={metric}")
            report, _ = run(command, heads / model, heads / f"{data}.jsonl", tmp_path / f"{model}{seed}", *more)
            assert report["metric"]["name"] == metric
        found = compare_runs([tmp_path / f"{model}0", tmp_path / f"{model}1"]).comparison
        reported = report_of(tmp_path / f"{model}0")["comparison"]["refined_vs_baseline"]["delta"]
        assert found[f"{tmp_path / model}0 vs baseline"].delta == pytest.approx(reported)


def drawn_rows(draw, rows=40):
    """Scores and predictions with ties, for 3 classes and for one output; and how often each row is drawn, 5 times."""
    true, scores = draw.random((rows, 3)) < 0.3, draw.integers(-4, 5, (rows, 3)) / 4
    sets = class_stats(torch.from_numpy(scores > 0), torch.from_numpy(true), torch.from_numpy(scores))
    x, y = draw.integers(0, 9, rows) / 8, draw.integers(0, 6, rows) / 5
    graded = np.stack([np.ones(rows), x, y, x * y, x * x, y * y], axis=1)
    return sets, graded, draw.multinomial(rows, np.full(rows, 1 / rows), size=5)


def test_metrics_of_drawn_rows_are_those_of_the_rows_repeated():
    """What the bootstrap of a rank correlation and of the mean average precision is made of."""
    sets, graded, times = drawn_rows(np.random.default_rng(3))
    for of_sample, areas, ranks in zip(
        times, average_precision.of_samples(sets, times), SPEARMAN.of_samples(graded, times), strict=True
    ):
        rows = np.repeat(np.arange(len(of_sample)), of_sample)
        true, scores = sets[rows, 6:9], sets[rows, 9:]
        assert areas == pytest.approx(judge.average_precision_score(true[:, true.any(0)], scores[:, true.any(0)]))
        assert ranks == pytest.approx(spearmanr(graded[rows, 1], graded[rows, 2]).statistic)


@pytest.mark.parametrize("name", ["spearman", "map"])
def test_the_bootstrap_of_a_rank_metric_sees_a_difference_and_its_sign(name):
    draw = np.random.default_rng(4)
    if name == "map":
        true = torch.from_numpy(draw.random((60, 3)) < 0.4)
        noise = torch.from_numpy(draw.normal(0, 0.5, (60, 3)))
        good, bad = (class_stats(true, true, signal * true + noise) for signal in (2.0, 0.3))
        metric = average_precision
    else:
        y, noise = draw.random(60), draw.normal(0, 1, 60)
        good, bad = (np.stack([np.ones(60), y + size * noise, y, y, y, y], axis=1) for size in (0.1, 1.0))
        metric = SPEARMAN
    groups = np.repeat(np.arange(30), 2)  # equal rows are one observation
    for of_rows in (None, groups):
        one, two = (
            compare(*pair, np.ones(60), higher_is_better=True, corpus=metric, groups=of_rows)
            for pair in ((good, bad), (bad, good))
        )
        assert one.delta == pytest.approx(corpus_value(metric, good) - corpus_value(metric, bad))
        assert one.p_value < 0.01 < one.ci95[0] < one.delta < one.ci95[1]
        assert two.delta == -one.delta
        assert one.test == "paired-bootstrap"
