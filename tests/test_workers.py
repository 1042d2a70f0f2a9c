"""Processes that load data, however they start: Python 3.14 and macOS neither fork nor inherit what is in memory."""

import os
import pickle
from contextlib import contextmanager
from multiprocessing import get_start_method, set_start_method
from pathlib import Path
from types import SimpleNamespace

import builders
import pytest
import torch
from conftest import SHORT
from runs import run_server
from safetensors.torch import load_file
from tasks import open_task

from dsd_refine.checkpoint.checkpoint import open_shapes
from dsd_refine.checkpoint.libraries.open import open_library
from dsd_refine.checkpoint.source import find_source
from dsd_refine.recipe import match_recipe, read_recipe, validate
from dsd_refine.training.batches import loader


@contextmanager
def started_by(method):
    """Worker processes start so. A server has imported what they need; a spawned one imports it itself."""
    before = get_start_method(allow_none=True)
    if method == "forkserver":
        run_server()
    set_start_method(method, force=True)
    try:
        yield
    finally:
        set_start_method(before, force=True)


def test_workers_that_are_not_forked_change_nothing(command, made, tmp_path):
    """Forked ones: test_run.py::test_workers_change_nothing."""
    args = [made / "timm", "--data", made / "pictures", *SHORT, "--control", "none", "--quiet", "--holdout", "0"]
    args += ["--keep", "sparse", "--sparse-steps", "1"]
    with started_by("forkserver"):
        assert command(*args, "-o", tmp_path / "with", "--workers", "1").code == 0
    assert command(*args, "-o", tmp_path / "without").code == 0
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("with", "without"))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_a_worker_that_starts_from_nothing_makes_the_same_batches(made, tmp_path):
    task = task_of(made / "timm", made / "pictures", tmp_path / "cache")
    plan = [([(0, None), (1, None)], True), ([(2, 7), (3, 7)], True), ([(4, 7)], False)]
    with started_by("spawn"):
        one = list(loader(SimpleNamespace(task=task, workers=1), task.train, plan))
    two = list(loader(SimpleNamespace(task=task, workers=0), task.train, plan))
    assert [batch.count for batch in one] == [batch.count for batch in two] == [2, 2, 0]
    for mine, other in zip(one, two, strict=True):
        assert torch.equal(mine.targets, other.targets)
        assert all(torch.equal(value, other.inputs[name]) for name, value in mine.inputs.items())


MAKERS = {
    "timm": (builders.timm_checkpoint, builders.image_folder),
    "vit": (builders.vit_checkpoint, lambda place: builders.image_folder(place, channels=3)),
    "torchvision": (builders.torchvision_checkpoint, lambda place: builders.image_folder(place, channels=3)),
    "bert": (builders.bert_checkpoint, lambda place: builders.text_csv(place.with_suffix(".csv"))),
    "gpt2": (builders.gpt2_checkpoint, lambda place: builders.text_file(place.with_suffix(".txt"))),
    "masked": (builders.masked_checkpoint, lambda place: builders.text_file(place.with_suffix(".txt"))),
    "ctc": (builders.ctc_checkpoint, builders.speech_folder),
    "captions": (builders.caption_checkpoint, builders.caption_folder),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_task_goes_to_another_process_whole(tmp_path, kind):
    """What a worker is given is the task: it makes the same batches of it there, augmented or not."""
    make_model, make_data = MAKERS[kind]
    make_model(tmp_path / "model")
    data = make_data(tmp_path / "data")
    task = task_of(tmp_path / "model", data if isinstance(data, os.PathLike) else tmp_path / "data", tmp_path / "cache")
    other = pickle.loads(pickle.dumps(task))
    for seed in (None, 7):
        one, two = (each.batch(each.train, [(0, seed), (1, seed)]) for each in (task, other))
        assert one.inputs.keys() == two.inputs.keys()
        assert all(torch.equal(value, two.inputs[name]) for name, value in one.inputs.items())
        assert torch.equal(one.targets, two.targets)


def task_of(model, data, cache):
    source = find_source(str(model))
    library = open_library(source)
    path, _ = match_recipe(library.names, library.task)
    recipe = validate({**read_recipe(path), "data": str(data), "task": library.task}, Path(path).name)
    return open_task(recipe, library, open_shapes(source, library).model, cache)
