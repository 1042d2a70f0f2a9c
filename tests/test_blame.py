"""What one row makes a model raise is said of that row: skipped before the first step where it can be told, else named."""

import csv
import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import small
import torch
from builders import WORDS, bert_checkpoint, save_transformers, seeded, text_csv, word_tokenizer
from conftest import SHORT
from small import PAIRED, TOKENS

from dsd_refine.tasks.base import Batch
from dsd_refine.training.blame import computed, is_of_the_machine

T5 = {"vocab_size": TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2, "pad_token_id": 0,
      "eos_token_id": 3, "decoder_start_token_id": 0}  # fmt: skip
READING_AT_THE_END = {
    "Bart": PAIRED,
    "MBart": PAIRED,
    "PLBart": PAIRED,
    "T5": T5,
}


def classifier(folder, family):
    """An encoder-decoder classifier: it reads its answer at the last [SEP] (3), and takes batches of equally many."""
    labels = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    model = small.family(f"{family}ForSequenceClassification", READING_AT_THE_END[family] | labels)
    return save_transformers(model, folder, word_tokenizer())


def texts(path, changed, rows=24):
    """`text_csv` with the text of some rows changed."""
    with text_csv(path, rows).open() as file:
        found = list(csv.DictReader(file))
    for number, text in changed.items():
        found[number]["text"] = text
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(found)
    return path


@pytest.mark.parametrize("family", READING_AT_THE_END)
def test_a_text_with_one_end_more_is_skipped_and_named(command, tmp_path, family):
    data = texts(tmp_path / "t.csv", {5: "the cat [SEP] sees", 6: "a dog [SEP] [SEP] eats"})
    found = command(classifier(tmp_path / "m", family), "--data", data, "-o", tmp_path / "out", *SHORT)
    assert found.code == 0, found.err
    report = json.loads((tmp_path / "out/dsd/report.json").read_text())
    skipped = {row["row"]: row["reason"] for row in report["data"]["train"]["skipped"]}
    assert skipped == {
        5: "holds '[SEP]' 2 times, other rows 1: the model reads its answer there; take it out of the text",
        6: "holds '[SEP]' 3 times, other rows 1: the model reads its answer there; take it out of the text",
    }


def test_pairs_have_more_ends_each_and_are_all_used(command, tmp_path):
    rows = "".join(f"a cat {word},the dog,{'neg' if i % 2 else 'pos'}\n" for i, word in enumerate(WORDS))
    (tmp_path / "t.csv").write_text("text,other,label\n" + rows)
    options = ("--data", tmp_path / "t.csv", "--text-column", "text,other", "-o", tmp_path / "out", *SHORT)
    found = command(classifier(tmp_path / "m", "Bart"), *options)
    assert found.code == 0, found.err
    data = json.loads((tmp_path / "out/dsd/report.json").read_text())["data"]
    assert sum(data[part]["rows"] for part in ("train", "holdout", "eval")) == len(WORDS)


def test_a_model_that_reads_elsewhere_keeps_such_rows(command, made, tmp_path):
    data = texts(tmp_path / "t.csv", {5: "the cat [SEP] sees"})
    found = command(made / "bert", "--data", data, "-o", tmp_path / "out", *SHORT)
    assert found.code == 0, found.err
    assert json.loads((tmp_path / "out/dsd/report.json").read_text())["data"]["train"]["skipped"] == []


# ---------------------------------------------------------------- what nobody could know before


RARE = TOKENS - 1  # the id of the last word


def failing_on(monkeypatch, fails, once_trained=False):
    """Let BERT's classifier raise where `fails(input_ids)`: an error of its own kind, over more than one line."""
    from transformers import BertForSequenceClassification

    forward, first = BertForSequenceClassification.forward, []

    def brittle(self, input_ids=None, **inputs):
        first.append(self.classifier.weight.detach().clone()) if not first else None
        if fails(input_ids) and not (once_trained and torch.equal(first[0], self.classifier.weight)):
            raise IndexError("one thing\nis out of another")
        return forward(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(BertForSequenceClassification, "forward", brittle)


def rare(ids):
    return bool((ids == RARE).any())


def split_texts(folder, part, number):
    """`train.csv` and `test.csv` without the rare word but in one row of one of them."""
    for name in ("train", "test"):
        with text_csv(folder / f"{name}.csv").open() as file:
            plain = {i: row["text"].replace(WORDS[-1], WORDS[0]) for i, row in enumerate(csv.DictReader(file))}
        plain |= {number: f"the {WORDS[-1]}"} if name == part else {}
        texts(folder / f"{name}.csv", plain)
    return ("--data", folder / "train.csv", "--eval-data", folder / "test.csv")


@pytest.mark.parametrize(
    ("part", "number", "code", "says"),
    [
        ("train", 11, 2, "the model fails on the training row 11: one thing is out of another"),
        ("train", 0, 2, "the model fails on the training row 0: one thing is out of another"),
        ("test", 7, 2, "the model fails on the evaluation row 7: one thing is out of another"),
        ("test", 0, 2, "the model fails on the evaluation row 0: one thing is out of another"),
    ],
)
def test_the_row_is_named_that_the_model_fails_on(command, monkeypatch, made, tmp_path, part, number, code, says):
    failing_on(monkeypatch, rare)
    options = split_texts(tmp_path, part, number)
    found = command(made / "bert", *options, "-o", tmp_path / "out", *SHORT, "--batch-size", "24")
    assert found.code == code, found.err
    assert "Traceback" not in found.err
    message = found.err.split("Error: ", 1)[1].strip()
    assert message.startswith(says)
    assert len(message.splitlines()) == 1
    assert "Take it out of the data" in message


def test_a_row_that_fails_after_the_first_step_is_named_too(command, monkeypatch, made, tmp_path):
    failing_on(monkeypatch, rare, once_trained=True)
    options = split_texts(tmp_path, "train", 11)
    found = command(made / "bert", *options, "-o", tmp_path / "out", *SHORT, "--batch-size", "24")
    assert found.code == 5, found.err
    assert "the model fails on the training row 11: one thing is out of another" in found.err


def test_rows_that_fail_only_together_are_all_named(command, monkeypatch, made, tmp_path):
    failing_on(monkeypatch, lambda ids: len(ids) > 8)
    options = split_texts(tmp_path, "train", 3)
    found = command(made / "bert", *options, "-o", tmp_path / "out", *SHORT, "--batch-size", "9")
    assert found.code == 2, found.err
    said = r"fails on a batch, though on none of its rows alone, the evaluation rows (\d+, ){5}…: "
    assert re.search(said, found.err)  # the longest nine of them


def test_a_model_that_fails_on_every_row_is_refused_as_a_whole(refused, monkeypatch, made, tmp_path):
    failing_on(monkeypatch, lambda ids: True)
    message = refused(made / "bert", *split_texts(tmp_path, "train", 3), "-o", tmp_path / "out", *SHORT)
    assert message.startswith("the model cannot compute on these data: one thing is out of another")


def test_no_row_is_blamed_for_a_wrapper_around_the_model():
    """What torch.compile or a process group cannot do is no fault of the data, and stays what it is."""
    loop = SimpleNamespace(
        shards=None,
        model=torch.nn.Linear(1, 1),
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        autocast=nullcontext,
        task=SimpleNamespace(batch=lambda part, items: Batch({"x": torch.ones(len(items), 1)}, torch.zeros(len(items)), 1)),
        begun=True,
    )
    batch = Batch({"x": torch.ones(2, 1)}, torch.zeros(2), 2, items=((0, None), (1, None)))

    def wrapped(x):
        raise NotImplementedError("no such kernel")

    with pytest.raises(NotImplementedError):
        computed(loop, None, wrapped, batch, lambda forward, given: forward(given.inputs["x"]))
    assert computed(loop, None, loop.model, batch, lambda forward, given: forward(given.inputs["x"])).shape == (2, 1)


def test_no_row_is_blamed_for_the_machine(command, monkeypatch, made, tmp_path):
    from transformers import BertForSequenceClassification

    def full(self, **inputs):
        if len(inputs["input_ids"]) > 8:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, **inputs)

    forward = BertForSequenceClassification.forward
    monkeypatch.setattr(BertForSequenceClassification, "forward", full)
    found = command(made / "bert", *split_texts(tmp_path, "train", 3), "-o", tmp_path / "out", *SHORT, "--batch-size", "9")
    assert found.code == 5
    assert "out of memory; try a smaller --batch-size" in found.err


def test_a_batch_knows_what_it_was_made_of_also_out_of_a_worker(command, monkeypatch, made, tmp_path):
    failing_on(monkeypatch, rare)
    options = split_texts(tmp_path, "test", 7)
    found = command(made / "bert", *options, "-o", tmp_path / "out", *SHORT, "--workers", "1")
    assert found.code == 2, found.err
    assert "the evaluation row 7: " in found.err


def test_a_text_longer_than_the_positions_is_cut(command, tmp_path):
    """BERT of 16 positions: `--max-length` and the tokenizer's own limit of 32 allow no more."""
    with seeded(0):
        folder = bert_checkpoint(tmp_path / "m", max_position_embeddings=16)
    data = texts(tmp_path / "t.csv", {3: " ".join(WORDS), 20: " ".join(WORDS)})
    found = command(folder, "--data", data, "-o", tmp_path / "out", *SHORT)
    assert found.code == 0, found.err


@pytest.mark.parametrize(
    "text",
    [
        "MPS backend out of memory (MPS allocated: 1 GB). Tried to allocate 2 GB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
        "NCCL error in: ProcessGroupNCCL.cpp, remote process exited",
    ],
)
def test_no_row_is_blamed_for_memory_that_is_full_or_a_process_that_is_gone(text):
    assert is_of_the_machine(RuntimeError(text))
