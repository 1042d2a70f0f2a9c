"""Rows gained and lost on the page: which are shown, what of them, and how little of it leaves the run's machine."""

import base64
import io
import json
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reports
from conftest import SHORT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Rows
from dsd_refine.report.examples import EXCERPT, MOST, SIDE, Content, contents_of, examples, excerpt, thumbnail
from dsd_refine.report.page import page

PICTURE = re.compile(r'src="data:image/jpeg;base64,([^"]+)"')


def picked(predictions, **options):
    return examples(predictions, **({"higher_is_better": True, "decided": True} | options))


def drawn(rows):
    return page(reports.report(), reports.log(), {}, reports.recipe(), None, rows)


def png(width, height, mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


def opened(address):
    return Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/jpeg;base64,"))))


# ---------------------------------------------------------------- which rows


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=80), st.integers(0, 30))
@settings(deadline=None, max_examples=60)
def test_rows_shown_are_rows_that_changed(rights, shown):
    """No row twice, in the data's order, no more than asked for, and all of them where they are few."""
    before, after = ([float(pair[n]) for pair in rights] for n in (0, 1))
    columns = {"row": list(range(len(rights))), "target": pa.array(["a"] * len(rights), pa.string())}
    for arm, scores in (("baseline", before), ("refined", after)):
        predictions = pa.array(["a" if score else "b" for score in scores], pa.string())
        columns |= {f"score_{arm}": pa.array(scores, pa.float64()), f"count_{arm}": pa.array([1] * len(scores), pa.int64())}
        columns[f"prediction_{arm}"] = predictions
    found = picked(pa.table(columns), shown=shown)
    for listed, count, pair in ((found.gained, found.all_gained, (False, True)), (found.lost, found.all_lost, (True, False))):
        rows = [int(one.row) for one in listed]
        assert rows == sorted(set(rows))
        assert all(rights[row] == pair for row in rows)
        assert count == rights.count(pair)
        assert len(rows) == min(count, shown or MOST)


def test_of_many_rows_those_shown_come_from_all_over_the_data():
    rows = [int(one.row.split("/")[1].split(".")[0]) for one in picked(reports.predictions(gained=500, lost=0)).gained]
    assert rows == list(range(0, 500, 50))


def test_of_what_is_not_right_or_wrong_the_largest_changes_are_shown():
    """Word errors: less is better, and a row's errors count by its words."""
    words = pa.table(
        {
            "row": ["a", "b", "c", "d"], "target": ["x"] * 4,
            "prediction_baseline": ["p", "q", "r", "s"], "prediction_refined": ["P", "Q", "R", "S"],
            "score_baseline": [4.0, 1.0, 1.0, 2.0], "score_refined": [2.0, 0.0, 3.0, 2.0],
            "count_baseline": [10, 1, 4, 4], "count_refined": [10, 1, 4, 4],
        }
    )  # fmt: skip
    found = picked(words, higher_is_better=False, decided=False)
    assert [(one.row, one.before, one.after) for one in found.gained] == [("b", "q", "Q"), ("a", "p", "P")]
    assert [one.row for one in found.lost] == ["c"]
    assert "Rows that changed most" in drawn(found)


def test_a_row_without_words_shows_its_own_value():
    losses = reports.predictions(gained=1, lost=1, rows=4)
    for arm in ("baseline", "refined"):
        at = losses.column_names.index(f"prediction_{arm}")
        losses = losses.set_column(at, f"prediction_{arm}", pa.nulls(4, pa.string()))
    found = picked(losses, higher_is_better=False, decided=False)
    assert [(one.before, one.after) for one in found.gained] == [("1.0000", "0.0000")]


# ---------------------------------------------------------------- what of them


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (160, 160), (161, 40), (4000, 30), (900, 1200)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_pictures_are_small_jpegs(size, mode):
    found = opened(thumbnail(png(*size, mode)))
    assert found.format == "JPEG"
    assert max(found.size) == min(SIDE, max(size))


@pytest.mark.parametrize("raw", [b"", b"no picture", png(50, 50)[:60], b"<svg onload=alert(1)/>"])
def test_what_is_no_picture_is_left_out(raw):
    assert thumbnail(raw) is None


def test_a_picture_that_is_gone_by_now_is_left_out(tmp_path):
    (tmp_path / "a.png").write_bytes(png(20, 10))
    table = Table(datasets.Dataset.from_dict({"file": ["a.png", "gone.png"]}), folder=tmp_path)
    content = contents_of(Rows(table, np.array([0, 1]), [b"", b""], ["", ""]), {"image": ("file",), "label": ("x",)})
    assert opened(content(0).picture).size == (20, 10)
    assert content(1) is None


@given(st.text(max_size=3 * EXCERPT))
def test_texts_are_cut_and_stand_on_one_line(text):
    found = excerpt(text)
    assert len(found) <= EXCERPT
    assert "\n" not in found
    whole = " ".join(text.split())
    assert found == whole or (found.endswith("…") and whole.startswith(found[:-1]))


def test_hostile_texts_stay_texts():
    rows = picked(reports.predictions(text=reports.HOSTILE), shown=3, content=lambda row: Content(text=reports.HOSTILE))
    text = drawn(rows)
    assert "<script" not in text
    assert "onload=alert(2)>" not in text
    assert text.count("&lt;script&gt;") >= 3 * 4


# ---------------------------------------------------------------- of a real run


def ran(command, made, out, model, data, *more):
    done = command(made / model, "--data", made / data, "-o", out, *SHORT, "--control", "none", "--gate", "none", *more)
    assert done.code == 0, done.err
    return (out / "dsd/report.html").read_text()


def changed(out):
    """How many rows are gained and lost, by the predictions."""
    rows = pq.read_table(out / "dsd/predictions.parquet")
    net = np.asarray(rows["score_refined"]) - np.asarray(rows["score_baseline"])
    return int((net > 0).sum()), int((net < 0).sum())


STRONG = ("--lr", "0.5", "--warmup-steps", "0")  # so that predictions change


@pytest.mark.parametrize("shown", [0, 1, 100])
def test_pictures_are_shown_where_they_are_asked_for(command, made, tmp_path, shown):
    more = ("--report-images", shown) if shown else ()
    text = ran(command, made, tmp_path / "out", "timm", "pictures", *STRONG, *more)
    gained, lost = changed(tmp_path / "out")
    assert gained + lost
    pictures = PICTURE.findall(text)
    assert len(pictures) == min(shown, gained) + min(shown, lost)
    assert all(max(opened(one).size) <= SIDE for one in pictures)
    assert text.count("<img") == len(pictures)
    assert text.count("<small>row <code>") == sum(min(shown or MOST, count) for count in (gained, lost))


def test_texts_are_shown_where_they_are_asked_for(command, made, tmp_path):
    """Content on the page changes nothing else."""
    plain = ran(command, made, tmp_path / "plain", "bert", "texts.csv", *STRONG)
    told = ran(command, made, tmp_path / "told", "bert", "texts.csv", *STRONG, "--report-images", 2)
    gained, lost = changed(tmp_path / "told")
    assert gained + lost
    assert plain.count("<q>") == 0
    assert told.count("<q>") == min(2, gained) + min(2, lost)
    reports_ = [json.loads((tmp_path / name / "dsd/report.json").read_text()) for name in ("plain", "told")]
    assert reports_[0]["comparison"] == reports_[1]["comparison"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "told")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("wrong", ["-1", "101", "many"])
def test_a_number_of_rows_that_is_none_is_refused(command, made, tmp_path, wrong):
    done = command(made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", "--report-images", wrong)
    assert done.code == 2
    assert "--report-images" in done.err
