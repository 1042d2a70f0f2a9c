"""Tokenizers: what one cannot read is a row to be skipped and named; what one breaks on is refused."""

import csv
import json
import os
import shutil
import sys

import numpy as np
import pytest
import small
from builders import (
    LETTERS,
    WORDS,
    caption_checkpoint,
    caption_folder,
    copy_folder,
    ctc_checkpoint,
    gpt2_checkpoint,
    letter_tokenizer,
    masked_checkpoint,
    speech_folder,
    text_file,
    word_tokenizer,
)
from conftest import SHORT
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import fresh, run_command
from small import TOKENS

from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.tasks.inputs import tokens
from dsd_refine.tasks.inputs.tokens import Doubled, Unknown, ids_or_reasons, load_tokenizer, tokenized
from dsd_refine.tasks.masked_lm import Masking

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
    from dsd_refine.tasks import ctc_speech as speech

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


# ---------------------------------------------------------------- tokens that the model has not


def with_more(folder, *tokens):
    """Let the folder's tokenizer have tokens that the model has no embedding for, as one with a new [PAD] has."""
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.pad_token = tokens[0]
    tokenizer.save_pretrained(folder)
    return folder


def documents(path, *more):
    path.write_text((path.parent / "plain.txt").read_text() + "".join(f"\n{text}\n" for text in more))
    return path


FAMILIES = {
    "causal-lm": lambda folder: gpt2_checkpoint(folder),
    "llama": lambda folder: small.save_family(folder, *small.CAUSAL["llama"]),
    "masked-lm": lambda folder: masked_checkpoint(folder),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_more_tokens_than_the_model_has_are_named_and_only_rows_that_hold_one_skipped(command, tmp_path, kind):
    folder = with_more(FAMILIES[kind](tmp_path / "m"), "<fill>", "<image>")
    text_file(tmp_path / "plain.txt")
    data = documents(tmp_path / "d.txt", "the cat <image> sees a dog", "a bird eats")
    found = command(folder, "--data", data, "-o", tmp_path / "out", *SHORT, "--batch-size", "4")
    assert found.code == 0, found.err
    reasons, report = skipped(tmp_path / "out", "train")
    assert reasons == {12: f"holds the token '<image>' ({TOKENS + 1}), which the model has not: it has {TOKENS}"}
    named = f"the tokenizer has 2 tokens beyond the model's {TOKENS}: '<fill>' ({TOKENS}), '<image>' ({TOKENS + 1}); "
    assert any(line.startswith(named) for line in report["warnings"])


@pytest.mark.parametrize("pad", [None, -1, 0])
@pytest.mark.parametrize("family", ["GPT2ForSequenceClassification", "LlamaForSequenceClassification"])
def test_rows_are_never_filled_with_a_token_that_the_model_has_not(command, made, tmp_path, family, pad):
    """Padded in a batch the model answers as it does row by row."""
    name = "gpt2" if family.startswith("GPT2") else "llama"
    config = small.CAUSAL[name][1] | {"pad_token_id": pad, "id2label": {0: "neg", 1: "pos"}}
    folder = with_more(small.save_family(tmp_path / "m", family, config), "<fill>")
    found = {}
    for size in (1, 8):
        out = tmp_path / f"out{size}"
        result = command(folder, "--data", made / "texts.csv", "-o", out, *SHORT[:-4], "--device", "cpu", "--batch-size", size)
        assert result.code == 0, result.err
        found[size] = json.loads((out / "dsd/report.json").read_text())["arms"]["baseline"]["loss"]
    assert found[1] == pytest.approx(found[8], rel=1e-5)


def test_a_mask_token_that_the_model_has_not_is_refused(refused, made, tmp_path):
    folder = masked_checkpoint(tmp_path / "m")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"mask_token": "<hidden>"})
    tokenizer.save_pretrained(folder)
    message = refused(folder, "--data", made / "documents.txt", "-o", tmp_path / "out")
    assert f"its tokenizer's mask token '<hidden>' is {TOKENS}, the model has only {TOKENS} tokens" in message


def test_random_replacements_are_tokens_that_the_model_has():
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["one more", "two more"])
    assert Masking.of(tokenizer, TOKENS).replacements.max() == TOKENS - 1
    assert (Masking.of(tokenizer, TOKENS).replacements == Masking.of(word_tokenizer()).replacements).all()


def test_captions_with_a_token_that_the_model_has_not_are_skipped(command, tmp_path):
    model, data = with_more(caption_checkpoint(tmp_path / "model"), "<fill>"), caption_folder(tmp_path / "data")
    file = data / "train/metadata.jsonl"
    file.write_text(file.read_text().replace("cat", "<fill>", 1))
    found = command(model, "--data", data, "-o", tmp_path / "out", *SHORT, "--batch-size", "4")
    assert found.code == 0, found.err
    reasons, _ = skipped(tmp_path / "out", "train")
    assert [reason.split(",")[0] for reason in reasons.values()] == [f"holds the token '<fill>' ({TOKENS})"]


# ---------------------------------------------------------------- special tokens twice


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["[CLS] the cat", "[CLS] a dog", "a bird"], ["2 of 3 rows begin with '[CLS]' twice"]),
        (["the cat [SEP]", "a dog", "a bird"], ["1 of 3 rows end with '[SEP]' twice"]),
        (["[CLS] the cat [SEP]"], ["1 of 1 rows begin with '[CLS]' twice", "1 of 1 rows end with '[SEP]' twice"]),
        (["the cat", "a [CLS] dog", "a [SEP] bird", "zebra zebra", "[PAD] [PAD]"], []),
    ],
)
def test_a_special_token_that_stands_twice_is_counted(texts, says):
    tokenizer = word_tokenizer()
    doubled = Doubled(tokenizer)
    for text in texts:
        doubled.see(tokenizer(text)["input_ids"])
    found = doubled.warnings()
    assert [line.split(":")[0] for line in found] == says


@given(st.lists(st.lists(st.sampled_from([2, 3, 5, 6]), max_size=6), max_size=20))
@settings(deadline=None)
def test_rows_are_counted_by_their_ids_alone(rows):
    doubled = Doubled(word_tokenizer())
    for row in rows:
        doubled.see(np.asarray(row))
    assert doubled.count["begin", 2] == sum(row[:2] == [2, 2] for row in rows)
    assert doubled.count["end", 3] == sum(row[-2:] == [3, 3] for row in rows)
    assert len([key for key, count in doubled.count.items() if count]) <= 2


@pytest.mark.parametrize("task", ["causal-lm", "text-classification"])
def test_rendered_texts_that_bring_what_the_tokenizer_adds_are_warned_of(command, made, tmp_path, task):
    if task == "causal-lm":
        model, data = made / "gpt2", tmp_path / "d.jsonl"
        rows = [{"text": f"[CLS] {word} the cat sees a dog"} for word in WORDS]
    else:
        model, data = made / "bert", tmp_path / "d.jsonl"
        rows = [{"text": f"[CLS] {word} the cat", "label": ["neg", "pos"][i % 2]} for i, word in enumerate(WORDS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = command(model, "--data", data, "-o", tmp_path / "out", *SHORT)
    assert found.code == 0, found.err
    warnings = skipped(tmp_path / "out", "train")[1]["warnings"]
    assert any(line.startswith(f"{len(WORDS)} of {len(WORDS)} rows begin with '[CLS]' twice: ") for line in warnings)


# ---------------------------------------------------------------- what the model reads little of


@pytest.mark.parametrize("block", [2, 1000])
@pytest.mark.parametrize("kind", ["rust", "python", "closed"])
def test_rows_that_are_cut_are_those_that_are_longer(monkeypatch, reader, tmp_path, kind, block):
    monkeypatch.setattr(tokens, "BLOCK", block)
    tokenizer = {"rust": word_tokenizer, "python": lambda: letter_tokenizer(tmp_path), "closed": lambda: reader}[kind]()
    rows = [(" ".join(WORDS[:n]),) for n in (1, 3, 9, 2, 4, 8, 5)]
    rows += [("zebra",)] if kind == "closed" else []
    whole = [len(ids or []) for ids, _ in ids_or_reasons(tokenizer, rows)]
    for most in range(3, 12):
        cut = set()
        found = ids_or_reasons(tokenizer, rows, cut, truncation=True, max_length=most)
        assert cut == {row for row, length in enumerate(whole) if length > most}
        assert [len(ids or []) for ids, _ in found] == [min(most, length) for length in whole]


def test_a_pair_is_cut_where_both_together_are_longer():
    cut = set()
    rows = [("the cat", "a dog"), ("the cat sees", "a dog"), ("the cat", "a dog sees a bird")]
    ids_or_reasons(word_tokenizer(), rows, cut, truncation=True, max_length=7)
    assert cut == {1, 2}


def labelled(path, texts):
    path.write_text("".join(json.dumps({"text": t, "label": ["neg", "pos"][n % 2]}) + "\n" for n, t in enumerate(texts)))
    return path


def test_texts_that_are_longer_than_the_model_reads_are_counted(command, made, tmp_path):
    texts = [" ".join(WORDS[: 3 + n % 8]) + f" {WORDS[n // 8]}" for n in range(40)]  # of 4 to 11 words, and 2 tokens around
    data = labelled(tmp_path / "d.jsonl", texts)
    found = command(made / "bert", "--data", data, "-o", tmp_path / "out", *SHORT, "--max-length", "10")
    assert found.code == 0, found.err
    line = "15 of 40 texts are longer than 10 tokens: the rest of them is not read (--max-length)"
    assert line in skipped(tmp_path / "out", "train")[1]["warnings"]
    found = command(made / "bert", "--data", data, "-o", tmp_path / "out", *SHORT, "--max-length", "13", "--overwrite")
    assert found.code == 0, found.err
    assert "is not read" not in " ".join(skipped(tmp_path / "out", "train")[1]["warnings"])


@pytest.mark.parametrize("task", ["text-classification", "causal-lm", "masked-lm"])
@pytest.mark.parametrize("strange", [3, 5])
def test_texts_of_unknown_tokens_are_counted(command, made, tmp_path, task, strange):
    """Texts of which 3 of 5 words are unknown, and others of which 2 are."""
    unknown = [f"the cat qwx{n} qwy{n} qwz{n}" for n in range(strange)]
    known = [f"the cat {WORDS[n % 20]} qwy{n} qwz{n}" for n in range(40 - strange)]
    data = labelled(tmp_path / "d.jsonl", [*unknown, *known])
    model = masked_checkpoint(tmp_path / "m") if task == "masked-lm" else made / {"causal-lm": "gpt2"}.get(task, "bert")
    found = command(model, "--data", data, "-o", tmp_path / "out", *SHORT)
    assert found.code == 0, found.err
    lines = [line for line in skipped(tmp_path / "out", "train")[1]["warnings"] if "'[UNK]'" in line]
    assert [line.split(",")[0] for line in lines] == (
        ["5 of 40 texts (12%) are for more than half '[UNK]'"] if strange == 5 else []
    )


def test_a_token_that_also_ends_texts_is_not_called_unknown():
    tokenizer = word_tokenizer()
    tokenizer.unk_token = "[SEP]"
    unknown = Unknown(tokenizer)
    unknown.see([3, 3, 3])
    assert unknown.warnings() == []


# ---------------------------------------------------------------- sentencepiece, and files that are none


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A sentencepiece model of the test's words: kind -> file."""
    import sentencepiece

    place = tmp_path_factory.mktemp("pieces")
    draw = np.random.default_rng(0)
    (place / "lines.txt").write_text("\n".join(" ".join(draw.choice(WORDS, 8)) for _ in range(400)))
    for kind in ("unigram", "bpe"):
        sentencepiece.SentencePieceTrainer.train(
            input=str(place / "lines.txt"), model_prefix=str(place / kind), vocab_size=46, model_type=kind, minloglevel=2,
            character_coverage=1.0, user_defined_symbols=["[CLS]", "[SEP]"],
        )  # fmt: skip
    return place


PIECES = {
    "DebertaV2": ("spm.model", "unigram", "MaskedLM", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "XLMRoberta": ("sentencepiece.bpe.model", "unigram", "MaskedLM", {"pad_token_id": 1}),
    "Albert": ("spiece.model", "unigram", "MaskedLM", {"embedding_size": 16}),
    "Llama": ("tokenizer.model", "bpe", "CausalLM", {"num_key_value_heads": 2}),
    "Gemma": ("tokenizer.model", "bpe", "CausalLM", {"num_key_value_heads": 2, "head_dim": 16}),
}


@pytest.mark.parametrize("family", PIECES)
def test_a_tokenizer_that_is_a_sentencepiece_model_alone_is_read(command, pieces, tmp_path, family):
    name, kind, head, config = PIECES[family]
    model = small.family(f"{family}For{head}", small.WIDE | {"vocab_size": 64} | config)
    model.save_pretrained(tmp_path / "m")
    shutil.copy(pieces / f"{kind}.model", tmp_path / "m" / name)
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": f"{family}Tokenizer"}))
    found = command(tmp_path / "m", "--data", text_file(tmp_path / "d.txt", 8), "-o", tmp_path / "out", *SHORT)
    assert found.code == 0, found.err
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.decode(tokenizer("the cat sees")["input_ids"], skip_special_tokens=True).strip() == "the cat sees"


def without_sentencepiece(*args):
    sys.modules |= {"sentencepiece": None, "google.protobuf": None}
    run_command(*args)


def test_the_packages_that_are_missing_are_named(pieces, made, tmp_path):
    folder = tmp_path / "m"
    small.family("LlamaForCausalLM", small.GROUPED).save_pretrained(folder)
    shutil.copy(pieces / "bpe.model", folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    found = fresh(without_sentencepiece, folder, "--data", made / "documents.txt", "-o", tmp_path / "out", *SHORT)
    assert found.returncode == 2, found.stderr
    assert found.stderr.splitlines()[-1] == (
        f"Error: {folder}/tokenizer.model: the tokenizer is a sentencepiece model, which needs sentencepiece and protobuf: "
        "pip install sentencepiece protobuf"
    )


def test_a_broken_sentencepiece_model_is_called_so(refused, pieces, made, tmp_path):
    folder = tmp_path / "m"
    small.family("LlamaForCausalLM", small.GROUPED).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((pieces / "bpe.model").read_bytes()[:100])
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    message = refused(folder, "--data", made / "documents.txt", "-o", tmp_path / "out")
    assert message == f"{folder}/tokenizer.model: cannot be read as a sentencepiece model; is the file whole?"


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 5\n"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("bert", "config.json"),
        ("bert", "tokenizer.json"),
        ("bert", "tokenizer_config.json"),
        ("gpt2", "generation_config.json"),
        ("gpt2", "tokenizer.model"),
        ("vit", "preprocessor_config.json"),
    ],
)
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_file_that_is_a_pointer_to_itself_is_called_so(refused, made, tmp_path, source, name, verb):
    folder = copy_folder(made / source, tmp_path / "m")
    (folder / name).write_text(POINTER)
    data = {"bert": "texts.csv", "gpt2": "documents.txt", "vit": "colours"}[source]
    message = refused(verb, folder, "--data", made / data, "-o", tmp_path / "out")
    assert message.startswith(f"{folder}: {name}: git-lfs pointers, not the files; run `git lfs pull`")
