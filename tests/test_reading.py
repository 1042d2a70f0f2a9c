"""How DATA is read: every file, folder, link, split and key of it is used, refused or named, and no line is lost unsaid."""

import bz2
import gzip
import json
import lzma
import os
import shutil

import datasets
import pytest
from builders import image_folder, text_csv, text_file
from conftest import SHORT
from hypothesis import given, settings
from hypothesis import strategies as st

from dsd_refine.data.files import paragraphs
from dsd_refine.data.reading import ROLES, Reading, Table, role_of, split_of
from dsd_refine.data.splits import by_role
from dsd_refine.data.tables import read_tables
from dsd_refine.errors import DataError

ROWS = {"text": ["a cat", "the dog", "red fish", "a bird"], "label": ["neg", "pos", "neg", "pos"]}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"


def read(spec, cache, **how):
    return read_tables(str(spec), cache, download=lambda name, size: False, **how)


def sizes(reading):
    return {name: len(table.rows) for name, table in reading.tables.items()}


def some_rows(prefix="", count=4):
    return datasets.Dataset.from_dict(
        {"text": [f"{prefix}{i} cat" for i in range(count)], "label": ["neg", "pos"] * (count // 2)}
    )


def jsonl(path, prefix="", count=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in some_rows(prefix, count)))
    return path


def parquet(path, prefix="", count=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    some_rows(prefix, count).to_parquet(path)
    return path


# ---------------------------------------------------------------- used, refused or named


def class_folders(place):
    image_folder(place, per_class=2, splits=())


def split_folders(place):
    image_folder(place, per_class=2)


def split_tables(place):
    some_rows().to_csv(place / "train.csv")
    some_rows("t").to_csv(place / "test.csv")


def tables_in_folders(place):
    for split in ("train", "test"):
        jsonl(place / split / "0.jsonl", split)


def shards(place):
    for number in range(3):
        jsonl(place / f"part-{number}.jsonl", str(number))


def texts(place):
    for number in range(3):
        text_file(place / f"{number}.txt", seed=number)


def from_the_hub(place):
    parquet(place / "data/train-00000-of-00002.parquet", "a")
    parquet(place / "data/train-00001-of-00002.parquet", "b")
    parquet(place / "data/test-00000-of-00001.parquet", "c")


def configured(place):
    from_the_hub(place)
    splits = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train", "test"))
    (place / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n# Rows\n")


def metadata(place):
    image_folder(place, per_class=2, splits=())
    lines = [f"{c}/{i:03}.png,{c}" for c in "abc" for i in range(2)]
    (place / "metadata.csv").write_text("\n".join(["file_name,label", *lines]) + "\n")


def split_metadata(place):
    for split in ("train", "test"):
        metadata(place / split)


def table_of_files(place):
    image_folder(place, per_class=2, splits=())
    lines = [f"{c}/{i:03}.png,{c}" for c in "abc" for i in range(2)]
    (place / "train.csv").write_text("\n".join(["image,label", *lines]) + "\n")


def saved(place):
    some_rows().save_to_disk(place)


def saved_splits(place):
    datasets.DatasetDict({"train": some_rows(), "test": some_rows("t")}).save_to_disk(place)


FORMS = [
    class_folders, split_folders, split_tables, tables_in_folders, shards, texts, from_the_hub, configured, metadata,
    split_metadata, table_of_files, saved, saved_splits,
]  # fmt: skip


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image_folder(path.parent / "made", classes=["a"], per_class=1, splits=(), seed=hash(path.name) % 1000)
    (path.parent / "made/a/000.png").rename(path)
    shutil.rmtree(path.parent / "made")


def linked(path):
    there = path.parent.parent / "elsewhere"
    picture(there / "b.png")
    path.symlink_to(there)


STRANGERS = {
    "stray.bin": lambda path: path.write_bytes(b"x"),
    "stray.png": picture,
    "stray.csv": lambda path: some_rows("s").to_csv(path),
    "stray.csv.gz": lambda path: path.write_bytes(gzip.compress(b"text,label\nan owl,neg\n")),
    "labels.txt": lambda path: path.write_text("neg\npos\n"),
    "labels.json": lambda path: path.write_text('{"0": "neg"}'),
    "test2.csv": lambda path: some_rows("s").to_csv(path),
    "dev.jsonl": lambda path: jsonl(path, "s"),
    "train.parquet": lambda path: parquet(path, "s"),
    "train-00007.jsonl": lambda path: jsonl(path, "s"),
    "validation_matched.csv": lambda path: some_rows("s").to_csv(path),
    "metadata.jsonl": lambda path: path.write_text('{"file_name": "none.png"}\n'),
    "Training": lambda path: picture(path / "a/stray.png"),
    "evaluation": lambda path: picture(path / "a/stray.png"),
    "test_more": lambda path: picture(path / "a/stray.png"),
    "VALID": lambda path: jsonl(path / "0.jsonl", "s"),
    "extra": lambda path: picture(path / "stray.png"),
    "old": lambda path: picture(path / "deep/er/stray.png"),
    "tables": lambda path: jsonl(path / "stray.jsonl", "s"),
    "empty": lambda path: path.mkdir(),
    "photos.zip": lambda path: path.write_bytes(b"PK\x03\x04"),
    "photos.tar": lambda path: path.write_bytes(b"x"),
    ".more": lambda path: picture(path / "stray.png"),
    ".labels.csv": lambda path: some_rows("s").to_csv(path),
    "linked": linked,
    "broken": lambda path: path.symlink_to("nowhere"),
    "circle": lambda path: path.symlink_to("."),
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_whatever_else_lies_in_data_is_used_refused_or_named(tmp_path, form):
    (tmp_path / "plain").mkdir()
    form(tmp_path / "plain")
    before = read(tmp_path / "plain", tmp_path / "cache")
    assert before.unused == ()
    assert before.notes
    inner = [path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*") if path.is_dir()]
    for number, (name, put) in enumerate(STRANGERS.items()):
        for folder in ["", *inner[-1:]]:
            place = tmp_path / f"{number}" / "d"
            shutil.copytree(tmp_path / "plain", place)
            if (place / folder / name).exists():
                shutil.rmtree(tmp_path / f"{number}")
                continue
            put(place / folder / name)
            try:
                after = read(place, tmp_path / "cache")
            except DataError as error:
                assert str(place) in str(error)  # noqa: PT017
            else:
                grown = sum(sizes(after).values()) > sum(sizes(before).values())
                assert grown or any(name in line for line in after.unused), (folder, name, after)
                for split, rows in sizes(before).items():
                    assert sizes(after).get(split, 0) >= rows or any(role_of(s) == role_of(split) for s in after.tables)
            shutil.rmtree(tmp_path / f"{number}")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_junk_and_papers_change_nothing(tmp_path, form):
    (tmp_path / "d").mkdir()
    form(tmp_path / "d")
    before = read(tmp_path / "d", tmp_path / "cache")
    for folder in [tmp_path / "d", *[path for path in (tmp_path / "d").rglob("*") if path.is_dir()]]:
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._x.png", ".gitattributes"):
            (folder / name).write_bytes(b"x")
        (folder / ".ipynb_checkpoints").mkdir()
        picture(folder / ".ipynb_checkpoints/x.png")
    for name in ("LICENSE", "CITATION.cff", *([] if form is configured else ["README.md"])):
        (tmp_path / "d" / name).write_text("words")
    after = read(tmp_path / "d", tmp_path / "cache")
    assert after.unused == ()
    assert {name: table.rows[:] for name, table in after.tables.items()} == {n: t.rows[:] for n, t in before.tables.items()}


def test_many_of_a_kind_are_counted(tmp_path):
    image_folder(tmp_path / "d", per_class=2)
    for number in range(40):
        (tmp_path / f"d/{number:02}.log").write_text("x")
    assert read(tmp_path / "d", tmp_path / "c").unused == (
        "00.log, 01.log, 02.log, 03.log, 04.log and 35 more beside them: a file beside test/, train/",
    )


@pytest.mark.parametrize("form", [shards, split_tables, tables_in_folders, texts, from_the_hub])
@pytest.mark.parametrize(
    "name",
    ["classes.txt", "labels.txt", "stats.json", "label_names.json", "README.txt", "LICENSE.txt", "train_test_split.json",
     "train_test_split.txt", "id2label.json", "vocab.txt"],
)  # fmt: skip
def test_a_list_or_a_paper_beside_the_tables_is_named(tmp_path, form, name):
    (tmp_path / "d").mkdir()
    form(tmp_path / "d")
    before = read(tmp_path / "d", tmp_path / "c")
    (tmp_path / "d" / name).write_text('{"neg": 1.5}' if name.endswith("json") else "neg\npos\n")
    if name.startswith("train_test") and form in (shards, texts):  # no other split is said: which it is is not known
        return
    after = read(tmp_path / "d", tmp_path / "c")
    assert {split: table.rows[:] for split, table in after.tables.items()} == {s: t.rows[:] for s, t in before.tables.items()}
    assert [line for line in after.unused if line.startswith(f"{name}: ")]


@pytest.mark.parametrize("name", ["README.txt", "labels.txt", "train_test_split.json", "train_test_split.txt"])
def test_a_list_or_a_paper_beside_picture_folders_is_named(tmp_path, name):
    split_folders(tmp_path / "d")
    (tmp_path / "d" / name).write_text("[]")
    reading = read(tmp_path / "d", tmp_path / "c")
    assert sizes(reading) == {"test": 6, "train": 6}
    assert [line.partition(":")[0] for line in reading.unused] == [name]


def test_tables_of_several_kinds_are_refused_with_their_names(tmp_path):
    jsonl(tmp_path / "d/reviews.jsonl")
    (tmp_path / "d/notes.txt").write_text("words\n")
    with pytest.raises(DataError, match=r"notes.txt, reviews.jsonl could each be its train split; .* give one file itself"):
        read(tmp_path / "d", tmp_path / "c")


def test_what_is_said_of_many_files_is_counted(command, made, tmp_path):
    for number in range(60):
        jsonl(tmp_path / f"d/part-{number:02}.jsonl", f"{number} ")
        picture(tmp_path / f"pictures/{number:02}/x.png")
        (tmp_path / f"pictures/{number:02}/more").mkdir()
    notes = read(tmp_path / "d", tmp_path / "c").notes
    assert len(notes) == 6
    assert notes[-1] == "and 55 more like these, the last part-59.jsonl: 4 lines, 4 rows"
    unused = read(tmp_path / "pictures", tmp_path / "c").unused
    assert len(unused) == 6
    assert unused[-1] == "and 55 more like these, the last 59/more: an empty folder"
    done = command("plan", made / "bert", "--data", tmp_path / "d")
    assert done.code == 0, done.err
    assert done.out.count("part-") + done.err.count("part-") < 40


def test_many_splits_and_configurations_are_counted(tmp_path):
    names = [f"lang{number:03}" for number in range(150)]
    for name in names:
        jsonl(tmp_path / f"d/{name}/x.jsonl", name)
    lines = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in names)
    (tmp_path / "d/README.md").write_text(f"---\nconfigs:\n{lines}---\n")
    for spec in (tmp_path / "d", f"{tmp_path}/d:none"):
        with pytest.raises(DataError, match=r"lang000, lang001, .*, … \(150 in all\)") as error:
            read(spec, tmp_path / "c")
        assert len(str(error.value)) < 500
    rows = Reading(dict.fromkeys(["train", "test", *names], Table(some_rows())))
    assert len(by_role(rows, "org/data").unused) == 6
    with pytest.raises(DataError, match=r"train, test, lang000, .*\(152 in all\)"):
        by_role(rows, "org/data", evaluates="lang")


# ---------------------------------------------------------------- names of splits


@pytest.mark.parametrize("train", ["train", "Training", "TRAIN"])
@pytest.mark.parametrize("test", [name for name in ROLES if not name.startswith("train")])
def test_split_folders_have_the_names_that_datasets_knows_in_any_case(tmp_path, train, test):
    image_folder(tmp_path / "d", per_class=2, splits=(train, test.title()))
    reading = read(tmp_path / "d", tmp_path / "c")
    assert sizes(reading) == {train: 6, test.title(): 6}
    assert reading.tables[train].origin == f"{train}/"


def test_the_pictures_of_testing_judge(command, made, tmp_path):
    image_folder(tmp_path / "d", per_class=12, splits=("Training",), seed=1)
    image_folder(tmp_path / "d", per_class=8, splits=("Testing",), seed=2)
    done = command(made / "timm", "--data", tmp_path / "d", "-o", tmp_path / "out", *SHORT, "--quiet")
    assert done.code == 0, done.err
    data = json.loads((tmp_path / "out/dsd/report.json").read_text())["data"]
    assert data["eval"]["rows"] == 24
    assert data["train"]["rows"] + data["holdout"]["rows"] == 36


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"), ("train_0", "train"), ("train-00001-of-00003", "train"), ("imdb_train", "train"),
        ("my data.dev", "dev"), ("test2", "test"), ("Train_1", "Train"), ("validation_matched", "validation_matched"),
        ("train_sft-00000-of-00003-0123456789abcdef", "train_sft"), ("latest", None), ("trainer", None), ("part-3", None),
        ("contest_0", None), ("2012", None),
    ],
)  # fmt: skip
def test_what_split_a_name_says(name, split):
    assert split_of(name) == split


def test_a_name_of_two_splits_is_refused(tmp_path):
    jsonl(tmp_path / "d/train-test.jsonl")
    with pytest.raises(DataError, match="named like train and test at once"):
        read(tmp_path / "d", tmp_path / "c")


def test_one_split_in_two_kinds_of_file_is_refused(tmp_path):
    for first, second in (("train.csv", "train.parquet"), ("train.csv", "train.csv.gz"), ("train.json", "train.jsonl")):
        (tmp_path / "d").mkdir()
        for name in (first, second):
            (tmp_path / "d" / name).write_bytes(b"x")
        with pytest.raises(DataError, match=f"{first}, {second} could each be its train split"):
            read(tmp_path / "d", tmp_path / "c")
        shutil.rmtree(tmp_path / "d")


def test_what_could_be_meant_as_much_as_what_is_read_is_refused(tmp_path):
    image_folder(tmp_path / "d", per_class=1, splits=("val",))
    assert sizes(read(tmp_path / "d", tmp_path / "c")) == {"val": 3}
    image_folder(tmp_path / "d", per_class=1, splits=("more",))
    with pytest.raises(DataError, match=rf"val/ would be its val, and more/ would not be used.*such as {tmp_path}/d/val"):
        read(tmp_path / "d", tmp_path / "c")
    image_folder(tmp_path / "e", per_class=1)
    jsonl(tmp_path / "e/train.jsonl")
    with pytest.raises(DataError, match=r"train.jsonl would be its train, and test/, train/ would not be used"):
        read(tmp_path / "e", tmp_path / "c")


def test_splits_inside_class_folders_are_refused(tmp_path):
    image_folder(tmp_path / "d", classes=["train", "test"], per_class=1, splits=("cats", "dogs"))
    with pytest.raises(DataError, match=r"cats/test/, cats/train/: splits inside a class folder"):
        read(tmp_path / "d", tmp_path / "c")
    with pytest.raises(DataError, match=rf"give {tmp_path}"):  # a folder around the data set
        image_folder(tmp_path / "e/wrapped", per_class=1)
        read(tmp_path / "e", tmp_path / "c")


def test_split_folders_with_a_common_word(tmp_path):
    image_folder(tmp_path / "d", per_class=1, splits=("images_train", "images_test"))
    assert sizes(read(tmp_path / "d", tmp_path / "c")) == {"images_train": 3, "images_test": 3}
    image_folder(tmp_path / "e", classes=["test_tube", "dev_board"], per_class=2, splits=())
    assert sizes(read(tmp_path / "e", tmp_path / "c")) == {"train": 4}


# ---------------------------------------------------------------- links


def test_links_to_folders_and_files_are_followed(tmp_path):
    image_folder(tmp_path / "there", classes=["cam1", "cam2"], per_class=5, splits=())
    image_folder(tmp_path / "d", per_class=2, splits=())
    (tmp_path / "d/a/cam1").symlink_to(tmp_path / "there/cam1")
    (tmp_path / "d/e").symlink_to(tmp_path / "there/cam2")
    (tmp_path / "d/b/linked.png").symlink_to(tmp_path / "there/cam1/000.png")
    reading = read(tmp_path / "d", tmp_path / "c")
    labels = reading.tables["train"].rows["label"][:]
    assert [labels.count(c) for c in "abce"] == [7, 3, 2, 5]
    assert reading.unused == ()


def test_circles_end_and_are_named(tmp_path):
    image_folder(tmp_path / "d", per_class=2, splits=())
    (tmp_path / "d/a/up").symlink_to("..")
    (tmp_path / "d/a/all").symlink_to("/")
    (tmp_path / "d/b/self").symlink_to("self")
    (tmp_path / "d/c/x").mkdir()
    (tmp_path / "d/c/y").symlink_to("x")
    shutil.copy(tmp_path / "d/c/000.png", tmp_path / "d/c/x/new.png")
    reading = read(tmp_path / "d", tmp_path / "c")
    assert sizes(reading) == {"train": 8}  # b/self is a row, which the task skips and names
    assert reading.unused == (
        "a/all: a link to a folder that holds it",
        "a/up: a link to a folder that holds it",
        "c/y: a link to a folder that is read already",
    )


def test_broken_links_are_named(tmp_path):
    image_folder(tmp_path / "d", per_class=2, splits=("train", "test"))
    (tmp_path / "d/validation").symlink_to("../gone")
    (tmp_path / "d/train/e").symlink_to("/gone/too")
    assert read(tmp_path / "d", tmp_path / "c").unused == (
        "train/e: a link to /gone/too, which is not there",
        "validation: a link to ../gone, which is not there",
    )


# ---------------------------------------------------------------- names that are not UTF-8


BAD = os.fsdecode(b"caf\xe9")


def bad_file(place):
    text_csv(place / f"{BAD}.csv")
    return place / f"{BAD}.csv"


def bad_shard(place):
    text_csv(place / "d/part-0.csv")
    text_csv(place / "d" / f"{BAD}.csv", seed=1)
    return place / "d"


def bad_folder(place):
    text_csv(place / BAD / "train.csv")
    return place / BAD


def bad_class(place):
    image_folder(place / "d", classes=["a", BAD], splits=())
    return place / "d"


def bad_picture(place):
    image_folder(place / "d", per_class=8, splits=())
    (place / "d/a/000.png").rename(place / f"d/a/{BAD}.png")
    return place / "d"


@pytest.mark.parametrize("verb", ["plan", "refine"])
@pytest.mark.parametrize("data", [bad_file, bad_shard, bad_folder, bad_class, bad_picture], ids=lambda data: data.__name__)
def test_a_name_that_is_not_utf_8_is_refused_before_training(refused, made, tmp_path, verb, data):
    model = made / ("timm" if data in (bad_class, bad_picture) else "bert")
    for options in (["--data", data(tmp_path)], ["--data", made / "texts.csv", "--eval-data", tmp_path / "d"]):
        if options[-1].exists():
            out = ["-o", tmp_path / "out"] if verb == "refine" else []
            message = refused(*["plan"] * (verb == "plan"), model, *options, *out)
            assert r"caf\xe9" in message
            assert "its name is not UTF-8, so no report could name it; rename it" in message
    assert not (tmp_path / "out.partial").exists()


# ---------------------------------------------------------------- lines and rows


def test_a_tsv_has_no_quoting(tmp_path):
    lines = [f"text {i}\t{('neg', 'pos')[i % 2]}" for i in range(60)]
    lines[10], lines[31] = '"he said\tneg', '"she said\tpos'
    (tmp_path / "t.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    reading = read(tmp_path / "t.tsv", tmp_path / "c")
    assert reading.tables["train"].rows["text"][10:12] == ['"he said', "text 11"]
    assert reading.notes == ("t.tsv: 61 lines with the head, 60 rows",)


def test_quotes_that_a_tsv_keeps_are_said(tmp_path):
    (tmp_path / "t.tsv").write_text('text\tlabel\n"a ""cat"""\tneg\nthe dog\tpos\n')
    assert "no quoting" in read(tmp_path / "t.tsv", tmp_path / "c").notes[0]
    (tmp_path / "r.tsv").write_text('"text"\t"label"\n"a cat"\t"neg"\n"the\ndog"\t"pos"\n')  # as R writes it
    reading = read(tmp_path / "r.tsv", tmp_path / "c")
    assert reading.tables["train"].rows[:] == {"text": ["a cat", "the\ndog"], "label": ["neg", "pos"]}


@pytest.mark.parametrize("texts", ["first line\nthe dog {}", "a\n\nb {}", "one\ntwo\nthree {}", 'he said ""so""\nand left {}'])
@pytest.mark.parametrize("columns", [("text", "label"), ("label", "text"), ("id", "text", "label")])
def test_texts_over_several_lines_of_a_tsv_are_refused(tmp_path, texts, columns):
    rows = {"text": [texts.format(i) for i in range(4)], "label": ["neg", "pos"] * 2, "id": [1, 2, 3, 4]}
    rows["text"][0] = "the cat"
    datasets.Dataset.from_dict({name: rows[name] for name in columns}).to_csv(tmp_path / "t.tsv", sep="\t")
    with pytest.raises(DataError, match=r"t.tsv: line 3 opens a quote .* Write it without them, or as a .csv"):
        read(tmp_path / "t.tsv", tmp_path / "c")


def test_open_quotes_in_whole_rows_of_a_tsv_are_texts(tmp_path):
    for number, rows in enumerate(
        (['neg\t"he said', 'pos\tshe said"', 'neg\t"a', ""], ['"he said\tneg', "x\tpos", '"so"\tneg'])
    ):
        (tmp_path / f"{number}.tsv").write_text("\n".join(["a\tb", *rows]) + "\n")
        assert sizes(read(tmp_path / f"{number}.tsv", tmp_path / "c")) == {"train": 3}


def blocks(count, *values):
    """`count` rows in all; each value fills a part of them."""
    return [value for value in values for _ in range(count // len(values))]


@pytest.mark.parametrize(
    ("values", "kind", "first", "last"),
    [
        ((None, "x"), "large_string", None, "x"),
        ((7, "x"), "large_string", "7", "x"),
        ((1.5, "x"), "large_string", "1.5", "x"),
        ((True, "x"), "large_string", "True", "x"),
        (("007", "x"), "large_string", "007", "x"),
        ((7, 1.5), "float64", 7.0, 1.5),
        ((7, None), "int64", 7, None),
        ((7, 8), "int64", 7, 8),
    ],
)
def test_a_column_of_a_long_csv_is_what_all_its_rows_hold(tmp_path, values, kind, first, last):
    count = 22_002
    rows = {"text": [f"row {i}" for i in range(count)], "label": [i % 2 for i in range(count)], "more": blocks(count, *values)}
    lines = [f"{a},{b},{'' if c is None else c}" for a, b, c in zip(*rows.values(), strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(["text,label,more", *lines]) + "\n")
    reading = read(tmp_path / "t.csv", tmp_path / "c")
    found = reading.tables["train"].rows
    assert (found[0]["more"], found[-1]["more"]) == (first, last)
    assert (found.features["label"].dtype, found.features["more"].dtype) == ("int64", kind)
    changes = kind == "large_string"
    assert ("columns read as texts, for some of their rows hold texts: more" in reading.notes[0]) == changes
    assert found["text"][:] == rows["text"]


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ("neg", "7", ["neg", "7"]), ("7", "neg", ["7", "neg"]), ("", "neg", [None, "neg"]), ("neg", "", ["neg", None]),
        ("7", "1.5", [7.0, 1.5]), ("", "7", [None, 7]), ("7", "8", [7, 8]),
    ],
)  # fmt: skip
def test_shards_whose_columns_hold_other_kinds(tmp_path, first, second, found):
    (tmp_path / "d").mkdir()
    for number, value in enumerate((first, second)):
        (tmp_path / f"d/part-{number}.csv").write_text(f"text,label\na cat,{value}\n")
    assert read(tmp_path / "d", tmp_path / "c").tables["train"].rows["label"][:] == found


@pytest.mark.parametrize(("first", "second"), [("1.5", "neg"), ("True", "neg")])
def test_shards_whose_columns_do_not_go_together_are_refused_by_column(tmp_path, first, second):
    (tmp_path / "d").mkdir()
    for number, value in enumerate((first, second)):
        (tmp_path / f"d/part-{number}.csv").write_text(f"text,label\na cat,{value}\n")
    with pytest.raises(DataError, match=r"the column 'label' is .* in part-\d.csv, .* in part-\d.csv, of one split"):
        read(tmp_path / "d", tmp_path / "c")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_fields_over_several_lines_are_said_with_their_first_line(tmp_path, end):
    rows = ["text,label", "a,neg", f'"b{end}c",pos', "", f'"d{end}e{end}f",neg', "g,pos"]
    (tmp_path / "t.csv").write_bytes((end.join(rows) + end).encode())
    reading = read(tmp_path / "t.csv", tmp_path / "c")
    assert sizes(reading) == {"train": 4}
    assert reading.notes == (
        "t.csv: 9 lines with the head, 4 rows (1 blank lines; 2 rows have a field that goes over several lines, the first at line 3)",
    )


@settings(max_examples=40, deadline=None)
@given(first=st.integers(0, 9), gap=st.integers(1, 9), tail=st.sampled_from(["z", 'z "q', " a"]))
def test_an_open_quote_never_swallows_rows(tmp_path_factory, first, gap, tail):
    place = tmp_path_factory.mktemp("quotes")
    lines = [f"text {i},neg" for i in range(20)]
    lines[first], lines[first + gap] = '"he said,neg', f'"{tail},pos'
    (place / "t.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    with pytest.raises(DataError) as error:
        read(place / "t.csv", place / "c")
    assert "t.csv" in str(error.value)
    assert f"line {first + 2} opens a quote" in str(error.value) or "inside string" in str(error.value)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(st.sampled_from('a ",\n;é'), min_size=1, max_size=8).filter(str.strip), min_size=1, max_size=6))
def test_any_texts_written_as_csv_come_back_with_every_line_accounted_for(tmp_path_factory, texts):
    place = tmp_path_factory.mktemp("texts")
    datasets.Dataset.from_dict({"text": texts, "label": ["x"] * len(texts)}).to_csv(place / "t.csv")
    reading = read(place / "t.csv", place / "c")
    assert reading.tables["train"].rows["text"][:] == texts
    spans = sum("\n" in text for text in texts)
    assert ("over several lines" in reading.notes[0]) == bool(spans)


def test_a_comma_too_many_in_every_row_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\nwell, a cat,neg\nwell, a dog,pos\n")
    with pytest.raises(DataError, match=r"one field more than its head \(2\): put texts that hold `,` in quotes"):
        read(tmp_path / "t.csv", tmp_path / "c")


@pytest.mark.parametrize(("sign", "word"), [(";", "`;`"), ("|", "`|`"), ("\t", "tabs")])
def test_another_separator_is_seen_and_said(tmp_path, sign, word):
    lines = ["text,label", "a cat,neg", "the dog,pos", '"red, fish",neg']
    shown = [line.replace(",", sign) if '"' not in line else f'"red, fish"{sign}neg' for line in lines]
    (tmp_path / "t.csv").write_text("\n".join(shown) + "\n")
    reading = read(tmp_path / "t.csv", tmp_path / "c")
    assert reading.tables["train"].rows[:] == {"text": ["a cat", "the dog", "red, fish"], "label": ["neg", "pos", "neg"]}
    assert f"separated by {word}" in reading.notes[0]


def test_a_separator_that_does_not_fit_every_line_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("text;label\na; b;neg\nthe dog;pos\n")
    with pytest.raises(DataError, match="'text;label' looks separated by `;`, but not every line is"):
        read(tmp_path / "t.csv", tmp_path / "c")
    (tmp_path / "one.csv").write_text("text\na; b\nthe dog\n")
    assert sizes(read(tmp_path / "one.csv", tmp_path / "c")) == {"train": 2}


def test_a_semicolon_csv_trains(refused, command, made, tmp_path):
    lines = [f"{word} cat {i};{('neg', 'pos')[i % 2]}" for i, word in enumerate(["red", "old", "new", "big"] * 6)]
    (tmp_path / "t.csv").write_text("\n".join(["text;label", *lines]) + "\n")
    done = command(made / "bert", "--data", tmp_path / "t.csv", "-o", tmp_path / "out", *SHORT, "--quiet")
    assert done.code == 0, done.err
    data = json.loads((tmp_path / "out/dsd/report.json").read_text())["data"]
    assert sum(data[part]["rows"] for part in ("train", "holdout", "eval")) == 24


def test_a_text_without_blank_lines_says_what_a_document_is(refused, made, tmp_path):
    (tmp_path / "t.txt").write_text("the cat sees a dog\n" * 30)
    message = refused(made / "gpt2", "--data", tmp_path / "t.txt", "-o", tmp_path / "out")
    assert "a paragraph is a document" in message
    assert "30 lines" in message
    assert ".jsonl or .csv with a column `text`" in message
    text_file(tmp_path / "good.txt", paragraphs=1)
    assert read(tmp_path / "good.txt", tmp_path / "c").tables["train"].advice == ""


# ---------------------------------------------------------------- encodings, packing


TEXT = "text,label\ncafé au lait,neg\nnaïve chat,pos\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
def test_a_byte_order_mark_is_recognised(tmp_path, encoding, kind):
    texts = {"csv": TEXT, "jsonl": '{"text": "café au lait"}\n{"text": "naïve chat"}\n', "txt": "café au lait\n\nnaïve chat\n"}
    (tmp_path / f"t.{kind}").write_bytes(texts[kind].encode(encoding))
    reading = read(tmp_path / f"t.{kind}", tmp_path / "c")
    assert reading.tables["train"].rows["text"][:] == ["café au lait", "naïve chat"]
    assert (f"read as {encoding}" in reading.notes[0]) == (encoding != "utf-8-sig")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16-le"])
def test_another_encoding_is_asked_for_and_then_read(command, refused, made, tmp_path, encoding):
    path = tmp_path / "t.csv"
    path.write_bytes((TEXT + "".join(f"dog {i},{('neg', 'pos')[i % 2]}\n" for i in range(20))).encode(encoding))
    message = refused(made / "bert", "--data", path, "-o", tmp_path / "out")
    assert "--encoding" in message
    assert "t.csv" in message
    assert read(path, tmp_path / "c", encoding=encoding).tables["train"].rows["text"][:2] == ["café au lait", "naïve chat"]
    done = command("plan", made / "bert", "--data", path, "--encoding", encoding)
    assert done.code == 0, done.err


def test_an_encoding_nobody_knows_is_refused(refused, made, tmp_path):
    for name in ("latin-99", "hex"):
        assert "for example utf-8, latin-1" in refused(made / "bert", "--data", made / "texts.csv", "--encoding", name)


def test_an_encoding_that_is_not_the_file_s_is_said(tmp_path):
    (tmp_path / "t.csv").write_text(TEXT, encoding="utf-8")
    assert "valid UTF-8" in read(tmp_path / "t.csv", tmp_path / "c", encoding="latin-1").notes[0]


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "txt"])
def test_packed_files_are_the_files(tmp_path, suffix, pack, kind):
    rows = some_rows()
    plain = tmp_path / f"t.{kind}"
    if kind in ("csv", "tsv"):
        rows.to_csv(plain, sep=",\t"[kind == "tsv"])
    elif kind == "txt":
        text_file(plain)
    else:
        rows.to_json(plain, lines=kind == "jsonl")
    (tmp_path / f"t.{kind}.{suffix}").write_bytes(pack(plain.read_bytes()))
    one, other = (read(path, tmp_path / "c").tables["train"].rows[:] for path in (plain, tmp_path / f"t.{kind}.{suffix}"))
    assert one == other


def test_packed_files_that_are_cut_or_would_fill_the_disk_are_refused(tmp_path, monkeypatch):
    packed = gzip.compress(b"text,label\n" + b"a,neg\n" * 100_000)
    (tmp_path / "cut.csv.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match="cannot be unpacked"):
        read(tmp_path / "cut.csv.gz", tmp_path / "c")
    monkeypatch.setattr("dsd_refine.data.plain.LEAST_REFUSED", 1000)
    (tmp_path / "bomb.csv.gz").write_bytes(gzip.compress(bytes(b"a" * 3_000_000)))
    with pytest.raises(DataError, match="unpacks to more than"):
        read(tmp_path / "bomb.csv.gz", tmp_path / "c")
    assert not list((tmp_path / "c").rglob("*.tmp"))


# ---------------------------------------------------------------- JSON


LIST = [{"text": "a cat", "label": "neg"}, {"text": "the dog", "label": "pos"}]


@pytest.mark.parametrize(
    ("content", "found", "unused"),
    [
        (LIST, {"train": 2}, 0),
        ({"data": LIST}, {"train": 2}, 0),
        ({"version": "1.1", "data": LIST}, {"train": 2}, 1),
        ({"rows": LIST, "labels": ["neg", "pos"]}, {"train": 2}, 1),
        ({"train": LIST, "test": LIST[:1], "about": {"by": "us"}}, {"train": 2, "test": 1}, 1),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_json_objects_around_rows(tmp_path, content, found, unused, indent):
    (tmp_path / "t.json").write_text(json.dumps(content, indent=indent))
    reading = read(tmp_path / "t.json", tmp_path / "c")
    assert sizes(reading) == found
    assert reading.tables["train"].rows["text"][:] == ["a cat", "the dog"]
    assert len(reading.unused) == unused
    assert all(line.startswith("t.json: the key '") for line in reading.unused)


@pytest.mark.parametrize("content", [{"first": LIST, "second": LIST}, {"text": ["a", "b"]}, {"data": LIST, "rows": LIST}])
def test_a_json_object_that_is_no_rows_is_refused_with_its_keys(tmp_path, content):
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"one JSON object with the keys .*as a line each \(.jsonl\)"):
        read(tmp_path / "t.json", tmp_path / "c")


def test_lines_in_a_json_stay_rows(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "hello"}]} for _ in range(3)]
    (tmp_path / "t.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sizes(read(tmp_path / "t.json", tmp_path / "c")) == {"train": 3}


# ---------------------------------------------------------------- folders from the Hub


def test_a_folder_from_the_hub(tmp_path):
    configured(tmp_path / "d")
    (tmp_path / "d/assets").mkdir()
    picture(tmp_path / "d/assets/banner.png")
    reading = read(tmp_path / "d", tmp_path / "c")
    assert sizes(reading) == {"train": 8, "test": 4}
    assert reading.tables["train"].rows["text"][:] == [f"{prefix}{i} cat" for prefix in "ab" for i in range(4)]
    assert reading.unused == ("assets/: no file of the configuration 'default' (README.md)",)
    (tmp_path / "d/README.md").unlink()
    bare = read(tmp_path / "d", tmp_path / "c")
    assert {n: t.rows[:] for n, t in bare.tables.items()} == {n: t.rows[:] for n, t in reading.tables.items()}
    assert any(line.startswith("assets/") for line in bare.unused)


def test_the_same_files_as_datasets_itself_would_take(tmp_path):
    for form in (from_the_hub, configured, tables_in_folders, split_tables, shards):
        (tmp_path / form.__name__).mkdir()
        form(tmp_path / form.__name__)
        theirs = datasets.load_dataset(str(tmp_path / form.__name__), cache_dir=str(tmp_path / "theirs"))
        ours = read(tmp_path / form.__name__, tmp_path / "c").tables
        assert {name: table.rows[:] for name, table in ours.items()} == {name: rows[:] for name, rows in theirs.items()}


def test_several_configurations_are_listed_and_one_can_be_named(tmp_path):
    for language in ("de", "fr"):
        jsonl(tmp_path / f"d/{language}/train.jsonl", language)
    lines = "".join(f"- config_name: {c}\n  data_files: {c}/*.jsonl\n" for c in ("de", "fr"))
    (tmp_path / "d/README.md").write_text(f"---\nconfigs:\n{lines}---\n")
    with pytest.raises(DataError, match=rf"several configurations: de, fr. Name one: --data {tmp_path}/d:de"):
        read(tmp_path / "d", tmp_path / "c")
    reading = read(f"{tmp_path}/d:fr", tmp_path / "c")
    assert reading.tables["train"].rows["text"][:] == [f"fr{i} cat" for i in range(4)]
    assert reading.unused == ("de/: no file of the configuration 'fr' (README.md)",)
    with pytest.raises(DataError, match=r"has no configuration 'es'; README\.md names de, fr"):
        read(f"{tmp_path}/d:es", tmp_path / "c")
    (tmp_path / "d/README.md").write_text(f"---\nconfigs:\n{lines}  default: true\n---\n")
    assert read(tmp_path / "d", tmp_path / "c").unused == ("de/: no file of the configuration 'fr' (README.md)",)


@pytest.mark.parametrize(
    ("files", "said"), [("[train.csv, gone.csv]", "the file gone.csv, which is"), ("x/*.csv", "the|files that")]
)
def test_a_file_of_a_configuration_that_is_not_there_is_named_in_one_line(tmp_path, files, said):
    some_rows().to_csv(tmp_path / "train.csv")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n")
    with pytest.raises(
        DataError, match=rf"'default' in its README.md names ({said}).* not there: fetch or correct it"
    ) as error:
        read(tmp_path, tmp_path / "c")
    assert len(str(error.value)) < 300


def test_class_names_that_a_readme_gives_are_kept(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/train.csv").write_text("text,label\na cat,1\nthe dog,0\n")
    (tmp_path / "d/README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: train.csv\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n"
        "  - name: label\n    dtype:\n      class_label:\n        names:\n          '0': pos\n          '1': neg\n---\n"
    )
    assert read(tmp_path / "d", tmp_path / "c").tables["train"].rows.features["label"].names == ["pos", "neg"]


def test_a_shard_that_is_missing_is_said(tmp_path):
    from_the_hub(tmp_path / "d")
    (tmp_path / "d/data/train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="train has 1 of its 2 files"):
        read(tmp_path / "d", tmp_path / "c")


def test_shards_of_other_columns_are_refused(tmp_path):
    jsonl(tmp_path / "d/part-0.jsonl")
    (tmp_path / "d/part-1.jsonl").write_text('{"text": "a cat"}\n')
    with pytest.raises(
        DataError, match=r"part-1.jsonl has the columns text, but part-0.jsonl, of the same split, has text, label"
    ):
        read(tmp_path / "d", tmp_path / "c")


def test_a_folder_of_texts_is_their_paragraphs(tmp_path):
    (tmp_path / "d").mkdir()
    texts(tmp_path / "d")
    reading = read(tmp_path / "d", tmp_path / "c")
    assert reading.tables["train"].rows["text"][:] == [p for n in range(3) for p in paragraphs(tmp_path / f"d/{n}.txt")]
    assert len(reading.notes) == 3


@pytest.mark.parametrize("name", ["train.parquet", "train.csv", "train.jsonl", "t.txt", "data/train-00000-of-00001.parquet"])
def test_a_pointer_of_git_lfs_is_no_data(tmp_path, name):
    path = tmp_path / "d" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(POINTER)
    with pytest.raises(DataError, match=r"is a Git LFS pointer, the file itself was not fetched: `git lfs pull`"):
        read(tmp_path / "d", tmp_path / "c")


def test_pictures_that_are_pointers_are_said_to_be(refused, made, tmp_path):
    image_folder(tmp_path / "d", per_class=2, splits=())
    for path in (tmp_path / "d").rglob("*.png"):
        path.write_bytes(POINTER)
    assert "a Git LFS pointer" in refused(made / "timm", "--data", tmp_path / "d", "-o", tmp_path / "out")


# ---------------------------------------------------------------- metadata


@pytest.mark.parametrize("name", ["file_name", "filename", "FilePath", "image_path", "Image_ID", "audio_path"])
def test_the_column_of_file_names_goes_by_many_names(tmp_path, name):
    image_folder(tmp_path / "d", per_class=2, splits=())
    (tmp_path / "d/metadata.csv").write_text(f"{name},label\na/000.png,a\nc/001.png,c\n")
    reading = read(tmp_path / "d", tmp_path / "c")
    assert reading.tables["train"].names == ["a/000.png", "c/001.png"]
    assert (f"in the column `{name}`" in reading.notes[0]) == (name != "file_name")
    assert {line.partition(":")[0] for line in reading.unused} == {"b/", "a/001.png", "c/000.png"}


def test_ids_of_pictures_are_their_names_without_suffix(tmp_path):
    image_folder(tmp_path / "d", per_class=2, splits=())
    for number, path in enumerate(sorted((tmp_path / "d").rglob("*.png"))):
        path.rename(path.with_name(f"p{number}.png"))
    (tmp_path / "d/metadata.csv").write_text("image_id,label\np0,a\np4,c\n")
    assert read(tmp_path / "d", tmp_path / "c").tables["train"].names == ["a/p0.png", "c/p4.png"]
    shutil.copy(tmp_path / "d/a/p0.png", tmp_path / "d/b/p0.png")
    with pytest.raises(DataError, match="could each be the 'p0' of its metadata"):
        read(tmp_path / "d", tmp_path / "c")


def test_metadata_above_split_folders_make_a_table_for_each(tmp_path):
    image_folder(tmp_path / "d", per_class=2)
    names = [path.relative_to(tmp_path / "d").as_posix() for path in sorted((tmp_path / "d").rglob("*.png"))]
    (tmp_path / "d/metadata.csv").write_text("".join(["file_name,label\n", *(f"{n},{n.split('/')[1]}\n" for n in names)]))
    reading = read(tmp_path / "d", tmp_path / "c")
    assert sizes(reading) == {"test": 6, "train": 6}
    assert all(name.startswith("test/") for name in reading.tables["test"].names)
    picture(tmp_path / "d/extra/x.png")
    with (tmp_path / "d/metadata.csv").open("a") as file:
        file.write("extra/x.png,a\n")
    with pytest.raises(DataError, match=r"files in test/, train/ and files elsewhere \(extra/\)"):
        read(tmp_path / "d", tmp_path / "c")


# ---------------------------------------------------------------- what is not there


def test_a_path_that_is_not_there_is_shown_with_what_is(refused, made, tmp_path, monkeypatch):
    jsonl(tmp_path / "data/reviews.jsonl")
    monkeypatch.chdir(tmp_path)
    for spec in ("data/review.jsonl", "./data/review.jsonl", tmp_path / "data/review.jsonl"):
        message = refused(made / "bert", "--data", spec, "-o", tmp_path / "out")
        assert f"looked for {tmp_path}/data/review.jsonl" in message
        assert "'reviews.jsonl'" in message
    message = refused(made / "bert", "--data", "dat/reviews", "-o", tmp_path / "out")  # could be a Hub name
    assert f"looked for {tmp_path}/dat/reviews" in message
    assert "which has 'data'" in message


def test_a_file_that_a_table_names_is_shown_as_it_was_looked_for(command, made, tmp_path):
    image_folder(tmp_path / "d", per_class=8, splits=())
    lines = [f"{c}/{i:03}.png,{c}" for c in "abc" for i in range(8)]
    (tmp_path / "d/train.csv").write_text("\n".join(["image,label", *lines, "b/missing.png,b"]) + "\n")
    done = command(made / "timm", "--data", tmp_path / "d", "-o", tmp_path / "out", *SHORT, "--quiet")
    assert done.code == 0, done.err
    (skipped,) = json.loads((tmp_path / "out/dsd/report.json").read_text())["data"]["train"]["skipped"]
    assert f"looked for {os.path.abspath(tmp_path / 'd/b/missing.png')}" in skipped["reason"]
    assert "has no 'missing.png'" in skipped["reason"]
