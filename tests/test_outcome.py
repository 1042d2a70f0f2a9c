"""What a CI job gets of a run: --summary, --junit and trackers. None of them changes a byte of the result."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import reports
from conftest import SHORT, hashes
from outputs import report_of

import dsd_refine
from dsd_refine.report import words
from dsd_refine.report.junit import failed_junit, junit
from dsd_refine.report.markdown import code, plain
from dsd_refine.report.notes import failure_notes, notes
from dsd_refine.run.tracking import settings_of

WEIGHTS = "model.safetensors"


def short_run(made, out, *more):
    return (made / "timm", "--data", made / "pictures", "-o", out, *SHORT, "--quiet", *more)


def test_a_run_writes_both_files_and_the_same_bytes(command, made, finished, tmp_path):
    found = command(*short_run(made, tmp_path / "out", "--summary", tmp_path / "s.md", "--junit", tmp_path / "j.xml"))
    assert found.code == 0, found.err
    assert hashes(tmp_path / "out")[WEIGHTS] == hashes(finished)[WEIGHTS]
    report = report_of(tmp_path / "out")
    assert (tmp_path / "s.md").read_text() == notes(report)
    suite = ElementTree.parse(tmp_path / "j.xml").getroot()
    assert {name: suite.get(name) for name in ("tests", "failures", "errors")} == {"tests": "2", "failures": "0", "errors": "0"}


def test_a_gate_that_is_not_met_is_a_failure_with_what_to_try(command, made, tmp_path):
    args = short_run(made, tmp_path / "out", "--summary", tmp_path / "s.md", "--junit", tmp_path / "j.xml")
    found = command(*args, "--gate", "better", "--sparse-steps", "0", "--dense-steps", "0", "--sparsity", "0")
    assert found.code == 3, found.err
    text = (tmp_path / "s.md").read_text()
    assert "NOT met" in text
    assert f"**What next** {plain(words.what_next(report_of(tmp_path / 'out')))}" in text
    suite = ElementTree.parse(tmp_path / "j.xml").getroot()
    assert suite.get("failures") == "1"
    assert "gate better" in suite.find("testcase/failure").get("message")


def test_a_run_that_is_refused_says_so_in_both(command, made, tmp_path):
    args = (made / "timm", "--data", tmp_path / "none", "-o", tmp_path / "out", "--device", "cpu")
    found = command(*args, "--summary", tmp_path / "s.md", "--junit", tmp_path / "j.xml")
    assert found.code == 2
    assert "dsd-refine: no result" in (tmp_path / "s.md").read_text()
    suite = ElementTree.parse(tmp_path / "j.xml").getroot()
    assert suite.get("errors") == "1"
    assert suite.find("testcase/error").get("message") in found.err


@pytest.mark.parametrize("option", ["--summary", "--junit"])
def test_a_place_that_cannot_be_written_is_refused_before_the_run(refused, made, tmp_path, option):
    assert "must be a file in a folder that exists" in refused(*short_run(made, tmp_path / "out", option, tmp_path / "no/file"))
    assert "must be a file in a folder that exists" in refused(*short_run(made, tmp_path / "out", option, tmp_path))


def test_a_finished_run_that_is_resumed_writes_them_again(command, made, finished, tmp_path):
    found = command(*short_run(made, finished, "--resume", "--summary", tmp_path / "s.md"))
    assert found.code == 0, found.err
    assert (tmp_path / "s.md").read_text() == notes(report_of(finished))


def test_the_notes_name_arms_intervals_changed_rows_and_what_next():
    text = notes(reports.report())
    assert "| refined vs baseline | +0.0300 | +0.0150 to +0.0410 |" in text
    assert "| the source right | 890 | 10 lost |" in text
    assert "| the source wrong | 40 gained | 60 |" in text
    assert "**What next** Use it" in text
    assert "refined right" not in notes(reports.loss_report())
    assert "something is odd" in notes(reports.loss_report())


def test_names_and_warnings_from_outside_break_neither_markdown_nor_xml():
    report = reports.report(warnings=[reports.HOSTILE, "\x00\x1b[31m\ud800"])
    report["source"]["model"] = reports.HOSTILE
    text = notes(report)
    assert "<script" not in text.replace(code(reports.HOSTILE), "")
    text.encode()
    assert ElementTree.fromstring(junit(report).partition("\n")[2]).get("name") == "dsd-refine"
    ElementTree.fromstring(failed_junit(reports.HOSTILE + "\x00").partition("\n")[2])
    assert "<script" not in failure_notes(reports.HOSTILE)


def test_many_warnings_are_counted():
    text = notes(reports.report(warnings=[f"number {n}" for n in range(50)]))
    assert "- number 19\n- and 30 more" in text


def test_tensorboard_has_losses_rates_holdout_arms_and_verdict(command, made, finished, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    found = command(*short_run(made, tmp_path / "out", "--report-to", "tensorboard"))
    assert found.code == 0, found.err
    assert hashes(tmp_path / "out")[WEIGHTS] == hashes(finished)[WEIGHTS]
    events = EventAccumulator(str(tmp_path / "runs/out"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "out/dsd/log.jsonl").read_text().splitlines()]
    for arm in ("refined", "dense"):
        steps = [line for line in lines if line["event"] == "step" and line["arm"] == arm]
        assert [event.value for event in events.Scalars(f"{arm}/loss")] == pytest.approx([line["loss"] for line in steps])
        assert [event.value for event in events.Scalars(f"{arm}/lr")] == pytest.approx([line["lr"] for line in steps])
        assert len(events.Scalars(f"{arm}/holdout/accuracy")) == sum(
            line["event"] == "evaluation" and line["arm"] == arm and line["part"] == "holdout" for line in lines
        )
    assert [event.step for event in events.Scalars("refined/loss")] == [1, 2, 3, 4, 5]
    assert [event.step for event in events.Scalars("dense/loss")] == [6, 7, 8, 9, 10]
    report = report_of(tmp_path / "out")
    for arm, metrics in report["arms"].items():
        assert events.Scalars(f"eval/{arm}/accuracy")[0].value == pytest.approx(metrics["accuracy"])
    (verdict,) = events.Tensors("verdict/text_summary")
    assert verdict.tensor_proto.string_val[0].decode() == report["verdict"]


def test_mlflow_has_them_too(command, made, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    found = command(*short_run(made, tmp_path / "out", "--report-to", "mlflow"))
    assert found.code == 0, found.err
    client = mlflow.MlflowClient()
    (experiment,) = [found for found in client.search_experiments() if found.name == "dsd-refine"]
    (run,) = client.search_runs([experiment.experiment_id])
    report = report_of(tmp_path / "out")
    assert run.info.status == "FINISHED"
    assert run.data.tags["verdict"] == report["verdict"]
    assert run.data.params["phase1.kind"] == "sparse"
    assert run.data.metrics["eval/refined/accuracy"] == pytest.approx(report["arms"]["refined"]["accuracy"])
    assert [point.step for point in client.get_metric_history(run.info.run_id, "refined/loss")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("name", "says"), [("comet", "not a tracker; known are tensorboard"), ("wandb", "is not installed")])
def test_a_tracker_that_is_not_there_is_refused_before_the_run(refused, made, tmp_path, name, says):
    assert says in refused(*short_run(made, tmp_path / "out", "--report-to", name))


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_trackio_and_wandb_are_called_as_accelerate_calls_them(command, made, tmp_path, monkeypatch, name):
    """Their packages are stood in for: what arrives is what a real one would be given."""
    came, run = [], SimpleNamespace()
    run.log = lambda values, step=None: came.append((step, values))
    run.finish = lambda: came.append("finish")
    fake = SimpleNamespace(init=lambda **given: came.append(given) or run, config=SimpleNamespace(update=lambda *a, **b: None))
    monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [name])
    found = command(*short_run(made, tmp_path / "out", "--report-to", name))
    assert found.code == 0, found.err
    assert came[0] == {"project": "dsd-refine", "name": "out"}
    assert came[-1] == "finish"
    steps = [step for step, values in came[1:-1]]
    assert steps == sorted(steps), "some trackers take rising steps only"
    assert came[-2][1]["verdict"] == report_of(tmp_path / "out")["verdict"]


class Failing:
    """A tracker that starts, and fails at the second value."""

    name = "tensorboard"

    def __init__(self, *args, **more):
        self.logged = 0

    def start(self):
        if self.logged is None:
            raise OSError("no server")

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None):
        self.logged += 1
        if self.logged > 1:
            raise OSError("the server went away")

    def finish(self):
        raise AssertionError("dropped trackers are not asked again")


def test_a_tracker_that_fails_while_the_run_trains_is_dropped_and_said_once(command, made, finished, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker", Failing)
    args = [arg for arg in short_run(made, tmp_path / "out", "--report-to", "tensorboard") if arg != "--quiet"]
    found = command(*args)
    assert found.code == 0, found.err
    assert found.err.count("--report-to tensorboard: it failed and gets no more values (the server went away)") == 1
    assert hashes(tmp_path / "out")[WEIGHTS] == hashes(finished)[WEIGHTS]


def test_a_tracker_that_cannot_start_stops_the_run_before_its_first_step(command, made, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")

    def start(self):
        raise OSError("no server")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker", type("Unable", (Failing,), {"start": start}))
    found = command(*short_run(made, tmp_path / "out", "--report-to", "tensorboard"))
    assert found.code == 2
    assert "--report-to tensorboard: cannot start (no server)" in found.err
    assert not (tmp_path / "out").exists()


def test_python_reports_to_trackers_too(made, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    dsd_refine.refine(
        made / "timm", data=made / "pictures", output_dir=tmp_path / "out", sparse_steps=1, dense_steps=1, gate="none",
        control="none", device="cpu", report_to="tensorboard",
    )  # fmt: skip
    assert list((tmp_path / "logs/out").glob("events.out.tfevents.*"))
    with pytest.raises(dsd_refine.UsageError, match="not a tracker"):
        dsd_refine.refine(made / "timm", data=made / "pictures", output_dir=tmp_path / "x", report_to=["nothing"])


def test_settings_are_flat():
    recipe = dsd_refine.Recipe.model_validate(
        {"data": "d", "phases": [{"kind": "sparse", "steps": 3, "lr": 0.1, "sparsity": 0.3}]}
    )
    settings = settings_of("net", recipe.model_dump(), Path("a/out"))
    assert settings["phase1.lr"] == 0.1
    assert settings["output"] == "out"
    assert all(isinstance(value, str | int | float) for value in settings.values())
