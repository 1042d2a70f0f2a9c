"""benchmarks/efficacy: a trial leaves one line in the ledger, and is not run again."""

import json

from conftest import ROOT
from runs import fresh, run_program


def search(tmp_path, *options):
    ledger = tmp_path / "demo.jsonl"
    quick = ("--quick", "--seeds", "1", "--only", "dsd 30 %, x1", "--ledger", ledger)
    found = fresh(run_program, ROOT / "benchmarks/efficacy/search.py", "demo", tmp_path / "work", *quick, *options)
    assert found.returncode == 0, found.stderr
    return ledger, found.stdout


def test_a_trial_leaves_one_line_and_is_not_run_again(tmp_path):
    """Without its checkpoint a second search could run nothing: what is in the ledger is not needed any more."""
    ledger, shown = search(tmp_path)
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [(line["setting"], line["arm"], line["seed"]) for line in lines] == [
        ("dsd 30 %, x1", "refined", 0),
        ("dsd 30 %, x1", "dense", 0),
    ]
    assert [[phase["kind"] for phase in line["recipe"]["phases"]] for line in lines] == [
        ["sparse", "dense"],
        ["dense", "dense"],
    ]
    for line in lines:
        assert line["gain"] == round(line["gained"] - line["lost"]) / line["rows"]
        assert line["source"] == lines[0]["source"]
    before = ledger.read_bytes()
    (tmp_path / "work/demo/0/checkpoint/model.safetensors").unlink()
    assert search(tmp_path) == (ledger, shown)
    assert ledger.read_bytes() == before
