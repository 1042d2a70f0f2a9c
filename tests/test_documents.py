"""What is a document, and how windows of it are evaluated: so that a published perplexity can be reproduced."""

import json
import math

import builders
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SHORT
from hypothesis import given
from hypothesis import strategies as st
from outputs import report_of, same
from runs import stop_after

from dsd_refine.data.joining import join_rows
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined, use_rows
from dsd_refine.data.tables import read_tables
from dsd_refine.errors import DataError
from dsd_refine.tasks.inputs.windows import cut_windows

QUIET = (*SHORT, "--batch-size", "4", "--control", "none", "--quiet")
TEXT = "\n the a  cat\nsees\n\n\na dog \neats\n"
WIKI = ["", " = A cat = ", "", " the cat sees ", " = = Its food = = ", " fish ", " = A dog = ", " the dog "]


def table_of(**columns):
    import datasets

    return Table(datasets.Dataset.from_dict(columns), origin="rows.jsonl")


def documents_of(path, how):
    reading = read_tables(str(path), path.parent / "cache", download=lambda *_: False, documents=how)
    return reading.tables["train"].rows["text"][:], reading.notes


@pytest.mark.parametrize(
    ("how", "documents", "word"),
    [
        ("paragraphs", ["the a  cat\nsees", "a dog \neats"], "paragraph"),
        ("lines", ["the a  cat", "sees", "a dog", "eats"], "line"),
        ("file", [TEXT], "file"),
    ],
)
def test_a_text_file_is_paragraphs_lines_or_one_document(tmp_path, how, documents, word):
    (tmp_path / "t.txt").write_text(TEXT)
    found, notes = documents_of(tmp_path / "t.txt", how)
    assert found == documents
    assert notes == (f"t.txt: 7 lines, {len(documents)} documents (a {word} is one)",)


def test_documents_is_refused_or_named_where_it_is_of_no_use(command, refused, made, tmp_path):
    said = refused(made / "bert", "--data", made / "texts.csv", "--documents", "lines", *QUIET)
    assert "documents: text-classification has no use for it" in said
    rows = [json.dumps({"text": f"the cat {word}"}) for word in builders.WORDS]
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    found = command(made / "gpt2", "--data", tmp_path / "d.jsonl", "--documents", "lines", "-o", tmp_path / "out", *QUIET)
    assert found.code == 0, found.err
    assert report_of(tmp_path / "out")["data"]["unused"] == ["--documents lines: not used, no .txt file is read"]


@pytest.mark.parametrize(
    ("by", "names", "documents"),
    [
        ("all", ["0-7"], ["|".join(WIKI)]),
        ("headings", ["1-5", "6-7"], ["|".join(WIKI[1:6]), "|".join(WIKI[6:])]),
        ("page", ["0-2", "3-5", "6-7"], ["|".join(WIKI[:3]), "|".join(WIKI[3:6]), "|".join(WIKI[6:])]),
    ],
)
def test_rows_are_joined_to_documents(by, names, documents):
    joined = join_rows(table_of(text=WIKI, page=[1, 1, 1, 2, 2, 2, 1, 1]), "text", by, "|")
    assert joined.rows["text"][:] == documents
    assert joined.names == names


def test_a_join_that_finds_nothing_is_refused():
    with pytest.raises(DataError, match=r"no row of rows.jsonl is a heading"):
        join_rows(table_of(text=["a", "b"]), "text", "headings")
    with pytest.raises(DataError, match="neither `all` nor `headings`, nor a column; the data has text"):
        join_rows(table_of(text=["a", "b"]), "text", "page")


def windows_of(lengths, max_length, stride):
    table = table_of(text=[str(length) for length in lengths])
    rows = use_rows(table, [Examined(bytes([n])) for n in range(len(lengths))])
    return cut_windows(
        rows, [np.arange(length, dtype=np.int32) for length in lengths], max_length, lambda ids: len(ids) > 1, stride
    )


@given(st.lists(st.integers(2, 40), min_size=1, max_size=4), st.integers(2, 12), st.integers(1, 12))
def test_with_a_stride_each_token_but_the_first_is_a_target_once_with_context(lengths, max_length, stride):
    stride = min(stride, max_length - 1)
    part = windows_of(lengths, max_length, stride)
    for row, length in enumerate(lengths):
        seen = []
        for unit in np.flatnonzero(part.row == row):
            ids = part.tokens[part.start[unit] : part.stop[unit]]
            assert 2 <= len(ids) <= max_length
            targets = ids[part.targets(unit)]
            seen += targets.tolist()
            if part.start[unit] != part.start[np.flatnonzero(part.row == row)[0]]:
                assert targets[0] - ids[0] >= max_length - stride  # tokens before the first target
        assert seen == list(range(1, length))


def test_a_stride_gives_the_perplexity_of_transformers_documentation(command, made, tmp_path):
    """https://huggingface.co/docs/transformers/perplexity, on rows joined by two line ends."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    draw = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 20)):
        rows = [json.dumps({"text": " ".join(draw.choice(builders.WORDS, draw.integers(0, 9)))}) for _ in range(count)]
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / f"d/{split}.jsonl").write_text("\n".join(rows))
    found = command(
        made / "gpt2", "--data", tmp_path / "d", "-o", tmp_path / "out", *QUIET, "--set", "join=all", "--stride", 10,
        "--holdout", 0, "--keep", "last", "--sparse-steps", 0, "--dense-steps", 0,
    )  # fmt: skip
    assert found.code == 0, found.err
    report = report_of(tmp_path / "out")
    assert "rows are joined to documents (join: all): 1 of test, 1 of train" in report["data"]["notes"]
    model, reader = (cls.from_pretrained(made / "gpt2") for cls in (AutoModelForCausalLM, AutoTokenizer))
    rows = [json.loads(line)["text"] for line in (tmp_path / "d/test.jsonl").read_text().splitlines()]
    ids = reader("\n\n".join(rows), return_tensors="pt", verbose=False).input_ids
    total, count, done = 0.0, 0, 0
    for start in range(0, ids.shape[1], 10):
        stop = min(start + 32, ids.shape[1])
        window, labels = ids[:, start:stop], ids[:, start:stop].clone()
        labels[:, : -(stop - done)] = -100
        targets = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total, count = total + float(model.eval()(window, labels=labels).loss) * targets, count + targets
        done = stop
        if stop == ids.shape[1]:
            break
    assert count == ids.shape[1] - 1 == pq.read_table(tmp_path / "out/dsd/predictions.parquet")["count_baseline"][0].as_py()
    assert math.isclose(report["arms"]["baseline"]["perplexity"], math.exp(total / count), rel_tol=1e-4)


def test_stopped_and_resumed_with_a_stride_and_joined_rows(command, made, tmp_path):
    draw = np.random.default_rng(0)
    rows = [{"text": " ".join(draw.choice(builders.WORDS, 6)), "page": row // 3} for row in range(48)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = [
        made / "gpt2",
        "--data",
        tmp_path / "d.jsonl",
        *QUIET,
        "--set",
        "join=page",
        "--stride",
        7,
        "--max-length",
        16,
        "-o",
    ]
    assert command(*args, tmp_path / "one").code == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        assert command(*args, tmp_path / "two", "--resume").code == 4
    assert command(*args, tmp_path / "two", "--resume").code == 0
    same(tmp_path / "one", tmp_path / "two")
    report = report_of(tmp_path / "one")
    assert report["data"]["unused"] == []  # `page` is used
    assert sum(report["data"][part]["rows"] for part in ("train", "holdout", "eval")) == 16
    assert command("verify", made / "gpt2", tmp_path / "one").code == 0


def test_masked_lm_joins_rows_too_and_has_no_stride(command, refused, tmp_path):
    model = builders.masked_checkpoint(tmp_path / "m")
    data = builders.text_file(tmp_path / "t.txt", paragraphs=24)
    args = (model, "--data", data, "--documents", "lines", "-o", tmp_path / "out", *QUIET)
    assert "stride: masked-lm has no use for it" in refused(*args, "--stride", 3)
    assert command(*args).code == 0


def test_a_stride_longer_than_a_window_is_refused(refused, made, tmp_path):
    said = refused(made / "gpt2", "--data", made / "documents.txt", "--stride", 32, *QUIET, "-o", tmp_path / "out")
    assert "--stride 32: windows hold 32 tokens" in said


def test_what_stands_between_joined_rows_needs_a_join(refused, made):
    said = refused(made / "gpt2", "--data", made / "documents.txt", "--set", "join_with=x", *QUIET)
    assert "give join too" in said
