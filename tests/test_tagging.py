"""token-classification: a tag for each word, and entities judged as seqeval judges them."""

import json

import builders
import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import SHORT
from outputs import report_of, same
from runs import stop_after
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score
from taggers import TAGS, tagged, tagged_file, tagger_checkpoint

from dsd_refine.evidence.compare import compare
from dsd_refine.tasks.inputs.tokens import for_words, load_tokenizer, word_pieces
from dsd_refine.tasks.token_classification import entities, entity_f1, is_of_entities

QUIET = (*SHORT, "--batch-size", "4", "--control", "none", "--quiet")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A tagger and rows of words."""
    place = tmp_path_factory.mktemp("tagging")
    tagger_checkpoint(place / "model")
    tagged_file(place / "d.jsonl")
    return place


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(command, model, data, out, *more):
    found = command(model, "--data", data, "-o", out, *QUIET, *more)
    assert found.code == 0, found.err
    return report_of(out)


def sums(guesses, truths):
    """The sums over rows that the metrics are made of."""
    pairs = [(entities(guess), entities(true)) for guess, true in zip(guesses, truths, strict=True)]
    return np.array([[len(a & b), len(a), len(b), 0, 0] for a, b in pairs], dtype=float)


@pytest.mark.parametrize(
    ("guess", "true", "f1"),
    [
        (["B-PER", "I-PER", "O"], ["B-PER", "I-PER", "O"], 1.0),
        (["B-PER", "O", "O"], ["B-PER", "I-PER", "O"], 0.0),  # another end is another entity
        (["B-LOC", "I-LOC", "O"], ["B-PER", "I-PER", "O"], 0.0),
        (["B-PER", "B-PER", "B-LOC"], ["B-PER", "B-PER", "O"], 0.8),
        (["I-PER", "I-PER", "O"], ["B-PER", "I-PER", "O"], 1.0),  # as CoNLL's script, which takes I- for a beginning
        (["O", "O", "O"], ["O", "O", "O"], 0.0),
    ],
)
def test_f1_of_known_sentences(guess, true, f1):
    assert entity_f1(sums([guess], [true]).sum(0)) == pytest.approx(f1)


def test_f1_is_seqevals_on_any_tags():
    draw = np.random.default_rng(0)
    truths = [draw.choice(TAGS, draw.integers(1, 9)).tolist() for _ in range(200)]
    guesses = [[tag if draw.random() < 0.7 else str(draw.choice(TAGS)) for tag in row] for row in truths]
    assert float(entity_f1(sums(guesses, truths).sum(0))) == pytest.approx(f1_score(truths, guesses))


def test_the_command_refines_a_tagger_and_seqeval_gives_its_figures(command, seen, tmp_path):
    report = run(command, seen / "model", seen / "d.jsonl", tmp_path / "out")
    assert (report["task"], report["metric"]["name"]) == ("token-classification", "f1")
    assert report["data"]["columns"] == {"text": "tokens", "label": "ner_tags"}
    assert report["labels"]["rule"] == "by name"
    assert command("verify", seen / "model", tmp_path / "out").code == 0
    table = pq.read_table(tmp_path / "out/dsd/predictions.parquet").to_pydict()
    truths = [text.split() for text in table["target"]]
    for arm in ("baseline", "refined"):
        guesses = [text.split() for text in table[f"prediction_{arm}"]]
        figures = report["arms"][arm]
        for name, judge in (
            ("f1", f1_score),
            ("precision", precision_score),
            ("recall", recall_score),
            ("accuracy", accuracy_score),
        ):
            assert figures[name] == pytest.approx(judge(truths, guesses))
        if sum(table[f"count_{arm}"]):
            assert figures["f1"] == pytest.approx(sum(table[f"score_{arm}"]) / sum(table[f"count_{arm}"]))
        stats = np.array(table[f"stats_{arm}"])
        assert figures["loss"] == pytest.approx(sum(table[f"loss_{arm}"]) / stats[:, -1].sum())


def test_a_tagger_learns(command, seen, tmp_path):
    tagged_file(tmp_path / "d.jsonl", rows=64)
    steps = ("--sparse-steps", 60, "--dense-steps", 30, "--lr", "3e-3", "--warmup-steps", 0)
    report = run(command, seen / "model", tmp_path / "d.jsonl", tmp_path / "out", *steps)
    assert report["arms"]["refined"]["loss"] < report["arms"]["baseline"]["loss"]
    assert report["comparison"]["refined_vs_baseline"]["test"] == "paired-bootstrap"


def test_the_bootstrap_of_f1_sees_a_difference_and_its_sign():
    draw = np.random.default_rng(1)
    truths = [tagged(draw)["ner_tags"] for _ in range(80)]
    spoilt = [["O"] * len(row) if number % 3 == 0 else row for number, row in enumerate(truths)]
    good, bad = sums(truths, truths), sums(spoilt, truths)
    found = compare(good, bad, np.ones(80), higher_is_better=True, corpus=entity_f1)
    assert found.delta == pytest.approx(1 - float(entity_f1(bad.sum(0))))
    assert found.p_value < 0.01 < found.ci95[0]


def test_stopped_and_resumed(command, seen, tmp_path):
    one, two = ([seen / "model", "--data", seen / "d.jsonl", "-o", tmp_path / name, *QUIET] for name in ("one", "two"))
    assert command(*one).code == 0
    for at in (2, 2):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, at)
            assert command(*two, "--resume").code == 4
    assert command(*two, "--resume").code == 0
    same(tmp_path / "one", tmp_path / "two")


def test_several_runs_are_compared_by_their_rows(seen, command, tmp_path):
    from dsd_refine import compare as compare_runs

    for name, seed in (("one", 0), ("two", 1)):
        run(command, seen / "model", seen / "d.jsonl", tmp_path / name, "--seed", seed)
    found = compare_runs([tmp_path / "one", tmp_path / "two"]).comparison
    reported = report_of(tmp_path / "one")["comparison"]["refined_vs_baseline"]["delta"]
    assert found[f"{tmp_path / 'one'} vs baseline"].delta == pytest.approx(reported)


def test_the_first_piece_of_a_word_carries_its_tag(tmp_path):
    """A byte-level tokenizer, which puts the space before a word into its first piece."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import RobertaTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters])}
    whole = Tokenizer(models.BPE(vocabulary, []))
    whole.pre_tokenizer, whole.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    RobertaTokenizer(tokenizer_object=whole, vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    reader = for_words(load_tokenizer(tmp_path), tmp_path)
    assert reader.add_prefix_space
    inputs, firsts = word_pieces(reader, [["ab", "c"]], 32)
    assert reader.convert_ids_to_tokens(inputs["input_ids"][0]) == ["<s>", "Ġ", "a", "b", "Ġ", "c", "</s>"]
    assert firsts == [{0: 1, 1: 4}]


def test_unusable_rows_are_skipped_and_named(command, seen, tmp_path):
    rows = [json.loads(line) for line in (seen / "d.jsonl").read_text().splitlines()]
    odd = [
        {"tokens": ["the", "cat"], "ner_tags": ["O"]},
        {"tokens": [], "ner_tags": []},
        {"tokens": ["the", " ", "cat"], "ner_tags": ["O", "O", "O"]},
        {"tokens": ["the", "cat"], "ner_tags": None},
    ]
    report = run(command, seen / "model", write(tmp_path / "d.jsonl", *rows, *odd), tmp_path / "out")
    skipped = {item["row"]: item["reason"] for item in report["data"]["train"]["skipped"]}
    assert skipped == {24: "2 words and 1 tags", 25: "no words", 26: "word 2 (' ') gives the tokenizer no piece", 27: "no tags"}


def test_words_beyond_the_length_are_counted_and_named(command, seen, tmp_path):
    report = run(command, seen / "model", seen / "d.jsonl", tmp_path / "out", "--max-length", 5)
    assert any("rows are longer than 5 tokens: the words after these have no prediction" in line for line in report["warnings"])
    table = pq.read_table(tmp_path / "out/dsd/predictions.parquet").to_pydict()
    assert max(len(text.split()) for text in table["target"]) == 3  # besides [CLS] and [SEP]


def test_tags_that_the_model_lacks_are_refused_or_left_out(refused, command, seen, tmp_path):
    rows = [json.loads(line) for line in (seen / "d.jsonl").read_text().splitlines()]
    rows[0]["ner_tags"][0] = "B-PLACE"
    data = write(tmp_path / "d.jsonl", *rows)
    said = refused(seen / "model", "--data", data, *QUIET, "-o", tmp_path / "out")
    assert "no class names of the model: B-PLACE. The model's classes are: O, B-ANIMAL" in said
    report = run(command, seen / "model", data, tmp_path / "out", "--set", "label_map={B-PLACE: null}")
    assert "B-PLACE" not in report["labels"]["data"]


@pytest.mark.parametrize("how", ["declared", "label_names", "texts", "other order"])
def test_numbers_are_named_by_the_data_or_the_recipe(command, seen, tmp_path, how):
    order = TAGS[::-1] if how == "other order" else TAGS
    draw = np.random.default_rng(0)
    rows = [tagged(draw) for _ in range(24)]
    numbers = [[order.index(tag) for tag in row["ner_tags"]] for row in rows]
    words = [row["tokens"] for row in rows]
    if how == "label_names":
        data = write(tmp_path / "d.jsonl", *({"tokens": a, "tags": b} for a, b in zip(words, numbers, strict=True)))
    else:
        kind = datasets.Features(
            {"words": datasets.List(datasets.Value("string")), "labels": datasets.List(datasets.ClassLabel(names=list(order)))}
        )
        datasets.Dataset.from_dict({"words": words, "labels": numbers}, kind).save_to_disk(tmp_path / "d")
        data = tmp_path / "d"
    if how == "texts":
        data = seen / "d.jsonl"
    more = ("--set", f"label_names=[{', '.join(TAGS)}]") if how == "label_names" else ()
    run(command, seen / "model", data, tmp_path / "out", *more)
    run(command, seen / "model", seen / "d.jsonl", tmp_path / "same")
    tables = [pq.read_table(tmp_path / name / "dsd/predictions.parquet") for name in ("out", "same")]
    assert sorted(tables[0]["target"].to_pylist()) == sorted(tables[1]["target"].to_pylist())


def test_parts_of_speech_are_judged_by_accuracy(command, refused, tmp_path):
    names = ("DET", "NOUN", "VERB")
    model = tagger_checkpoint(tmp_path / "m", names)
    draw = np.random.default_rng(0)
    rows = [{"tokens": draw.choice(builders.WORDS, 5).tolist(), "upos": draw.choice(names, 5).tolist()} for _ in range(24)]
    data = write(tmp_path / "d.jsonl", *rows)
    report = run(command, model, data, tmp_path / "out")
    assert report["metric"]["name"] == "accuracy"
    assert set(report["arms"]["refined"]) == {"accuracy", "loss"}
    table = pq.read_table(tmp_path / "out/dsd/predictions.parquet").to_pydict()
    assert set(table["count_refined"]) == {5}
    said = refused(model, "--data", data, *QUIET, "-o", tmp_path / "x", "--set", "metric=f1")
    assert "metric: f1: token-classification is measured by accuracy here" in said


def test_the_metric_can_be_accuracy(command, seen, tmp_path):
    report = run(command, seen / "model", seen / "d.jsonl", tmp_path / "out", "--set", "metric=accuracy")
    assert next(iter(report["arms"]["refined"])) == "accuracy"
    table = pq.read_table(tmp_path / "out/dsd/predictions.parquet").to_pydict()
    assert report["arms"]["refined"]["accuracy"] == pytest.approx(sum(table["score_refined"]) / sum(table["count_refined"]))


@pytest.mark.parametrize(
    ("names", "yes"),
    [(TAGS, True), (("O", "I-PER", "S-LOC"), True), (("NOUN", "VERB"), False), (("O",), False), (("O", "PER"), False)],
)
def test_which_classes_are_of_entities(names, yes):
    assert is_of_entities(names) == yes


def test_several_columns_of_tags_are_refused(refused, seen, tmp_path):
    rows = [{**json.loads(line), "tags": ["O"]} for line in (seen / "d.jsonl").read_text().splitlines()]
    said = refused(seen / "model", "--data", write(tmp_path / "d.jsonl", *rows), *QUIET)
    assert "could each be the label column: name the one that is meant with --label-column" in said
