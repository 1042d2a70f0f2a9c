"""What a run does no more often than it must: imports, loads, decodings, evaluations. Times are benchmarks' (benchmarks/)."""

import ctypes
import platform
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import SHORT, process
from runs import start

from dsd_refine.checkpoint.libraries.timm import TimmLibrary
from dsd_refine.recipe import Recipe
from dsd_refine.run import open as opening
from dsd_refine.run.run import Options
from dsd_refine.system import keep_freed_memory

EPOCHS = ("--sparse-epochs", "2", "--dense-epochs", "1", "--gate", "none", "--device", "cpu", "--quiet", "--batch-size", "8")


def test_texts_do_not_import_the_library_of_pictures(made, tmp_path):
    """Pictures of timm do not import transformers: test_command.py::test_stdout_is_the_result_alone."""
    done = start(made / "bert", "--data", made / "texts.csv", "-o", tmp_path / "out", *SHORT, "--quiet", absent="timm")
    assert done.returncode == 0, done.stderr


def test_the_source_is_loaded_once_whatever_the_arms(command, made, tmp_path, monkeypatch):
    """By us; its own library loads it once as a user does, and the output once."""
    loads: Counter[str] = Counter()
    for name in ("load", "load_plain"):
        real = getattr(TimmLibrary, name)

        def counted(self, *given, real=real, name=name):
            loads[name] += 1
            return real(self, *given)

        monkeypatch.setattr(TimmLibrary, name, counted)
    arms = ("--control", "dense", "--control", "random", "--seeds", "2")
    found = command(made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", *SHORT, "--gate", "none", *arms)
    assert found.code == 0, found.err
    assert loads == {"load": 1, "load_plain": 2}


FAULTS = """
import resource, torch
from dsd_refine.system import keep_freed_memory
kept = {keep} and keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(2_000_000) for _ in range(20)]  # of 8 MB each, as a step's activations
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, *_, last = (faults() for _ in range(8))  # the first few still find room between what lies there
print(kept, first, last)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is what is told")
@pytest.mark.parametrize("keep", [True, False])
def test_memory_that_a_step_lets_go_of_is_not_fetched_again_page_by_page(keep):
    """From a glibc that gives all of it back; left to itself it does so or not, by what lies at its heap's top."""
    gives_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    told, first, last = process("-c", FAULTS.format(keep=keep), **gives_back).stdout.split()
    assert told == str(keep)
    assert (int(last) * 20 < int(first)) == keep


def test_an_allocator_that_is_not_glibc_s_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("nothing is to be told"))
    assert not keep_freed_memory()


@pytest.mark.parametrize(("device", "kept"), [("cpu", 1), ("cuda", 0)])
def test_a_run_on_a_cpu_keeps_its_memory(monkeypatch, device, kept):
    asked = []
    monkeypatch.setattr(opening, "keep_freed_memory", lambda: asked.append(1))
    monkeypatch.setattr(opening, "Accelerator", lambda **_: SimpleNamespace(
        device=torch.device(device), mixed_precision="no", distributed_type=DistributedType.NO, scaler=None))  # fmt: skip
    recipe = Recipe.model_validate({"phases": [{"kind": "dense", "steps": 1, "lr": 0.1}]})
    opening.open_accelerator(recipe, Options(output_dir=Path("out")))
    assert len(asked) == kept
