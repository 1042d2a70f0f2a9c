"""Decoded once a run: what is held gives the same bytes as what is decoded again, and a torn or full cache changes nothing."""

import os
import pickle
import random

import builders
import numpy as np
import pytest
import torch
from conftest import SHORT
from outputs import same
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from dsd_refine.data.decoded import ENTRY, Budget, DecodedRows, Store
from dsd_refine.recipe import Augment
from dsd_refine.seeding import seed_all
from dsd_refine.tasks.inputs import images
from dsd_refine.tasks.inputs.audio import SpecAugment
from dsd_refine.tasks.inputs.pixels import crop_place
from dsd_refine.training.batches import one_ahead

CROPS = ("--set", "augment={crop: random-resized, flip: 0.5}")


def test_a_row_comes_back_as_it_was_put(tmp_path):
    rows = DecodedRows(tmp_path / "t", 5, Budget(100), writes=True)
    rows.put(3, b"abcdef", 2, 3)
    rows.put(0, b"xy", 1, 2)
    assert (rows.get(3), rows.get(0), rows.get(1)) == ((b"abcdef", 2, 3), (b"xy", 1, 2), None)
    assert rows.get(99) is None
    other = pickle.loads(pickle.dumps(rows))  # a worker process: it reads, and writes nothing
    other.put(1, b"zz", 1, 2)
    assert (other.get(3), other.get(1)) == ((b"abcdef", 2, 3), None)


def test_what_does_not_fit_is_not_held_and_what_is_smaller_still_is(tmp_path):
    rows = DecodedRows(tmp_path / "t", 3, Budget(5), writes=True)
    rows.put(0, b"abcdef", 1, 6)
    rows.put(1, b"abc", 1, 3)
    assert (rows.get(0), rows.get(1), rows.budget.full) == (None, (b"abc", 1, 3), True)
    assert Store(tmp_path, 0, writes=True).rows(3) is None


def test_tables_share_what_is_left(tmp_path):
    store = Store(tmp_path / "deep/er", 4, writes=True)
    one, two = store.rows(1), store.rows(1)
    one.put(0, b"abc", 1, 3)
    two.put(0, b"abc", 1, 3)
    assert (one.get(0), two.get(0)) == ((b"abc", 1, 3), None)


@pytest.mark.parametrize("suffix", [".values", ".rows"])
def test_torn_files_hold_nothing(tmp_path, suffix):
    rows = DecodedRows(tmp_path / "t", 2, Budget(100), writes=True)
    rows.put(1, b"abcdef", 2, 3)
    os.truncate(rows.path.with_suffix(suffix), 3)
    assert rows.get(1) is None


def test_a_full_disk_ends_the_holding_and_keeps_what_is_there(tmp_path, monkeypatch):
    rows = DecodedRows(tmp_path / "t", 3, Budget(100), writes=True)
    rows.put(0, b"abc", 1, 3)
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    rows.put(1, b"abc", 1, 3)
    monkeypatch.undo()
    rows.put(2, b"abc", 1, 3)
    assert [rows.get(row) for row in range(3)] == [(b"abc", 1, 3), None, None]


def test_a_row_that_was_written_in_part_is_not_held(tmp_path, monkeypatch):
    rows, write = DecodedRows(tmp_path / "t", 1, Budget(100), writes=True), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, place: write(file, content[:2], place))
    rows.put(0, b"abc", 1, 3)
    assert rows.get(0) is None
    assert rows.path.with_suffix(".rows").stat().st_size == ENTRY.size


@pytest.mark.parametrize("size", [(40, 30), (300, 4), (4, 300), (1, 1)])
@pytest.mark.parametrize("seed", range(8))
def test_crops_are_torchvision_s(size, seed):
    augment = Augment(crop="random-resized", scale=(0.35, 1.0), ratio=(0.75, 4 / 3))
    seed_all(seed)
    wanted = RandomResizedCrop.get_params(Image.new("RGB", size), augment.scale, augment.ratio)
    assert crop_place(size[1], size[0], augment, torch.Generator().manual_seed(seed)) == tuple(wanted)


@pytest.mark.parametrize("frames", [4, 5, 17, 60, 400])
@pytest.mark.parametrize("seed", [0, 3, 2**40 + 5])
def test_masks_in_time_are_transformers(frames, seed):
    from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

    for share, length, least in ((0.05, 5, 2), (0.5, 10, 0), (0.9, 3, 0), (0.01, 2, 0)):
        drawn = SpecAugment(share, length, least).draw(frames, seed)
        if frames < length:
            assert not drawn.any()
            continue
        seed_all(seed)
        assert drawn.tolist() == _compute_mask_indices((1, frames), share, length, min_masks=least)[0].tolist()


def test_drawing_for_a_row_leaves_the_model_s_generators_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    crop_place(30, 40, Augment(crop="random-resized"), torch.Generator().manual_seed(1))
    SpecAugment(0.5, 2, 0).draw(30, 7)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


@pytest.mark.parametrize("how", [["--cache-gb", "0"], ["--cache-gb", "0.000001"], ["--workers", "2"]])
@pytest.mark.parametrize("augment", [CROPS, ("--set", "augment={flip: 0.5}"), ()], ids=["crops", "mirrored", "as it is"])
def test_a_run_without_a_cache_ends_in_the_same_bytes(command, made, tmp_path, how, augment):
    args = (made / "timm", "--data", made / "pictures", *SHORT, *augment, "--quiet")
    assert command(*args, "-o", tmp_path / "held").code == 0
    assert command(*args, "-o", tmp_path / "again", *how).code == 0
    same(tmp_path / "held", tmp_path / "again")


def test_no_picture_is_decoded_twice(command, made, tmp_path, monkeypatch):
    seen, look = [], images.look
    monkeypatch.setattr(images, "look", lambda raw, channels: seen.append(raw) or look(raw, channels))
    args = (made / "timm", "--data", made / "pictures", "--sparse-epochs", "3", "--dense-epochs", "2", *CROPS)
    assert command(*args, "--gate", "none", "--batch-size", "8", "--device", "cpu", "-o", tmp_path / "out").code == 0
    assert len(seen) == len(list((made / "pictures").rglob("*.png")))


def test_a_cache_that_a_kill_left_is_not_used(command, made, tmp_path):
    """Its files are never synced: a new start makes them anew."""
    out = tmp_path / "out"
    left = out.with_name("out.partial") / "cache/decoded/table-1.values"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"\xff" * 100_000)
    args = (made / "timm", "--data", made / "pictures", *SHORT, "--quiet")
    assert command(*args, "-o", out, "--overwrite").code == 0
    assert command(*args, "-o", tmp_path / "clean").code == 0
    same(out, tmp_path / "clean")


def test_speech_is_decoded_once(command, made, tmp_path):
    source, data = builders.ctc_checkpoint(tmp_path / "speech"), builders.speech_folder(tmp_path / "clips")
    args = (source, "--data", data, *SHORT, "--quiet")
    assert command(*args, "-o", tmp_path / "held").code == 0
    assert command(*args, "-o", tmp_path / "again", "--cache-gb", "0").code == 0
    same(tmp_path / "held", tmp_path / "again")


@pytest.mark.parametrize("slow", [False, True])
def test_batches_come_in_order_and_once_and_errors_where_they_belong(slow, monkeypatch):
    monkeypatch.setattr("dsd_refine.training.batches.SLOW", -1.0 if slow else 60.0)
    assert list(one_ahead(iter(range(7)))) == [*range(7)]
    assert list(one_ahead(iter([]))) == []

    def failing():
        yield from range(4)
        raise OSError("gone")

    ahead, got = one_ahead(failing()), []
    with pytest.raises(OSError, match="gone"):
        got += ahead
    got = []
    with pytest.raises(OSError, match="gone"):
        for number in one_ahead(failing()):
            got.append(number)
    assert got == [0, 1, 2, 3]


def test_the_thread_that_makes_batches_leaves_the_cores_to_training(monkeypatch):
    monkeypatch.setattr("dsd_refine.training.batches.SLOW", -1.0)
    monkeypatch.setattr("dsd_refine.training.batches.TIMED", 2)

    def cores():
        for _ in range(4):
            yield torch.get_num_threads()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert list(one_ahead(cores())) == [2, 2, 1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_texts_are_tokenized_once(command, made, tmp_path, monkeypatch):
    """When the rows are looked through; a run that holds nothing tokenizes them in each epoch and arm."""
    from dsd_refine.tasks import text_rows

    calls, tokenized = [], text_rows.tokenized
    monkeypatch.setattr(text_rows, "tokenized", lambda *given, **how: calls.append(1) or tokenized(*given, **how))
    args = (made / "bert", "--data", made / "texts.csv", *SHORT, "--quiet")
    assert command(*args, "-o", tmp_path / "held").code == 0
    assert not calls
    assert command(*args, "-o", tmp_path / "again", "--cache-gb", "0").code == 0
    assert calls
    same(tmp_path / "held", tmp_path / "again")


def test_a_cache_that_is_too_small_is_said_and_a_plan_tells_of_it(command, made, tmp_path):
    args = (made / "timm", "--data", made / "pictures", *SHORT)
    small = command(*args, "-o", tmp_path / "small", "--cache-gb", "0.000001")
    assert small.err.count("cache: it holds a part of the rows") == 1
    assert "cache:" not in command(*args, "-o", tmp_path / "large").err
    assert "25% of the disk space that is free (--cache-gb)" in command("plan", made / "timm", "--data", made / "pictures").out
    assert "--cache-gb" not in command("plan", made / "gpt2", "--data", made / "documents.txt").out
