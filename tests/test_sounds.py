"""audio-classification: waveforms and spectrograms through the checkpoint's own feature extractor."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import SHORT
from outputs import report_of, same
from runs import stop_after
from sounds import RATE, TONES, sound_checkpoint, sound_folder, tone

QUIET = (*SHORT, "--batch-size", "5", "--control", "none", "--quiet")


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    """Models of three kinds, and tones."""
    place = tmp_path_factory.mktemp("sounds")
    sound_checkpoint(place / "wav2vec2")
    sound_checkpoint(place / "hubert", "Hubert", feat_extract_norm="layer")
    sound_checkpoint(place / "ast", "AST")
    sound_folder(place / "d")
    return place


def run(command, model, data, out, *more):
    found = command(model, "--data", data, "-o", out, *QUIET, *more)
    assert found.code == 0, found.err
    return report_of(out), pq.read_table(out / "dsd/predictions.parquet").to_pydict()


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "ast"])
def test_the_command_refines_each_kind(command, heard, tmp_path, kind):
    """The first layer keeps its weights whole, and the result is of the same shape."""
    report, table = run(command, heard / kind, heard / "d", tmp_path / "out")
    assert (report["task"], report["metric"]["name"]) == ("audio-classification", "accuracy")
    assert report["data"]["columns"] == {"audio": "audio", "label": "label"}
    assert report["labels"]["rule"] == "by name"
    assert set(table["target"]) == set(TONES)
    assert command("verify", heard / kind, tmp_path / "out").code == 0
    first = [layer["name"] for layer in report["layers"] if layer["excluded"] == "the first layer: it sees the input"]
    assert len(first) == 1
    assert first[0].endswith(("conv_layers.0.conv.weight", "patch_embeddings.projection.weight"))
    assert report["preprocessing"]["attention_mask"] == (kind == "hubert")
    assert report["preprocessing"]["spec_augment"] == (kind != "ast")


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "ast"])
def test_the_score_of_a_clip_does_not_depend_on_the_batch(command, heard, tmp_path, kind):
    losses = []
    for size in (1, 7):
        zero = ("--sparse-steps", 0, "--dense-steps", 0, "--sparsity", 0, "--batch-size", size)
        losses.append(run(command, heard / kind, heard / "d", tmp_path / str(size), *zero)[1]["loss_baseline"])
    assert np.allclose(*losses, atol=1e-5)


def test_a_model_learns_to_hear(command, heard, tmp_path):
    steps = ("--sparse-steps", 60, "--dense-steps", 10, "--lr", "1e-3", "--warmup-steps", 0, "--batch-size", 12)
    report, _ = run(command, heard / "ast", heard / "d", tmp_path / "out", *steps, "--set", "metric=f1_macro")
    assert report["arms"]["refined"]["accuracy"] > report["arms"]["baseline"]["accuracy"] + 0.2
    assert report["metric"]["name"] == "f1_macro"


def test_stopped_and_resumed(command, heard, tmp_path):
    """With the masks in time of wav2vec2's own SpecAugment."""
    one, two = ([heard / "wav2vec2", "--data", heard / "d", "-o", tmp_path / name, *QUIET] for name in ("one", "two"))
    assert command(*one).code == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        assert command(*two, "--resume").code == 4
    assert command(*two, "--resume").code == 0
    same(tmp_path / "one", tmp_path / "two")


def test_clips_that_are_cut_are_counted_and_broken_ones_are_named(command, heard, tmp_path):
    draw = np.random.default_rng(0)
    sound_folder(tmp_path / "d", splits=("train",))
    soundfile.write(tmp_path / "d/train/low/long.wav", tone(draw, 400, 0.6), 4000)  # 0.3 s at twice the rate
    soundfile.write(tmp_path / "d/train/low/longer.wav", tone(draw, 400, 0.6), RATE)
    (tmp_path / "d/train/low/broken.wav").write_bytes(b"RIFF")
    report, _ = run(command, heard / "ast", tmp_path / "d", tmp_path / "out")
    assert "2 of 26 clips are longer than 0.41 s" in " ".join(report["warnings"])
    (skipped,) = report["data"]["train"]["skipped"]
    assert skipped["row"].endswith("broken.wav")
    assert "unreadable audio" in skipped["reason"]


def test_other_classes_are_refused(refused, heard, tmp_path):
    data = sound_folder(tmp_path / "d", names=("low", "middle", "shrill"))
    said = refused(heard / "ast", "--data", data, *QUIET)
    assert "shrill" in said
    assert "low, middle, high" in said
    model = sound_checkpoint(tmp_path / "m", "AST", 4)
    assert "4" in refused(model, "--data", heard / "d", *QUIET)
    model = sound_checkpoint(tmp_path / "s", "AST", problem_type="multi_label_classification")
    said = refused(model, "--data", heard / "d", *QUIET)
    assert "problem_type is 'multi_label_classification', which is not supported yet for sounds" in said
