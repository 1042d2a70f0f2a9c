"""Tries that several processes train side by side give the bytes of a run in one process."""

import json
from types import SimpleNamespace

import pytest
from conftest import ROOT, process
from outputs import report_of, same
from runs import free_port

STEPS = ("--sparse-steps", "3", "--dense-steps", "2", "--gate", "none", "--quiet", "--device", "cpu", "--save-phases")
SEEDS = (*STEPS, "--lr", "0.01", "--control", "dense", "--control", "random", "--seeds", "2", "--set", "soup=greedy")
SEARCH = (*STEPS, "--lr", "0.01", "--control", "dense", "--search", "4")


@pytest.fixture(scope="module")
def place(made, tmp_path_factory):
    """A folder with the outputs of two processes, all of one launch (see tests/support/spread_worker.py)."""
    folder = tmp_path_factory.mktemp("spread")
    seeds = [made / "bert", "--data", made / "texts.csv", *SEEDS]
    search = [made / "bert", "--data", made / "texts.csv", *SEARCH]
    arguments = {"killed": seeds, "seeds": seeds, "search": search}
    (folder / "arguments.json").write_text(json.dumps(arguments, default=str))
    support = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/support'}"
    how = ("--nproc-per-node", 2, "--max-restarts", 1, "--master-addr", "127.0.0.1", "--master-port", free_port())
    done = process("-m", "torch.distributed.run", *how, ROOT / "tests/support/spread_worker.py", folder, PYTHONPATH=support)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is done") == 2
    return SimpleNamespace(folder=folder, seeds=seeds, search=search, said=done.stderr)


@pytest.mark.parametrize("name", ["seeds", "search"])
def test_tries_side_by_side_give_the_bytes_of_one_process(place, command, name):
    """Several seeds, controls and a soup of them; and a search, whose later tries depend on the earlier ones."""
    one = place.folder / f"one-{name}"
    found = command(*getattr(place, name), "-o", one)
    assert found.code == 0, found.err
    same(one, place.folder / name)
    assert report_of(place.folder / name)["environment"]["processes"] == 1
    phases = [path.relative_to(one) for path in sorted(one.rglob("dsd/phases/**/model.safetensors"))]
    assert phases
    assert all((one / path).read_bytes() == (place.folder / name / path).read_bytes() for path in phases)
    assert not (place.folder / f"{name}.partial").exists()


def test_tries_go_on_to_the_same_bytes_after_a_kill_and_a_stop(place):
    """One process was killed in the middle of a try, and the other was stopped by the launcher."""
    assert "process 0 ended with 4" in place.said
    assert place.said.count("Error: stopped ") == 1
    same(place.folder / "seeds", place.folder / "killed")


def test_spread_goes_with_the_whole_model_alone(made, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refused(made / "bert", "--data", made / "texts.csv", "-o", made / "out", *STEPS, "--shard", "--spread", "tries")
    assert "give one of them" in message


def test_one_process_has_nobody_beside_it(made, command, tmp_path):
    found = command(made / "bert", "--data", made / "texts.csv", *STEPS, "-o", tmp_path / "out", "--spread", "tries")
    assert found.code == 0, found.err
