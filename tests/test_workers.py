"""Processes that load data, however they start: Python 3.14 and macOS neither fork nor inherit what is in memory."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import builders
import pytest
import torch
from conftest import ROOT, SHORT, environment
from safetensors.torch import load_file
from tasks import open_task

from dsd_refine.checkpoint.checkpoint import open_shapes
from dsd_refine.checkpoint.libraries.open import open_library
from dsd_refine.checkpoint.source import find_source
from dsd_refine.recipe import match_recipe, read_recipe, validate

SCRIPT = """
import sys
from multiprocessing import set_start_method
from dsd_refine.cli.app import main

if __name__ == "__main__":
    set_start_method(sys.argv.pop(1))
    main()
"""


@pytest.mark.parametrize(("method", "model", "data"), [("spawn", "timm", "pictures")])
def test_workers_that_are_not_forked_change_nothing(command, made, tmp_path, method, model, data):
    """Forked ones: test_run.py::test_workers_change_nothing."""
    (tmp_path / "start.py").write_text(SCRIPT)
    args = [made / model, "--data", made / data, *SHORT, "--control", "none", "--quiet", "--holdout", "0"]
    args += ["--keep", "sparse", "--sparse-steps", "1"]  # workers start three times: each start imports torch
    how = [sys.executable, tmp_path / "start.py", method, *args, "-o", tmp_path / "with", "--workers", "1"]
    done = subprocess.run(list(map(str, how)), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert command(*args, "-o", tmp_path / "without").code == 0
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("with", "without"))
    assert all(torch.equal(one[name], two[name]) for name in two)


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
