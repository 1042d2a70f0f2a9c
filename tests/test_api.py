"""The Python API: the command's verbs as functions. The caller's process is as it was afterwards."""

import ast
import inspect
import logging
import os
import random
import re
import shutil
import tempfile
import textwrap
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, hashes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dsd_refine
from dsd_refine import DataError, RecipeError, Report, UsageError

SHORT = {"sparse_steps": 3, "dense_steps": 2, "gate": "none", "batch_size": 8, "device": "cpu"}


def refined(made, out, **more):
    return dsd_refine.refine(made / "timm", output_dir=out, **({"data": made / "pictures"} | SHORT | more))


def weights(out):
    return hashes(out)["model.safetensors"]


@pytest.fixture(scope="module")
def done(made, tmp_path_factory):
    """A finished run and its report."""
    out = tmp_path_factory.mktemp("api") / "out"
    return out, refined(made, out, sparsity=0.3)


def test_the_exported_names_and_signatures_are_these():
    assert sorted(dsd_refine.__all__) == dsd_refine.__all__
    functions = {
        name: getattr(dsd_refine, name) for name in dsd_refine.__all__ if inspect.isfunction(getattr(dsd_refine, name))
    }
    shown = {name: list(inspect.signature(function).parameters) for name, function in functions.items()}
    assert shown == {
        "apply_masks": ["model", "masks"],
        "compare": ["outputs"],
        "make_masks": ["model", "sparsity", "include", "exclude", "first", "criterion", "seed"],
        "open_checkpoint": ["source", "library", "allow_pickle", "weights_key"],
        "plan": ["model", "data", "eval_data", "recipe", "measured", "options"],
        "refine": ["model", "data", "eval_data", "output_dir", "recipe", "folder", "callbacks", "quiet", "options"],
        "verify": ["source", "output", "trust_remote_code", "allow_pickle", "weights_key"],
    }
    for name in dsd_refine.__all__:
        assert getattr(dsd_refine, name).__doc__, name


def test_it_writes_what_the_command_writes(command, made, done, tmp_path):
    args = ["--sparse-steps", "3", "--dense-steps", "2", "--gate", "none", "--batch-size", "8", "--device", "cpu"]
    command(made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", *args, "--sparsity", "0.3", "--quiet")
    assert weights(tmp_path / "out") == weights(done[0])


def test_the_report_is_typed_and_comes_back_from_its_folder(done):
    out, report = done
    assert report.folder == out
    assert report.verdict in ("better", "worse", "same", "inconclusive")
    assert report.credit in ("mask", "training", "none", "unknown")
    assert report.arms["refined"]["accuracy"] == report.data["arms"]["refined"]["accuracy"]
    low, high = report.comparison["dense"].ci95
    assert low <= report.comparison["dense"].delta <= high
    again = Report.load(out)
    assert again.arms == report.arms
    assert again.comparison == report.comparison
    rows = report.to_pandas()
    assert len(rows) == report.data["data"]["eval"]["rows"]
    assert rows["score_refined"].mean() == pytest.approx(report.arms["refined"]["accuracy"])
    assert report._repr_html_().startswith("<iframe srcdoc=")
    assert "<script" not in report._repr_html_()
    assert report.verdict in repr(report)
    with pytest.raises(UsageError, match="not an output of dsd-refine"):
        Report.load(out.parent)


def test_verify_and_plan(made, done):
    assert dsd_refine.verify(made / "timm", done[0]) == []
    planned = dsd_refine.plan(made / "timm", data=made / "pictures", sparsity=0.3, sparse_steps=3)
    assert planned["task"] == "image-classification"
    assert "masked at 0.3" in repr(planned)
    assert dict(planned)["task"] == planned.get("task")
    assert "data" in planned
    with pytest.raises(UsageError, match="folder that the module"):
        dsd_refine.plan(nn.Linear(2, 2), data=made / "pictures")
    with pytest.raises(UsageError, match="not an output"):
        dsd_refine.verify(made / "timm", made)


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"sparcity": 0.3}, UsageError, "did you mean 'sparsity'"),
        ({"sparsity": 1.5}, RecipeError, "sparsity"),
        ({"lr": "fast"}, RecipeError, "lr"),
        ({"data": None}, DataError, "no data"),
        ({"data": 7}, UsageError, "expected a path"),
        ({"task": "paint"}, UsageError, "not a task"),
        ({"folder": "x"}, UsageError, "open module"),
        ({"recipe": "resnet500"}, UsageError, "resnet500"),
        ({"recipe": {}}, UsageError, "expected a name, a file or a Recipe"),
        ({"phases": "dense"}, RecipeError, "phases: a list"),
        ({"include": 3}, RecipeError, "include"),
        ({"control": 5}, RecipeError, "control"),
        ({"expect": [0.5]}, RecipeError, "expect"),
        ({"sparsity": np.array([0.2, 0.3])}, RecipeError, "sparsity"),
        ({"device": "tpu"}, RecipeError, "device"),
        ({"workers": -1}, RecipeError, "workers"),
        ({"save_every": "often"}, RecipeError, "save_every"),
        ({"report_images": 101}, RecipeError, "report_images"),
        ({"yes": "no"}, RecipeError, "yes"),
        ({"compile": "no"}, RecipeError, "compile"),
        ({"callbacks": [object()]}, UsageError, "none of the methods"),
        ({"callbacks": 5}, UsageError, "list of objects"),
    ],
)
def test_mistakes_are_errors_of_ours(made, tmp_path, more, error, said):
    with pytest.raises(error, match=said):
        refined(made, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


def test_phases_and_controls_are_what_is_said(made, tmp_path):
    phases = [dsd_refine.Phase(kind="sparse", steps=2, lr=0.02, sparsity=0.25), {"kind": "dense", "steps": 1, "lr": 0.01}]
    options = {"data": made / "pictures", "phases": phases, "gate": "none", "batch_size": 8, "device": "cpu"}
    report = dsd_refine.refine(made / "timm", output_dir=tmp_path / "out", control=(), **options)
    assert [(phase["arm"], phase["kind"], phase["optimizer_steps"]) for phase in report.data["phases"]] == [
        ("refined", "sparse", 2),
        ("refined", "dense", 1),
    ]
    assert report.gate == {"rule": "none", "passed": True}
    assert report.cost["samples"] == 3 * 8
    same = dsd_refine.refine(made / "timm", output_dir=tmp_path / "same", control="none", **options)
    assert weights(same.folder) == weights(report.folder)


def test_one_name_stands_for_a_list_and_a_numpy_number_for_a_number(made, tmp_path):
    listed = refined(made, tmp_path / "a", exclude=["*fc*"], lr=0.5)
    alone = refined(made, tmp_path / "b", exclude="*fc*", lr=np.float64(0.5))
    small = refined(made, tmp_path / "c", exclude="*fc*", lr=np.float32(0.5))
    assert weights(listed.folder) == weights(alone.folder) == weights(small.folder)


def test_a_handler_that_python_did_not_set_is_left_alone(monkeypatch):
    import signal

    from dsd_refine.run.signals import Signals

    set_here = []
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *given: set_here.append(given))
    with Signals():
        pass
    assert set_here == []


def test_a_notebook_shows_its_own_bar(made, tmp_path, monkeypatch, capfd):
    import sys

    import datasets  # noqa: F401 - it makes a class of its own of tqdm.auto's
    import tqdm.auto

    shown = []

    class Bar(tqdm.tqdm):
        def __init__(self, *given, **more):
            if more.get("unit") == " steps":  # and not a library's own
                shown.append(more["total"])
            super().__init__(*given, **more)

    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    refined(made, tmp_path / "out")
    assert shown == [3, 2, 3, 2]  # sparse and dense phase of both arms
    assert "sparse" in capfd.readouterr().err


def state_of_the_process():
    levels = {name: logging.getLogger(name).level for name in ("timm", "datasets", "transformers", "accelerate")}
    return {
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "levels": levels,
        "filters": list(warnings.filters),
        "gradients": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("more", [{}, {"data": "nowhere"}])
def test_a_call_leaves_the_process_as_it_found_it(made, tmp_path, more):
    import datasets  # noqa: F401 - at its import, not in a call, it sets its logger's level
    import transformers
    from accelerate.state import PartialState

    transformers.utils.logging.enable_progress_bar()
    shared, before = dict(PartialState._shared_state), state_of_the_process()
    try:
        refined(made, tmp_path / "out", **more)
    except UsageError:
        assert more
    after = state_of_the_process()
    assert {name for name in before if before[name] != after[name]} == set()
    assert PartialState._shared_state == shared
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_two_calls_may_have_other_precisions_and_threads(made, tmp_path):
    refined(made, tmp_path / "a", mixed_precision="bf16")
    reports = []
    thread = threading.Thread(target=lambda: reports.append(refined(made, tmp_path / "b", mixed_precision="no")))
    thread.start()
    thread.join()
    assert reports[0].exit_code == 0


def test_it_is_quiet_off_a_terminal(made, tmp_path, capfd):
    refined(made, tmp_path / "out")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    refined(made, tmp_path / "told", quiet=False)
    assert "baseline" in capfd.readouterr().err


def test_an_open_data_set_is_read_as_its_file_is(made, tmp_path):
    import datasets

    rows = datasets.load_dataset("csv", data_files=str(made / "texts.csv"), split="train", cache_dir=str(tmp_path / "cache"))
    rows.to_csv(tmp_path / "rows.csv", index=False)
    parts = rows.train_test_split(0.25, seed=0, shuffle=False)
    for name, data in (("a", tmp_path / "rows.csv"), ("b", rows)):
        dsd_refine.refine(made / "bert", data=data, output_dir=tmp_path / name, **SHORT)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    report = dsd_refine.refine(made / "bert", data=parts, output_dir=tmp_path / "c", **SHORT)
    assert report.data["data"]["eval"]["rows"] == len(parts["test"])
    assert {source["file"].split("/")[0] for source in report.data["data"]["sources"]} == {"datasets.DatasetDict"}


def test_an_open_module_is_refined_from_the_values_that_it_holds(made, tmp_path, monkeypatch):
    import timm

    def here(out):
        return dsd_refine.refine(model, folder=".", data=made / "pictures", output_dir=tmp_path / out, **SHORT)

    model = timm.create_model(f"local-dir:{made / 'timm'}", pretrained=True)
    same = dsd_refine.refine(model, folder=made / "timm", data=made / "pictures", output_dir=tmp_path / "same", **SHORT)
    assert same.data["source"]["files"] == refined(made, tmp_path / "file").data["source"]["files"]
    assert weights(tmp_path / "same") == weights(tmp_path / "file")
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    other = dsd_refine.refine(model, folder=made / "timm", data=made / "pictures", output_dir=tmp_path / "other", **SHORT)
    assert other.data["source"]["files"] != same.data["source"]["files"]
    assert other.data["source"]["model"] == f"{made / 'timm'} (an open module)"
    assert tempfile.gettempdir() + "/dsd-refine-" not in other.to_json()
    monkeypatch.chdir(made / "timm")
    assert weights(here("here").folder) == weights(other.folder)
    with pytest.raises(UsageError, match="is not the model"):
        dsd_refine.refine(nn.Linear(2, 2), folder=made / "timm", data=made / "pictures", output_dir=tmp_path / "x", **SHORT)
    with pytest.raises(UsageError, match="folder"):
        dsd_refine.refine(model, data=made / "pictures", output_dir=tmp_path / "x", **SHORT)


def test_several_runs_on_one_baseline(made, done, tmp_path):
    refined(made, tmp_path / "b", sparsity=0.5, seed=3)
    found = dsd_refine.compare([done[0], tmp_path / "b"])
    assert list(found.comparison) == [
        f"{done[0]} vs baseline",
        f"{tmp_path / 'b'} vs baseline",
        f"{done[0]} vs {tmp_path / 'b'}",
    ]
    ours, theirs = found.comparison[f"{done[0]} vs baseline"], done[1].comparison["baseline"]
    assert (ours.delta, ours.p_value, ours.gained, ours.lost) == (theirs.delta, theirs.p_value, theirs.gained, theirs.lost)
    assert ours.p_adjusted >= ours.p_value
    assert list(found.to_pandas().index) == list(found.comparison)
    other = dsd_refine.refine(made / "vit", data=made / "colours", output_dir=tmp_path / "vit", **SHORT)
    with pytest.raises(UsageError, match="no common baseline"):
        dsd_refine.compare([done[0], other.folder])
    with pytest.raises(UsageError, match="two"):
        dsd_refine.compare([done[0]])
    with pytest.raises(UsageError, match="two"):
        dsd_refine.compare(str(done[0]))


@pytest.fixture(scope="module")
def repeated(made, tmp_path_factory):
    """Two runs on evaluation rows that are each there six times."""
    place = tmp_path_factory.mktemp("repeated")
    head, *rows = (made / "texts.csv").read_text().splitlines()
    (place / "train.csv").write_text("\n".join([head, *rows[8:]]) + "\n")
    (place / "test.csv").write_text("\n".join([head, *(rows[:8] * 6)]) + "\n")
    options = {"data": place / "train.csv", "eval_data": place / "test.csv", "lr": 0.5, "control": "none"} | SHORT
    for name, sparsity in (("a", 0.3), ("b", 0.6)):
        dsd_refine.refine(made / "bert", output_dir=place / name, sparsity=sparsity, **options)
    return place


def test_repeated_rows_count_once_as_in_the_report(repeated):
    found = dsd_refine.compare([repeated / "a", repeated / "b"])
    for name in ("a", "b"):
        ours, theirs = found.comparison[f"{repeated / name} vs baseline"], Report.load(repeated / name).comparison["baseline"]
        assert theirs.test == "mcnemar-exact-grouped"
        assert (ours.test, ours.ci95, ours.p_value) == (theirs.test, theirs.ci95, theirs.p_value)


@pytest.mark.parametrize("column", ["score_refined", "loss_baseline", "target"])
def test_predictions_that_are_not_the_reports_are_refused(repeated, tmp_path, column):
    shutil.copytree(repeated / "b", tmp_path / "b")
    file = tmp_path / "b/dsd/predictions.parquet"
    table = Report.load(tmp_path / "b").to_pandas()
    table[column] = "other" if column == "target" else 1 - table[column]
    table.to_parquet(file)
    with pytest.raises(UsageError, match="come out again" if column == "score_refined" else "no common baseline"):
        dsd_refine.compare([repeated / "a", tmp_path / "b"])
    file.write_bytes(b"no table")
    with pytest.raises(UsageError, match="cannot be read"):
        dsd_refine.compare([repeated / "a", tmp_path / "b"])


def test_masks_for_a_loop_of_ones_own():
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.Embedding(3, 4))
    with torch.no_grad():
        model[2].weight.fill_(1.0)  # all the same: the lowest flat indices are masked
    masks = dsd_refine.make_masks(model, sparsity=0.3)
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {"0.weight": 14, "2.weight": 9}
    assert not masks["2.weight"].flatten()[:9].any()
    assert masks["2.weight"].flatten()[9:].all()
    dsd_refine.apply_masks(model, masks)
    assert int((model[0].weight == 0).sum()) == 14
    assert list(dsd_refine.make_masks(model, sparsity=0.3, exclude=["0.*"])) == ["2.weight"]
    for wrong in ({"sparsity": 1.0}, {"sparsity": 0.3, "criterion": "luck"}, {"sparsity": 0.3, "include": ["nothing.*"]}):
        with pytest.raises(UsageError):
            dsd_refine.make_masks(model, **wrong)
    with pytest.raises(UsageError, match="no parameter"):
        dsd_refine.apply_masks(model, {"9.weight": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(UsageError, match="is bool"):
        dsd_refine.apply_masks(model, {"0.weight": torch.ones(6, 8)})


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    sparsity=st.floats(0, 1, exclude_max=True),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    layout=st.sampled_from(["plain", "transposed", "every second row"]),
    levels=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_masks_have_exact_counts_and_break_ties_by_the_lowest_index(rows, columns, sparsity, dtype, layout, levels, seed):
    drawn = torch.randint(1, levels + 1, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)
    views = {
        "plain": drawn,
        "transposed": drawn.t().contiguous().t(),
        "every second row": drawn.repeat_interleave(2, 0)[::2],
    }
    model = nn.Sequential(nn.Linear(columns, rows), nn.BatchNorm1d(rows), nn.Embedding(3, 4)).to(dtype)
    model[0].weight = nn.Parameter(views[layout])
    count = max(0, min(round(sparsity * rows * columns), rows * columns - 1))
    flat = drawn.flatten().tolist()
    masked = set(sorted(range(len(flat)), key=lambda i: (flat[i], i))[:count])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = dsd_refine.make_masks(model, sparsity=sparsity)
    assert list(masks) == (["0.weight"] if count else [])
    dsd_refine.apply_masks(model, masks)
    expected = torch.tensor([0.0 if i in masked else value for i, value in enumerate(flat)], dtype=dtype)
    assert torch.equal(model[0].weight.flatten(), expected)
    for name, value in model.state_dict().items():
        assert name == "0.weight" or torch.equal(value, before[name])


def test_every_example_of_the_documentation_runs(made, tmp_path, monkeypatch):
    """docs/python.md, block by block, in one namespace: `MODEL`, `DATA` and `SHORT` stand for the reader's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imgs").symlink_to(made / "pictures")
    (tmp_path / "my-model").symlink_to(made / "timm")
    text = Path(ROOT, "docs/python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) >= 6
    names = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)


def public_functions():
    """The functions that the package exports, and the methods of its classes, but those that a library's class documents."""
    for name in dsd_refine.__all__:
        exported = getattr(dsd_refine, name)
        if inspect.isfunction(exported):
            yield pytest.param(exported, id=name)
        elif inspect.isclass(exported):
            inherited = {
                method for base in exported.__mro__[1:] if "dsd_refine" not in base.__module__ for method in vars(base)
            }
            for method, function in vars(exported).items():
                if inspect.isfunction(function) and not method.startswith("_") and method not in inherited:
                    yield pytest.param(function, id=f"{name}.{method}")


@pytest.mark.parametrize("function", public_functions())
def test_what_is_public_says_its_arguments_its_result_and_its_errors(function):
    text, signature = inspect.getdoc(function), inspect.signature(function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    if [name for name in signature.parameters if name != "self"]:
        assert "Args:" in text
    if signature.return_annotation not in (None, "None"):
        assert "Return" in text
    if any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree)):
        assert "Raises:" in text
