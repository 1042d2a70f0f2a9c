"""Tokenizers: what one cannot read is a row to be skipped and named; what one breaks on is refused."""

import csv
import json
import os
import sys

import pytest
from builders import LETTERS, caption_checkpoint, caption_folder, copy_folder, ctc_checkpoint, masked_checkpoint, speech_folder
from conftest import SHORT

from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.tasks import tokens
from dsd_refine.tasks.tokens import ids_or_reasons, load_tokenizer, tokenized

UNREAD = "unreadable text (the tokenizer: "


def close_vocabulary(folder):
    """Let the tokenizer have no token for words that it does not know."""
    file = folder / "tokenizer.json"
    config = json.loads(file.read_text())
    config["model"]["unk_token"] = "none such"
    file.write_text(json.dumps(config))
    return folder


def skipped(folder, part):
    report = json.loads((folder / "dsd/report.json").read_text())
    return {item["row"]: item["reason"] for item in report["data"][part]["skipped"]}, report


@pytest.fixture
def reader(made, tmp_path):
    return load_tokenizer(close_vocabulary(copy_folder(made / "bert", tmp_path / "reader")))


def test_rows_are_told_apart_wherever_they_stand(monkeypatch, reader):
    monkeypatch.setattr(tokens, "BLOCK", 3)
    rows = [(word,) for word in ("cat", "zebra", "dog", "the a", "bird", "fish", "zebra cat", "\ud800", "old")]
    found = ids_or_reasons(reader, rows, truncation=True, max_length=8)
    assert [reason is None for _, reason in found] == [True, False, True, True, True, True, False, False, True]
    assert all(reason.startswith(UNREAD) and ids is None for ids, reason in found if reason)
    assert all(ids == reader(*row)["input_ids"] for row, (ids, reason) in zip(rows, found, strict=True) if not reason)
    assert [reason is None for _, reason in ids_or_reasons(reader, [("cat", "zebra"), ("cat", "dog")])] == [False, True]


def test_a_text_that_is_refused_is_the_data_s_fault_and_a_panic_the_checkpoint_s(reader):
    with pytest.raises(DataError, match=r"unreadable text"):
        tokenized(reader, "zebra")

    class PanicException(BaseException):
        pass

    class Panics:
        name_or_path = "its/name"

        def __init__(self, error):
            self.error = error

        def __call__(self, *texts):
            raise self.error

    with pytest.raises(CheckpointError, match=r"its/name: its tokenizer fails on a text: out of range"):
        tokenized(Panics(PanicException("out of range")), "cat")
    with pytest.raises(KeyboardInterrupt):
        tokenized(Panics(KeyboardInterrupt()), "cat")


@pytest.mark.parametrize("streams", ["none", "no number"])
def test_a_tokenizer_opens_where_there_is_no_standard_error(monkeypatch, made, streams):
    """As under pythonw, or in a library's caller that is a daemon."""
    kept = os.dup(2)
    if streams == "none":
        monkeypatch.setattr(sys, "stderr", None)
    else:
        os.close(2)
    try:
        assert load_tokenizer(made / "bert")("cat")["input_ids"]
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_classified_texts_that_cannot_be_read_are_skipped_and_named(command, made, tmp_path):
    model = close_vocabulary(copy_folder(made / "bert", tmp_path / "model"))
    with (made / "texts.csv").open() as file:
        rows = list(csv.DictReader(file))
    rows[3]["text"] = "the zebra"
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = command(model, "--data", tmp_path / "texts.jsonl", "-o", tmp_path / "out", *SHORT)
    assert found.code == 0, found.err
    reasons, report = skipped(tmp_path / "out", "train")
    assert list(reasons) == [3]
    assert reasons[3].startswith(UNREAD)
    assert sum(report["data"][part]["rows"] for part in ("train", "holdout", "eval")) == len(rows) - 1
    assert any("1 training rows skipped, the first: 3 (unreadable text" in line for line in report["warnings"])


@pytest.mark.parametrize("task", ["causal-lm", "masked-lm"])
def test_documents_that_cannot_be_read_are_skipped_and_named(command, made, tmp_path, task):
    model = copy_folder(made / "gpt2", tmp_path / "model") if task == "causal-lm" else masked_checkpoint(tmp_path / "model")
    data = tmp_path / "documents.txt"
    data.write_text((made / "documents.txt").read_text() + "\nthe zebra eats\n")
    found = command(close_vocabulary(model), "--data", data, "-o", tmp_path / "out", *SHORT, "--batch-size", "2")
    assert found.code == 0, found.err
    reasons, _ = skipped(tmp_path / "out", "train")
    assert list(reasons) == [12]
    assert reasons[12].startswith(UNREAD)


def test_pictures_whose_caption_cannot_be_read_are_skipped_and_named(command, tmp_path):
    model, data = close_vocabulary(caption_checkpoint(tmp_path / "model")), caption_folder(tmp_path / "data")
    file = data / "train/metadata.jsonl"
    file.write_text(file.read_text().replace("cat", "zebra", 1))
    found = command(model, "--data", data, "-o", tmp_path / "out", *SHORT, "--batch-size", "4")
    assert found.code == 0, found.err
    reasons, report = skipped(tmp_path / "out", "train")
    assert [row.rsplit("/", 1)[-1] for row in reasons] == ["000.png"]
    assert next(iter(reasons.values())).startswith(UNREAD)
    assert report["data"]["train"]["rows"] + report["data"]["holdout"]["rows"] == 11


def test_clips_whose_text_cannot_be_read_are_skipped_and_named(command, monkeypatch, tmp_path):
    from dsd_refine.tasks import speech

    def reading(tokenizer, text, **options):
        if len(text) > 1 and LETTERS[0] in text:
            raise DataError(f"{UNREAD}no)")
        return tokenized(tokenizer, text, **options)

    monkeypatch.setattr(speech, "tokenized", reading)
    model, data = ctc_checkpoint(tmp_path / "model"), speech_folder(tmp_path / "data", rows=32)
    with (data / "train/metadata.csv").open() as file:
        unread = {row["file_name"] for row in csv.DictReader(file) if LETTERS[0] in row["text"] and len(row["text"]) > 1}
    found = command(model, "--data", data, "-o", tmp_path / "out", *SHORT, "--batch-size", "4")
    assert found.code == 0, found.err
    reasons, _ = skipped(tmp_path / "out", "train")
    assert unread
    assert {row.rsplit("/", 1)[-1] for row, reason in reasons.items() if reason.startswith(UNREAD)} == unread


def test_texts_of_which_none_can_be_read_are_refused(refused, made, tmp_path):
    model = close_vocabulary(copy_folder(made / "bert", tmp_path / "model"))
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(f"zebra {i},{'neg' if i % 2 else 'pos'}\n" for i in range(9)))
    message = refused(model, "--data", tmp_path / "texts.csv", "-o", tmp_path / "out")
    assert "no row can be used: 9 x unreadable text (the tokenizer: " in message
