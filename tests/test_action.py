"""The GitHub Action: its steps run here with the runner's files faked; the examples for CI are what their systems accept."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from builders import image_folder, timm_checkpoint
from conftest import ROOT, hashes
from outputs import report_of
from runner import Runner, annotations
from runs import stop_after
from writable_hub import TOKEN, writable_hub

WORKFLOWS = sorted((ROOT / "examples/ci").glob("*.yml"))
GITHUB = [path for path in WORKFLOWS if "gitlab" not in path.name]
SCRIPTS = [*sorted((ROOT / ".github/action").glob("*.sh")), *sorted((ROOT / "examples/ci").glob("*.sh"))]
SHORT = "--sparse-steps 3 --dense-steps 2 --control none --batch-size 8 --device cpu"


@pytest.fixture
def place(tmp_path):
    for name in ("work", "caches"):
        (tmp_path / name).mkdir()
    return tmp_path


def action(place, **variables):
    return Runner(place / "work", place / "caches", **variables)


def stood_in(place, code, output=None, message="", **inputs):
    """Run the action with a stand-in for dsd-refine; returns what the steps left."""
    runner = action(place)
    runner.stand_in(code, output, message)
    return runner.run(**{"model": "net", "data": "rows", "install": "none"} | inputs)


def arguments(place):
    return (place / "work/.runner/arguments").read_text().splitlines()


def refined(place, made, **inputs):
    given = {"model": str(made / "timm"), "data": str(made / "pictures"), "args": SHORT, "gate": "none", "install": "none"}
    return action(place).run(**given | inputs)


def test_a_met_gate_gives_outputs_summary_and_report(finished, place):
    ran = stood_in(place, 0, finished)
    assert ran.code == 0, ran.log
    report = report_of(finished)
    assert {name: ran.outputs[name] for name in ("verdict", "credit", "report", "exit-code", "url")} == {
        "verdict": report["verdict"], "credit": report["credit"], "report": "dsd-output/dsd/report.json", "exit-code": "0",
        "url": "",
    }  # fmt: skip
    assert float(ran.outputs["delta"]) == pytest.approx(report["comparison"]["refined_vs_baseline"]["delta"], rel=1e-5)
    assert ran.summary == "## noted\n"
    assert ran.annotations == []
    assert ran.used["Upload the report"]["name"] == "dsd-refine-report"
    kept = ran.used["Upload the report"]["path"].split()
    assert {"!dsd-output/dsd/predictions.parquet", "!dsd-output/dsd/probe.safetensors"} <= set(kept)
    assert "Push" in ran.skipped
    assert "Save the state of a stopped run" in ran.skipped


@pytest.mark.parametrize(("fail", "code", "kind"), [("true", 3, "error"), ("false", 0, "warning")])
def test_a_gate_that_is_not_met_fails_the_job_or_only_warns_and_nothing_is_pushed(finished, place, fail, code, kind):
    ran = stood_in(place, 3, finished, fail_on_gate=fail, push="org/tiny")
    assert ran.code == code, ran.log
    assert ran.outputs["exit-code"] == "3"
    assert ran.outputs["verdict"] == report_of(finished)["verdict"]
    assert [found for found, _ in ran.annotations] == [kind]
    assert "the gate better was not met" in ran.annotations[0][1]
    assert "Push" in ran.skipped
    assert "Upload the report" in ran.used


@pytest.mark.parametrize(
    ("code", "message", "says"),
    [
        (2, "recipe: bert\nError: rows: no such folder\n  - tried it\n", "rows: no such folder\n  - tried it"),
        (3, "Error: the written checkpoint failed its check\n", "the written checkpoint failed its check"),
        (5, "step 1\nError: net: no space, 100% full\n", "net: no space, 100% full"),
        (1, "Traceback\n", "dsd-refine has a bug"),
        (137, "", "the run was killed, perhaps because the memory was full"),
        (127, "dsd-refine: not found\n", "dsd-refine: not found"),
    ],
)
def test_what_went_wrong_is_annotated_and_the_code_stays(place, code, message, says):
    ran = stood_in(place, code, None, message, fail_on_gate="false")
    assert ran.code == code
    ((kind, text),) = ran.annotations
    assert kind == "error"
    assert says in text
    assert ran.summary == "## dsd-refine: no result\n"
    assert ran.outputs["exit-code"] == str(code)
    assert ran.outputs["verdict"] == ran.outputs["report"] == ""
    assert {"Upload the report", "Push"} <= set(ran.skipped)


def test_inputs_become_options_and_empty_ones_none(finished, place):
    stood_in(place, 0, finished, args="--text-column 'a b' --seeds 3", recipe="dsd", sparsity="0.25,0.3", publish="best")
    given = arguments(place)
    assert given[:7] == ["run", "net", "--output-dir", "dsd-output", "--gate", "better", "--summary"]
    expected = ["--yes", "--data", "rows", "--recipe", "dsd", "--sparsity", "0.25,0.3", "--publish", "best", "--text-column"]
    assert given[8:] == [*expected, "a b", "--seeds", "3"]
    shutil.rmtree(place / "work/dsd-output")
    stood_in(place, 0, finished, data="")
    assert arguments(place)[8:] == ["--yes"]


def test_nothing_in_inputs_is_run(finished, place):
    ran = stood_in(
        place, 0, finished, model="$(touch ran)", data="x; touch ran", args="$(touch ran) `touch ran`; touch ran", resume_key="$(touch ran)"
    )  # fmt: skip
    assert ran.code == 0, ran.log
    assert arguments(place)[1] == "$(touch ran)"
    assert not (place / "work/ran").exists()
    ran = stood_in(place, 0, finished, args="--quiet 'open")
    assert ran.code == 2
    assert ran.annotations[0][1].startswith("the input is not quoted")


def test_what_a_model_or_a_data_set_says_is_no_command_of_the_runner(place):
    forged = "::set-output name=verdict::better\n::error title=dsd-refine::forged\n"
    ran = stood_in(place, 2, None, f"{forged}Error: rows\n{forged}")
    ((_, text),) = ran.annotations
    assert text.startswith("rows\n::set-output"), "it is part of the one message"
    assert ran.outputs["verdict"] == ""


def test_a_stopped_run_is_saved_and_the_next_attempt_goes_on_to_the_same_bytes(made, place, monkeypatch):
    """The state of a run that a signal stopped is put where the cache has it."""
    from dsd_refine.cli.app import main

    def in_process(out, code):
        args = [made / "timm", "--data", made / "pictures", "-o", out, "--gate", "none", *SHORT.split(), "--quiet"]
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        assert ended.value.code == code

    in_process(place / "whole", 0)
    stop_after(monkeypatch, 2)
    in_process(place / "work/dsd-output", 4)
    saving = action(place)
    saving.stand_in(4)
    stopped = saving.run(model=str(made / "timm"), data=str(made / "pictures"), args=SHORT, gate="none", install="none")
    assert stopped.code == 4
    assert "its state is saved" in stopped.annotations[0][1]
    shutil.rmtree(place / "work")
    (place / "work").mkdir()
    inputs = {"model": str(made / "timm"), "data": str(made / "pictures"), "args": SHORT, "gate": "none", "install": "none"}
    ran = action(place).run(attempt=2, **inputs)
    assert ran.code == 0, ran.log
    assert ran.annotations == []
    assert hashes(place / "work/dsd-output")["model.safetensors"] == hashes(place / "whole")["model.safetensors"]
    lines = [json.loads(line) for line in (place / "work/dsd-output/dsd/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2, 3, 1, 2]
    assert ran.log.count("step 3/3") == 1
    assert f"## dsd-refine: {ran.outputs['verdict']}" in ran.summary


def test_a_time_limit_stops_the_run_with_its_state_saved(place):
    """SIGTERM comes at the limit; a stand-in does what a run does then."""
    runner = action(place)
    (place / "work/.runner/bin/dsd-refine").write_text(
        "#!/bin/sh\ntrap 'mkdir dsd-output.partial; echo saved > dsd-output.partial/state; exit 4' TERM\nsleep 100 & wait\n"
    )
    ran = runner.run(model="net", install="none", time_limit="0.02", resume_key="weekly")
    assert ran.code == 4, ran.log
    ((kind, text),) = ran.annotations
    assert (kind, ran.outputs["exit-code"]) == ("error", "4")
    assert "its state is saved; run the job again" in text
    assert ran.used["Save the state of a stopped run"]["path"] == "dsd-output.partial"
    (saved,) = (place / "caches").iterdir()
    assert saved.name.endswith("-weekly-7-1")
    assert (saved / "state").is_file()


def test_a_state_that_cannot_be_continued_is_left_and_said(finished, place):
    (place / "work/dsd-output.partial").mkdir()
    runner = action(place)
    runner.stand_in(0, finished)
    program = place / "work/.runner/bin/dsd-refine"
    refusal = 'for last; do :; done; if [ "$last" = --resume ]; then echo "Error: other threads" >&2; exit 2; fi'
    program.write_text(program.read_text().replace("#!/bin/sh", f"#!/bin/sh\n{refusal}"))
    ran = runner.run(model="net", install="none")
    assert ran.code == 0, ran.log
    assert ran.annotations == [("notice", "the saved state cannot be continued here, so the run starts anew: other threads")]
    assert not (place / "work/dsd-output.partial").exists()


def test_install_takes_the_action_s_own_commit_or_what_is_asked_for(place):
    stood_in(place, 2, install="")
    stood_in(place, 2, install="dsd-refine==0.1.0")
    pip = (place / "work/.runner/pip").read_text().splitlines()
    assert pip == [f"-m pip install --disable-pip-version-check {name}" for name in (ROOT, "dsd-refine==0.1.0")]


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    """An untrained classifier and pictures that teach it: any training makes it better."""
    place = tmp_path_factory.mktemp("weak")
    timm_checkpoint(place / "net")
    image_folder(place / "pictures", per_class=24)
    return place


LEARNS = "--control dense --device cpu --lr 0.02 --dense-lr 0.02 --sparse-epochs 2 --dense-epochs 2 --batch-size 8"


def release(place, weak, server, **inputs):
    """Run the step of examples/ci/release.yml that uses the action, against a Hub on loopback that has the model."""
    workflow = yaml.safe_load((ROOT / "examples/ci/release.yml").read_text("utf-8"))
    (step,) = (step for step in workflow["jobs"]["refine"]["steps"] if "dsd-refine@" in step.get("uses", ""))
    here = {"data": str(weak / "pictures"), "hf-token": TOKEN, "install": "none"}
    given = {name.replace("-", "_"): str(value) for name, value in {**step["with"], **here}.items()}
    variables = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(place / "home")}
    return action(place, **variables).run(**given | inputs)


RELEASED = "your-org/your-model"  # its name in the example


def test_a_release_opens_a_pull_request_with_the_better_checkpoint(weak, place):
    """The whole way: the model comes from the Hub, is refined, and the better one is proposed to the Hub."""
    with writable_hub({RELEASED: weak / "net"}, place / "hub") as server:
        ran = release(place, weak, server, args=LEARNS)
        assert ran.code == 0, ran.log
        assert ran.outputs["verdict"] == "better"
        assert ran.outputs["url"] == f"{server.url}/{RELEASED}/discussions/1"
        (request,) = server.requests
        assert server.commits == []
    assert request["summary"].startswith("dsd-refine: better, accuracy ")
    assert (request["folder"] / "model.safetensors").read_bytes() == (place / "work/dsd-output/model.safetensors").read_bytes()
    assert hashes(server.folders[RELEASED]) == hashes(weak / "net")
    assert f"Pushed: <{ran.outputs['url']}>" in ran.summary
    assert TOKEN not in ran.log + ran.summary
    assert not [path for path in place.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_release_that_cannot_be_improved_opens_none_and_says_what_to_try(weak, place):
    """With a rate of 0 nothing is learned. The summary says why nothing is pushed, and what to do next."""
    with writable_hub({RELEASED: weak / "net"}, place / "hub") as server:
        ran = release(place, weak, server, args=LEARNS.replace("0.02", "0"), sparsity="0")
        assert ran.code == 3, ran.log
        assert (server.requests, server.commits, server.objects) == ([], [], {})
    assert ran.outputs["exit-code"] == "3"
    assert ran.outputs["verdict"] in ("inconclusive", "same")
    assert ran.outputs["url"] == ""
    assert f"## dsd-refine: {ran.outputs['verdict']}" in ran.summary
    assert "better (the verdict is better): NOT met; the checkpoint is under rejected/" in ran.summary
    assert "**What next** Read the warning about the source first" in ran.summary, (
        "an untrained model is no better than guessing"
    )
    ((kind, text),) = ran.annotations
    assert (kind, text) == ("error", "the gate better was not met; the job summary says why and what to try")
    assert (place / "work/dsd-output/rejected/model.safetensors").is_file()


def test_a_push_that_is_refused_is_annotated(finished, place):
    runner = action(place)
    runner.stand_in(0, finished)
    program = place / "work/.runner/bin/dsd-refine"
    refusal = 'if [ "$1" = push ]; then echo "Error: org/net: the token may not write" >&2; exit 2; fi'
    program.write_text(program.read_text().replace("#!/bin/sh", f"#!/bin/sh\n{refusal}"))
    ran = runner.run(model="net", push="org/net", install="none")
    assert ran.code == 2, ran.log
    assert ran.annotations == [("error", "org/net: the token may not write")]
    assert "Not pushed to org/net" in ran.summary
    assert ran.outputs["url"] == ""


def test_no_input_stands_in_a_script():
    """An input in a script could run as one. Inputs reach scripts as variables only."""
    steps = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))["runs"]["steps"]
    for step in steps:
        assert "${{" not in step.get("run", ""), step["name"]
        assert "run" not in step or step["shell"] == "bash"


def test_every_input_and_output_has_a_word_and_is_used():
    text = (ROOT / "action.yml").read_text("utf-8")
    action = yaml.safe_load(text)
    assert all(entry["description"] for entry in (*action["inputs"].values(), *action["outputs"].values()))
    assert set(re.findall(r"inputs\.([\w-]+)", text)) == set(action["inputs"])
    assert {"verdict", "credit", "delta", "report"} <= set(action["outputs"])


@pytest.mark.parametrize("path", GITHUB, ids=lambda path: path.name)
def test_the_examples_give_the_action_inputs_that_it_has(path):
    inputs = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))["inputs"]
    jobs = yaml.safe_load(path.read_text("utf-8"))["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"] if "dsd-refine@" in step.get("uses", "")]
    assert len(steps) == 1
    assert set(steps[0]["with"]) <= set(inputs)
    assert {name for name, entry in inputs.items() if entry.get("required")} <= set(steps[0]["with"])
    outputs = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))["outputs"]
    assert set(re.findall(rf"steps\.{steps[0].get('id')}\.outputs\.([\w-]+)", path.read_text("utf-8"))) <= set(outputs)


def test_the_examples_use_options_that_exist():
    from dsd_refine.cli.app import cli

    known = {name for verb in ("run", "push") for parameter in cli.commands[verb].params for name in parameter.opts}
    for path in (*WORKFLOWS, *SCRIPTS):
        lines = [
            line
            for line in path.read_text("utf-8").splitlines()
            if "dsd-refine " in line or "args:" in line or "--output-dir" in line
        ]
        named = set(re.findall(r"(?<![\w-])--[a-z-]+", " ".join(lines)))
        assert named - {"--publish", "--preserve-status", "--signal", "--kill-after"} <= known, path.name


def program(name):
    """The path of a linter, also of one beside this Python. Skips the test if there is none."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return found or pytest.skip(f"{name} is not installed")


def test_actionlint_accepts_the_examples_and_the_steps_of_the_action(tmp_path):
    """actionlint looks at workflows only, so the action's steps are put into one."""
    action = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
    inputs = {name: {"type": "string", "description": entry["description"]} for name, entry in action["inputs"].items()}
    job = {"runs-on": "ubuntu-latest", "steps": action["runs"]["steps"]}
    (tmp_path / ".github/workflows").mkdir(parents=True)
    steps = tmp_path / ".github/workflows/steps.yml"
    steps.write_text(yaml.safe_dump({"on": {"workflow_call": {"inputs": inputs}}, "jobs": {"steps": job}}, sort_keys=False))
    linted = subprocess.run([program("actionlint"), *GITHUB, steps], cwd=tmp_path, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_accepts_the_scripts(path):
    checked = subprocess.run([program("shellcheck"), "-x", "-P", path.parent, path], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(("code", "pushed"), [(0, True), (3, False), (4, False), (2, False)])
def test_the_plain_script_pushes_only_what_is_proven(place, code, pushed):
    runner = action(place)
    runner.stand_in(code)
    command = ["bash", ROOT / "examples/ci/refine.sh", "net", "rows", "org/net", "--seeds", "3"]
    ran = subprocess.run(command, cwd=place / "work", env=runner.variables, capture_output=True, text=True)
    assert ran.returncode == code, ran.stderr
    if pushed:
        assert arguments(place) == ["push", "out", "org/net"]
    else:
        assert arguments(place)[:4] == ["run", "net", "--data", "rows"]
        assert arguments(place)[-2:] == ["--seeds", "3"]


def test_annotations_end_where_commands_are_stopped():
    text = "::stop-commands::abc\n::error title=dsd-refine::no\n::abc::\n::error title=dsd-refine::a%0Ab"
    assert annotations(text) == [("error", "a\nb")]
