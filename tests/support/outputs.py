"""Look at the output of a run, and compare two of them."""

import json

import torch
from safetensors.torch import load_file


def report_of(out):
    """The report of a finished run."""
    return json.loads((out / "dsd/report.json").read_text())


def strip(report):
    """A report without what differs between two runs of one command: times and paths."""
    report = json.loads(json.dumps(report))
    for phase in report["phases"]:
        del phase["seconds"], phase["samples_per_second"]
    del report["argv"], report["output"]["path"], report["cost"]
    return report


def same(one, two):
    """Two outputs are equal byte for byte, and their reports but for times and paths."""
    for name in ("model.safetensors", "dsd/predictions.parquet", "dsd/log.jsonl", "dsd/recipe.yaml"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert strip(report_of(one)) == strip(report_of(two))


def near(one, two, most=1e-5):
    """The weights of two outputs are equal but for rounding: they differ by `most` at most."""
    one, two = (
        {name: value for file in sorted(out.glob("model*.safetensors")) for name, value in load_file(file).items()}
        for out in (one, two)
    )
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=0, atol=most), name
