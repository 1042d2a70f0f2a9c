"""`verify` says what is wrong with an output, and nothing about a right one."""

import hashlib
import json
import struct
from pathlib import Path

import hostile
import pytest
import torch
from builders import copy_folder, write_tensors
from runs import fresh, run_command
from safetensors.torch import load_file

from dsd_refine.checkpoint.safetensors_file import read_header


@pytest.fixture
def output(finished, tmp_path):
    """A finished run's output, to spoil."""
    return copy_folder(finished, tmp_path / "out")


def source_of(output):
    return json.loads((output / "dsd/report.json").read_text())["source"]["resolved"]


def verified(command, output):
    return command("verify", source_of(output), output)


def test_a_right_output_passes(command, output):
    found = verified(command, output)
    assert found.code == 0, found.out
    assert "same files" in found.out


def rehashed(output):
    """Let the report be right about the weight files as they are now, so that no hash tells what was done to them."""
    report = json.loads((output / "dsd/report.json").read_text())
    for side, root in (("output", output), ("source", Path(report["source"]["resolved"]))):
        for item in report[side]["files"]:
            item["sha256"] = hashlib.sha256((root / item["name"]).read_bytes()).hexdigest()
    (output / "dsd/report.json").write_text(json.dumps(report))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


SPOILED = {
    "a changed weight": (lambda out: flip(out / "model.safetensors", -2), "SHA-256"),
    "a changed header": (lambda out: flip(out / "model.safetensors", 30), ""),
    "a changed side file": (lambda out: (out / "config.json").write_text("{}"), "config.json: differs"),
    "a missing side file": (lambda out: (out / "config.json").unlink(), "config.json: the source has it"),
    "a truncated file": (
        lambda out: (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-4]),
        "truncated",
    ),
    "an emptied probe": (lambda out: write_tensors(out / "dsd/probe.safetensors", {}), "holds no example"),
    "a missing probe": (lambda out: (out / "dsd/probe.safetensors").unlink(), "probe.safetensors is missing"),
    "a changed probe": (lambda out: flip(out / "dsd/probe.safetensors", -2), "computes something else"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_is_wrong_is_said_with_exit_code_3(command, output, what):
    spoil, said = SPOILED[what]
    spoil(output)
    found = verified(command, output)
    assert found.code == 3, found.err
    assert said in found.out


@pytest.fixture
def foreign(output, tmp_path):
    """An output, right in itself, of a source with a tensor that the model has not, the last of the file."""
    source = copy_folder(Path(source_of(output)), tmp_path / "source")
    report = json.loads((output / "dsd/report.json").read_text())
    report["source"]["resolved"] = str(source)
    (output / "dsd/report.json").write_text(json.dumps(report))
    for folder in (source, output):
        path = folder / "model.safetensors"
        write_tensors(path, {**load_file(path), "old.weight": torch.tensor([1.0, float("nan")])})
    rehashed(output)
    return output


def test_a_tensor_that_is_not_the_model_s_is_held_against_the_source_whatever_the_hashes_say(command, foreign):
    found = verified(command, foreign)
    assert found.code == 0, found.out  # NaN is the source's own, and none of ours
    flip(foreign / "model.safetensors", -1)
    rehashed(foreign)
    found = verified(command, foreign)
    assert found.code == 3
    assert found.out.count("\n  - ") == 1
    assert "old.weight: is not the model's, yet its bytes differ from the source's" in found.out


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named_whatever_the_hashes_say(command, output, value):
    path = output / "model.safetensors"
    at = next(entry.begin for entry in read_header(path).entries if entry.name == "fc.bias")
    data = bytearray(path.read_bytes())
    data[at : at + 4] = struct.pack("<f", value)
    path.write_bytes(data)
    rehashed(output)
    found = verified(command, output)
    assert found.code == 3
    assert "fc.bias: holds values that are not finite" in found.out


@pytest.mark.parametrize("side", ["output", "source"])
def test_any_name_in_the_report_is_held_against_the_folder(output, side):
    """In a process of its own: what stands in a name must come out of a real stdout."""
    report = json.loads((output / "dsd/report.json").read_text())
    report[side]["files"] += [{"name": name, "sha256": "0" * 64} for name in hostile.NAMES]
    (output / "dsd/report.json").write_text(json.dumps(report))
    (output / "link").symlink_to("link")
    found = fresh(run_command, "verify", source_of(output), output)
    assert found.returncode == 3, found.stderr
    assert found.stdout.count(f": SHA-256 of the {side}'s file is not the one in the report") == len(hostile.NAMES)
    assert max(map(len, found.stdout.splitlines())) < 300


def test_something_else_is_no_output(refused, tmp_path, output):
    assert "not an output of dsd-refine" in refused("verify", source_of(output), tmp_path)


def test_weights_beside_those_written_and_an_emptied_list_are_seen(command, output):
    (output / "pytorch_model.bin").write_bytes(b"x")
    assert "holds weights that the run did not write" in verified(command, output).out
    (output / "pytorch_model.bin").unlink()
    report = json.loads((output / "dsd/report.json").read_text())
    report["output"]["files"] = []
    (output / "dsd/report.json").write_text(json.dumps(report))
    assert "does not list it" in verified(command, output).out
