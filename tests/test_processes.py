"""Several processes under torchrun and accelerate do what one process with their batches together does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import builders
import pytest
import torch
import yaml
from conftest import ROOT, environment
from outputs import near, report_of
from runs import free_port, in_two, torchrun, torchrun_arguments, two_processes
from torch import distributed, nn

from dsd_refine.recipe import Recipe
from dsd_refine.run.open import PATIENCE, open_accelerator, parallel
from dsd_refine.run.run import Options

STEPS = ("--sparse-steps", "5", "--dense-steps", "4", "--gate", "none", "--control", "dense", "--quiet", "--lr", "0.01")
PLAIN = ("--warmup-steps", "2", "--set", "augment={crop: none, flip: 0.0}")


def accelerate(*args):
    """`accelerate launch` as a user would give it; its own configuration, not a flag of ours, chooses the CPU."""
    script = Path(sys.executable).parent / "accelerate"
    launch = ["launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port()), str(ROOT / "cli.py")]
    more = environment(ACCELERATE_USE_CPU="true")
    return subprocess.run(
        [str(script), *launch, *map(str, args)], cwd=ROOT, env=more, capture_output=True, text=True, timeout=300
    )


def counted(out):
    report = report_of(out)
    keys = ("arm", "kind", "sparsity", "measured_sparsity", "epochs", "optimizer_steps", "samples", "lr_first", "lr_peak")
    return [[phase[key] for key in (*keys, "lr_last")] for phase in report["phases"]]


def losses(out):
    lines = map(json.loads, (out / "dsd/log.jsonl").read_text().splitlines())
    return [(x["arm"], x["phase"], x["step"], x["samples"], x["lr"]) for x in lines if x["event"] == "step"]


@pytest.mark.parametrize(("launch", "model"), [(torchrun, "vit"), (accelerate, "bert")])
def test_two_processes_are_one_of_twice_the_batch(command, made, tmp_path, launch, model):
    if model == "bert":
        source = builders.bert_checkpoint(
            tmp_path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0
        )
        data, options = made / "texts.csv", ["--optimizer", "sgd", "--gradient-accumulation-steps", "2", "--warmup-steps", "2"]
    else:
        frozen = [a for n in (0, 1) for a in ("--set", f"phases.{n}.frozen=['*attention*']")]
        more = [
            *frozen,
            "--set",
            "phases.1.average=ema",
            "--set",
            "phases.1.ema_decay=0.5",
            "--set",
            "phases.0.distill={weight: 0.2}",
        ]
        source, data, options = made / "vit", made / "colours", [*PLAIN, *more, "--save-phases"]
    args = [source, "--data", data, *STEPS, *options]
    cpu = ["--device", "cpu"] if launch is torchrun else []
    two = launch(*args, "-o", tmp_path / "two", "--batch-size", 2, *cpu, "--json")
    assert two.returncode == 0, two.stderr
    assert two.stdout == (tmp_path / "two/dsd/report.json").read_text()  # once, not once a process
    one = command(*args, "-o", tmp_path / "one", "--batch-size", 4, "--device", "cpu")
    assert one.code == 0, one.err
    one, two = tmp_path / "one", tmp_path / "two"
    near(one, two)
    assert counted(one) == counted(two)
    assert losses(one) == losses(two)
    reports = [report_of(out) for out in (one, two)]
    assert [report["environment"]["processes"] for report in reports] == [1, 2]
    assert reports[0]["data"] == reports[1]["data"]
    assert reports[0]["layers"] == reports[1]["layers"]
    for arm, figures in reports[0]["arms"].items():
        assert reports[1]["arms"][arm] == pytest.approx(figures, abs=1e-5)
    assert command("verify", source, two).code == 0
    assert not (tmp_path / "two.partial").exists()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_two_processes_train_in_each_precision_of_a_cpu(command, made, tmp_path, precision):
    """The model's own forward stays float32: the source's probes and the output's proof are made with it."""
    args = [made / "timm", "--data", made / "pictures", *STEPS, *PLAIN, "--device", "cpu", "--mixed-precision", precision]
    two = two_processes(*args, "-o", tmp_path / "two", "--batch-size", 2)
    assert two.returncode == 0, two.stderr
    report = report_of(tmp_path / "two")
    assert yaml.safe_load((tmp_path / "two/dsd/recipe.yaml").read_text())["mixed_precision"] == precision
    assert report["environment"]["processes"] == 2
    assert command("verify", made / "timm", tmp_path / "two").code == 0


def wrapped():
    """What one of two processes finds."""
    phases = [{"kind": "dense", "steps": 1, "lr": 0.1}]
    recipe = Recipe.model_validate({"phases": phases, "mixed_precision": "bf16"})
    accelerator = open_accelerator(recipe, Options(output_dir=None, device="cpu"))
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(accelerator.process_index))
    before = model(x)
    around = parallel(model, accelerator.device)
    assert "forward" not in vars(model)
    assert torch.equal(model(x), before)
    with accelerator.autocast():
        assert around(x).dtype == torch.bfloat16
    around(x).sum().backward()
    mean = accelerator.reduce(x.sum(0), "mean")
    assert torch.allclose(model.weight.grad, mean.expand(2, 3), atol=1e-6)
    assert distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout == PATIENCE
    distributed.destroy_process_group()


def test_a_wrapped_model_s_own_forward_is_as_it_was():
    """In each precision, and the processes wait for each other as long as the main one may take."""
    done = in_two(wrapped)
    assert done.returncode == 0, done.stderr


def test_an_odd_rest_trains_with_batchnorm_and_one_process_speaks(made, tmp_path):
    found = two_processes(
        made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", *STEPS, "--batch-size", 5, "--device", "cpu", "--json"
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout == (tmp_path / "out/dsd/report.json").read_text()
    report = json.loads(found.stdout)
    assert report["data"]["train"]["rows"] == 21
    assert report["phases"][0]["samples"] == 21 + 21 + 10  # steps of 10, 11, 10, 11 and 10 rows: no lone one


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--label-column", "stars"], 2),
        (["--lr", "1e38", "--set", "max_grad_norm=null"], 5),
        (["--gate", "better"], 3),
    ],
)
def test_a_failing_run_tells_its_code_beside_the_launcher_s(made, tmp_path, options, code):
    """A launcher ends with a code of its own; that this line comes through it, the stop below tells."""
    found = two_processes(
        made / "bert", "--data", made / "texts.csv", "-o", tmp_path / "out", *STEPS, "--batch-size", 4, "--device", "cpu", *options
    )  # fmt: skip
    assert found.returncode == code, found.stderr
    assert found.stderr.splitlines().count(f"dsd-refine: exit code {code}") == 1
    assert "Traceback" not in found.stderr
    if code == 3:
        assert report_of(tmp_path / "out")["exit_code"] == 3
    else:
        assert found.stderr.count("Error: ") >= 1
        assert not (tmp_path / "out").exists()


def test_two_processes_stop_and_go_on_together(made, tmp_path):
    """SIGTERM to the launcher reaches both; what they saved goes on to the end of the undisturbed run."""
    long = ("--sparse-steps", 60, "--batch-size", 2, "--device", "cpu")
    args = [made / "vit", "--data", made / "colours", *STEPS, *PLAIN, *long]
    child = subprocess.Popen(
        [sys.executable, *torchrun_arguments(*args, "-o", tmp_path / "out")],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    log = tmp_path / "out.partial/log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and child.poll() is None:
        if log.is_file() and log.read_bytes().count(b"\n") >= 10:
            break
        time.sleep(0.02)
    assert child.poll() is None, child.communicate()
    os.kill(child.pid, signal.SIGTERM)
    _, err = child.communicate(timeout=100)
    assert child.returncode != 0
    assert "dsd-refine: exit code 4" in err
    assert json.loads((tmp_path / "out.partial/state.json").read_text())["run"]["progress"]["step"] >= 9
    resumed = two_processes(*args, "-o", tmp_path / "out", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert two_processes(*args, "-o", tmp_path / "whole").returncode == 0
    near(tmp_path / "out", tmp_path / "whole")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
