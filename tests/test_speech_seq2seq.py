"""speech-seq2seq: clips as Whisper and Speech2Text hear them, transcripts with their tokens, errors as jiwer counts them."""

import json

import builders
import jiwer
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from conftest import SHORT, hashes
from outputs import near, report_of, same
from pairs import speech2text_checkpoint, whisper_checkpoint
from runs import stop_after, two_processes
from tasks import open_task

from dsd_refine.checkpoint.libraries.transformers import TransformersLibrary
from dsd_refine.errors import DataError
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.tasks.base import Scores

QUIET = (*SHORT, "--quiet", "--lr", "0.003", "--warmup-steps", "0", "--control", "none")
FAMILIES = ("whisper", "speech2text")


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    """Read-only: a model of each family, and clips of at most a second."""
    place = tmp_path_factory.mktemp("heard")
    whisper_checkpoint(place / "whisper")
    speech2text_checkpoint(place / "speech2text")
    builders.speech_folder(place / "data", rows=12)
    for wav in sorted((place / "data").rglob("*.wav")):
        samples, rate = soundfile.read(wav)
        soundfile.write(wav, samples[: rate - 50 * int(wav.stem)], rate)  # of several lengths
    return place


def opened(model, data, cache, **fields):
    """(task, model in evaluation mode) on a folder's data."""
    import transformers

    recipe = Recipe(phases=(Phase(kind="dense", steps=1, lr=0.1),), data=str(data), **fields)
    loaded = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(model).eval()
    return open_task(recipe, TransformersLibrary.open(model), loaded, cache), loaded


def labels_of(task, unit=0):
    return task.writer.tokenizer.convert_ids_to_tokens(task.train.labels[unit].tolist())


def clips(folder, rows):
    """A folder of clips from (samples, text) pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (samples, _) in enumerate(rows):
        soundfile.write(folder / f"{number}.wav", samples, 8000)
    lines = [json.dumps({"file_name": f"{number}.wav", "text": text}) for number, (_, text) in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


GOOD = [
    (builders.spoken(text, seed=i), text)
    for i, text in enumerate(["abc", "fed ab", "cab", "ff", "bad caf", "dab", "ace", "bee"])
]


# ---------------------------------------------------------------- what is heard and learned


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_transformers_own_and_no_row_hangs_on_another(heard, tmp_path, family):
    task, model = opened(heard / family, heard / "data", tmp_path / "cache")
    batch = task.batch(task.eval, [(unit, None) for unit in range(4)])
    with torch.no_grad():
        together = task.score(model, batch)
        singles = [task.batch(task.eval, [(unit, None)]) for unit in range(4)]
        alone = [task.score(model, one)[0] for one in singles]
        for score, one in zip(alone, singles, strict=True):
            read = {name: value for name, value in one.inputs.items() if not name.startswith("decoder")}
            own = float(model(**read, labels=one.targets).loss)
            assert score.loss / one.count == pytest.approx(own, rel=1e-5)
            texts = task.writer.tokenizer.batch_decode(model.generate(**read), skip_special_tokens=True)
            assert score.text == " ".join(texts[0].split())
        assert float(task.loss(model, batch)) == pytest.approx(sum(one.loss for one in alone), rel=1e-5)
    assert [one.loss for one in together] == pytest.approx([one.loss for one in alone], rel=1e-6)
    assert [one.text for one in together] == [one.text for one in alone]
    assert len({len(one.inputs.get("attention_mask", [[1]])[0]) for one in singles}) == (4 if family == "speech2text" else 1)


def test_features_are_those_of_the_checkpoints_extractor(heard, tmp_path):
    import transformers

    task, _ = opened(heard / "whisper", heard / "data", tmp_path / "cache")
    samples, rate = soundfile.read(heard / "data/test/000.wav", dtype="float32")
    own = transformers.AutoFeatureExtractor.from_pretrained(heard / "whisper")(samples, sampling_rate=rate, return_tensors="pt")
    assert torch.equal(task.batch(task.eval, [(0, None)]).inputs["input_features"], own["input_features"])


def test_languages_and_tasks_of_whisper(heard, tmp_path):
    task, _ = opened(heard / "whisper", heard / "data", tmp_path / "c")
    assert labels_of(task)[:3] == ["<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    assert labels_of(task)[-1] == "<|endoftext|>"
    assert task.writer.tokenizer.convert_ids_to_tokens(int(task.train.shifted[0][0])) == "<|startoftranscript|>"
    for name in ("german", "de", "<|de|>"):
        task, _ = opened(heard / "whisper", heard / "data", tmp_path / "c", target_language=name)
        assert labels_of(task)[0] == "<|de|>"
        assert task.report()["preprocessing"]["generation"]["language"] == "<|de|>"
    english = whisper_checkpoint(tmp_path / "english", multilingual=False)
    task, _ = opened(english, heard / "data", tmp_path / "c")
    assert labels_of(task)[0] == "<|notimestamps|>"
    with pytest.raises(DataError, match="the model is for one language only: leave it out"):
        opened(english, heard / "data", tmp_path / "c", target_language="de")
    with pytest.raises(DataError, match="knows no language 'klingon'"):
        opened(heard / "whisper", heard / "data", tmp_path / "c", target_language="klingon")
    unsaid = whisper_checkpoint(tmp_path / "unsaid", language=None)
    with pytest.raises(DataError, match="nothing says which one is spoken: give --set target_language=NAME"):
        opened(unsaid, heard / "data", tmp_path / "c")


def test_rows_that_cannot_be_used_are_skipped_and_named(heard, tmp_path):
    odd = [(builders.spoken("a" * 12), "a"), (GOOD[0][0], " "), (GOOD[0][0], "ab" * 30), (GOOD[0][0], "...")]
    data = clips(tmp_path / "d", [*GOOD, *odd])
    task, _ = opened(heard / "whisper", data, tmp_path / "c", holdout=0.0, keep="last", normalizer="basic")
    reasons = {item["row"]: item["reason"] for item in task.train.rows.skipped}
    assert reasons == {
        "8.wav": "1.2 s long: the model hears 1 s",
        "9.wav": "no text",
        "10.wav": "its text has more than 40 tokens",
        "11.wav": "its text is empty once it is normalized",
    }


def test_spec_augment_is_as_the_config_says(heard, tmp_path):
    """Off in a plain Whisper; where the config has it, the model masks in training only."""
    config = {"apply_spec_augment": True, "mask_time_prob": 0.5, "mask_time_length": 4}
    masked, plain = whisper_checkpoint(tmp_path / "m", **config), heard / "whisper"
    losses = {}
    for name, model in (("plain", plain), ("masked", masked)):
        task, loaded = opened(model, heard / "data", tmp_path / "c")
        batch = task.batch(task.train, [(0, None)])
        for training in (False, True):
            loaded.train(training)
            np.random.seed(0)
            with torch.no_grad():
                losses[name, training] = float(task.loss(loaded, batch))
    assert losses["plain", False] == losses["plain", True] == losses["masked", False] != losses["masked", True]


# ---------------------------------------------------------------- metrics


def test_errors_are_jiwers_and_whispers_normalizer_is_optional(heard, tmp_path):
    plain, _ = opened(heard / "whisper", heard / "data", tmp_path / "c")
    english, _ = opened(heard / "whisper", heard / "data", tmp_path / "c", normalizer="english", metric="cer")
    reference, text = "Mr. Brown has two cats", "mister brown has 2 cat"
    sums = plain.measure([reference], text)
    assert sums[0] / sums[1] == jiwer.wer(reference, text)
    assert sums[2] / sums[3] == jiwer.cer(reference, text)
    assert english.measure([reference], text) == (1, 5, 1, 23)  # only the last letter differs
    assert english.row_value((1, 5, 1, 23)) == (1, 23)
    assert (plain.metric, english.metric) == ("wer", "cer")
    assert english.report()["preprocessing"]["normalizer"] == "english"


def test_the_loss_can_decide_and_then_nothing_is_written(heard, tmp_path):
    task, model = opened(heard / "speech2text", heard / "data", tmp_path / "c", metric="loss")
    model.generate = None
    with torch.no_grad():
        scores = Scores.of(enumerate(task.score(model, task.batch(task.eval, [(0, None), (1, None)]))), 2)
    assert task.metrics(scores) == {"loss": pytest.approx(scores.score.sum() / scores.count.sum())}
    assert scores.text is None


# ---------------------------------------------------------------- through the command


@pytest.fixture(scope="module")
def results(heard, tmp_path_factory):
    """OUT of a finished run of each family."""
    from runs import whole

    place = tmp_path_factory.mktemp("results")
    return {family: whole([heard / family, "--data", heard / "data", *QUIET, "-o", place / family]) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_command_refines_it_and_jiwer_gives_its_figures(command, heard, results, family):
    out, report = results[family], report_of(results[family])
    assert (report["task"], report["metric"]) == ("speech-seq2seq", {"name": "wer", "higher_is_better": False})
    assert report["data"]["columns"] == {"audio": "audio", "text": "text"}
    assert set(report["phases"][-1]["holdout"]) == {"loss"}
    table = pq.read_table(out / "dsd/predictions.parquet").to_pydict()
    for arm, found in report["arms"].items():
        assert list(found) == ["wer", "cer", "loss"]
        assert found["wer"] == pytest.approx(jiwer.wer(table["target"], table[f"prediction_{arm}"]))
        assert found["cer"] == pytest.approx(jiwer.cer(table["target"], table[f"prediction_{arm}"]))
    assert report["arms"]["refined"]["loss"] < report["arms"]["baseline"]["loss"]
    assert command("verify", heard / family, out).code == 0
    mine, theirs = hashes(out), hashes(heard / family)
    assert all(mine[name] == theirs[name] for name in theirs if name != "model.safetensors")


@pytest.mark.parametrize(
    ("family", "first"), [("whisper", "model.encoder.conv1.weight"), ("speech2text", "model.encoder.conv.conv_layers.0.weight")]
)
def test_the_layer_that_hears_first_tables_and_tied_heads_are_not_masked(results, family, first):
    layers = {layer["name"]: layer for layer in report_of(results[family])["layers"]}
    assert layers[first]["excluded"] == "the first layer: it sees the input"
    free = [name for name, layer in layers.items() if layer["excluded"] is None]
    assert len(free) > 20
    assert not [name for name in free if "embed" in name]


def test_positions_that_the_class_freezes_do_not_train(heard, results):
    """Whisper's encoder has fixed sinusoids. transformers' loading would make them trainable."""
    from safetensors.torch import load_file

    source, written = (load_file(folder / "model.safetensors") for folder in (heard / "whisper", results["whisper"]))
    assert torch.equal(source["model.encoder.embed_positions.weight"], written["model.encoder.embed_positions.weight"])
    assert not torch.equal(source["model.decoder.embed_positions.weight"], written["model.decoder.embed_positions.weight"])


def test_stopped_and_resumed(command, heard, results, tmp_path):
    args = [heard / "whisper", "--data", heard / "data", *QUIET, "-o", tmp_path / "two"]
    for at in (2, 2):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, at)
            assert command(*args, "--resume").code == 4
    assert command(*args, "--resume").code == 0
    same(results["whisper"], tmp_path / "two")


def test_two_processes_are_one_of_twice_the_batch(command, heard, tmp_path):
    args = [heard / "speech2text", "--data", heard / "data", "--optimizer", "sgd", "--lr", "0.01", "--warmup-steps", "0", "--quiet",
            "--sparse-steps", 3, "--dense-steps", 2, "--gate", "none", "--device", "cpu", "--control", "none"]  # fmt: skip
    two = two_processes(*args, "-o", tmp_path / "two", "--batch-size", 3)
    assert two.returncode == 0, two.stderr
    assert command(*args, "-o", tmp_path / "one", "--batch-size", 6).code == 0
    near(tmp_path / "one", tmp_path / "two")
    tables = [pq.read_table(tmp_path / name / "dsd/predictions.parquet").to_pydict() for name in ("one", "two")]
    assert tables[0]["prediction_refined"] == tables[1]["prediction_refined"]
