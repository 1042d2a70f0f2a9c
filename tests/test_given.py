"""Which splits and columns are used: spoken for, refused or named, from the data to stderr, plan, report, page and card."""

import json
import re
import shlex
import shutil

import builders
import datasets
import numpy as np
import pytest
from builders import WORDS, bert_checkpoint, image_folder, text_csv, text_file
from conftest import SHORT
from hypothesis import given, settings
from hypothesis import strategies as st

from dsd_refine.data.columns import AUDIO, CAPTION, DOCUMENT, IMAGE, LABEL, PAIRS, TEXT, TRANSCRIPT, choose
from dsd_refine.data.reading import Reading, Table, speaks_of
from dsd_refine.data.splits import Rows, by_role, divide
from dsd_refine.data.tables import read_tables
from dsd_refine.errors import DataError

MNLI = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
PLAN = ("--sparse-steps", "1", "--dense-steps", "1", "--json")


def rows_of(count, seed=0, **more):
    """Rows of text and label; `more` are further columns, a function of the row's number each."""
    texts = [f"the {WORDS[(row + seed) % 9]} sees {WORDS[(row * 5 + seed) % 11]} {WORDS[row % 3]}" for row in range(count)]
    made = {"text": texts, "label": [("neg", "pos")[row % 2] for row in range(count)]}
    return datasets.Dataset.from_dict(made | {name: [of(row) for row in range(count)] for name, of in more.items()})


def saved(folder, splits, rows=20):
    """A DatasetDict as save_to_disk writes it."""
    made = {name: rows_of(rows + number, number) for number, name in enumerate(splits)}
    datasets.DatasetDict(made).save_to_disk(folder)
    return folder


def split_files(folder, splits, rows=20):
    folder.mkdir()
    for number, name in enumerate(splits):
        rows_of(rows + number, number).to_csv(folder / f"{name}.csv")
    return folder


def split_folders(folder, splits):
    for number, name in enumerate(splits):
        image_folder(folder, splits=[name], per_class=10 + number, seed=number)
    return folder


@pytest.fixture
def plan(command):
    """What `plan --json` says of the data of a run."""

    def run(model, data, *options):
        found = command("plan", model, "--data", data, *PLAN, *options)
        assert found.code == 0, found.err
        return json.loads(found.out)

    return run


def where(plan):
    """part -> (the split or file that it comes from, rows)."""
    return {one["part"]: (one.get("split") or one["file"], one["rows"]) for one in plan["data"]["sources"]}


# ---------------------------------------------------------------- roles of splits


ONE_ROW = Table(datasets.Dataset.from_dict({"text": ["a"]}))


def roles(names, **options):
    reading = Reading(dict.fromkeys(names, ONE_ROW))
    found = by_role(reading, "org/data", **options)
    return {role: table.split for role, table in found.tables.items()}, [line.split(":")[0] for line in found.unused]


@pytest.mark.parametrize(
    ("names", "options", "found", "unused"),
    [
        (["train", "test"], {}, {"train": "train", "test": "test"}, []),
        (["Training", "Dev"], {}, {"train": "Training", "validation": "Dev"}, []),
        (["train", "test", "unsupervised"], {}, {"train": "train", "test": "test"}, ["split unsupervised"]),
        (["train", "train_small", "test"], {}, {"train": "train", "test": "test"}, ["split train_small"]),
        (["train_full", "test"], {}, {"train": "train_full", "test": "test"}, []),
        (["everything"], {}, {"train": "everything"}, []),
        (
            ["train", "validation", "test"],
            {"evaluates": "validation"},
            {"train": "train", "test": "validation"},
            ["split test"],
        ),
        (
            ["train", "validation", "test"],
            {"selects": "test"},
            {"train": "train", "validation": "test", "test": "validation"},
            [],
        ),
        (
            MNLI,
            {"evaluates": "validation_matched"},
            {"train": "train", "test": "validation_matched"},
            ["split validation_mismatched", "split test_matched", "split test_mismatched"],
        ),
        (
            ["train", "val", "dev", "test"],
            {"selects": "dev"},
            {"train": "train", "validation": "dev", "test": "test"},
            ["split val"],
        ),
        (["train", "test", "validation"], {"use": "train"}, {"train": "train", "validation": "validation"}, ["split test"]),
        (["train", "validation_matched"], {"use": "train"}, {"train": "train"}, ["split validation_matched"]),
        (["only"], {"use": "evaluate"}, {"test": "only"}, []),
        (["train", "test_a"], {"use": "evaluate", "evaluates": "TEST_A"}, {"test": "test_a"}, ["split train"]),
    ],
)
def test_every_split_has_a_role_or_is_named(names, options, found, unused):
    assert roles(names, **options) == (found, unused)


@pytest.mark.parametrize(
    ("names", "options", "says"),
    [
        (MNLI, {}, "test_matched, test_mismatched, validation_matched, validation_mismatched evaluates is not known"),
        (MNLI, {"selects": "validation_matched"}, "test_matched, test_mismatched, validation_mismatched evaluates"),
        (["train", "validation", "validation_2"], {}, "validation_2, validation evaluates"),
        (["train", "test", "test_small"], {}, "test_small, test evaluates"),
        (["train", "testA", "testB"], {}, "testA, testB"),
        (["train.clean", "en.dev", "en.test"], {}, "en.test, en.dev"),
        (["train", "val", "dev"], {}, "val, dev evaluates"),
        (["train", "test", "evaluation"], {}, "test, evaluation"),
        (["train", "training"], {}, "train and training could each be its train split"),
        (["train_a", "train_b", "test"], {}, "train_a and train_b could each be its train split"),
        (["test"], {}, "has only the split test; none is train"),
        (["first", "second"], {}, "first, second; none is train"),
        (["train", "test"], {"evaluates": "dev"}, "--eval-split dev: org/data has no split of that name; it has train, test"),
        (["train", "test"], {"selects": "tset"}, "--holdout-split tset: .*it has train, test"),
        (["train", "test"], {"evaluates": "train"}, "--eval-split train: that split trains"),
        (["train", "test"], {"evaluates": "test", "selects": "test"}, "both name test"),
        (["first", "second"], {"use": "evaluate"}, "first, second; which evaluates is not known: give --eval-split"),
        (["train", "test_a", "test_b"], {"use": "evaluate"}, "test_a, test_b evaluates is not known"),
    ],
)
def test_splits_that_nobody_spoke_for_are_refused(names, options, says):
    with pytest.raises(DataError, match=says):
        roles(names, **options)


def test_a_folder_of_a_split_s_own_name_is_a_split(refused, plan, made, tmp_path):
    """validation_matched/ beside train/ is no class and no folder to pass over."""
    builders.image_folder(tmp_path, splits=("train", "validation_matched", "validation_other"), channels=3)
    message = refused("plan", made / "vit", "--data", tmp_path)
    assert "Which of validation_matched, validation_other evaluates is not known: give --eval-split NAME" in message
    found = plan(made / "vit", tmp_path, "--eval-split", "validation_matched")
    assert where(found)["eval"] == ("validation_matched", 24)
    assert any("validation_other" in line for line in found["data"]["unused"])


GLUED = [
    ("trainset", "testset"), ("traindata", "testdata"), ("TrainSet", "ValidationSet"), ("traindir", "valdir"),
    ("trainA", "testA"), ("trn", "tst"), ("myTrainData", "myTestData"), ("train", "holdout"),
]  # fmt: skip


@pytest.mark.parametrize(("train", "other"), GLUED)
@pytest.mark.parametrize("form", ["tables", "tables in folders", "pictures"])
def test_a_split_s_word_counts_where_nothing_parts_it_from_the_rest(refused, plan, made, tmp_path, train, other, form):
    if form == "pictures":
        split_folders(tmp_path / "d", [train, other])
    else:
        split_files(tmp_path / "d", [train, other], rows=40)
        for path in sorted((tmp_path / "d").iterdir()) if form == "tables in folders" else ():
            (tmp_path / "d" / path.stem).mkdir()
            path.rename(tmp_path / "d" / path.stem / "0.csv")
    model = made / ("timm" if form == "pictures" else "bert")
    message = refused(model, "--data", tmp_path / "d", "-o", tmp_path / "out")
    assert "--eval-split NAME" in message
    assert other in message
    found = where(plan(model, tmp_path / "d", "--eval-split", other))
    assert (found["train"][0], found["eval"][0]) == (train, other)


@pytest.mark.parametrize("names", [("imdbtrain", "imdbtest"), ("IMDBTrain", "IMDBTest"), ("smsTRAIN", "smsTEST")])
@pytest.mark.parametrize("form", [split_files, split_folders])
def test_names_that_differ_in_a_split_s_word_alone_are_splits(made, tmp_path, names, form):
    form(tmp_path / "d", names)
    found = by_role(read_tables(str(tmp_path / "d"), tmp_path / "c", download=lambda *_: False), str(tmp_path / "d"))
    assert {role: len(table.rows) for role, table in found.tables.items()} == (
        {"train": 20, "test": 21} if form is split_files else {"train": 30, "test": 33}
    )


@pytest.mark.parametrize("names", [("trainset", "testset"), ("images_train", "images_val"), ("catstrain", "catstest")])
def test_flat_folders_of_pictures_that_name_splits_are_no_classes(refused, made, tmp_path, names):
    image_folder(tmp_path, classes=names, splits=(), per_class=8)
    assert "no images in class folders here" in refused("plan", made / "timm", "--data", tmp_path)


@pytest.mark.parametrize(
    "other", ["unlabeled", "unlabeled/0", "unlabelled_rows", "sample_submission", "unsup", "mytest", "no_labels"]
)
def test_a_file_that_speaks_of_rows_not_to_train_is_not_joined(refused, made, tmp_path, other):
    split_files(tmp_path / "d", ["tweets"])
    text_csv(tmp_path / "d" / f"{other}.csv")
    message = refused(made / "bert", "--data", tmp_path / "d", "-o", tmp_path / "out")
    assert f"{other}.csv speaks of rows that are not to train: name the files train and test" in message


@pytest.mark.parametrize("names", [("holdout", "data"), ("testset", "tweets"), ("valdata", "all")])
def test_a_test_file_beside_one_of_no_split_is_refused(refused, made, tmp_path, names):
    split_files(tmp_path / "d", names)
    message = refused(made / "bert", "--data", tmp_path / "d", "-o", tmp_path / "out")
    assert "which are the data? Move the others away, name them like train and test" in message
    assert all(f"{name}.csv" in message for name in names)


def test_files_of_unrelated_names_are_said_to_be_joined(plan, made, tmp_path):
    split_files(tmp_path / "d", ["tweets", "reviews"])
    said = plan(made / "bert", tmp_path / "d")["warnings"]
    assert any(line.startswith("reviews.csv, tweets.csv: names of no split, so all are joined as train") for line in said)
    for number, names in enumerate([("part-0", "part-1"), ("2019", "2020"), ("tweets 1", "tweets 22")]):
        split_files(tmp_path / f"{number}", names)
        assert not any("joined" in line for line in plan(made / "bert", tmp_path / f"{number}")["warnings"])


@pytest.mark.parametrize("inner", ["", "unknown", "test", "images", "Unlabelled"])
def test_pictures_of_a_test_split_in_no_class_are_left_out_and_named(plan, refused, made, tmp_path, inner):
    image_folder(tmp_path, splits=("train", "test"), per_class=12)
    (tmp_path / "test" / inner).mkdir(exist_ok=True)
    for path in list((tmp_path / "test").glob("[abc]/*.png")):
        path.rename(tmp_path / "test" / inner / f"{path.parent.name}{path.name}")
    for name in "abc":
        (tmp_path / "test" / name).rmdir()
    found = plan(made / "timm", tmp_path)
    assert sum(rows for _, rows in where(found).values()) == 36
    (said,) = [line for line in found["warnings"] if line.startswith("test/: ")]
    assert said.endswith("so of no label: not used")
    assert "label_map" not in json.dumps(found["warnings"])
    (tmp_path / "train").rename(tmp_path / "validation")  # nothing trains
    refused("plan", made / "timm", "--data", tmp_path)


def test_a_test_split_of_another_class_is_not_left_out(refused, made, tmp_path):
    image_folder(tmp_path, splits=("train",))
    image_folder(tmp_path, splits=("test",), classes=["d"])
    assert "d" in refused("plan", made / "timm", "--data", tmp_path)


@pytest.mark.parametrize("inner", ["images", "clips", "train"])
@pytest.mark.parametrize("spec", ["", "train.csv"])
def test_file_names_of_a_table_may_count_from_the_one_folder_that_holds_them(plan, made, tmp_path, inner, spec):
    image_folder(tmp_path / "made", splits=(), per_class=8)
    (tmp_path / "d" / inner).mkdir(parents=True)
    lines = ["image,label"]
    for path in sorted((tmp_path / "made").rglob("*.png")):
        shutil.copy(path, tmp_path / "d" / inner / f"{path.parent.name}{path.name}")
        lines.append(f"{path.parent.name}{path.name},{path.parent.name}")
    (tmp_path / "d/train.csv").write_text("\n".join(lines) + "\n")
    found = plan(made / "timm", tmp_path / "d" / spec)
    assert sum(rows for _, rows in where(found).values()) == 24
    assert f"train.csv: the files of its column 'image' are those in {inner}/" in found["data"]["notes"]
    assert found["data"]["unused"] == []
    assert all(not part["skipped"] for part in (found["data"]["train"], found["data"]["eval"]))


@pytest.mark.parametrize("sign", ["csv", "tsv"])
@pytest.mark.parametrize("first", ["the red dog runs home{}pos", "good{}1", "a cat{}neg"])
def test_a_table_without_a_head_is_said_to_seem_so(refused, made, tmp_path, sign, first):
    lines = [first, *(f"the dog {{}}{number}" for number in range(6)), "a cow{}neg", "a cow{}pos"]
    (tmp_path / f"t.{sign}").write_text("".join(line.format("\t" if sign == "tsv" else ",") + "\n" for line in lines))
    message = refused("plan", made / "bert", "--data", tmp_path / f"t.{sign}")
    assert "The first line seems to be data" in message
    (tmp_path / "u.csv").write_text("words,kind\na cat,neg\na dog,pos\n")
    assert "seems to be data" not in refused("plan", made / "bert", "--data", tmp_path / "u.csv")


def test_file_names_that_two_folders_hold_are_shown_where_they_are(refused, made, tmp_path):
    for inner in ("large", "small"):
        image_folder(tmp_path / inner, splits=(), per_class=8)
    (tmp_path / "train.csv").write_text("image,label\n" + "".join(f"{c}/00{i}.png,{c}\n" for c in "abc" for i in range(8)))
    message = refused("plan", made / "timm", "--data", tmp_path / "train.csv")
    assert "it lies in large/ and small/ there" in message


def test_folders_that_hold_the_same_classes_are_no_classes(refused, plan, made, tmp_path):
    for number, names in enumerate([("data", "more"), ("images", "unlabeled"), ("a", "b", "c")]):
        split_folders(tmp_path / f"{number}", names)
        message = refused(made / "timm", "--data", tmp_path / f"{number}", "-o", tmp_path / "out")
        assert "they seem to be splits, and which trains is not known: name them train/ and test/" in message
    for name in "abc":  # a folder of the same name in every class is none
        image_folder(tmp_path / "d" / name, classes=["images"], per_class=9, splits=())
    assert where(plan(made / "timm", tmp_path / "d"))["train"][1] > 9


@given(
    st.lists(
        st.builds(
            lambda start, end: start + end,
            st.sampled_from(["train", "validation", "val", "dev", "test", "eval", "extra", "unlabelled", "en.test"]),
            st.sampled_from(["", "_matched", "_2", "A", ".clean", "-small", "2017"]),
        ),
        min_size=1,
        max_size=6,
        unique=True,
    )
)
@settings(max_examples=200, deadline=None)
def test_any_splits_are_used_refused_or_named(names):
    try:
        taken, left = roles(names)
    except DataError as error:
        said = str(error)
    else:
        said = " ".join([*taken.values(), *left])
        assert all(speaks_of(line.removeprefix("split ")) in (None, "train") for line in left)
    assert all(name in said for name in names)


@pytest.mark.parametrize("form", ["saved", "files"])
def test_a_split_is_named_by_an_option(plan, refused, made, tmp_path, form):
    names = ("train", "val", "dev", "test", *(["unlabelled"] if form == "saved" else []))
    data = {"saved": saved, "files": split_files}[form](tmp_path / "d", names)
    message = refused("plan", made / "bert", "--data", data)
    assert re.search(
        "Which of (val, dev|dev, val) evaluates is not known: give --eval-split NAME, and --holdout-split", message
    )
    found = plan(made / "bert", data, "--eval-split", "dev", "--holdout-split", "val")
    assert where(found) == {"train": ("train", 20), "holdout": ("val", 21), "eval": ("dev", 22)}
    assert found["data"]["rule"] == "--eval-split dev; holdout is --holdout-split val"
    assert found["data"]["unused"][0] == "split test: not used"
    assert ("split unlabelled: not used" in found["warnings"]) == (form == "saved")


def test_split_folders_of_pictures(plan, refused, made, tmp_path):
    data = split_folders(tmp_path / "d", ("train", "val", "dev"))
    assert "Which of dev, val evaluates is not known" in refused("plan", made / "timm", "--data", data)
    found = plan(made / "timm", data, "--eval-split", "val", "--holdout-split", "dev")
    assert where(found) == {"train": ("train", 30), "eval": ("val", 33), "holdout": ("dev", 36)}
    assert {one["file"] for one in found["data"]["sources"]} == {"d/train", "d/val", "d/dev"}


def test_the_holdout_of_a_named_evaluation_split(plan, made, tmp_path):
    data = saved(tmp_path / "d", ("train", "validation", "test_1", "test_2"))
    found = plan(made / "bert", data, "--eval-split", "test_2")
    assert where(found) == {"train": ("train", 20), "holdout": ("validation", 21), "eval": ("test_2", 23)}
    found = plan(made / "bert", data, "--eval-split", "validation")
    assert where(found) == {"train": ("train", 18), "holdout": ("train", 2), "eval": ("validation", 21)}
    assert found["data"]["unused"] == ["split test_1: not used", "split test_2: not used"]


def test_a_named_split_without_labels_is_refused(refused, made, tmp_path):
    hidden = rows_of(12).remove_columns("label").add_column("label", [None] * 12)
    splits = {"train": rows_of(20), "test": rows_of(10, 3), "test_hidden": hidden}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "d")
    for option in ("--eval-split", "--holdout-split"):
        options = ("--eval-split", "test") if option == "--holdout-split" else ()
        message = refused("plan", made / "bert", "--data", tmp_path / "d", option, "test_hidden", *options)
        assert f"{option} test_hidden: the split has no usable rows: 12 rows were skipped (12 no label)" in message


def test_evaluation_data_with_splits_of_their_own(plan, refused, made, tmp_path):
    data = split_files(tmp_path / "d", ("train", "test"))
    judges = saved(tmp_path / "judges", ("train", "validation", "test"), rows=30)
    found = plan(made / "bert", data, "--eval-data", judges)
    assert where(found)["eval"] == ("test", 32)
    assert found["data"]["rule"].startswith("--eval-data; holdout carved")
    assert found["data"]["unused"] == [
        "split train of judges: not used",
        "split validation of judges: not used",
        "d: split test: not used (--eval-data evaluates)",
    ]
    found = plan(made / "bert", data, "--eval-data", judges, "--eval-split", "validation")
    assert where(found)["eval"] == ("validation", 31)
    assert found["data"]["rule"].startswith("--eval-split validation")
    assert "judges has no split" in refused(
        "plan", made / "bert", "--data", data, "--eval-data", judges, "--eval-split", "dev"
    ).replace(f"{tmp_path}/", "")


# ---------------------------------------------------------------- too few rows to carve


@pytest.mark.parametrize(("classes", "each"), [(100, 4), (30, 3), (5, 2), (1, 4)])
def test_a_holdout_that_rounds_to_nothing_names_the_share_that_does_not(classes, each):
    labels = [f"c{number}" for number in range(classes) for _ in range(each)]
    contents = [f"row {number}".encode() for number in range(len(labels))]
    table = Table(datasets.Dataset.from_dict({"text": labels}))
    rows = Rows(table, np.arange(len(labels)), contents, labels)
    test = {"test": Rows(table, np.arange(1), [b"t"], ["c0"])}
    with pytest.raises(DataError, match="too few rows for a holdout") as error:
        divide({"train": rows} | test, None, 0.1)
    share = float(re.search(r"--holdout ([\d.]+) takes (\d+)", str(error.value))[1])
    promised = int(re.search(r"--holdout ([\d.]+) takes (\d+)", str(error.value))[2])
    found = divide({"train": rows} | test, None, share)
    assert len(found.holdout) == promised >= classes
    assert len(set(found.holdout.labels)) == classes
    assert "--holdout-split NAME" in str(error.value)


def test_evaluation_rows_that_round_to_nothing_are_asked_for(refused, made, tmp_path):
    rows_of(4).to_csv(tmp_path / "few.csv")
    message = refused("plan", made / "bert", "--data", tmp_path / "few.csv")
    assert "0.2 of the 2 rows of each class rounds to no row that evaluates" in message
    assert "--eval-data" in message


def test_many_classes_of_few_rows_need_the_share_that_the_message_names(plan, refused, tmp_path):
    names = [f"c{number:02}" for number in range(30)]
    model = bert_checkpoint(tmp_path / "bert", labels=names)
    for name, each in (("train", 4), ("test", 1)):
        lines = [f"the {WORDS[number % 9]} {number} {name},{label}" for number, label in enumerate(names * each)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *lines]))
    message = refused("plan", model, "--data", tmp_path)
    assert "too few rows for a holdout: 0.1 of the 4 rows of each class rounds to no row" in message
    assert "--holdout 0.25 takes 30 of 30 classes; or name a split that selects, --holdout-split NAME" in message
    assert where(plan(model, tmp_path, "--holdout", "0.25"))["holdout"] == ("train", 30)


# ---------------------------------------------------------------- columns


def table(**columns):
    return Table(datasets.Dataset.from_dict(columns))


def several(prefix, rows=20):
    return [f"{prefix} number {row} of many words" for row in range(rows)]


NAMES = ["neg", "pos"] * 10
NOTHING = {"text": None, "label": None, "image": None, "audio": None}


def chosen(kinds, asked=None, **columns):
    return choose(table(**columns), kinds, NOTHING | (asked or {}))


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_of_texts_are_taken_in_the_order_of_their_task(pair):
    columns = {pair[1].upper(): several("b"), "idx": list(range(20)), "label": NAMES, pair[0]: several("a")}
    assert chosen((TEXT, LABEL), **columns)["text"] == (pair[0], pair[1].upper())


@pytest.mark.parametrize(
    ("columns", "used"),
    [
        ({"Text": several("a"), "Label": NAMES}, ("Text", "Label")),
        ({"review": several("a"), "sentiment": NAMES}, ("review", "sentiment")),
        ({"my words": several("a"), "y": NAMES}, ("my words", "y")),
        ({"words, as they came": several("a"), "y": NAMES}, ("words, as they came", "y")),
        ({"tweet": several("a"), "Sentiment": NAMES, "user_name": several("b")}, ("tweet", "Sentiment")),
        ({"text": several("a"), "label": NAMES, "label_text": NAMES}, ("text", "label")),
        ({"text": several("a"), "label": NAMES, "url": several("b"), "date": several("c")}, ("text", "label")),
        ({"text": several("a"), "label": NAMES, "topic_of_it": ["sport and more", "the arts"] * 10}, ("text", "label")),
        ({"text": several("a"), "label": NAMES, "remark": ["always the same"] * 20}, ("text", "label")),
        ({"text": several("a"), "label": NAMES, "category": NAMES}, ("text", "label")),
        ({"text": several("a"), "label": NAMES, "labels": [None] * 20, "review": [5] * 20}, ("text", "label")),
    ],
)
def test_columns_by_name_whatever_their_case(columns, used):
    found = chosen((TEXT, LABEL), **columns)
    assert (*found["text"], *found["label"]) == used
    assert chosen((TEXT, LABEL), {what: ",".join(names) for what, names in found.items()}, **columns) == found


@pytest.mark.parametrize(
    "columns",
    [
        {"title": several("a"), "content": several("b")},
        {"text": several("a"), "summary": several("b")},
        {"text": several("a"), "sentence": several("b")},
        {"premise": several("a"), "hypothesis": several("b"), "explanation": several("c")},
        {"question": several("a"), "answer": several("b")},
    ],
)
def test_a_further_column_of_texts_is_refused(columns):
    with pytest.raises(DataError, match=r"--text-column") as error:
        chosen((TEXT, LABEL), label=NAMES, **columns)
    assert all(name in str(error.value) for name in columns)
    two = list(columns)[:2]
    assert chosen((TEXT, LABEL), {"text": ",".join(two)}, label=NAMES, **columns)["text"] == tuple(two)


def test_three_columns_are_no_text():
    with pytest.raises(DataError, match="--text-column a,b,c: a text is one column, or two for a pair; these are 3"):
        chosen((TEXT, LABEL), {"text": "a,b,c"}, a=several("a"), b=several("b"), c=several("c"), label=NAMES)


def test_what_is_beside_the_known_pair_does_not_hide_it():
    columns = {"explanation": several("c"), "premise": several("a"), "hypothesis": several("b")}
    with pytest.raises(DataError, match=r"--text-column premise,hypothesis$"):
        chosen((TEXT, LABEL), label=NAMES, **columns)


def snli(path, rows=80):
    """Lines as SNLI has them: a parse beside each sentence, what each annotator said, and "-" where they did not agree."""
    lines = []
    for n in range(rows):
        label = ("neutral", "entailment", "contradiction", "-")[n % 4]
        one, two = (f"the {WORDS[(n + k) % 9]} sees {WORDS[n % 7]} {n}" for k in (0, 3))
        parses = {"sentence1_binary_parse": f"( {one} )", "sentence1_parse": f"(ROOT {one})"}
        parses |= {"sentence2_binary_parse": f"( {two} )", "sentence2_parse": f"(ROOT {two})"}
        ids = {"captionID": f"{n}.jpg#0", "pairID": f"{n}.jpg#0r1n"}
        said = {"annotator_labels": [label], "gold_label": label}
        lines.append(said | ids | parses | {"sentence1": one, "sentence2": two})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_snli_as_it_is_handed_out(plan, refused, tmp_path):
    data = snli(tmp_path / "snli.jsonl")
    model = bert_checkpoint(tmp_path / "m", ["entailment", "neutral", "contradiction"])
    said = refused("plan", model, "--data", data)
    found = plan(model, data, *shlex.split(said[said.index("--set") :]))
    assert found["data"]["columns"] == {"text": "sentence1,sentence2", "label": "gold_label"}
    (unused,) = found["data"]["unused"]
    assert "sentence1_parse" in unused
    assert "annotator_labels" in unused
    assert sum(rows for _, rows in where(found).values()) == 60


# ---------------------------------------------------------------- options that are of no use, or leak the answer


@pytest.mark.parametrize(
    ("model", "data", "options", "says"),
    [
        (
            "bert",
            "texts.csv",
            ["--image-column", "text"],
            "--image-column: text-classification reads columns of text and label",
        ),
        ("bert", "texts.csv", ["--audio-column", "text"], "--audio-column: text-classification"),
        ("gpt2", "documents.txt", ["--label-column", "text"], "--label-column: causal-lm reads columns of text, and no label"),
        (
            "timm",
            "pictures",
            ["--text-column", "label"],
            "--text-column: image-classification reads columns of image and label",
        ),
        ("timm", "pictures", ["--max-length", "9"], "--max-length is of texts that are cut into tokens"),
        ("bert", "texts.csv", ["--text-column", "text,label"], "'label' would be read as label and as text"),
        ("bert", "texts.csv", ["--text-column", "text,text"], "'text' would be read as text and as text"),
        ("bert", "texts.csv", ["--label-column", "text", "--text-column", "text"], "'text' would be read as label and as text"),
        (
            "timm",
            "pictures",
            ["--image-column", "image", "--label-column", "image"],
            "'image' would be read as image and as label",
        ),
    ],
)
def test_an_option_that_is_of_no_use_or_gives_the_answer_is_refused(refused, made, model, data, options, says):
    assert says in refused("plan", made / model, "--data", made / data, *options)


@pytest.mark.parametrize("form", ["csv", "parquet", "disk"])
def test_an_encoding_of_no_text_file_is_named(plan, made, tmp_path, form):
    data = tmp_path / f"d.{form}"
    write = {"csv": "to_csv", "parquet": "to_parquet", "disk": "save_to_disk"}[form]
    getattr(rows_of(20), write)(str(data))
    found = plan(made / "bert", data, "--encoding", "latin-1")
    line = "--encoding iso8859-1: not used, no text file is read"
    assert (line in found["warnings"]) == (form != "csv")
    assert line not in plan(made / "bert", data)["warnings"]


@pytest.mark.parametrize("name", ["split", "Set", "fold", "subset", "partition", "data_split"])
@pytest.mark.parametrize("values", [("train", "test"), ("TRAIN", "dev", "test"), ("training", "val_1")])
def test_a_column_that_says_which_rows_judge_is_refused(plan, refused, made, tmp_path, name, values):
    data = tmp_path / "d.csv"
    rows_of(24, **{name: lambda row: values[row % len(values)]}).to_csv(data)
    said = refused("plan", made / "bert", "--data", data)
    assert f"the column {name!r} says which split a row is of ({', '.join(sorted(values))})" in said
    rows_of(9, 2).to_csv(tmp_path / "other.csv")
    found = plan(made / "bert", data, "--eval-data", tmp_path / "other.csv")
    assert any(f"columns not used: {name}" in line for line in found["warnings"])


@pytest.mark.parametrize("values", [("train",), ("red", "blue"), ("a", "b", "train")])
def test_a_column_of_that_name_that_says_no_such_thing_is_named(plan, made, tmp_path, values):
    data = tmp_path / "d.csv"
    rows_of(24, set=lambda row: values[row % len(values)]).to_csv(data)
    assert plan(made / "bert", data)["data"]["unused"] == ["columns not used: set"]


def test_a_column_of_roles_may_be_the_label(plan, tmp_path):
    rows_of(24, split=lambda row: ("train", "test")[row % 2]).remove_columns("label").to_csv(tmp_path / "d.csv")
    found = plan(bert_checkpoint(tmp_path / "m", ["train", "test"]), tmp_path / "d.csv", "--label-column", "split")
    assert found["data"]["columns"]["label"] == "split"


# ---------------------------------------------------------------- many columns, and none that are columns


def test_of_many_columns_a_message_names_a_dozen_and_how_many(plan, refused, made, tmp_path):
    rows_of(20, **{f"x{n}": lambda row: row for n in range(100)}).to_csv(tmp_path / "d.csv")
    (unused,) = plan(made / "bert", tmp_path / "d.csv")["data"]["unused"]
    assert unused.startswith("columns not used: x0, x1, x2, ")
    assert unused.endswith("x11, … (100 in all)")
    said = refused("plan", made / "bert", "--data", tmp_path / "d.csv", "--label-column", "y")
    assert said.endswith("the data has text, label, x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, … (102 in all). "
                         "Name it with --label-column")  # fmt: skip


@pytest.mark.parametrize(
    "first",
    [
        "a very long film of which nobody could say that it has an end or a beginning,pos",
        "the film is quite good,pos",
        "5,0,0,0,1",
    ],
)
def test_a_csv_file_without_a_head_is_called_so(refused, made, tmp_path, first):
    (tmp_path / "d.csv").write_text(f"{first}\n" * 9)
    said = refused("plan", made / "bert", "--data", tmp_path / "d.csv", "--label-column", "label")
    assert "The first line seems to be data, and no head" in said
    assert len(said) < 350


@pytest.mark.parametrize(
    ("kinds", "columns", "flag"),
    [
        ((TEXT, LABEL), {"text": several("a"), "fine_label": NAMES, "coarse_label": NAMES}, "--label-column"),
        ((TEXT, LABEL), {"text": several("a"), "label_fine": NAMES, "label_coarse": NAMES}, "--label-column"),
        ((TEXT, LABEL), {"text": several("a"), "label": NAMES, "labels": NAMES}, "--label-column"),
        ((DOCUMENT,), {"text": several("a"), "content": several("b")}, "--text-column"),
        ((DOCUMENT,), {"story": several("a"), "moral": several("b")}, "--text-column"),
        ((IMAGE, CAPTION), {"image": several("a"), "caption": several("b"), "description": several("c")}, "--text-column"),
        ((IMAGE, LABEL), {"jpg": several("a"), "png": several("b"), "label": NAMES}, "--image-column"),
        ((AUDIO, TRANSCRIPT), {"audio": several("a"), "text": several("b"), "sentence": several("c")}, "--text-column"),
    ],
)
def test_columns_of_equal_standing_are_refused(kinds, columns, flag):
    with pytest.raises(DataError, match=flag):
        chosen(kinds, **columns)


@pytest.mark.parametrize(
    ("kinds", "columns", "used"),
    [
        ((DOCUMENT,), {"title": several("a"), "text": several("b"), "id": several("c")}, ["text"]),
        ((IMAGE, LABEL), {"image": several("a"), "path": several("b"), "label": NAMES}, ["image", "label"]),
        ((IMAGE, LABEL), {"Image_Path": several("a"), "image_id": several("b"), "label": NAMES}, ["Image_Path", "label"]),
        ((IMAGE, LABEL), {"image_id": several("a"), "label": NAMES}, ["image_id", "label"]),
        ((AUDIO, TRANSCRIPT), {"path": several("a"), "sentence": several("b"), "accent": several("c")}, ["path", "sentence"]),
        ((AUDIO, TRANSCRIPT), {"file": several("a"), "text": several("b"), "normalized_text": several("c")}, ["file", "text"]),
    ],
)
def test_a_surer_name_is_taken_and_the_other_is_left(kinds, columns, used):
    assert [name for names in chosen(kinds, **columns).values() for name in names] == used


def test_a_picture_beside_a_mask_and_two_pictures():
    rows = {"mask": [None], "image": [None], "label": ["a"]}
    kinds = datasets.Features({"mask": datasets.Image(), "image": datasets.Image(), "label": datasets.Value("string")})
    both = Table(datasets.Dataset.from_dict(rows, features=kinds))
    assert choose(both, (IMAGE, LABEL), NOTHING)["image"] == ("image",)
    with pytest.raises(DataError, match=r"mask and before could each be the image column.*--image-column"):
        choose(Table(both.rows.rename_column("image", "before")), (IMAGE, LABEL), NOTHING)


@pytest.mark.parametrize("text", ["stars", "Stars"])
def test_what_is_missing_lists_the_columns_and_the_remedy(refused, made, tmp_path, text):
    rows_of(8).rename_columns({"label": "stars_given"}).to_csv(tmp_path / "d.csv")
    message = refused("plan", made / "bert", "--data", tmp_path / "d.csv")
    assert "no label column found" in message
    assert "the data has text, stars_given. Name it with --label-column" in message


def test_a_text_file_has_no_labels(refused, made, tmp_path):
    text_file(tmp_path / "d.txt")
    message = refused("plan", made / "bert", "--data", tmp_path / "d.txt")
    assert "the data has text. A .txt file holds texts alone: give a CSV, JSON-lines or Parquet file" in message


def test_splits_may_call_their_columns_otherwise(plan, made, tmp_path):
    rows_of(20).rename_columns({"text": "Text", "label": "Label"}).to_json(tmp_path / "train.jsonl")
    rows_of(9, 2, stars=lambda row: row).rename_columns({"text": "sentence", "label": "target"}).to_csv(tmp_path / "test.csv")
    found = plan(made / "bert", tmp_path)
    assert where(found)["eval"] == ("test", 9)
    assert found["data"]["columns"] == {"text": "Text", "label": "Label"}
    assert found["data"]["unused"] == ["columns not used: stars"]


def test_a_split_without_a_column_that_is_used_is_refused(refused, made, tmp_path):
    rows_of(20).to_json(tmp_path / "train.jsonl")
    rows_of(9, 2).rename_columns({"text": "prose_1"}).add_column("prose_2", several("a", 9)).to_csv(tmp_path / "test.csv")
    message = refused("plan", made / "bert", "--data", tmp_path)
    assert "test.csv: no column 'text'" in message
    assert "the data has prose_1, label, prose_2. Name it with --text-column" in message
    (tmp_path / "judge.csv").write_text("text,mark\na cat,pos\n")
    message = refused("plan", made / "bert", "--data", tmp_path / "train.jsonl", "--eval-data", tmp_path / "judge.csv")
    assert "judge.csv: no column 'label'; the data has text, mark. Name it with --label-column" in message


# ---------------------------------------------------------------- one place says it


def said_of_data(found, out):
    """The report's data, and the texts that must say the same."""
    report = json.loads((out / "dsd/report.json").read_text())
    return report, [found.err, found.out, (out / "dsd/report.html").read_text(), (out / "README.md").read_text()]


def test_a_run_says_which_data_it_uses(command, made, tmp_path):
    data = tmp_path / "private place" / "words"
    splits = {"train": rows_of(24), "dev_1": rows_of(12, 1), "dev_2": rows_of(11, 2), "notes": rows_of(3)}
    datasets.DatasetDict({name: rows.add_column("idx", list(range(len(rows)))) for name, rows in splits.items()}).save_to_disk(
        data
    )
    out = tmp_path / "out"
    found = command(made / "bert", "--data", data, "--eval-split", "dev_2", "-o", out, *SHORT)
    assert found.code == 0, found.err
    report, texts = said_of_data(found, out)
    said = report["data"]
    assert said["sources"] == [
        {"part": "train", "file": "words/train", "split": "train", "rows": 22},
        {"part": "holdout", "file": "words/train", "split": "train", "rows": 2},
        {"part": "eval", "file": "words/dev_2", "split": "dev_2", "rows": 11},
    ]
    assert said["columns"] == {"text": "text", "label": "label"}
    assert said["rule"] == "--eval-split dev_2; holdout carved (0.1) from the training rows"
    assert said["unused"] == ["split dev_1: not used", "split notes: not used", "columns not used: idx"]
    assert set(said["unused"]) <= set(report["warnings"])
    lines = ["22 rows of words/train", "11 rows of words/dev_2", said["rule"], "text = text; label = label", *said["unused"]]
    for text in texts:
        for line in lines:
            assert line in text.replace("\\_", "_")
    assert "data: train: 22 rows of words/train" in found.err.splitlines()
    assert "private place" not in json.dumps({**said, "warnings": report["warnings"]})
    card = (out / "README.md").read_text()
    assert "private place" not in card
    section = (out / "dsd/report.html").read_text().split(">Data</h3>")[1].split("<h3")[0]
    assert "private place" not in section


def test_the_plan_says_it_in_words_too(command, made, tmp_path):
    rows_of(20, url=lambda row: f"http://a/{row}").to_csv(tmp_path / "d.csv")
    found = command("plan", made / "bert", "--data", tmp_path / "d.csv")
    lines = [" ".join(line.split()) for line in found.out.splitlines()]
    assert "data train: 14 rows of d.csv" in lines
    assert "data rule: evaluation is carved (0.2) from the training rows; holdout carved (0.1) from the training rows" in lines
    assert "data columns: text = text; label = label" in lines
    assert "warning columns not used: url" in lines


# ---------------------------------------------------------------- before the weights


def without_weights(source, folder):
    """A copy whose weights are cut in the middle."""
    shutil.copytree(source, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    return folder


def bad_data(kind, model, place):
    """Arguments with one fault in the data, and what is to be said of it."""
    pictures = {"timm": "pictures", "vit": "colours"}.get(model)
    data = place / pictures if pictures else place / "texts.csv"
    if kind == "no such file":
        return ["--data", place / "nothing.csv"], "no such file"
    if kind == "no such split":
        return ["--data", data, "--eval-split", "dev"], "--eval-split dev"
    if kind == "no such label":
        return ["--data", data, "--label-column", "mark"], "no column 'mark'"
    if kind == "no such eval data":
        return ["--data", data, "--eval-data", place / "nothing"], "no such file"
    return ["--data", data, "--set", "label_names=[x, y, z]"], "labels|names|classes"


@pytest.mark.parametrize("verb", [[], ["plan"]])
@pytest.mark.parametrize("model", ["bert", "timm", "vit"])
@pytest.mark.parametrize("kind", ["no such file", "no such split", "no such label", "no such eval data"])
def test_a_fault_of_the_data_is_said_before_the_weights_are_opened(refused, made, tmp_path, verb, model, kind):
    broken = without_weights(made / model, tmp_path / model)
    args, says = bad_data(kind, model, made)
    more = [] if verb else ["-o", tmp_path / "out"]
    assert re.search(says, refused(*verb, broken, *args, *more))


@pytest.mark.parametrize("verb", [[], ["plan"]])
def test_labels_that_the_config_does_not_know_are_said_before_the_weights_are_opened(refused, made, tmp_path, verb):
    more = [] if verb else ["-o", tmp_path / "out"]
    broken = without_weights(made / "bert", tmp_path / "bert")
    text_csv(tmp_path / "d.csv", labels=("neg", "pos", "so-so"))
    assert "so-so" in refused(*verb, broken, "--data", tmp_path / "d.csv", *more)
    broken = without_weights(made / "timm", tmp_path / "timm")
    image_folder(tmp_path / "d", classes=["a", "b", "wolf"], per_class=2)
    assert "wolf" in refused(*verb, broken, "--data", tmp_path / "d", *more)
    good = refused(*verb, broken, "--data", made / "pictures", *more)
    assert "model.safetensors" in good


def test_a_folder_of_no_pictures_is_no_class(plan, made, tmp_path):
    """Labels count where a row that has them can be used, also before the rows are examined."""
    image_folder(tmp_path / "d", per_class=8, splits=[])
    (tmp_path / "d/notes").mkdir()
    (tmp_path / "d/notes/read me.txt").write_text("no picture")
    found = plan(made / "timm", tmp_path / "d")
    assert sum(rows for _, rows in where(found).values()) == 24
    assert any("notes/read me.txt" in line for line in found["warnings"])


# ---------------------------------------------------------------- whatever is added: used, refused or named

ADDED = ("title", "sentence", "Text", "labels", "Category", "idx", "url", "stars", "img", "file_name", "premise", "body text")
CONTENT = {
    "texts": lambda row: f"some words that row {row} says",
    "one text": lambda row: "always the same words",
    "names": lambda row: ("red", "blue")[row % 2],
    "numbers": lambda row: row,
    "lists": lambda row: [row, row],
    "nothing": lambda row: None,
}


def table_for(model, path, made):
    """A table that the model's task takes."""
    if model == "gpt2":
        return rows_of(20).remove_columns("label")
    if model == "bert":
        return rows_of(20)
    files = sorted((made / ("pictures" if model == "timm" else "colours") / "train").rglob("*.png"))
    return datasets.Dataset.from_dict({"image": list(map(str, files)), "label": [file.parent.name for file in files]})


@pytest.mark.parametrize("model", ["bert", "gpt2", "timm"])
@pytest.mark.parametrize("name", ADDED)
def test_any_column_more_is_used_refused_or_named(command, made, tmp_path, model, name):
    data = table_for(model, tmp_path, made)
    taken = [column for column in data.column_names if column != name]
    for number, (content, of) in enumerate(CONTENT.items()):
        path = tmp_path / f"{number}.jsonl"
        more = data.select_columns(taken).add_column(name, [of(row) for row in range(len(data))])
        more.to_json(path)
        found = command("plan", made / model, "--data", path, "--holdout", "0.34", *PLAN)
        if found.code == 2:
            assert name in found.err, content
            assert re.search(r"--(text|label|image)-column", found.err), content
            continue
        assert found.code == 0, found.err
        said = json.loads(found.out)["data"]
        used = [column for names in said["columns"].values() for column in names.split(",")]
        named = [line for line in said["unused"] if line.startswith("columns not used: ")]
        assert (name in used) != any(name in line for line in named), content


@pytest.mark.parametrize("name", ["validation", "dev", "test_2", "valid_small", "train_extra", "unlabelled", "TEST", "eval-b"])
@pytest.mark.parametrize("base", [("train",), ("train", "test"), ("train", "validation", "test")])
def test_any_split_more_is_used_refused_or_named(command, made, tmp_path, base, name):
    if name in base:
        return
    data = saved(tmp_path / "d", (*base, name))
    found = command("plan", made / "bert", "--data", data, *PLAN)
    if found.code == 2:
        assert name in found.err
        assert "--eval-split NAME" in found.err
        again = command("plan", made / "bert", "--data", data, "--eval-split", name, *PLAN)
        assert again.code == 0, again.err
        found = again
    said = json.loads(found.out)
    used = {one["split"] for one in said["data"]["sources"]}
    assert (name in used) != (f"split {name}: not used" in said["data"]["unused"])
    assert set(said["data"]["unused"]) <= set(said["warnings"])
    for other in base:
        assert other in used or f"split {other}: not used" in said["warnings"]
