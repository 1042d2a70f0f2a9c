"""Masked language modelling: what is hidden, from whom it depends, and the sums."""

import hashlib
import json

import builders
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import SPECIAL, WORDS, word_tokenizer
from conftest import SHORT
from datasets import Dataset
from runs import stop_after

from dsd_refine.data.reading import Table
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.recipe import validate
from dsd_refine.tasks.inputs.texts import window_length
from dsd_refine.tasks.masked_lm import SALT, Masking, prepare_masked

MASK, WORD = SPECIAL.index("[MASK]"), len(SPECIAL)


def prepared(contents, length=8, tokenizer=None):
    recipe = validate(
        {"phases": [{"kind": "sparse", "steps": 1, "lr": 0.1, "sparsity": 0.3}], "holdout": 0.0, "keep": "last"}, "test"
    )
    tables = {name: Table(Dataset.from_dict({"text": contents})) for name in ("train", "test")}
    return prepare_masked(recipe, tables, None, tokenizer or word_tokenizer(), length)


def uniform(input_ids, attention_mask):
    return torch.zeros(*input_ids.shape, 30)


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return builders.masked_checkpoint(tmp_path_factory.mktemp("masked") / "m")


@pytest.fixture(scope="module")
def ran(masked, made, tmp_path_factory):
    """OUT of a finished run."""
    from dsd_refine.cli.app import main

    out = tmp_path_factory.mktemp("ran") / "out"
    args = [masked, "--data", made / "documents.txt", "-o", out, *SHORT, "--quiet", "--dense-lr", "0.01", "--optimizer", "sgd"]
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    assert ended.value.code == 0
    return out


# ---------------------------------------------------------------- what is hidden


def test_of_the_words_fifteen_in_a_hundred_are_asked_for_and_no_special_token():
    masking = Masking.of(word_tokenizer())
    ids = np.array([2, *np.random.default_rng(0).integers(WORD, WORD + len(WORDS), 1000), 3, 1, 0])
    seen, targets = masking.hide(ids, seed=1)
    asked = targets != -100
    assert asked.sum() == 150
    assert not asked[[0, -3, -2, -1]].any()
    assert (targets[asked] == ids[asked]).all()
    assert (seen[~asked] == ids[~asked]).all()


def test_of_the_hidden_ones_eight_in_ten_are_the_mask_token_one_a_chance_word_one_itself():
    masking = Masking.of(word_tokenizer())
    ids = np.full(40_000, WORD)
    seen, targets = masking.hide(ids, seed=1)
    found = seen[targets != -100]
    assert len(found) == 6000
    shares = (found == MASK).mean(), ((found != MASK) & (found != WORD)).mean(), (found == WORD).mean()
    chance = 0.1 * (1 - 1 / len(WORDS))  # a chance word may be the word itself
    assert shares == pytest.approx((0.8, chance, 0.2 - chance), abs=0.015)
    assert set(found.tolist()) <= {MASK, *range(WORD, WORD + len(WORDS))}


@pytest.mark.parametrize(("words", "asked"), [(0, 0), (1, 1), (3, 1), (10, 2), (20, 3)])
def test_at_least_one_word_is_asked_for_where_there_is_any(words, asked):
    ids = np.array([2, *[WORD] * words, 3])
    assert (Masking.of(word_tokenizer()).hide(ids, seed=5)[1] != -100).sum() == asked


def test_evaluation_asks_for_the_same_whatever_stands_around_the_row():
    """Masks hang on content and window: not on the row's place, the batch or the order."""
    long = " ".join(WORDS)
    one, two = prepared([long, "the cat sees"]), prepared(["a bird eats now", long])
    first = one.batch(one.eval, [(0, None), (1, None), (2, None)])
    other = two.batch(two.eval, [(3, None), (2, None), (1, None)])
    assert torch.equal(first.inputs["input_ids"], other.inputs["input_ids"].flip(0))
    assert torch.equal(first.targets, other.targets.flip(0))
    assert not torch.equal(first.targets[0] != -100, first.targets[1] != -100)


def test_training_draws_by_the_item_s_seed():
    task = prepared([" ".join(WORDS)])
    one, again, other = (task.batch(task.train, [(0, seed)]).targets for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_rows_without_a_word_are_skipped_and_windows_without_one_left_out():
    task = prepared(["the cat", "[SEP] [PAD]", "", "zebra", " ".join(WORDS[:7])])
    reasons = [(row["row"], row["reason"].split(":")[0]) for row in task.eval.rows.skipped]
    assert reasons == [(1, "no token that could be hidden"), (2, "no text"), (3, "no token that could be hidden")]
    spans = list(zip(task.eval.row.tolist(), (task.eval.stop - task.eval.start).tolist(), strict=True))
    assert spans == [(0, 4), (1, 8)]  # the second has nine tokens: what is left of it is [SEP]


def test_sums_are_over_the_hidden_tokens_and_padding_counts_for_nothing():
    task = prepared([" ".join(WORDS[:14]), "a bird"])
    batch = task.batch(task.eval, [(unit, None) for unit in range(task.eval.units)])
    counts = [score.count for score in task.score(uniform, batch)]
    assert counts == [1, 1, 1]
    assert batch.count == 3
    assert float(task.loss(uniform, batch)) == pytest.approx(3 * np.log(30), rel=1e-6)
    assert task.logits(uniform, batch).shape == (3, 30)
    alone = task.batch(task.eval, [(2, None)])
    width = alone.targets.shape[1]
    assert torch.equal(batch.targets[2, :width], alone.targets[0])
    assert (batch.inputs["attention_mask"].sum(1) == torch.tensor([8, 8, 4])).all()


def test_a_tokenizer_without_mask_token_is_refused():
    tokenizer = word_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(CheckpointError, match="no mask token"):
        prepared(["the cat"], tokenizer=tokenizer)


def test_positions_that_begin_after_the_padding_are_not_counted(tmp_path):
    """RoBERTa of 20 positions, padding id 1, holds 18 tokens."""
    from transformers import AutoModelForMaskedLM

    folder = builders.masked_checkpoint(tmp_path, kind="Roberta", max_position_embeddings=20, pad_token_id=1)
    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert window_length(word_tokenizer(), model.config, None, 512, model) == 18
    with pytest.raises(DataError, match="only 18 positions"):
        window_length(word_tokenizer(), model.config, 20, 512, model)


# ---------------------------------------------------------------- whole runs


def by_hand(ids, text, number):
    """The masks of evaluation, from their description: (seen, targets) of one window."""
    content = hashlib.sha256(text.encode()).digest()
    seed = int.from_bytes(hashlib.sha256(SALT + content + number.to_bytes(8, "little")).digest()[:8], "little")
    draw = np.random.default_rng(seed)
    places = [i for i, token in enumerate(ids) if token >= WORD]
    order = draw.random(len(places))
    count = max(1, round(0.15 * len(places)))
    chosen = [places[i] for i in np.argsort(order, kind="stable")[:count]]
    fate, chance = draw.random(count), draw.random(count)
    seen, targets = list(ids), [-100] * len(ids)
    for place, f, c in zip(chosen, fate, chance, strict=True):
        targets[place] = ids[place]
        seen[place] = MASK if f < 0.8 else WORD + int(c * len(WORDS)) if f < 0.9 else ids[place]
    return torch.tensor([seen]), torch.tensor([targets])


def test_the_metric_is_the_library_s_loss_over_the_hidden_tokens(ran, masked, made):
    """Baseline and refined, by transformers' own labels, one window at a time, from what was written."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(masked)
    table = pq.read_table(ran / "dsd/predictions.parquet").to_pydict()
    documents = [text.strip() for text in (made / "documents.txt").read_text().split("\n\n")]
    report = json.loads((ran / "dsd/report.json").read_text())
    for arm, folder in (("baseline", masked), ("refined", ran)):
        model = AutoModelForMaskedLM.from_pretrained(folder).eval()
        for row, score, count in zip(table["row"], table[f"score_{arm}"], table[f"count_{arm}"], strict=True):
            ids = tokenizer(documents[row])["input_ids"]
            pairs = [by_hand(ids[i : i + 32], documents[row], i // 32) for i in range(0, len(ids), 32)]
            with torch.no_grad():
                sums = [float(model(seen, labels=targets).loss) * int((targets != -100).sum()) for seen, targets in pairs]
            assert count == sum(int((targets != -100).sum()) for _, targets in pairs)
            assert score == pytest.approx(sum(sums), rel=1e-5)
        loss = sum(table[f"score_{arm}"]) / sum(table[f"count_{arm}"])
        assert report["arms"][arm] == pytest.approx({"loss": loss, "perplexity": np.exp(loss)}, rel=1e-6)


def test_the_run_is_of_its_task_and_verifies(ran, masked, command):
    report = json.loads((ran / "dsd/report.json").read_text())
    assert (report["task"], report["metric"]) == ("masked-lm", {"name": "loss", "higher_is_better": False})
    layers = {layer["name"]: layer["excluded"] for layer in report["layers"]}
    assert layers["bert.embeddings.word_embeddings.weight"] == "embedding, tied to another layer"
    assert layers["cls.predictions.transform.dense.weight"] is None
    assert command("verify", masked, ran).code == 0


def test_the_same_command_gives_the_same_bytes_stopped_and_resumed_too(ran, masked, made, command, tmp_path):
    args = ("--data", made / "documents.txt", *SHORT, "--dense-lr", "0.01", "--optimizer", "sgd", "-o", tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 4)
        assert command(masked, *args, "--workers", 1).code == 4
    assert command(masked, *args, "--workers", 1, "--resume").code == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == (ran / "model.safetensors").read_bytes()
    assert (tmp_path / "out/dsd/predictions.parquet").read_bytes() == (ran / "dsd/predictions.parquet").read_bytes()


def test_a_causal_model_is_refused_for_it(refused, made, tmp_path):
    assert "masked-lm" in refused(
        made / "gpt2", "--task", "masked-lm", "--data", made / "documents.txt", "-o", tmp_path / "out"
    )
