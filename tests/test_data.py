"""Where rows come from, which of them train, select and judge, and what becomes of odd rows, pictures and labels."""

import errno
import hashlib
import json
import os
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from builders import WORDS, image_folder, text_file, word_tokenizer
from labelled import NAMED, recipe, table, texts
from PIL import Image

from dsd_refine.checkpoint.preprocessing import Preprocessing
from dsd_refine.data.columns import LABEL, column
from dsd_refine.data.files import paragraphs
from dsd_refine.data.labels import label_texts, match_labels
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import SALT, Rows, by_role, carve, divide
from dsd_refine.data.tables import ROWS_AT_ONCE, read_tables
from dsd_refine.errors import DataError
from dsd_refine.tasks.base import Scores
from dsd_refine.tasks.causal_lm import prepare_documents
from dsd_refine.tasks.image_classification import prepare_images
from dsd_refine.tasks.inputs.images import decode
from dsd_refine.tasks.inputs.texts import window_length


def read(spec, cache):
    return by_role(read_tables(str(spec), cache, download=lambda name, size: False), str(spec)).tables


def sizes(tables):
    return {name: len(table.rows) for name, table in tables.items()}


def digest(text):
    return hashlib.sha256(text.encode()).digest()


def rows_of(contents, labels=None):
    """Rows with these contents, for the rules that do not look at the table."""
    table = Table(datasets.Dataset.from_dict({"text": contents}))
    digests = [digest(content) for content in contents]
    return Rows(table, np.arange(len(contents)), digests, list(labels or [""] * len(contents)))


def grey(*_):
    to_tensor = lambda image: torch.from_numpy(np.array(image)).float()[None]  # noqa: E731
    return Preprocessing(1, to_tensor, to_tensor, to_tensor, (32, 32), None, {})


def pictures(folder, cache, aliases=(("a",), ("b",), ("c",)), **fields):
    return prepare_images(recipe(**fields), read(folder, cache), None, grey(), aliases, 3)


# ---------------------------------------------------------------- forms of --data


@pytest.mark.parametrize(
    ("splits", "found"),
    [
        ([], {"train": 6}),
        (["train", "test"], {"train": 6, "test": 6}),
        (["train", "val"], {"train": 6, "validation": 6}),
        (["train", "validation", "test"], {"train": 6, "validation": 6, "test": 6}),
    ],
)
def test_class_folders(tmp_path, splits, found):
    image_folder(tmp_path / "d", per_class=2, splits=splits)
    tables = read(tmp_path / "d", tmp_path / "cache")
    assert sizes(tables) == found
    train = tables["train"]
    assert train.rows["label"][:] == ["a", "a", "b", "b", "c", "c"]
    assert train.name(2) == ("train/" if splits else "") + "b/000.png"


def test_hidden_folders_are_no_classes_and_hidden_files_no_rows(tmp_path):
    image_folder(tmp_path / "d", per_class=1, splits=[])
    (tmp_path / "d/.git").mkdir()
    (tmp_path / "d/.git/x.png").write_bytes(b"")
    (tmp_path / "d/a/.hidden").mkdir()
    (tmp_path / "d/a/.hidden/x.png").write_bytes(b"")
    (tmp_path / "d/a/.DS_Store").write_bytes(b"")
    assert sizes(read(tmp_path / "d", tmp_path / "cache")) == {"train": 3}


def test_a_class_may_be_called_train(tmp_path):
    image_folder(tmp_path / "d", classes=["bus", "car", "train"], per_class=1, splits=[])
    tables = read(tmp_path / "d", tmp_path / "cache")
    assert tables["train"].rows["label"][:] == ["bus", "car", "train"]
    image_folder(tmp_path / "e", per_class=2, splits=["train"])
    (tmp_path / "e/notes").mkdir()
    assert sizes(read(tmp_path / "e", tmp_path / "cache")) == {"train": 6}


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet", "disk", "dict", "split files"])
def test_tables(tmp_path, form):
    rows = datasets.Dataset.from_dict({"text": ["a cat", "NA, null", "a dog"], "label": ["pos", "neg", "pos"]})
    path = tmp_path / f"d.{form}"
    if form == "csv":
        rows.to_csv(path)
    elif form == "tsv":
        rows.to_csv(path, sep="\t")
    elif form == "jsonl":
        rows.to_json(path)
    elif form == "parquet":
        rows.to_parquet(path)
    elif form == "disk":
        rows.save_to_disk(path)
    elif form == "dict":
        datasets.DatasetDict({"train": rows, "test": rows.select([0]), "unsupervised": rows}).save_to_disk(path)
    else:
        path.mkdir()
        rows.to_json(path / "train.jsonl")
        rows.select([0]).to_csv(path / "dev.csv")
    tables = read(path, tmp_path / "cache")
    more = {"dict": {"test": 1}, "split files": {"validation": 1}}.get(form, {})
    assert sizes(tables) == {"train": 3} | more
    assert tables["train"].rows["text"][:] == ["a cat", "NA, null", "a dog"]
    assert tables["train"].rows["label"][:] == ["pos", "neg", "pos"]
    assert tables["train"].name(2) == 2


@pytest.mark.parametrize("saved", [{"columns": ["text"]}, {"type": "numpy"}, {"type": "pandas"}, {"type": "torch"}])
def test_a_saved_format_is_not_kept(tmp_path, saved):
    rows = datasets.Dataset.from_dict({"text": ["a cat", "a dog"], "label": [0, 1]})
    rows.with_format(**saved).save_to_disk(tmp_path / "d")
    train = read(tmp_path / "d", tmp_path / "c")["train"]
    assert train.rows[0] == {"text": "a cat", "label": 0}
    assert label_texts(train, "label") == ["0", "1"]


def test_a_text_file_is_cut_at_blank_lines(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeffone\ntwo\r\n  \r\n\n three \n\n\n".encode())
    assert list(paragraphs(path)) == ["one\ntwo", "three"]
    assert read(path, tmp_path)["train"].rows["text"][:] == ["one\ntwo", "three"]


@pytest.mark.parametrize("split", ["", "train"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_names_the_files(tmp_path, split, kind):
    image_folder(tmp_path / "d" / split, per_class=2, splits=[])
    rows = [{"file_name": "a/000.png", "label": "a"}, {"file_name": "c/001.png", "label": "c"}]
    file = tmp_path / "d" / split / f"metadata.{kind}"
    if kind == "csv":
        file.write_text("file_name,label\na/000.png,a\nc/001.png,c\n")
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    train = read(tmp_path / "d", tmp_path / "cache")["train"]
    assert train.rows["label"][:] == ["a", "c"]
    assert train.name(1) == f"{split}/c/001.png".lstrip("/")
    assert all(path.endswith(row["file_name"]) for path, row in zip(train.rows["image"], rows, strict=True))


def test_metadata_with_a_column_of_its_own_of_that_name(tmp_path):
    image_folder(tmp_path / "d", per_class=1, splits=[])
    (tmp_path / "d/metadata.csv").write_text("image,file_name,label\n7,a/000.png,a\n8,c/000.png,c\n")
    train = read(tmp_path / "d", tmp_path / "cache")["train"]
    assert [path.rsplit("/", 2)[1] for path in train.rows["image"]] == ["a", "c"]


def test_metadata_without_file_names_is_refused(tmp_path):
    (tmp_path / "metadata.csv").write_text("name,label\nx.png,a\n")
    with pytest.raises(DataError, match=r"no `file_name` column, only name, label"):
        read(tmp_path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.csv", b"", "is empty"),
        ("head.csv", b"text,label\n", "holds no rows"),
        ("blank.txt", b"\n \n", "holds no rows"),
        ("bytes.txt", b"caf\xe9\n", "not UTF-8"),
        ("bytes.csv", b"text,label\ncaf\xe9,a\n", "not UTF-8"),
        ("broken.parquet", b"PAR1 nothing", "cannot be read"),
        ("broken.jsonl", b'{"text": "a"\n{', "cannot be read"),
        ("model.bin", b"x", "known are"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        read(path, tmp_path / "cache")
    assert name in str(error.value)


def test_what_is_nowhere_and_no_hub_name_is_refused(tmp_path):
    for spec in ("./nothing.csv", str(tmp_path / "nothing")):
        with pytest.raises(DataError, match="no such file or directory"):
            read(spec, tmp_path)


def test_a_folder_without_classes_lists_the_known_forms(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match=r"Known forms: class folders"):
        read(tmp_path / "d", tmp_path)


def test_a_disk_without_known_splits_lists_them(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"first": rows, "second": rows}).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match="first, second"):
        read(tmp_path / "d", tmp_path)


# ---------------------------------------------------------------- splits


def split(train, test=None, validation=None, evaluation=None, holdout=0.25):
    given = {"train": train, "test": test, "validation": validation}
    tables = {name: rows_of(rows) for name, rows in given.items() if rows is not None}
    judged = {"train": rows_of(evaluation)} if evaluation is not None else None
    found = divide(tables, judged, holdout)
    lengths = [len(part) if part is not None else None for part in (found.train, found.holdout, found.eval)]
    return found, lengths


def names(prefix, n):
    return [f"{prefix}{i}" for i in range(n)]


TRAIN, TEST, VALIDATION, EVAL = names("r", 20), names("t", 7), names("v", 5), names("e", 3)


@pytest.mark.parametrize(
    ("given", "lengths", "rule"),
    [
        ({"test": TEST, "evaluation": EVAL}, [15, 5, 3], "--eval-data"),
        ({"test": TEST, "validation": VALIDATION, "evaluation": EVAL}, [20, 5, 3], "--eval-data"),
        ({"test": TEST}, [15, 5, 7], "test"),
        ({"test": TEST, "validation": VALIDATION}, [20, 5, 7], "test; holdout is validation"),
        ({"validation": VALIDATION}, [15, 5, 5], "validation; holdout carved"),
        ({"validation": VALIDATION, "test": []}, [15, 5, 5], "validation; holdout carved"),
        ({}, [12, 4, 4], "carved"),
        ({"test": TEST, "holdout": 0}, [20, None, 7], "test"),
    ],
)
def test_which_split_judges_and_which_selects(given, lengths, rule):
    found, counted = split(TRAIN, **given)
    assert counted == lengths
    assert found.rule.startswith(rule)
    if "validation" in rule and "holdout is" in rule:
        assert found.holdout.digests == [digest(v) for v in VALIDATION]


@pytest.mark.parametrize("hidden", ["missing column", "nothing", "minus one"])
def test_an_unlabelled_test_split_counts_as_absent(hidden):
    names = datasets.ClassLabel(names=["neg", "pos"])
    test = {"text": ["red dog", "blue cat", "a fish"]}
    if hidden == "nothing":
        test["label"] = [None, None, None]
    if hidden == "minus one":
        test["label"] = [-1, -1, -1]
    made = datasets.Dataset.from_dict(test)
    if hidden == "minus one":
        made = made.cast_column("label", names)
    train = table(text=[f"the {a} {b}" for a in WORDS[:4] for b in WORDS[4:9]], label=["neg", "pos"] * 10)
    task = texts({"train": train, "test": Table(made)})
    assert len(task.eval.rows) == 4  # carved: a fifth
    assert task.eval.rows.table is train
    assert any("the test split has no usable rows" in line for line in task.warnings)


def test_nothing_left_is_refused():
    for given, says in (({"train": []}, "no usable training rows"), ({"train": ["a"]}, "too few rows")):
        with pytest.raises(DataError, match=says):
            split(**given)
    with pytest.raises(DataError, match="holdout"):
        split(["a", "b"], test=["c"], holdout=0.1)


def test_overlap_is_counted_and_warned_of():
    found, _ = split(["a", "b", *TRAIN], test=["a", "b", "a", "new"], holdout=0)
    assert found.overlap == 3
    found, _ = split(TRAIN, evaluation=TRAIN, holdout=0.25)  # a quarter of them is held out
    assert found.overlap == 20
    train = table(text=["a cat", "a dog", "a bird", "a fish"], label=["neg", "pos"] * 2)
    test = table(text=["a dog", "the fish"], label=["pos", "neg"])
    task = texts({"train": train, "test": test}, holdout=0, keep="last")
    assert any("1 of 2 evaluation rows have the content of a training or holdout row" in line for line in task.warnings)


# ---------------------------------------------------------------- carving


@pytest.mark.parametrize("share", [0.1, 0.2, 0.25, 0.5])
def test_carving_takes_round_of_the_share_of_each_class(share):
    contents, labels = names("x", 37), ["a"] * 23 + ["b"] * 9 + ["c"] * 5
    kept, carved = carve(rows_of(contents, labels), share)
    for label in "abc":
        assert carved.labels.count(label) == round(share * labels.count(label))
    assert sorted(kept.digests + carved.digests) == sorted(map(digest, contents))


def test_carving_takes_the_smallest_salted_hashes():
    contents = names("x", 40)
    _, carved = carve(rows_of(contents), 0.25)
    ranked = sorted(contents, key=lambda text: hashlib.sha256(SALT + digest(text)).digest())
    assert set(carved.digests) == {digest(text) for text in ranked[:10]}


def test_carving_does_not_hang_on_row_order_or_other_classes():
    contents, labels = names("x", 30), ["a", "b", "c"] * 10
    whole = set(carve(rows_of(contents, labels), 0.3)[1].digests)
    backwards = set(carve(rows_of(contents[::-1], labels[::-1]), 0.3)[1].digests)
    only = [(c, label) for c, label in zip(contents, labels, strict=True) if label != "b"]
    without = set(carve(rows_of([c for c, _ in only], [label for _, label in only]), 0.3)[1].digests)
    assert whole == backwards
    assert without < whole


def test_equal_rows_stay_together():
    for copies in range(2, 7):
        contents = [f"x{i}" for i in range(12) for _ in range(copies)]
        for share in (0.1, 0.2, 0.5):
            kept, carved = carve(rows_of(contents), share)
            assert carved.digests
            assert not set(kept.digests) & set(carved.digests)


def test_equal_rows_stay_together_across_classes():
    contents, labels = names("x", 40) * 2 + names("y", 50), ["a"] * 40 + ["b"] * 90
    kept, carved = carve(rows_of(contents, labels), 0.2)
    assert len(kept) + len(carved) == len(contents)
    assert len(carved) >= 26
    assert not set(kept.digests) & set(carved.digests)
    ranked = sorted(names("x", 40), key=lambda text: hashlib.sha256(SALT + digest(text)).digest())
    mixed = rows_of([*names("x", 40), ranked[0]], ["a"] * 40 + ["b"])
    kept, carved = carve(mixed, 0.2)  # the one row of b is the first that a would give
    assert kept.labels.count("b") == 1
    assert not set(kept.digests) & set(carved.digests)


def test_carving_never_empties_a_class():
    kept, carved = carve(rows_of(["x"] * 5 + ["y"] * 5, ["a"] * 5 + ["b"] * 5), 0.5)
    assert (len(kept), len(carved)) == (10, 0)


def test_the_seed_carves_nothing(tmp_path):
    image_folder(tmp_path / "d", per_class=10, splits=[])
    first, other = (pictures(tmp_path / "d", tmp_path / "c", seed=seed) for seed in (0, 1))
    assert first.holdout.rows.fingerprint == other.holdout.rows.fingerprint
    assert first.eval.rows.fingerprint == other.eval.rows.fingerprint


# ---------------------------------------------------------------- rows that cannot be used


def test_unreadable_pictures_are_skipped_and_named(tmp_path):
    image_folder(tmp_path / "d", per_class=4)
    cut = tmp_path / "d/train/b/001.png"
    cut.write_bytes(cut.read_bytes()[:200])
    (tmp_path / "d/test/c/002.png").write_bytes(b"no picture at all")
    task = pictures(tmp_path / "d", tmp_path / "c", holdout=0, keep="last")
    train, test = task.train.rows.skipped, task.eval.rows.skipped
    assert [row["row"] for row in train] == ["train/b/001.png"]
    assert [row["row"] for row in test] == ["test/c/002.png"]
    assert "unreadable picture" in train[0]["reason"]
    assert len(task.eval.rows) == 11
    assert any("train/b/001.png" in line for line in task.warnings)


def test_rows_without_label_or_text_are_skipped_and_numbered(tmp_path):
    path = tmp_path / "t.csv"
    lines = ["text,label", *(f"the {a} cat,neg\nthe {a} dog,pos" for a in WORDS[10:20]), ",neg", "a bird,", " ,pos"]
    path.write_text("\n".join(lines) + "\n")
    task = texts(read(path, tmp_path / "c"))
    assert task.train.rows.skipped == [
        {"row": 20, "reason": "no text"},
        {"row": 21, "reason": "no label"},
        {"row": 22, "reason": "no text"},
    ]
    parts = (task.train, task.holdout, task.eval)
    assert sum(len(part.rows) for part in parts) == 20


def test_pictures_of_any_suffix_are_rows_and_other_files_are_named(tmp_path):
    image_folder(tmp_path / "d", per_class=4)
    for number, suffix in enumerate(("jfif", "avif", "PNG.bak")):
        (tmp_path / f"d/train/a/{number:03}.png").rename(tmp_path / f"d/train/a/picture.{suffix}")
    (tmp_path / "d/train/a/notes").write_text("no picture")
    task = pictures(tmp_path / "d", tmp_path / "c", holdout=0, keep="last")
    assert [row["row"] for row in task.train.rows.skipped] == ["train/a/notes"]
    used = [task.train.rows.name(row) for row in range(len(task.train.rows))]
    assert len(used) == 12
    assert sum("picture." in name for name in used) == 3


def test_a_class_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    image_folder(tmp_path / "d", per_class=2, splits=[])
    real = os.scandir

    def locked(path="."):
        if str(path).endswith("b"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(DataError, match=r"d/b: cannot be listed \(Permission denied\)"):
        read(tmp_path / "d", tmp_path / "c")


def test_plain_bytes_are_pictures_too(tmp_path):
    image_folder(tmp_path / "f", per_class=4, splits=[])
    files = sorted((tmp_path / "f").rglob("*.png"))
    rows = {"image": [file.read_bytes() for file in files], "label": [file.parent.name for file in files]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "d.parquet")
    task = pictures(tmp_path / "d.parquet", tmp_path / "c", holdout=0, keep="last")
    assert len(task.train.rows) + len(task.eval.rows) == 12
    assert task.batch(task.train, [(0, None)]).inputs["x"].shape == (1, 1, 32, 32)


def test_a_missing_picture_file_is_skipped(tmp_path):
    image_folder(tmp_path / "d", per_class=6, splits=[])
    lines = [f"{c}/{i:03}.png,{c}" for c in "abc" for i in range(7)]
    (tmp_path / "d/metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    task = pictures(tmp_path / "d", tmp_path / "c", holdout=0, keep="last")
    assert [row["row"] for row in task.train.rows.skipped] == ["a/006.png", "b/006.png", "c/006.png"]
    assert "No such file" in task.train.rows.skipped[0]["reason"]


def test_no_row_with_a_label_is_an_error():
    with pytest.raises(DataError, match="no row has a label"):
        texts({"train": table(text=["a", "b"], label=[None, None])})


def test_every_row_unusable_says_why(tmp_path):
    image_folder(tmp_path / "d", per_class=2, splits=[])
    for path in (tmp_path / "d").rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"no row can be used: 6 x unreadable picture"):
        pictures(tmp_path / "d", tmp_path / "c")


# ---------------------------------------------------------------- columns


def test_a_missing_column_lists_what_is_there():
    data = table(words=["a"], stars=["neg"])
    with pytest.raises(DataError, match=r"the data has words, stars. Name it with --text-column"):
        texts({"train": data})
    with pytest.raises(DataError, match=r"no column 'mark'; the data has words, stars. Name it with --label-column"):
        texts({"train": data}, text_column="words", label_column="mark")


def test_columns_by_type_by_name_and_as_asked():
    data = datasets.Dataset.from_dict({"label": ["x"], "kind": [0]})
    named = Table(data)
    both = Table(data.cast_column("kind", datasets.ClassLabel(names=["n"])))
    assert column(named, None, LABEL) == "label"
    assert column(Table(both.rows.remove_columns("label")), None, LABEL) == "kind"
    assert column(both, "kind", LABEL) == "kind"
    with pytest.raises(DataError, match=r"label and kind could each be the label column.*--label-column"):
        column(both, None, LABEL)


def test_two_text_columns_are_a_pair():
    data = table(q=["the cat", "a dog"] * 10, a=["red bird"] * 20, label=["neg", "pos"] * 10)
    task = texts({"train": data, "test": data}, text_column="q,a", holdout=0, keep="last")
    ids = task.batch(task.train, [(0, None)]).inputs["input_ids"][0].tolist()
    assert ids == word_tokenizer()("the cat", "red bird")["input_ids"]


# ---------------------------------------------------------------- pictures


def png(array, mode=None, **options):
    import io

    image = Image.fromarray(array) if isinstance(array, np.ndarray) else array
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, options.pop("format", "png"), **options)
    return buffer.getvalue()


RAMP = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (4, 1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P", "1", "LA"])
def test_modes_become_what_the_model_sees(mode, channels):
    colours = np.stack([RAMP, RAMP, RAMP], -1)
    raw = png(Image.fromarray(colours), mode, format="tiff" if mode == "CMYK" else "png")
    image = decode(raw, channels)
    assert image.mode == {1: "L", 3: "RGB"}[channels]
    assert image.size == (16, 4)
    if mode in ("L", "RGB", "RGBA", "LA"):
        assert np.array_equal(np.array(image).reshape(4, 16, -1)[..., 0], RAMP)


def test_sixteen_bits_are_scaled_not_clipped():
    wide = np.array([[0, 257, 1000, 32768, 65535]], dtype=np.uint16)
    assert np.array(decode(png(wide), 1)).tolist() == [[0, 1, 4, 128, 255]]
    assert np.array(decode(png(wide), 3))[0, :, 2].tolist() == [0, 1, 4, 128, 255]


def test_pictures_are_turned_upright():
    image = Image.fromarray(RAMP)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    found = decode(png(image, exif=exif), 1)
    assert found.size == (4, 16)
    assert np.array(found)[:, 0].tolist() == RAMP[0].tolist()


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4), "floating-point"),
        (np.full((2, 2), 70000, dtype=np.int32), "more than 16 bits"),
    ],
)
def test_pixels_without_one_meaning_are_refused(array, says):
    with pytest.raises(DataError, match=says):
        decode(png(array, format="tiff"), 1)


def test_a_bomb_is_not_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match="too large"):
        decode(png(RAMP), 1)


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        ({"dog", "tabby cat"}, {"dog": 1, "tabby cat": 0}),
        ({"Dog", "TABBY_CAT", "great white"}, {"Dog": 1, "TABBY_CAT": 0, "great white": 2}),
        ({"n01", "n02", "n03"}, {"n01": 1, "n02": 0, "n03": 2}),
    ],
)
def test_labels_go_by_name(labels, ids):
    found = match_labels(NAMED, 3, labels)
    assert found.ids == ids
    assert found.rule == "by name"
    assert found.model == ("tabby cat", "dog", "great_white")


def test_names_of_digits_may_have_lost_their_zeros():
    """A table's reader takes 01 for 1. As written comes first."""
    assert match_labels((("01",), ("02",), ("10",)), 3, {"1", "2", "10"}).ids == {"1": 0, "2": 1, "10": 2}
    assert match_labels((("01",), ("1",)), 2, {"01", "1"}).ids == {"01": 0, "1": 1}


@pytest.mark.parametrize("library", ["timm", "transformers", "torchvision"])
def test_imagenets_names_are_known_to_models_of_every_library(library):
    from timm.data import ImageNetInfo
    from torchvision.models._meta import _IMAGENET_CATEGORIES as SHORT

    info = ImageNetInfo("imagenet-1k")
    texts, synsets = ([str(of(i)) for i in range(1000)] for of in (info.index_to_description, info.index_to_label_name))
    aliases = {
        "timm": [[synset, text] for synset, text in zip(synsets, texts, strict=True)],
        "transformers": [[text] for text in texts],
        "torchvision": [[name] for name in SHORT],
    }[library]
    hub = [*texts[:517], "crane2", *texts[518:]]
    assert (hub[134], len(set(hub))) == ("crane", 1000)
    for data in (hub, synsets, list(SHORT)):
        assert match_labels(aliases, 1000, set(data)).ids == {name: number for number, name in enumerate(data)}
    few = match_labels(aliases, 1000, {"tench", "crane"}, hub)
    assert few.ids == {"tench": 0, "crane": 134}
    assert few.model[0] == aliases[0][0]
    with pytest.raises(DataError, match="names of several of its classes: crane"):
        match_labels(aliases, 1000, {"tench", "crane"})
    with pytest.raises(DataError, match="tench"):
        match_labels([[f"thing {i}"] for i in range(1000)], 1000, {"tench"})


def test_names_that_do_not_match_show_both_lists():
    with pytest.raises(DataError) as error:
        match_labels(NAMED, 3, {"dog", "wolf", "lynx"})
    for name in ("wolf", "lynx", "tabby cat", "dog", "great_white"):
        assert name in str(error.value)


def test_two_labels_for_one_class_are_refused():
    with pytest.raises(DataError, match="same class"):
        match_labels(NAMED, 3, {"Dog", "dog"})


def test_numbers_go_by_number_not_by_text():
    found = match_labels(None, 12, {str(n) for n in range(12)})
    assert [found.ids[str(n)] for n in range(12)] == list(range(12))
    assert "integers" in found.rule


def test_numeric_folders_go_by_number(tmp_path):
    image_folder(tmp_path / "d", classes=[str(n) for n in range(11)], per_class=2)
    task = prepare_images(recipe(holdout=0, keep="last"), read(tmp_path / "d", tmp_path / "c"), None, grey(), None, 11)
    folders = [task.train.rows.name(row).split("/")[1] for row in range(22)]
    assert [int(name) for name in folders] == task.train.ids.tolist()


def test_integer_names_of_the_model_win_over_order(tmp_path):
    aliases = (("0",), ("1",), ("10",), ("2",))
    image_folder(tmp_path / "d", classes=["0", "1", "10", "2"], per_class=2)
    task = prepare_images(recipe(holdout=0, keep="last"), read(tmp_path / "d", tmp_path / "c"), None, grey(), aliases, 4)
    assert {task.train.rows.labels[row]: int(task.train.ids[row]) for row in range(8)} == {"0": 0, "1": 1, "10": 2, "2": 3}


def test_other_names_go_in_sorted_order_where_the_model_has_none():
    found = match_labels(None, 3, {"b", "a", "c"})
    assert found.ids == {"a": 0, "b": 1, "c": 2}
    assert "sorted" in found.rule
    with pytest.raises(DataError, match="the data has 3 classes"):
        match_labels(None, 4, {"b", "a", "c"})


def test_a_data_set_of_declared_names_keeps_their_order():
    found = match_labels(None, 2, {"pos", "neg"}, ["pos", "neg"])
    assert found.ids == {"pos": 0, "neg": 1}


def test_other_labels_than_the_declared_ones_are_refused_with_both_lists():
    for declared in (["neg", "pos"], ["0", "1"]):
        with pytest.raises(DataError, match=rf"training data: wolf\. .* are: {', '.join(declared)}"):
            match_labels(None, 2, {*declared, "wolf"}, declared)
    with pytest.raises(DataError, match="training data: 2"):
        match_labels(None, 2, {"neg", "pos", "2"}, ["neg", "pos"])


@pytest.mark.parametrize("aliases", [None, [["neg"], ["pos"]]])
def test_integers_beside_declared_names_are_their_ids(aliases):
    names = datasets.ClassLabel(names=["pos", "neg"])
    data = {"text": [f"the {a} {b}" for a in WORDS[:4] for b in WORDS[4:9]], "label": [0, 1] * 10}
    train = Table(datasets.Dataset.from_dict(data).cast_column("label", names))
    judged = table(text=["red dog", "blue cat"], label=[0, 1])
    task = texts({"train": train}, aliases=aliases, evaluation={"train": judged})
    assert task.eval.ids.tolist() == ([0, 1] if aliases is None else [1, 0])


def test_declared_names_that_are_integers_are_the_ids():
    names = sorted(map(str, range(12)))  # "10" stands third
    found = match_labels(None, 12, {"2", "10"}, names)
    assert found.ids == {str(n): n for n in range(12)}
    assert "integers" in found.rule


@pytest.mark.parametrize("labels", [{"0", "3"}, {"1", "2", "3"}, {"-1", "0", "1"}, {"0", "1"}])
def test_ids_out_of_range_or_of_another_count_are_refused(labels):
    with pytest.raises(DataError, match="model"):
        match_labels(None, 3, labels)


def test_a_class_id_out_of_the_data_sets_range_is_refused():
    rows = datasets.Dataset.from_dict({"label": [0, 1]}).cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    wrong = datasets.Dataset(pa.table({"label": [0, 5]}), info=rows.info)
    with pytest.raises(DataError, match=r"row 1: class id 5"):
        label_texts(Table(wrong), "label")


@pytest.mark.parametrize(
    ("values", "says"), [([0.0, 1.5], "row 1: the label 1.5 is no class"), ([[0], [0, 1]], "row 0: 'label' holds several")]
)
def test_regression_and_multi_label_are_refused(values, says):
    with pytest.raises(DataError, match=says):
        label_texts(table(label=values), "label")


def test_whole_floats_are_ids():
    assert label_texts(table(label=[0.0, 1.0, None]), "label") == ["0", "1", None]


def test_one_map_serves_every_split():
    train = table(text=["the cat", "a dog", "red fish", "blue bird"] * 3, label=["0", "1"] * 6)
    test = table(text=["new dog"], label=["1"])
    task = texts({"train": train, "test": test}, aliases=None, holdout=0, keep="last")
    assert task.eval.ids.tolist() == [1]
    with pytest.raises(DataError, match="model"):
        texts({"train": train, "test": table(text=["new dog"], label=["2"])}, aliases=None, holdout=0, keep="last")


def test_a_models_placeholder_names_are_no_names():
    from dsd_refine.checkpoint.libraries.transformers import TransformersLibrary

    def names(*of):
        config = SimpleNamespace(num_labels=len(of), id2label=dict(enumerate(of)))
        return TransformersLibrary(Path(), config, "text-classification").label_names()

    assert names("LABEL_0", "LABEL_1") == (None, 2)
    assert names("no", "yes") == ([["no"], ["yes"]], 2)


# ---------------------------------------------------------------- language models


def documents(contents, length=4, tokenizer=None, **fields):
    tables = {"train": table(text=contents), "test": table(text=contents)}
    return prepare_documents(recipe(holdout=0, keep="last", **fields), tables, None, tokenizer or word_tokenizer(), length)


def test_windows_follow_each_other_and_cover_the_document():
    words = " ".join(WORDS[:9])
    ids = word_tokenizer()(words)["input_ids"]
    assert len(ids) == 11
    part = documents([words]).eval
    windows = [part.tokens[a:b].tolist() for a, b in zip(part.start, part.stop, strict=True)]
    assert windows == [ids[0:4], ids[4:8], ids[8:11]]
    assert part.row.tolist() == [0, 0, 0]


def test_a_last_token_alone_makes_no_window():
    part = documents([" ".join(WORDS[:7])]).eval  # nine tokens
    assert list(zip(part.start, part.stop, strict=True)) == [(0, 4), (4, 8)]


def test_the_first_token_of_a_window_is_no_target_and_sums_are_added():
    task = documents(["the cat sees a dog not", "a bird"])

    def forward(input_ids, attention_mask):
        return torch.zeros(*input_ids.shape, 30)

    scores = [0.0, 0.0]
    counts = [0, 0]
    for unit in range(task.eval.units):
        batch = task.batch(task.eval, [(unit, None)])
        (found,) = task.score(forward, batch)
        scores[task.eval.row_of(unit)] += found.score
        counts[task.eval.row_of(unit)] += found.count
    assert counts == [3 + 3, 3]  # 8 tokens in two windows of 4; 4 tokens in one
    assert scores == pytest.approx([6 * np.log(30), 3 * np.log(30)], rel=1e-6)
    zero = np.zeros(2)
    figures = task.metrics(Scores(np.array(scores), np.array(counts), zero, zero))
    assert figures["loss"] == pytest.approx(np.log(30), rel=1e-6)
    assert figures["perplexity"] == pytest.approx(30, rel=1e-5)


def test_the_loss_mask_comes_from_lengths_not_from_the_pad_id():
    tokenizer = word_tokenizer()
    tokenizer.pad_token = "cat"
    task = documents(["the cat cat", "cat cat cat cat cat"], length=8, tokenizer=tokenizer)
    batch = task.batch(task.eval, [(0, None), (1, None)])
    cat = tokenizer.convert_tokens_to_ids("cat")
    assert batch.count == 4 + 6
    assert (batch.targets == cat).sum() == 2 + 5
    assert (batch.targets[0] != -100).tolist() == [True] * 4 + [False] * 3
    assert batch.targets[1].tolist() == [*batch.inputs["input_ids"][1, 1:].tolist(), -100]  # of each token what follows it
    assert batch.inputs["attention_mask"].sum(1).tolist() == [5, 7]


def test_nothing_is_added_to_the_tokenizers_ids():
    tokenizer = word_tokenizer()
    part = documents(["the cat", "a dog"], tokenizer=tokenizer).eval
    assert part.tokens.tolist() == tokenizer("the cat")["input_ids"] + tokenizer("a dog")["input_ids"]


def test_documents_without_a_target_are_skipped(tmp_path):
    from tokenizers import processors

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    task = documents(["the cat", "dog", "", None, "a bird"], tokenizer=tokenizer)
    assert [(row["row"], row["reason"].split(":")[0]) for row in task.eval.rows.skipped] == [
        (1, "fewer than two tokens"),
        (2, "no text"),
        (3, "no text"),
    ]
    assert len(task.eval.rows) == 2


def test_more_length_than_positions_is_refused():
    config = SimpleNamespace(max_position_embeddings=16)
    config.get_text_config = lambda: config
    tokenizer, model = SimpleNamespace(model_max_length=10**30), torch.nn.Linear(1, 1)
    assert window_length(tokenizer, config, None, 1024, model) == 16
    assert window_length(tokenizer, config, 8, 1024, model) == 8
    with pytest.raises(DataError, match="only 16 positions"):
        window_length(tokenizer, config, 17, 1024, model)


def test_a_text_file_and_a_table_of_its_paragraphs_are_the_same_data(tmp_path):
    text_file(tmp_path / "t.txt", paragraphs=10)
    rows = list(paragraphs(tmp_path / "t.txt"))
    datasets.Dataset.from_dict({"text": rows}).to_json(tmp_path / "t.jsonl")
    found = [
        prepare_documents(recipe(), read(tmp_path / name, tmp_path / "c"), None, word_tokenizer(), 8).train.rows.fingerprint
        for name in ("t.txt", "t.jsonl")
    ]
    assert found[0] == found[1]


def test_long_texts_are_cut_to_the_models_length():
    data = table(text=[" ".join(WORDS)] * 4, label=["neg", "pos"] * 2)
    task = texts({"train": data, "test": data}, holdout=0, keep="last")
    assert task.batch(task.eval, [(0, None)]).inputs["input_ids"].shape == (1, 16)


def test_the_fingerprint_changes_with_content_label_and_order():
    base = rows_of(["a", "b"], ["x", "y"])
    others = [rows_of(["a", "c"], ["x", "y"]), rows_of(["a", "b"], ["x", "x"]), rows_of(["b", "a"], ["x", "y"])]
    assert base.fingerprint == rows_of(["a", "b"], ["x", "y"]).fingerprint
    assert len({rows.fingerprint for rows in (base, *others)}) == 4


def test_texts_are_looked_through_a_block_at_a_time(tmp_path):
    """However long the rows are, the table stays on the disk."""
    rows, text = 6 * ROWS_AT_ONCE, "flim " * 400
    lines = (f"{text}{number},{('neg', 'pos')[number % 2]}" for number in range(rows))
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *lines]))
    tables = read(tmp_path / "train.csv", tmp_path / "cache")
    tracemalloc.start()
    try:
        task = texts(tables)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert task.train.units + task.holdout.units + task.eval.units == rows
    assert most < rows * len(text) / 2
