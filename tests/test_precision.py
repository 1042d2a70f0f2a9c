"""Autocast, torch.compile and channels-last: how steps are computed, which must not change what the method does."""

import functools
import json
import os

import builders
import pytest
import torch
from accelerate.state import AcceleratorState
from forked import Child, preload
from forked import command as run_command
from runs import fresh, run_program
from safetensors.torch import load_file
from torch import nn

from dsd_refine.run.open import channels_last

SHORT = (
    "--gate",
    "none",
    "--batch-size",
    "8",
    "--device",
    "cpu",
    "--quiet",
    "--sparse-steps",
    "4",
    "--dense-steps",
    "2",
    "--control",
    "none",
    "--lr",
    "0.001",
)


@pytest.fixture(scope="module", autouse=True)
def imported():
    preload()


@pytest.fixture(scope="module")
def plain(made, tmp_path_factory):
    """The run without any of it."""
    return run(made, tmp_path_factory.mktemp("plain"))


def run(made, place, *more, before=lambda: None):
    """OUT of a run in a process of its own: Accelerate sets a precision once."""

    def work():
        AcceleratorState._reset_state(reset_partial_state=True)  # what a test before has set, and the fork with it
        before()
        run_command(made / "timm", "--data", made / "pictures", "-o", place / "out", "--save-phases", *SHORT, *more)()

    child = Child(work, place / "log")
    assert child.wait() == 0, child.said()
    return place / "out"


def losses(out):
    lines = [json.loads(line) for line in (out / "dsd/log.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if "loss" in line and "step" in line])


def zeros_are_exact(out):
    layers = [layer for layer in json.loads((out / "dsd/report.json").read_text())["layers"] if layer["excluded"] is None]
    assert len(layers) > 1
    return all(layer["zeros_in_sparse"] == layer["masked"] for layer in layers)


def test_autocast_trains_float32_masters(made, plain, tmp_path):
    out = run(made, tmp_path, "--mixed-precision", "bf16")
    assert zeros_are_exact(out)
    assert not torch.equal(losses(out), losses(plain))  # it is at work
    assert torch.allclose(losses(out), losses(plain), rtol=0.05)
    weights = load_file(out / "model.safetensors")
    for name, value in load_file(plain / "model.safetensors").items():
        assert weights[name].dtype == value.dtype
        assert value.numel() < 100 or not torch.equal(weights[name], weights[name].bfloat16().to(value.dtype))


def test_a_precision_that_accelerate_decides_is_in_the_recipe(made, plain, tmp_path):
    """The recipe in the output repeats the run, whatever is configured where it is given back."""

    def configured():
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"

    out = run(made, tmp_path, before=configured)
    assert "mixed_precision: bf16" in (out / "dsd/recipe.yaml").read_text()
    assert "mixed_precision: 'no'" in (plain / "dsd/recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("precision", "says"),
    [("fp16", "--mixed-precision fp16 needs a GPU"), ("fp8", "accelerate refuses this device and precision")],
)
def test_a_precision_that_is_not_to_be_had_is_refused(made, tmp_path, precision, says):
    """Accelerate itself computes in float32 where it is asked for fp16 on a CPU."""

    def work():
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ["ACCELERATE_MIXED_PRECISION"] = precision
        run_command(made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", *SHORT)()

    child = Child(work, tmp_path / "log")
    assert child.wait() == 2, child.said()
    assert says in child.said()
    assert "Traceback" not in child.said()
    assert not list(tmp_path.glob("out*"))


def test_compiled_steps_do_the_same(made, plain, tmp_path):
    """Traced and run without a compiler, which takes minutes and a machine that has one."""

    def traced():
        torch.compile = functools.partial(torch.compile, backend="aot_eager")

    out = run(made, tmp_path, "--compile", before=traced)
    assert zeros_are_exact(out)
    assert torch.allclose(losses(out), losses(plain), rtol=1e-4)
    weights = load_file(out / "model.safetensors")
    assert all(
        torch.allclose(weights[n], value, rtol=1e-3, atol=1e-5) for n, value in load_file(plain / "model.safetensors").items()
    )


def without_compiler(*args):
    """The command, as CXX=/nonexistent makes it: torch reads that when it is imported."""
    from torch._inductor import config

    config.cpp.cxx = (None, "/nonexistent")
    run_program("cli.py", *args)


def test_compile_without_a_compiler_is_refused_before_the_first_step(made, tmp_path):
    args = (made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", "--compile", *SHORT)
    done = fresh(without_compiler, *args, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 2
    assert "--compile: torch.compile does not work here" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_convolutions_compute_channels_last(made, command, tmp_path, monkeypatch):
    seen, forward = [], torch.nn.Conv2d.forward

    def spied(self, values):
        if self.training and values.shape[1] > 1 and values.shape[2] > 1:  # elsewhere both orders are one
            seen.append(values.is_contiguous(memory_format=torch.channels_last) and not values.is_contiguous())
        return forward(self, values)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", spied)
    assert command(made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", *SHORT).code == 0
    assert len(seen) > 6
    assert all(seen)


@pytest.mark.parametrize(
    ("layer", "device", "last"),
    [
        (nn.Conv2d(8, 16, 1, stride=2), "cpu", False),
        (nn.Conv2d(15, 16, 1, stride=(1, 2)), "cpu", False),
        (nn.Conv2d(8, 16, 1, stride=2), "cuda", True),
        (nn.Conv2d(16, 16, 1, stride=2), "cpu", True),
        (nn.Conv2d(8, 16, 1), "cpu", True),
        (nn.Conv2d(8, 16, 3, stride=2), "cpu", True),
        (nn.Linear(8, 16), "cpu", False),
    ],
)
def test_channels_come_last_where_their_gradients_are_right(layer, device, last):
    assert channels_last(nn.Sequential(nn.ReLU(), layer), torch.device(device)) is last


def test_a_narrow_network_trains(tmp_path):
    """Channels-last its second stage's shortcut, 1x1 with 8 channels in, kills the process or gives wrong gradients."""
    source = builders.timm_checkpoint(tmp_path / "net", arch="resnet18", channels=(8, 16, 16, 16), in_chans=3, size=288)
    data = builders.image_folder(tmp_path / "data", size=288, channels=3)
    child = Child(run_command(source, "--data", data, "-o", tmp_path / "out", *SHORT), tmp_path / "log")
    assert child.wait() == 0, child.said()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_each_arm_finds_its_loss_scale_anew(command, made, tmp_path, monkeypatch, optimizer):
    """A scale that is far too large skips first steps: of every arm, not only of the one that comes first (rule 15)."""
    from dsd_refine.run import open as opening

    real = opening.open_accelerator

    def scaled(*args):
        accelerator = real(*args)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # finite, and no gradient times it is
        return accelerator

    monkeypatch.setattr(opening, "open_accelerator", scaled)
    args = [made / "timm", "--data", made / "pictures", *SHORT[: SHORT.index("--control")], "--sparse-steps", "8"]
    more = ["--optimizer", optimizer, "--lr", "0.001", "--control", "dense", "--control", "random"]
    found = command(*args, *more, "-o", tmp_path / "out")
    assert found.code == 0, found.err
    phases = json.loads((tmp_path / "out/dsd/report.json").read_text())["phases"]
    first, second = (dict.fromkeys(("refined", "dense", "random"), 0) for _ in range(2))
    for number, phase in enumerate(phases):
        (second if number % 2 else first)[phase["arm"]] = phase["optimizer_steps"]
    assert all(steps < 8 for steps in first.values()), first
    assert set(second.values()) == {2}  # within an arm it is kept
