"""ctc-speech: any clip is heard as the checkpoint hears, no row's score hangs on another, and what is said can be counted again."""

import io
import json
import shutil
from types import SimpleNamespace

import builders
import datasets
import jiwer
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from conftest import SHORT
from outputs import near, report_of, same
from runs import stop_after, two_processes
from tasks import open_task
from versions import are_tested

from dsd_refine.checkpoint.libraries.transformers import TransformersLibrary
from dsd_refine.data.tables import read_tables
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.run.run import Run
from dsd_refine.tasks.base import Scores
from dsd_refine.tasks.ctc_speech import CtcDecoder, row_score
from dsd_refine.tasks.inputs.audio import SpecAugment, decode, open_feature_extractor, resample

LAYER = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
ADAPTER = {**LAYER, "add_adapter": True, "num_adapter_layers": 1}
QUIET = (*SHORT, "--quiet")


def wav(samples, rate=8000, form="WAV", subtype=None):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form, subtype=subtype)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    """Read-only: models `group` (no mask) and `layer` (mask), and data."""
    place = tmp_path_factory.mktemp("heard")
    builders.ctc_checkpoint(place / "group")
    builders.ctc_checkpoint(place / "layer", **LAYER)
    builders.speech_folder(place / "data")
    return place


def opened(model, data, cache, **fields):
    """(task, model in evaluation mode) on a folder's data."""
    import transformers

    recipe = Recipe(phases=(Phase(kind="dense", steps=1, lr=0.1),), data=str(data), **fields)
    loaded = transformers.AutoModelForCTC.from_pretrained(model).eval()
    library = TransformersLibrary.open(model)
    return open_task(recipe, library, loaded, cache), loaded


def written(folder, clips, split=""):
    """A folder of WAV files and metadata.jsonl from (samples or bytes, text) pairs."""
    place = folder / split
    place.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (sound, text) in enumerate(clips):
        raw = sound if isinstance(sound, bytes) else wav(sound)
        (place / f"{number}.wav").write_bytes(raw)
        lines.append(json.dumps({"file_name": f"{number}.wav", "text": text}))
    (place / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


GOOD = [
    (builders.spoken(text, seed=i), text)
    for i, text in enumerate(["abc", "fed ab", "cab", "ff", "bad cafe", "dab", "ace", "bee"])
]


# ---------------------------------------------------------------- sound


def test_channels_are_averaged_and_values_are_fractions():
    left = builders.spoken("ab")
    samples, rate = decode(wav(np.stack([left, -left / 2], axis=1), 44100))
    assert rate == 44100
    assert samples.dtype == np.float32
    assert np.allclose(samples, left / 4, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "subtype"), [("WAV", "FLOAT"), ("WAV", "ULAW"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("MP3", None)]
)
def test_formats(form, subtype):
    samples, rate = decode(wav(builders.spoken("abc", 16000), 16000, form, subtype))
    assert rate == 16000
    assert abs(len(samples) - 4800) <= 2400  # MP3 pads to whole frames
    assert 0.1 < np.abs(samples).max() < 1


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "unreadable audio"),
        (b"RIFF but no more", "unreadable audio"),
        (wav(np.zeros((0,), dtype=np.float32)), "without samples"),
        (wav(np.array([0.0, np.nan] * 800, dtype=np.float32), subtype="FLOAT"), "not finite"),
    ],
)
def test_what_is_no_sound_is_named(raw, reason):
    with pytest.raises(DataError, match=reason):
        decode(raw)


@pytest.mark.parametrize("rate", [4000, 8000, 11025, 44100, 48000])
def test_any_rate_becomes_the_checkpoints(rate):
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)
    found = resample(tone, rate, 8000)
    assert found.dtype == np.float32
    assert len(found) == 8000
    wanted = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    assert np.abs(found - wanted)[100:-100].max() < 0.02


def test_a_clip_of_any_rate_and_channels_is_heard_alike(heard, tmp_path):
    once, twice = builders.spoken("abc", 8000, seed=1), builders.spoken("abc", 16000, seed=1)
    stereo = np.stack([twice, twice], axis=1)
    data = written(tmp_path / "d", [(wav(once), "abc"), (wav(stereo, 16000), "abc"), *GOOD])
    task, _ = opened(heard / "group", data, tmp_path / "cache", holdout=0.0, keep="last")
    units = {name: unit for unit in range(task.train.units) if (name := task.train.rows.name(unit)) in ("0.wav", "1.wav")}
    sounds = [task.batch(task.train, [(unit, None)]).inputs["input_values"][0] for unit in units.values()]
    if len(sounds) == 2:  # neither was carved for the evaluation
        assert sounds[0].shape == sounds[1].shape
        assert torch.corrcoef(torch.stack(sounds))[0, 1] > 0.98


# ---------------------------------------------------------------- words


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return CtcDecoder(builders.letter_tokenizer(tmp_path_factory.mktemp("words")), blank=0, size=11)


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        ([0, 5, 5, 0, 0, 6, 0], "ab"),
        ([5, 0, 5], "aa"),  # a blank between keeps both: a tokenizer that collapses again would lose one
        ([5, 5, 4, 4, 0, 4, 6], "a b"),
        ([4, 5, 4], "a"),
        ([0, 0], ""),
        ([], ""),
        ([5, 3, 6], "a<unk>b"),
    ],
)
def test_greedy_decoding(words, frames, text):
    assert words.text(frames) == text


@pytest.mark.parametrize(("text", "problem"), [("a b", None), ("", "no label"), ("a<pad>", "blank"), ("xyz", None)])
def test_labels_that_cannot_train(words, text, problem):
    found = words.problem(words.labels(text))
    assert found is None if problem is None else problem in found


def test_a_label_that_the_model_lacks(words):
    short = CtcDecoder(words.tokenizer, blank=0, size=10)
    assert "no label for" in short.problem(short.labels("abcdef"))
    assert short.problem(short.labels("abcde")) is None


def test_unknown_characters_are_found(words):
    assert words.unknown({"ab xa", "zé"}) == ["x", "z", "é"]


@pytest.mark.parametrize(("reference", "text"), [("a b c", "a c"), ("a", "a b c"), ("ab cd", ""), ("ab", "ab"), ("a b", "b a")])
def test_a_rows_edits_are_jiwers(reference, text):
    found = row_score(reference, text, 1.5, 4)
    assert found.score / found.count == jiwer.wer(reference, text)
    assert found.stats[0] / found.stats[1] == jiwer.cer(reference, text)
    assert (found.loss, found.stats[2], found.text) == (1.5, 4, text)


# ---------------------------------------------------------------- rows


def test_rows_that_cannot_train_are_skipped_and_named(heard, tmp_path):
    odd = [
        (builders.spoken("ab"), "abcdefabcdef"),  # 12 labels, 9 frames
        (builders.spoken("ab"), "aaaaaa"),  # 6 labels want 11 frames: a blank between each two
        (builders.spoken("ab"), "ababab"),  # 6 labels, 6 frames
        (b"not a sound", "abc"),
        (builders.spoken("ab"), "  "),
        (builders.spoken("ab"), None),
    ]
    data = written(tmp_path / "d", [*odd, *GOOD], "train")
    written(tmp_path / "d", GOOD, "test")
    with (tmp_path / "d/train/metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "gone.wav", "text": "abc"}) + "\n")
    task, _ = opened(heard / "group", data, tmp_path / "cache", holdout=0.0, keep="last")
    reasons = {item["row"]: item["reason"] for item in task.train.rows.skipped}
    assert set(reasons) == {"train/0.wav", "train/1.wav", "train/3.wav", "train/4.wav", "train/5.wav", "train/gone.wav"}
    assert reasons["train/0.wav"] == "more labels than frames: its text needs 12 frames, the clip has 9"
    assert reasons["train/1.wav"] == "more labels than frames: its text needs 11 frames, the clip has 9"
    assert "unreadable audio" in reasons["train/3.wav"]
    assert reasons["train/4.wav"] == reasons["train/5.wav"] == "no text"
    assert "unreadable file (No such file" in reasons["train/gone.wav"]
    assert len(task.train.rows) == len(GOOD) + 1
    assert any("6 training rows skipped, the first: train/0.wav (more labels" in line for line in task.warnings)


@pytest.mark.parametrize("model", ["group", "layer"])
def test_clips_too_short_for_masks_and_convolutions_train(heard, tmp_path, model):
    tiny = [(np.full(n, 0.1, dtype=np.float32), "a") for n in (1, 40, 185, 400, 640)]
    data = written(tmp_path / "d", [*tiny, *GOOD], "train")
    written(tmp_path / "d", GOOD, "test")
    task, loaded = opened(heard / model, data, tmp_path / "cache", holdout=0.0, keep="last")
    assert task.train.rows.skipped == []
    assert [clip.frames for clip in task.train.clips[:5]] == [1, 1, 1, 2, 3]
    assert task.extractor.shortest == 186  # the receptive field of the convolutions
    loaded.train()
    for items in ([(0, 1)], [(0, 1), (1, 2), (3, 3), (4, 4), (8, 5)]):
        batch = task.batch(task.train, items)
        loss = task.loss(loaded, batch)
        loss.backward()
        assert torch.isfinite(loss)
    grads = [p.grad for p in loaded.parameters() if p.grad is not None]
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_spec_augment_is_a_function_of_the_row():
    augment = SpecAugment(share=0.3, length=4, least=1)
    masks = [augment.draw(50, 7) for _ in range(2)]
    assert torch.equal(*masks)
    assert 4 <= int(masks[0].sum()) <= 20
    assert not torch.equal(masks[0], augment.draw(50, 8))
    assert not augment.draw(3, 7).any()
    assert augment.draw(4, 7).all()


def test_masks_do_not_hang_on_the_batch(heard, tmp_path):
    task, _ = opened(heard / "layer", heard / "data", tmp_path / "cache")
    together = task.batch(task.train, [(unit, 100 + unit) for unit in range(4)])
    for unit in range(4):
        alone = task.batch(task.train, [(unit, 100 + unit)]).inputs["mask_time_indices"][0]
        assert torch.equal(together.inputs["mask_time_indices"][unit, : len(alone)], alone)
        assert not together.inputs["mask_time_indices"][unit, len(alone) :].any()
    assert "mask_time_indices" not in task.batch(task.train, [(0, None)]).inputs


def test_unknown_characters_are_counted_and_warned_of(heard, tmp_path):
    clips = [*GOOD, (builders.spoken("abc", letter=0.2), "a-c"), (builders.spoken("ab", letter=0.2), "x-b")]
    data = written(tmp_path / "d", clips, "train")
    written(tmp_path / "d", GOOD, "test")
    task, _ = opened(heard / "group", data, tmp_path / "cache", holdout=0.0, keep="last")
    assert any("3 of 64 characters of the texts are unknown to the tokenizer ('-', 'x')" in line for line in task.warnings)
    row = next(unit for unit in range(task.train.units) if task.train.rows.name(unit) == "train/8.wav")
    assert task.train.clips[row].labels.tolist() == [5, 3, 7]
    assert task.target(task.train, row) == "a-c"


def test_a_text_of_another_alphabet_is_refused(heard, tmp_path):
    data = written(tmp_path / "d", [(sound, text.upper()) for sound, text in GOOD])
    with pytest.raises(DataError, match=r"does not know 29 of 29 characters .*case and alphabet"):
        opened(heard / "group", data, tmp_path / "cache")


# ---------------------------------------------------------------- no row hangs on another


@pytest.mark.parametrize(
    ("family", "config", "masked"),
    [
        ("Wav2Vec2", {}, False),
        ("Wav2Vec2", LAYER, True),
        ("Wav2Vec2", ADAPTER, False),  # takes a mask, and lets padding leak in all the same
        ("Hubert", LAYER, True),
        ("WavLM", {}, False),
        ("Data2VecAudio", {"conv_pos_kernel_size": 3}, False),
        ("SEW", {"squeeze_factor": 2}, False),
        ("UniSpeechSat", {}, False),
        ("Wav2Vec2Conformer", {}, False),
    ],
)
def test_scores_do_not_depend_on_the_batch(heard, tmp_path, family, config, masked):
    model = builders.ctc_checkpoint(tmp_path / "m", family, **config)
    task, loaded = opened(model, heard / "data", tmp_path / "cache")
    assert task.extractor.masked == masked
    with torch.no_grad():
        together = task.score(loaded, task.batch(task.eval, [(unit, None) for unit in range(16)]))
        alone = [task.score(loaded, task.batch(task.eval, [(unit, None)]))[0] for unit in range(16)]
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.loss for one in together] == pytest.approx([one.loss for one in alone], rel=1e-5)


@pytest.mark.parametrize("model", ["group", "layer"])
def test_the_loss_is_transformers_own(heard, tmp_path, model):
    task, loaded = opened(heard / model, heard / "data", tmp_path / "cache")
    loaded.config.ctc_loss_reduction = "sum"
    for unit in range(4):
        batch = task.batch(task.train, [(unit, None)])
        with torch.no_grad():
            wanted = loaded(**batch.inputs, labels=batch.targets).loss
            assert task.loss(loaded, batch) == pytest.approx(float(wanted), rel=1e-5)
        assert batch.count == int((batch.targets != -100).sum())


def parakeet(folder, kind):
    """Models that see a spectrogram, or waves with a channel: tokens with a word boundary, blank last."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["<unk>", *builders.LETTERS, "▁"]
    vocabulary = {name: number for number, name in enumerate(names)} | {"<pad>": len(names)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = transformers.ParakeetTokenizer(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    size, blank = len(names) + 1, len(names)
    if kind == "OmniASR":
        audio = {"conv_dim": [8, 8], "conv_kernel": [10, 8], "conv_stride": [10, 16], "num_conv_pos_embeddings": 8}
        audio |= {"model_type": "omniasr_audio", "num_conv_pos_embedding_groups": 2, **sizes}
        config = transformers.OmniASRCTCConfig(vocab_size=size, audio_config=audio, blank_token_id=blank)
        extractor = transformers.OmniASRFeatureExtractor(sampling_rate=8000)
    else:
        encoder = {**sizes, "subsampling_factor": 4, "subsampling_conv_channels": 8, "num_mel_bins": 16, "layerdrop": 0.0}
        config = transformers.ParakeetCTCConfig(vocab_size=size, encoder_config=encoder, pad_token_id=blank)
        extractor = transformers.ParakeetFeatureExtractor(16, 8000, hop_length=80, n_fft=256, win_length=200)
    with builders.seeded(0):
        model = getattr(transformers, f"{kind}ForCTC")(config)
    return builders.save_transformers(model, folder, extractor, tokenizer)


@pytest.mark.skipif(not are_tested("transformers"), reason="older ones lack OmniASR, and need librosa for Parakeet")
@pytest.mark.parametrize("kind", ["Parakeet", "OmniASR"])
def test_spectrograms_and_other_tokenizers(command, heard, tmp_path, kind):
    model = parakeet(tmp_path / "m", kind)
    task, loaded = opened(model, heard / "data", tmp_path / "cache")
    assert task.decoder.blank == 8
    assert task.decoder.text([7, 1, 8, 1, 8, 2, 7, 3]) == "aab c"
    with torch.no_grad():
        together = task.score(loaded, task.batch(task.eval, [(unit, None) for unit in range(8)]))
        alone = [task.score(loaded, task.batch(task.eval, [(unit, None)]))[0] for unit in range(8)]
    assert [one.loss for one in together] == pytest.approx([one.loss for one in alone], rel=1e-5)
    found = command(model, "--data", heard / "data", "-o", tmp_path / "out", *QUIET)
    assert found.code == 0, found.err
    assert command("verify", model, tmp_path / "out").code == 0


# ---------------------------------------------------------------- forms of data


def test_a_saved_data_set_with_an_audio_column(heard, tmp_path):
    """No torchcodec is needed: the bytes are decoded here."""
    rows = {
        "sound": [{"bytes": wav(sound), "path": f"{i}.wav"} for i, (sound, _) in enumerate(GOOD)],
        "said": [text for _, text in GOOD],
    }
    made = (
        datasets.Dataset.from_dict(rows)
        .cast_column("sound", datasets.Audio(decode=False))
        .cast_column("sound", datasets.Audio())
    )
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "saved")
    task, _ = opened(heard / "group", tmp_path / "saved", tmp_path / "cache", text_column="said", holdout=0.0, keep="last")
    assert task.audio_column == "sound"
    assert [task.target(task.train, row) for row in range(8)] == [text for _, text in GOOD]
    assert task.batch(task.train, [(0, None)]).inputs["input_values"].shape == (1, 2400)


def test_a_table_of_paths_and_a_named_column(heard, tmp_path):
    written(tmp_path / "sounds", GOOD)
    (tmp_path / "t.csv").write_text("clip,said\n" + "".join(f"sounds/{i}.wav,{text}\n" for i, (_, text) in enumerate(GOOD)))
    fields = {"audio_column": "clip", "text_column": "said"}
    task, _ = opened(heard / "group", tmp_path / "t.csv", tmp_path / "cache", **fields)
    parts = [part for part in (task.train, task.holdout, task.eval) if part]
    assert sorted(text for part in parts for (text,) in part.rows.texts) == sorted(text for _, text in GOOD)


@pytest.mark.parametrize(
    ("fields", "message"), [({"audio_column": "x"}, "--audio-column"), ({"text_column": "x"}, "--text-column")]
)
def test_a_missing_column_is_named(heard, tmp_path, fields, message):
    with pytest.raises(DataError, match=message):
        opened(heard / "group", heard / "data", tmp_path / "cache", **fields)


def test_the_fingerprint_knows_the_text(heard, tmp_path):
    prints = set()
    for text in ("abc", "abd"):
        clips = [(GOOD[0][0], text), *GOOD[1:]]
        tables = read_tables(str(written(tmp_path / text, clips)), tmp_path / "cache", download=lambda name, size: False).tables
        assert tables["train"].rows.column_names == ["text", "audio"]
        task, _ = opened(heard / "group", tmp_path / text, tmp_path / "cache", holdout=0.0, keep="last")
        prints.add((task.train.rows.fingerprint, task.eval.rows.fingerprint))
    assert len(prints) == 2


def test_white_space_in_texts_is_normalised(heard, tmp_path):
    data = written(tmp_path / "d", [(sound, f" {text}  \n") for sound, text in GOOD])
    task, _ = opened(heard / "group", data, tmp_path / "cache")
    assert {text for (text,) in task.train.rows.texts} <= {text for _, text in GOOD}


# ---------------------------------------------------------------- scores


def test_scores_are_packed_and_unpacked():
    rows = [row_score("a b", text, 0.5, 3) for text in ("", "a b", "zé ☃")]
    scores = Scores.of([(0, rows[0]), (1, rows[1]), (3, rows[2])], 4)
    again = Scores.unpack(scores.pack())
    assert again.text == scores.text == ["", "a b", "", "zé ☃"]
    for name in ("score", "count", "loss", "prediction", "stats"):
        assert np.array_equal(getattr(again, name), getattr(scores, name))
    plain = Scores.unpack(Scores.of([], 2).pack())
    assert plain.text is None
    assert plain.stats is None


# ---------------------------------------------------------------- through the command


@pytest.fixture(scope="module")
def result(heard, tmp_path_factory):
    """OUT of a finished run with several odd rows, and its data."""
    from dsd_refine.cli.app import main

    place = tmp_path_factory.mktemp("result")
    shutil.copytree(heard / "data", place / "data")
    for split in ("train", "test"):
        (place / "data" / split / "broken.wav").write_bytes(b"no sound")
        soundfile.write(place / "data" / split / "long.wav", builders.spoken("ab"), 8000)
        with (place / "data" / split / "metadata.csv").open("a") as file:
            file.write("broken.wav,abc\nlong.wav,abcdefabcdef\n")
    args = [heard / "layer", "--data", place / "data", "-o", place / "out", *QUIET, "--control", "dense", "--control", "random"]
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    assert ended.value.code == 0
    return place


def test_wer_and_cer_can_be_counted_again(result):
    report = report_of(result / "out")
    assert report["metric"] == {"name": "wer", "higher_is_better": False}
    table = pq.read_table(result / "out/dsd/predictions.parquet").to_pydict()
    assert len(table["row"]) == report["data"]["eval"]["rows"] == 16
    for arm, found in report["arms"].items():
        said = table[f"prediction_{arm}"]
        assert found["wer"] == pytest.approx(jiwer.wer(table["target"], said))
        assert found["cer"] == pytest.approx(jiwer.cer(table["target"], said))
        assert found["wer"] == pytest.approx(sum(table[f"score_{arm}"]) / sum(table[f"count_{arm}"]))
        edits, characters, labels = np.sum(table[f"stats_{arm}"], axis=0)
        assert found["cer"] == pytest.approx(edits / characters)
        assert labels == sum(len(text) for text in table["target"])
    delta = report["arms"]["baseline"]["wer"] - report["arms"]["refined"]["wer"]
    assert report["comparison"]["refined_vs_baseline"]["delta"] == pytest.approx(delta)
    assert report["comparison"]["refined_vs_baseline"]["test"] == "paired-bootstrap"


def test_the_report_names_what_was_skipped(result):
    report = report_of(result / "out")
    for part, split in (("train", "train"), ("eval", "test")):
        reasons = {item["row"]: item["reason"] for item in report["data"][part]["skipped"]}
        assert "unreadable audio" in reasons[f"{split}/broken.wav"]
        assert "more labels than frames" in reasons[f"{split}/long.wav"]
    assert report["preprocessing"]["sampling_rate"] == 8000
    assert report["preprocessing"]["attention_mask"] is True
    phase = report["phases"][0]
    assert set(phase["holdout"]) == {"wer", "cer", "loss"}


def test_the_first_convolution_and_weight_norm_are_not_masked(result):
    layers = {layer["name"]: layer for layer in report_of(result / "out")["layers"]}
    first = layers["wav2vec2.feature_extractor.conv_layers.0.conv.weight"]
    assert first["excluded"] == "the first layer: it sees the input"
    assert layers["wav2vec2.feature_extractor.conv_layers.1.conv.weight"]["excluded"] is None
    assert layers["lm_head.weight"]["excluded"] is None
    assert layers["lm_head.weight"]["zeros_in_sparse"] == layers["lm_head.weight"]["masked"] > 0
    norm = [layer["excluded"] for name, layer in layers.items() if "pos_conv_embed" in name and "bias" not in name]
    assert norm == ["reparametrised weight"] * 2


def test_verify_and_plain_loading(command, heard, result):
    import transformers

    assert command("verify", heard / "layer", result / "out").code == 0
    assert type(transformers.AutoModelForCTC.from_pretrained(result / "out")).__name__ == "Wav2Vec2ForCTC"


@pytest.mark.parametrize("model", ["group", "layer"])
def test_stopped_and_resumed(command, heard, tmp_path, model):
    one, two = ([heard / model, "--data", heard / "data", "-o", tmp_path / name, *QUIET] for name in ("one", "two"))
    assert command(*one).code == 0
    for at in (2, 3):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, at)
            assert command(*two, "--resume").code == 4
    assert command(*two, "--resume").code == 0
    same(tmp_path / "one", tmp_path / "two")


def test_the_margin_of_an_error_rate_is_absolute():
    """Half a point, as of any fraction; only a loss's margin is relative."""
    task = SimpleNamespace(metric="wer", higher_is_better=False, metrics=lambda scores: {"wer": 0.1})
    run = SimpleNamespace(task=task, recipe=SimpleNamespace(margin=0.005), seeds={"baseline": [None]})
    assert Run.margin.fget(run) == 0.005
    run.task = SimpleNamespace(metric="loss", higher_is_better=False, metrics=lambda scores: {"loss": 2.0})
    assert Run.margin.fget(run) == 0.01


def test_two_processes_are_one_of_twice_the_batch(command, heard, tmp_path):
    args = [heard / "group", "--data", heard / "data", "--optimizer", "sgd", "--lr", "0.01", "--warmup-steps", "0", "--quiet",
            "--sparse-steps", 3, "--dense-steps", 2, "--gate", "none", "--device", "cpu"]  # fmt: skip
    two = two_processes(*args, "-o", tmp_path / "two", "--batch-size", 4)
    assert two.returncode == 0, two.stderr
    assert command(*args, "-o", tmp_path / "one", "--batch-size", 8).code == 0
    near(tmp_path / "one", tmp_path / "two")
    tables = [pq.read_table(tmp_path / name / "dsd/predictions.parquet").to_pydict() for name in ("one", "two")]
    assert tables[0]["prediction_baseline"] == tables[1]["prediction_baseline"]
    assert tables[0]["prediction_refined"] == tables[1]["prediction_refined"]


def test_workers_change_nothing(command, heard, tmp_path):
    for workers in (0, 2):
        args = ["--data", heard / "data", "-o", tmp_path / f"w{workers}", *QUIET, "--workers", workers]
        assert command(heard / "group", *args).code == 0
    same(tmp_path / "w0", tmp_path / "w2")


def test_the_papers_recipe_and_distillation_run(command, heard, tmp_path):
    args = [heard / "group", "--data", heard / "data", *QUIET]
    found = command(*args, "-o", tmp_path / "out", "--recipe", "speech")
    assert found.code == 0, found.err
    report = report_of(tmp_path / "out")
    kinds = [(phase["kind"], phase["sparsity"]) for phase in report["phases"] if phase["arm"] == "refined"]
    assert kinds == [("sparse", 0.5), ("dense", None), ("sparse", 0.25), ("dense", None)]
    front = [layer for layer in report["layers"] if "feature_extractor" in layer["name"] and "conv.weight" in layer["name"]]
    assert all(layer["excluded"] for layer in front)
    found = command(*args, "-o", tmp_path / "taught", "--set", "phases.1.distill={weight: 0.5, temperature: 2.0}")
    assert found.code == 0, found.err


def test_plan_counts_clips(command, heard):
    found = command("plan", heard / "group", "--data", heard / "data", "--json")
    assert found.code == 0, found.err
    totals = json.loads(found.out)["totals"]
    assert totals["rows"] == "14 train, 2 holdout, 16 evaluation"


def test_missing_packages_are_named(refused, heard, monkeypatch):
    from dsd_refine import extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    message = refused(heard / "group", "--data", heard / "data")
    assert message == "ctc-speech needs soundfile and jiwer: pip install 'dsd-refine[speech]'"


@pytest.mark.parametrize("rate", [0, -8000, 10**9, "fast"])
def test_a_feature_extractor_of_no_rate_that_sound_has_is_refused(heard, tmp_path, rate):
    import transformers

    folder = builders.copy_folder(heard / "group", tmp_path / "m")
    for path in folder.glob("*processor*.json"):
        config = json.loads(path.read_text())
        at = config.get("feature_extractor", config)
        at["sampling_rate"] = rate
        path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="feature extractor cannot be used"):
        open_feature_extractor(folder, transformers.AutoModelForCTC.from_pretrained(folder).eval())


def test_a_folder_without_feature_extractor_is_refused(heard, tmp_path):
    import transformers

    folder = builders.copy_folder(heard / "group", tmp_path / "m")
    for path in folder.glob("*processor*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="feature extractor cannot be used"):
        open_feature_extractor(folder, transformers.AutoModelForCTC.from_pretrained(folder).eval())
