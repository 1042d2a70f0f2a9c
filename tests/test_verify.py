"""`verify` says what is wrong with an output, and nothing about a right one."""

import json

import pytest
from builders import copy_folder


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


def test_something_else_is_no_output(refused, tmp_path, output):
    assert "no output of dsd-refine" in refused("verify", source_of(output), tmp_path)


def test_weights_beside_those_written_and_an_emptied_list_are_seen(command, output):
    import json

    (output / "pytorch_model.bin").write_bytes(b"x")
    assert "holds weights that the run did not write" in verified(command, output).out
    (output / "pytorch_model.bin").unlink()
    report = json.loads((output / "dsd/report.json").read_text())
    report["output"]["files"] = []
    (output / "dsd/report.json").write_text(json.dumps(report))
    assert "does not list it" in verified(command, output).out
