"""Labels and classes: by name in whatever writing, by number, by what the user says; never by a guess that is plainly wrong."""

import json
import shlex
import unicodedata

import builders
import datasets
import numpy as np
import pytest
import torch
import yaml
from builders import WORDS
from conftest import SHORT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from labelled import NAMED, recipe, table, texts
from outputs import report_of
from safetensors.torch import load_file, save_file

from dsd_refine.data.labels import label_texts, match_labels, without_hidden
from dsd_refine.data.names import counterparts, listed, map_option
from dsd_refine.errors import DataError
from dsd_refine.evidence.confusion import better_assignment
from dsd_refine.recipe import parse_yaml, set_field, validate

QUICK = (*SHORT, "--control", "none", "--quiet")


def csv(path, labels, rows=8):
    """`rows` sentences of each label, each ended by a word that tells which label of the list it is."""
    draw, lines = np.random.default_rng(0), ["text,label"]
    for row in range(rows * len(labels)):
        which = row % len(labels)
        lines.append(f"{' '.join(draw.choice(WORDS[-8:], 4))} {row} {WORDS[which]},{labels[which]}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def knowing(folder, classes, names=None, order=None):
    """A BERT that answers a text that ends with WORDS[w] by class order[w] (w): its embeddings tell, no layer interferes."""
    builders.bert_checkpoint(
        folder, names or classes, num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    tensors = load_file(folder / "model.safetensors")
    order = order or list(range(classes))
    embedding = tensors["bert.embeddings.word_embeddings.weight"]
    embedding.zero_()
    for word in range(classes):
        embedding[len(builders.SPECIAL) + word, word] = 5.0
    for name, tensor in tensors.items():
        if ("layer.0" in name and "LayerNorm" not in name) or "position" in name or "token_type" in name:
            tensor.zero_()
    # the first token reads the mean of the row, as queries and keys are all 0
    tensors["bert.encoder.layer.0.attention.self.value.weight"].copy_(torch.eye(32))
    tensors["bert.encoder.layer.0.attention.output.dense.weight"].copy_(50 * torch.eye(32))
    tensors["bert.pooler.dense.weight"].copy_(torch.eye(32))
    tensors["bert.pooler.dense.bias"].zero_()
    head = tensors["classifier.weight"]
    head.zero_()
    tensors["classifier.bias"].zero_()
    for word in range(classes):
        head[order[word], word] = 4.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def baseline(out):
    report = report_of(out)
    return report["arms"]["baseline"]["accuracy"], report["labels"]


# ---------------------------------------------------------------- LABEL_k


@pytest.mark.parametrize("classes", [2, 3, 11, 12, 101])
@pytest.mark.parametrize("form", ["LABEL_{}", "label_{}", "Label_{}"])
def test_label_k_is_class_k_for_any_number_of_classes(classes, form):
    found = match_labels(None, classes, {form.format(k) for k in range(classes)})
    assert found.ids == {form.format(k): k for k in range(classes)}
    assert not found.guessed


def test_some_of_them_are_enough_and_others_are_refused():
    assert match_labels(None, 12, {"LABEL_10", "LABEL_2"}).ids == {"LABEL_10": 10, "LABEL_2": 2}
    declared = ["LABEL_1", "LABEL_0"]  # the data set's own ids are others
    assert match_labels(None, 2, set(declared), declared).ids == {"LABEL_0": 0, "LABEL_1": 1}
    with pytest.raises(DataError, match=r"LABEL_3\. The model's classes are: LABEL_0, LABEL_1, LABEL_2"):
        match_labels(None, 3, {"LABEL_3", "LABEL_1"})
    with pytest.raises(DataError, match="no class names of the model: cat"):
        match_labels(None, 2, {"LABEL_0", "cat"})


def test_twelve_unnamed_classes_reach_what_transformers_reaches(command, tmp_path):
    source = knowing(tmp_path / "m", 12)
    names = [f"LABEL_{k}" for k in range(12)]
    rows, judged = csv(tmp_path / "rows.csv", names, rows=6), csv(tmp_path / "judged.csv", names, rows=5)
    found = command(source, "--data", rows, "--eval-data", judged, "-o", tmp_path / "out", *QUICK)
    assert found.code == 0, found.err
    accuracy, labels = baseline(tmp_path / "out")
    assert accuracy == 1
    assert labels["rule"] == "LABEL_k is class k (the model has no names)"


# ---------------------------------------------------------------- a guess that the answers contradict


def test_a_sorted_order_that_the_answers_contradict_is_refused_with_both(refused, command, tmp_path):
    """Names that sort as c10, c11, c2, …: the model was trained on them in the order of their numbers."""
    names = [f"c{k}" for k in range(12)]
    source = knowing(tmp_path / "m", 12)
    rows, judged = csv(tmp_path / "rows.csv", names, rows=6), csv(tmp_path / "judged.csv", names, rows=5)
    said = refused(source, "--data", rows, "--eval-data", judged, "-o", tmp_path / "out", *QUICK)
    assert "sorted order of the data's names" in said
    assert "c10 → 2" in said  # used
    assert "c10 → 10" in said  # fits
    assert "16.7% of 60 rows are right" in said
    assert "100.0% are right" in said
    assert "nothing was trained" in said
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    better, kept = (
        shlex.split(text)[0].rstrip(",;")
        for text in said.removesuffix("; nothing was trained").replace(", or keep", "").split("--set ")[1:]
    )
    for option, accuracy in ((better, 1), (kept, 1 / 6)):
        out = tmp_path / f"out {accuracy}"
        found = command(source, "--data", rows, "--eval-data", judged, "-o", out, *QUICK, "--set", option)
        assert found.code == 0, found.err
        assert baseline(out)[0] == pytest.approx(accuracy)
        assert ("fits the source's answers far better" in " ".join(report_of(out)["warnings"])) == (accuracy != 1)


def test_few_evaluation_rows_are_helped_by_the_training_rows(refused, tmp_path):
    source = knowing(tmp_path / "m", 3, order=[1, 2, 0])
    rows, judged = csv(tmp_path / "rows.csv", ["a", "b", "c"], rows=20), csv(tmp_path / "judged.csv", ["a", "b", "c"], rows=2)
    said = refused(source, "--data", rows, "--eval-data", judged, "-o", tmp_path / "out", *QUICK)
    assert "a → 1, b → 2, c → 0; 100.0% are right" in said
    assert "of 66 rows" in said


@pytest.mark.parametrize("kind", ["integers", "declared"])
def test_ids_that_the_answers_contradict_are_refused_too(refused, tmp_path, kind):
    """The well-known case: two models of one task that count its classes in another order."""
    source = knowing(tmp_path / "m", 3, order=[2, 0, 1])
    names = ["0", "1", "2"] if kind == "integers" else ["entailment", "neutral", "contradiction"]
    rows = csv(tmp_path / "rows.csv", names, rows=20)
    if kind == "declared":
        read = datasets.Dataset.from_csv(str(rows), cache_dir=str(tmp_path / "cache"))
        rows = tmp_path / "disk"
        read.cast_column("label", datasets.ClassLabel(names=names)).save_to_disk(rows)
    said = refused(source, "--data", rows, "--eval-data", rows, "-o", tmp_path / "out", *QUICK)
    assert f"{names[0]} → 2, {names[1]} → 0, {names[2]} → 1; 100.0% are right" in said


def test_with_names_it_is_a_warning(command, tmp_path):
    source = knowing(tmp_path / "m", 3, ["a", "b", "c"], order=[1, 2, 0])
    rows = csv(tmp_path / "rows.csv", ["a", "b", "c"], rows=20)
    found = command(source, "--data", rows, "--eval-data", rows, "-o", tmp_path / "out", *QUICK)
    assert found.code == 0, found.err
    (line,) = [line for line in report_of(tmp_path / "out")["warnings"] if "far better" in line]
    assert "a → b, b → c, c → a; 100.0% are right" in line
    assert "--set 'label_map={a: b, b: c, c: a}', if it is the right one" in line


def answers(classes, rows, right, order=None, seed=0):
    """Targets and answers: of `rows` rows of each class the share `right` by class order[k] (k), the rest by any."""
    draw, targets = np.random.default_rng(seed), np.repeat(np.arange(classes), rows)
    meant = np.asarray(order if order is not None else range(classes))[targets]
    return targets, np.where(draw.random(len(targets)) < right, meant, draw.integers(0, classes, len(targets)))


@given(st.integers(2, 30), st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_weak_model_is_not_taken_for_a_misread_one(classes, rows, right, seed):
    assert better_assignment(*answers(classes, rows, right, seed=seed), classes) is None


@given(st.integers(3, 30), st.integers(20, 40), st.floats(0.85, 1), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_misread_one_is_seen(classes, rows, right, seed):
    order = np.roll(np.arange(classes), 1 + seed % (classes - 1))
    found = better_assignment(*answers(classes, rows, right, order, seed), classes)
    assert found is not None
    assert list(found.classes) == order.tolist()
    assert found.accuracy > found.used


@pytest.mark.parametrize("classes", [3, 5, 10])
def test_a_biased_one_is_not(classes):
    """Five stars where four are meant, four for three, …: another assignment fits more rows, and not those of the last label."""
    targets = np.repeat(np.arange(classes), 200)
    too_good = np.minimum(targets + (np.arange(len(targets)) % 10 > 0), classes - 1)
    assert better_assignment(targets, too_good, classes) is None
    always = np.zeros_like(targets)
    assert better_assignment(targets, always, classes) is None


def test_many_classes_of_a_few_rows_fit_by_chance_and_are_not_seen():
    targets, found = answers(100, 2, 0.0)
    assert better_assignment(targets, found, 100) is None


# ---------------------------------------------------------------- label_map


def test_positive_and_pos_are_refused_with_the_line_that_cures_it(refused, command, tmp_path):
    source = builders.bert_checkpoint(tmp_path / "m", ["NEGATIVE", "POSITIVE"])
    rows = builders.text_csv(tmp_path / "rows.csv")
    args = (source, "--data", rows, "-o", tmp_path / "out", *QUICK)
    said = refused(*args)
    assert "--set 'label_map={neg: NEGATIVE, pos: POSITIVE}'" in said
    found = command(*args, *shlex.split(said[said.index("--set") :]))
    assert found.code == 0, found.err
    report = report_of(tmp_path / "out")
    assert report["labels"]["rule"] == "by label_map (neg → NEGATIVE, pos → POSITIVE)"
    assert report["labels"]["model"] == ["NEGATIVE", "POSITIVE"]
    again = command(
        source, "--recipe", tmp_path / "out/dsd/recipe.yaml", "-o", tmp_path / "again", "--quiet", "--device", "cpu"
    )
    assert again.code == 0, again.err
    assert report_of(tmp_path / "again")["labels"] == report["labels"]


@pytest.mark.parametrize(
    ("label_map", "says"),
    [
        ("{nog: NEGATIVE}", "label_map: nog is no label of the data. The data's labels are: neg, pos"),
        ("{neg: BAD, pos: POSITIVE}", "label_map: BAD is no class of the model. The model's classes are: NEGATIVE, POSITIVE"),
        ("{neg: 2, pos: 0}", "label_map: 2 is no class of the model"),
        ("{neg: NEGATIVE}", "no class names of the model: pos"),
        ("[neg, pos]", "label_map: expected a mapping"),
        ("{neg: yes, pos: no}", "put it into quotes"),
        ("{1: NEGATIVE}", "the key 1 is not text; put it into quotes"),
    ],
)
def test_a_map_that_cannot_be_is_refused(refused, tmp_path, label_map, says):
    source = builders.bert_checkpoint(tmp_path / "m", ["NEGATIVE", "POSITIVE"])
    rows = builders.text_csv(tmp_path / "rows.csv")
    said = refused(source, "--data", rows, "-o", tmp_path / "out", *QUICK, "--set", f"label_map={label_map}")
    assert says in said


def test_a_map_may_make_two_labels_one_class_and_nothing_else_does():
    both = match_labels((("neg",), ("pos",)), 2, {"neg", "awful", "pos"}, label_map={"awful": "neg"})
    assert both.ids == {"awful": 0, "neg": 0, "pos": 1}
    assert both.rule == "by label_map (awful → neg), the others by name"
    with pytest.raises(DataError, match=r"same class of the model: 'Dog' and 'dog' are both dog|Dog and dog are both dog"):
        match_labels(NAMED, 3, {"Dog", "dog"})


def test_a_map_of_a_model_without_names_takes_numbers():
    for values in (["2", "0", "1"], ["LABEL_2", "label_0", "LABEL_1"]):
        found = match_labels(None, 3, {"a", "b", "c"}, label_map=dict(zip("abc", values, strict=True)))
        assert found.ids == {"a": 2, "b": 0, "c": 1}
        assert not found.guessed
    assert match_labels(None, 3, {"a"}, label_map={"a": "2"}).ids == {"a": 2}  # one of its classes is enough
    turned = match_labels(None, 2, {"0", "1"}, ["no", "yes"], {"0": "1", "yes": "0"})
    assert turned.ids == {"no": 1, "yes": 0, "0": 1, "1": 0}


def test_a_class_of_a_name_that_two_have_is_meant_by_its_number():
    aliases = (("crane",), ("heron",), ("crane",))
    with pytest.raises(DataError, match=r"names of several of its classes: crane.*label_map=\{crane: NUMBER\}"):
        match_labels(aliases, 3, {"crane"})
    assert match_labels(aliases, 3, {"crane"}, label_map={"crane": "2"}).ids == {"crane": 2}
    with pytest.raises(DataError, match="crane is the name of several classes"):
        match_labels(aliases, 3, {"x"}, label_map={"x": "crane"})


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.text(max_size=8), min_size=1, max_size=4))
@example({"1e5": "0E0", "yes": "null", "2001-01-01": "~"})
@settings(max_examples=50, deadline=None)
def test_the_line_that_is_offered_says_what_it_should(pairs):
    """Whatever the names: through a shell, YAML and the recipe it comes back as the same map."""
    flag, assignment = shlex.split(map_option(pairs))
    raw = {"phases": [{"kind": "dense", "steps": 1, "lr": 0.1}]}
    set_field(raw, assignment)
    assert flag == "--set"
    assert validate(raw).label_map == pairs
    if all(text.isprintable() for text in (*pairs, *pairs.values())):
        assert validate(parse_yaml(recipe(label_map=pairs).dump(), "x")).label_map == pairs


@pytest.mark.parametrize(
    ("labels", "classes", "pairs"),
    [
        (["neg", "pos"], ["NEGATIVE", "POSITIVE"], ["NEGATIVE", "POSITIVE"]),
        (["LABEL_1", "LABEL_0"], ["no", "yes"], ["yes", "no"]),
        (["entail", "neutral"], ["ENTAILMENT", "NEUTRAL", "CONTRADICTION"], ["ENTAILMENT", "NEUTRAL"]),
        (["p\u043es"], ["neg", "pos"], ["pos"]),
        (["cat"], ["category", "caterpillar"], None),
        (["wolf", "dog"], ["dog", "cat"], None),
        (["ne", "neg"], ["negative", "other"], None),
    ],
)
def test_what_labels_seem_to_mean(labels, classes, pairs):
    assert counterparts(labels, classes) == (pairs and dict(zip(labels, pairs, strict=True)))


# ---------------------------------------------------------------- label_names


def disk(path, names, ids):
    data = {
        "text": [f"the {a} {b} {n}" for n, (a, b) in enumerate(zip(WORDS * 9, WORDS[3:] * 9, strict=False))][: len(ids)],
        "label": ids,
    }
    rows = datasets.Dataset.from_dict(data).cast_column("label", datasets.ClassLabel(names=names))
    rows.save_to_disk(path)
    return path


def test_label_names_come_before_a_data_set_s_own(command, refused, tmp_path):
    """The data set calls its classes neg and pos, in this order; the model NEGATIVE and POSITIVE, in the other."""
    source = builders.bert_checkpoint(tmp_path / "m", ["POSITIVE", "NEGATIVE"])
    data = disk(tmp_path / "d", ["neg", "pos"], [0, 1, 1] * 12)
    args = (source, "--data", data, "--eval-data", data, "-o", tmp_path / "out", *QUICK)
    found = command(*args, "--set", "label_names=[NEGATIVE, POSITIVE]")
    assert found.code == 0, found.err
    import pyarrow.parquet

    targets = pyarrow.parquet.read_table(tmp_path / "out/dsd/predictions.parquet")["target"].to_pylist()
    assert targets == ["NEGATIVE", "POSITIVE", "POSITIVE"] * 12
    assert "integers by the names" in report_of(tmp_path / "out")["labels"]["rule"]
    said = refused(*args, "--set", "label_names=[NEGATIVE, POSITIVE, OTHER]", "--overwrite")
    assert "label_names has 3 names, the data set's own classes are 2: neg, pos" in said


def test_label_names_that_name_nothing_are_said(command, made, tmp_path):
    found = command(
        made / "bert", "--data", made / "texts.csv", "-o", tmp_path / "out", *QUICK, "--set", "label_names=[neg, pos]"
    )
    assert found.code == 0, found.err
    report = report_of(tmp_path / "out")
    assert any("label_names names integers, and the labels of the data are texts" in line for line in report["warnings"])
    assert report["labels"]["rule"] == "by name"


def test_label_names_give_a_model_without_names_its_order():
    from dataclasses import replace

    train = replace(
        table(text=["the cat", "a dog", "red fish", "blue bird"] * 3, label=["neg", "pos"] * 6), classes=("pos", "neg")
    )
    task = texts({"train": train, "test": train}, aliases=None, holdout=0, keep="last")
    assert task.labels.ids == {"pos": 0, "neg": 1}
    assert task.labels.rule == "the order of label_names (the model has no names)"


@pytest.mark.parametrize("given", ["label_map={a: b}", "label_names=[a, b]"])
def test_a_task_without_classes_takes_neither(refused, made, tmp_path, given):
    said = refused(made / "gpt2", "--data", made / "documents.txt", "-o", tmp_path / "out", *QUICK, "--set", given)
    assert "label_names and label_map are of classes, and causal-lm has none" in said


def test_integers_without_names_are_offered_the_model_s(refused, tmp_path):
    source = builders.bert_checkpoint(tmp_path / "m", ["NEGATIVE", "POSITIVE"])
    rows = csv(tmp_path / "rows.csv", ["0", "1"])
    said = refused(source, "--data", rows, "-o", tmp_path / "out", *QUICK)
    assert "--set 'label_names=[name of 0, name of 1]'" in said
    assert "[NEGATIVE" not in said  # whose order it is, the data's or the model's, is not known


def glue(path, labels, hidden, rows=20):
    """A folder of JSON lines: train and validation with integers, a test split whose labels are hidden."""
    path.mkdir()
    for split, ids in (("train", labels), ("validation", labels), ("test", hidden)):
        lines = [{"text": f"the {WORDS[n % 9]} {split} {n}", "label": ids[n % len(ids)]} for n in range(rows)]
        (path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_minus_one_is_no_label_as_in_glue_s_hidden_test_split(command, refused, made, tmp_path):
    data = glue(tmp_path / "d", [0, 1], [-1])
    source = builders.bert_checkpoint(tmp_path / "m", ["neg", "pos"])
    said = refused(source, "--data", data, "-o", tmp_path / "out", *QUICK)
    assert "-1" not in said
    names = ("--set", "label_names=[neg, pos]")
    for model, more in ((source, names), (builders.bert_checkpoint(tmp_path / "unnamed", 2), ())):
        found = command(model, "--data", data, "-o", tmp_path / "out", *QUICK, "--overwrite", *more)
        assert found.code == 0, found.err
        report = report_of(tmp_path / "out")
        assert report["data"]["sources"][-1]["split"] == "validation"
        assert any("test split has no usable rows with labels" in line for line in report["warnings"])


@pytest.mark.parametrize("form", [int, float, str])
def test_a_split_of_minus_one_alone_has_no_labels(form):
    read = [label_texts(table(label=[form(n) for n in column]), "label") for column in ([0, 1, 2], [-1, -1])]
    assert without_hidden(read, None, {}) == [read[0], [None, None]]
    assert without_hidden(read, None, {"-1": "0"}) == read
    assert without_hidden(read, (("-1",), ("0",)), {}) == read


@pytest.mark.parametrize("numbers", [[-1, 0, 1], [0, 1, -1, 2], [-1, 0]])
def test_minus_one_among_other_numbers_may_be_a_class(command, refused, tmp_path, numbers):
    """A sentiment's negative class, or a row that nobody labelled: the user says which."""
    source = builders.bert_checkpoint(tmp_path / "m", ["neg", "mid", "pos"])
    args = (source, "--data", csv(tmp_path / "rows.csv", numbers, rows=24), "-o", tmp_path / "out", *QUICK)
    for more in ((), ("--set", "label_names=[neg, mid, pos]")):
        said = refused(*args, *more)
        assert "the label -1 stands beside" in said
        assert 'label_map={"-1": null' in said
    left = [number for number in sorted(numbers) if number >= 0]
    given = ", ".join(f'"{number}": {name}' for number, name in zip(left, ["neg", "mid", "pos"], strict=False))
    found = command(*args, "--set", f'label_map={{"-1": null, {given}}}')
    assert found.code == 0, found.err


@pytest.mark.parametrize("labels", [["-1", "1"], ["-2", "-1", "0"], ["-1", "cat"], ["-1.5", "-1"]])
def test_minus_one_beside_others_is_a_label(labels):
    assert without_hidden([labels], None, {}) == [labels]


def test_minus_one_and_one_are_two_classes_also_beside_label_names(command, refused, tmp_path):
    source = builders.bert_checkpoint(tmp_path / "m", ["neg", "pos"])
    args = (source, "--data", csv(tmp_path / "rows.csv", [-1, 1], rows=12), "-o", tmp_path / "out", *QUICK)
    assert "the labels are -1 and 1, and label_names counts from 0" in refused(*args, "--set", "label_names=[neg, pos]")
    found = command(*args, "--set", 'label_map={"-1": neg, "1": pos}')
    assert found.code == 0, found.err
    assert report_of(tmp_path / "out")["labels"]["rule"] == "by label_map (-1 → neg, 1 → pos)"


STARS = [f"{n} star{'s' if n > 1 else ''}" for n in (1, 2, 3)]


@pytest.mark.parametrize("numbers", [[1, 2], [1, 2, 3], [3]])
def test_numbers_in_the_model_s_names_say_which_is_meant(command, refused, tmp_path, numbers):
    source = builders.bert_checkpoint(tmp_path / "m", STARS)
    rows = csv(tmp_path / "rows.csv", numbers, rows=20)
    args = (source, "--data", rows, "-o", tmp_path / "out", *QUICK)
    said = refused(*args)
    assert "label_names" not in said
    found = command(*args, *shlex.split(said[said.index("--set") :]))
    assert found.code == 0, found.err
    rule = ", ".join(f"{n} → {STARS[n - 1]}" for n in numbers)
    assert report_of(tmp_path / "out")["labels"]["rule"] == f"by label_map ({rule})"


@pytest.mark.parametrize(
    ("names", "labels", "says"),
    [
        (STARS, ["0", "1", "2"], 'label_map={"0": …, "1": …, "2": …}'),
        (["1 of 3", "2 of 3", "3 of 3"], ["1", "2"], 'label_map={"1": …, "2": …}'),
        (["bad", "fair", "good"], ["1", "2", "3"], 'label_map={"1": …, "2": …, "3": …}'),
        (["bad", "good"], ["0", "1"], "label_names=[name of 0, name of 1]"),
        (["bad", "fair", "good", "best"], ["0", "3"], "label_names=[name of 0, name of 1, name of 2, …]"),
        (["age 20-29", "age 30-39"], ["20", "30"], 'label_map={"20": …, "30": …}'),
    ],
)
def test_no_order_is_offered_that_nobody_said(names, labels, says):
    with pytest.raises(DataError) as error:
        match_labels([[name] for name in names], len(names), set(labels))
    assert says in str(error.value)
    assert ("label_names" in str(error.value)) == says.startswith("label_names")


def test_label_names_of_numbers_that_do_not_count_from_0_lead_to_label_map(refused, tmp_path):
    source = builders.bert_checkpoint(tmp_path / "m", ["bad", "fair", "good"])
    rows = csv(tmp_path / "rows.csv", [1, 2, 3])
    more = ("--set", "label_names=[bad, fair, good]")
    said = refused(source, "--data", rows, "-o", tmp_path / "out", *QUICK, *more)
    assert "class id 3 is outside 0..2. label_names counts from 0: leave it out" in said
    assert """--set 'label_map={"3": CLASS, …}'""" in said


@pytest.mark.parametrize("config", ["", "  config_name: default\n"])
def test_names_of_a_readme_s_dataset_info_are_the_data_s(command, tmp_path, config):
    """Its parquet files hold bare integers, in another order than the model's."""
    import pyarrow
    import pyarrow.parquet

    names = "".join(f"          '{n}': {name}\n" for n, name in enumerate(("pos", "neg")))
    (tmp_path / "d/data").mkdir(parents=True)
    (tmp_path / "d/README.md").write_text(
        f"---\ndataset_info:\n{config}  features:\n  - name: text\n    dtype: string\n  - name: label\n"
        f"    dtype:\n      class_label:\n        names:\n{names}---\n# Words\n"
    )
    for split, rows in (("train", 24), ("test", 9)):
        texts = [f"the {WORDS[n % 9]} {split} {n}" for n in range(rows)]
        held = pyarrow.table({"text": texts, "label": [0, 1, 1] * (rows // 3)})
        pyarrow.parquet.write_table(held, tmp_path / f"d/data/{split}-00000-of-00001.parquet")
    ours = datasets.load_dataset(str(tmp_path / "d"), cache_dir=str(tmp_path / "cache"))["test"]
    source = builders.bert_checkpoint(tmp_path / "m", ["neg", "pos"])
    found = command(source, "--data", tmp_path / "d", "-o", tmp_path / "out", *QUICK)
    assert found.code == 0, found.err
    targets = pyarrow.parquet.read_table(tmp_path / "out/dsd/predictions.parquet")["target"].to_pylist()
    assert targets == ["pos", "neg", "neg"] * 3
    assert targets == [ours.features["label"].names[n] for n in ours["label"]]


# ---------------------------------------------------------------- rows that label_map leaves out


def test_a_label_that_nobody_agreed_on_is_left_out_by_label_map(command, refused, tmp_path):
    source = builders.bert_checkpoint(tmp_path / "m", ["neg", "pos"])
    args = (source, "--data", csv(tmp_path / "rows.csv", ["neg", "pos", "-"]), "-o", tmp_path / "out", *QUICK)
    said = refused(*args)
    assert """--set 'label_map={"-": null}'""" in said
    found = command(*args, *shlex.split(said[said.index("--set") :]))
    assert found.code == 0, found.err
    report = report_of(tmp_path / "out")
    left = report["data"]["train"]["skipped"]
    assert [item["row"] for item in left] == list(range(2, 24, 3))
    assert {item["reason"] for item in left} == {"label '-' left out by label_map"}
    assert any("8 training rows skipped, the first: 2 (label '-' left out" in line for line in report["warnings"])
    again = command(
        source, "--recipe", tmp_path / "out/dsd/recipe.yaml", "-o", tmp_path / "again", "--quiet", "--device", "cpu"
    )
    assert again.code == 0, again.err
    assert report_of(tmp_path / "again")["data"] == report["data"]


def test_any_label_may_be_left_out_and_only_one_that_is_there(command, refused, tmp_path):
    source = builders.bert_checkpoint(tmp_path / "m", 2)
    args = (source, "--data", csv(tmp_path / "rows.csv", ["a", "b", "?"]), "-o", tmp_path / "out", *QUICK)
    found = command(*args, "--set", 'label_map={"?": null}')
    assert found.code == 0, found.err
    assert report_of(tmp_path / "out")["labels"]["model"] == ["a", "b"]
    said = refused(*args, "--overwrite", "--set", 'label_map={"!": null}')
    assert "label_map: ! is no label of the data. The data's labels are: ?, a, b" in said


def test_the_mark_of_no_agreement_is_offered_beside_names_that_do_not_match():
    with pytest.raises(DataError, match=r'label_map=\{"-": null, neg: NEGATIVE, pos: POSITIVE\}'):
        match_labels((("NEGATIVE",), ("POSITIVE",)), 2, {"-", "neg", "pos"})
    with pytest.raises(DataError, match=r'nobody agreed on: --set \'label_map=\{"-": null\}'):
        match_labels(None, 2, {"-", "neg", "pos"})


def test_one_label_in_a_list_is_called_so():
    with pytest.raises(DataError, match=r"one label in a list .*write it plain"):
        label_texts(table(label=[["neg"], ["pos"]]), "label")


@pytest.mark.parametrize("column", [[True, False], ["1", "0"], ["1.0", "0.0"], [1.0, 0.0], [" 1", "0 "], ["01", "00"], [1, 0]])
def test_names_that_are_said_name_integers_in_any_writing(column):
    from dataclasses import replace

    named = replace(table(label=column), classes=("no", "yes"))
    assert label_texts(named, "label") == ["yes", "no"]


# ---------------------------------------------------------------- how labels are written


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        (["0", "1", "2"], [0, 1, 2]),
        (["2.0", "10.0", "0.0"], [2, 10, 0]),
        ([" 2", "10 ", "0"], [2, 10, 0]),
        (["02", "10", "00"], [2, 10, 0]),
        ([2.0, 10.0, 0.0], [2, 10, 0]),
    ],
)
def test_numbers_in_any_writing_are_numbers(labels, ids):
    rows = (
        [*labels, *(str(n) for n in range(12) if n not in ids)]
        if isinstance(labels[0], str)
        else [*labels, *map(float, set(range(12)) - set(ids))]
    )
    read = label_texts(table(label=rows), "label")
    found = match_labels(None, 12, set(read))
    assert [found.ids[text] for text in read[: len(ids)]] == ids


@pytest.mark.parametrize("names", [{"1", "01", "0"}, {"1", "1.0", "0"}, {"0", " 0", "1"}])
def test_one_number_in_two_writings_is_refused(names):
    with pytest.raises(DataError, match=r"(same number|same class)"):
        match_labels(None, 2, names)
    with pytest.raises(DataError, match="same class"):
        match_labels((("0",), ("1",)), 2, names)


@pytest.mark.parametrize("names", [{"0.5", "1.5"}, {"1", "2.25"}, {"-.5", "3"}])
def test_scores_in_text_are_no_classes(names):
    with pytest.raises(DataError, match="numbers and no classes"):
        match_labels(None, 2, names)


def test_yes_and_no_are_their_words():
    read = label_texts(table(label=[True, False, None]), "label")
    assert read == ["True", "False", None]
    assert match_labels(None, 2, {"True", "False"}).ids == {"False": 0, "True": 1}
    assert match_labels((("true",), ("false",)), 2, {"True", "False"}).ids == {"True": 0, "False": 1}
    with pytest.raises(DataError, match=r'label_map=\{"False": …, "True": …\}'):
        match_labels((("a",), ("b",)), 2, {"True", "False"})


def test_a_label_of_spaces_is_none_and_bytes_are_text():
    assert label_texts(table(label=["a", " ", "", None]), "label") == ["a", None, None, None]
    assert label_texts(table(label=[b"pos", b"neg"]), "label") == ["pos", "neg"]


def test_outer_spaces_and_capitals_match_or_are_refused():
    assert match_labels(NAMED, 3, {" dog", "Tabby Cat"}).ids == {" dog": 1, "Tabby Cat": 0}
    with pytest.raises(DataError, match="' dog' and 'dog' are both 'dog'"):
        match_labels(NAMED, 3, {" dog", "dog"})
    with pytest.raises(DataError, match=r"look the same: 'pos', 'pos '"):
        match_labels(None, 3, {"neg", "pos", "pos "})
    with pytest.raises(DataError, match=r"the data has 3 classes \(neg, 'pos', 'pos '\), the model 2"):
        match_labels(None, 2, {"neg", "pos", "pos "})


NFC, NFD = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")


@pytest.mark.parametrize(("model", "data"), [(NFC, NFD), (NFD, NFC)])
def test_a_folder_of_macos_is_the_model_s_class(command, tmp_path, model, data):
    source = builders.timm_checkpoint(tmp_path / "m", [model, "thé", "eau"])
    pictures = builders.image_folder(tmp_path / "p", [data, unicodedata.normalize("NFD", "thé"), "eau"])
    found = command(source, "--data", pictures, "-o", tmp_path / "out", *QUICK)
    assert found.code == 0, found.err
    assert report_of(tmp_path / "out")["labels"]["model"] == [model, "thé", "eau"]


@pytest.mark.parametrize("aliases", [None, ((NFC,), ("thé",))])
def test_train_and_test_may_be_written_in_two_forms(aliases):
    train = table(text=["the cat", "a dog", "red fish", "blue bird"] * 3, label=[NFD, "thé"] * 6)
    test = table(text=["new dog", "old cat"], label=[NFC, unicodedata.normalize("NFD", "thé")])
    task = texts({"train": train, "test": test}, aliases=aliases, holdout=0, keep="last")
    assert task.eval.ids.tolist() == [0, 1]
    with pytest.raises(DataError, match=r"look the same: 'cafe\\u0301' and 'caf\\xe9'|'caf\\xe9' and 'cafe\\u0301'"):
        label_texts(table(label=[NFC, NFD]), "label")


@pytest.mark.parametrize(
    ("label", "shown"),
    [("p\u043es", r"'p\u043es'"), ("po\u200bs", r"'po\u200bs'"), ("p\u03bfs", r"'p\u03bfs'"), ("pos\u00ad", r"'pos\xad'")],
)
def test_look_alikes_are_shown_with_their_escapes(label, shown):
    with pytest.raises(DataError) as error:
        match_labels((("neg",), ("pos",)), 2, {"neg", label})
    said = str(error.value)
    assert f"no class names of the model: {shown}. The model's classes are: neg, 'pos'" in said
    assert f"{shown} looks like 'pos', but is written with other characters" in said
    (option,) = shlex.split(said.split("--set ")[1].split(". '")[0])
    cure = yaml.safe_load(option.removeprefix("label_map="))
    assert match_labels((("neg",), ("pos",)), 2, {"neg", label}, label_map=cure).ids == {"neg": 0, label: 1}


def test_names_with_commas_are_told_apart():
    assert listed(["tench, Tinca tinca", "goldfish"]) == '"tench, Tinca tinca", "goldfish"'
    assert listed(["a", "b"]) == "a, b"
    with pytest.raises(DataError, match='classes are: "tench, Tinca tinca", "goldfish, Carassius auratus"'):
        match_labels((("tench, Tinca tinca",), ("goldfish, Carassius auratus",)), 2, {"tinca"})


# ---------------------------------------------------------------- names of a checkpoint


def configured(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a", "b", "c", "d"], "label_names has 4 names, the head 3: a, b, c, d"),
        (["a", "b"], "label_names has 2 names, the head 3: a, b"),
        ("abc", "`label_names` is not a list of texts"),
        ({"a": 0, "b": 1, "c": 2}, "`label_names` is not a list of texts"),
        ([0, 1, 2], "`label_names` is not a list of texts"),
        (["a", None, "c"], "`label_names` is not a list of texts"),
        (["a", "b", "a"], "label_names has 'a' for two classes"),
    ],
)
def test_names_of_a_timm_config_that_are_not_those_of_its_head(refused, made, tmp_path, names, says):
    source = configured(builders.timm_checkpoint(tmp_path / "m", 3), label_names=names)
    assert says in refused(source, "--data", made / "pictures", "-o", tmp_path / "out", *QUICK)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"label_names": ["a", "b", "c", "d"]}, "torch.Size([4])"),
        ({"label_names": ["a", "b", "c", "d"], "num_classes": 3}, "label_names"),
        ({"label_names": "abc", "num_classes": 3}, "label_names"),
        ({"label_names": ["a", "b", "b"]}, "label_names has 'b' for two classes"),
    ],
)
def test_names_of_a_torchvision_config_that_are_not_those_of_its_head(refused, made, tmp_path, fields, says):
    source = configured(builders.torchvision_checkpoint(tmp_path / "m"), **fields)
    assert says in refused(source, "--data", made / "colours", "-o", tmp_path / "out", *QUICK)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_labels": 3}, "`id2label` has 2 names, `num_labels` is 3"),
        ({"id2label": {"0": "neg", "1": "pos", "2": "other"}, "num_labels": 2}, "`id2label` has 3 names, `num_labels` is 2"),
        ({"id2label": {"0": "neg", "1": ["pos"]}}, "class names that are no texts"),
        ({"label2id": {"pos": 0, "neg": 1}}, "`id2label` names the classes neg, pos, `label2id` pos, neg"),
    ],
)
def test_names_of_a_transformers_config_that_contradict_it(refused, made, tmp_path, fields, says):
    source = configured(builders.bert_checkpoint(tmp_path / "m"), **fields)
    assert says in refused(source, "--data", made / "texts.csv", "-o", tmp_path / "out", *QUICK)


def test_names_that_only_label2id_has_are_the_model_s(command, made, tmp_path):
    source = configured(
        builders.bert_checkpoint(tmp_path / "m"), id2label={"0": "LABEL_0", "1": "LABEL_1"}, label2id={"pos": 0, "neg": 1}
    )
    found = command(source, "--data", made / "texts.csv", "-o", tmp_path / "out", *QUICK)
    assert found.code == 0, found.err
    assert report_of(tmp_path / "out")["labels"]["model"] == ["pos", "neg"]


def test_a_head_of_one_output_is_named_so(refused, made, tmp_path):
    source = builders.vit_checkpoint(tmp_path / "m", 1)
    said = refused(source, "--data", made / "colours", "-o", tmp_path / "out", *QUICK)
    assert "the head has one output, which is supported for texts alone" in said
