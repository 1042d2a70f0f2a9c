"""A run stopped anywhere and taken up again ends in the bytes of the undisturbed one."""

import json
import shutil
import signal
import time

import pytest
from conftest import hashes
from forked import Child, preload
from forked import command as run_command
from outputs import same
from runs import stop_after, whole

STEPS = ("--sparse-steps", "4", "--dense-steps", "4", "--gate", "none", "--batch-size", "8", "--device", "cpu", "--quiet")
CROPS = ("--set", "augment={crop: random-resized, flip: 0.5}")
ARMS = ("--control", "dense", "--control", "random")
ALL = 3 * 8  # optimizer steps of the three arms


def arguments(made, out, *more):
    """A run with what a stop must keep: BatchNorm, momentum, augmentation, a refreshed mask, epochs ending in mid-phase."""
    return [made / "timm", "--data", made / "pictures", "-o", out, *STEPS, *ARMS, *CROPS, "--set", "phases.0.refresh=2", *more]


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory):
    """The same run, never stopped."""
    return whole(arguments(made, tmp_path_factory.mktemp("undisturbed") / "out"))


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 8, 9, 12, 13, 20, 23, ALL])
def test_stopped_at_a_step_and_resumed(command, made, undisturbed, tmp_path, at):
    args = arguments(made, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, at)
        stopped = command(*args)
    assert stopped.code == 4, stopped.err
    assert stopped.out == ""
    assert "go on with --resume" in stopped.err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial/state.json").is_file()
    done = [json.loads(line) for line in (tmp_path / "out.partial/log.jsonl").read_text().splitlines()]
    assert sum(line["event"] == "step" for line in done) == at
    resumed = command(*args, "--resume")
    assert resumed.code == 0, resumed.err
    same(tmp_path / "out", undisturbed)
    assert not (tmp_path / "out.partial").exists()


def test_stopped_at_every_step(command, made, undisturbed, tmp_path):
    args = arguments(made, tmp_path / "out", "--resume")
    stops = 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 1)
            found = command(*args)
        if found.code == 0:
            break
        assert found.code == 4, found.err
        stops += 1
        assert stops <= ALL
    assert stops == ALL
    same(tmp_path / "out", undisturbed)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("bert", ["--gradient-accumulation-steps", "2", "--batch-size", "3"]),
        ("gpt2", ["--sparsity", "0.2,0.5"]),
        ("vit", ["--save-phases", "--workers", "2", "--keep", "last"]),
    ],
)
def test_other_tasks_resume_too(command, made, tmp_path, model, options):
    data = {"bert": "texts.csv", "gpt2": "documents.txt", "vit": "colours"}[model]
    one, two = ([made / model, "--data", made / data, "-o", tmp_path / n, *STEPS, *options] for n in ("one", "two"))
    whole(one)
    for at in (2, 4):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, at)
            assert command(*two, "--resume").code == 4
    assert command(*two, "--resume").code == 0
    same(tmp_path / "one", tmp_path / "two")
    if "--save-phases" in options:
        assert hashes(tmp_path / "one/dsd/phases") == hashes(tmp_path / "two/dsd/phases")


def test_killed_between_saves_goes_on_from_the_last_one(command, made, undisturbed, tmp_path, monkeypatch):
    """No word of the end, as with SIGKILL or a power cut: the state is the one of the last phase's end."""
    from dsd_refine.training import loop as train

    class Killed(BaseException):
        pass

    args = arguments(made, tmp_path / "out")
    taken, step = [0], train.train_step

    def killed(*given):
        taken[0] += 1
        if taken[0] == 11:
            raise Killed
        return step(*given)

    from dsd_refine.cli.app import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", killed)
        with pytest.raises(Killed):
            main([str(arg) for arg in args])
    log = tmp_path / "out.partial/log.jsonl"
    assert log.stat().st_size > json.loads((tmp_path / "out.partial/state.json").read_text())["log_bytes"]
    resumed = command(*args, "--resume")
    assert resumed.code == 0, resumed.err
    same(tmp_path / "out", undisturbed)


def test_killed_while_publishing(command, made, undisturbed, tmp_path, monkeypatch):
    from dsd_refine.run import publish

    def full(*_):
        raise OSError(28, "No space left on device", "somewhere")

    args = arguments(made, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "copy_file", full)
        assert command(*args).code == 5
    assert not (tmp_path / "out").exists()
    assert command(*args, "--resume").code == 0
    same(tmp_path / "out", undisturbed)


def test_resume_of_a_finished_run_changes_nothing(command, undisturbed, made):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in undisturbed.rglob("*")}
    found = command(*arguments(made, undisturbed), "--resume", "--json")
    assert found.code == 0
    assert found.out == (undisturbed / "dsd/report.json").read_text()
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in undisturbed.rglob("*")} == before
    assert not undisturbed.with_name("out.partial").exists()


def test_resume_with_nothing_saved_starts_anew(command, made, undisturbed, tmp_path):
    assert command(*arguments(made, tmp_path / "out", "--resume")).code == 0
    same(tmp_path / "out", undisturbed)


@pytest.fixture
def stopped(command, made, tmp_path):
    """Arguments of a run that was stopped in its sixth step."""
    args = arguments(made, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 6)
        assert command(*args).code == 4
    return args


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--seed", "9"], "recipe.seed was 0, is 9"),
        (["--lr", "0.5"], "recipe.phases.0.lr was 'auto', is 0.5"),
        (["--control", "random"], "recipe.control.0 was 'dense', is 'random'"),
    ],
)
def test_resume_of_another_recipe_is_refused(refused, stopped, tmp_path, change, says):
    before = hashes(tmp_path / "out.partial")
    args = [arg for arg in stopped if arg not in ARMS] if "--control" in change else stopped
    message = refused(*args, "--resume", *change)
    assert says in message
    assert "--overwrite" in message
    after = hashes(tmp_path / "out.partial")
    made_anew = ("pid", "lock", "cache")  # by every start
    assert {k: v for k, v in after.items() if not k.startswith(made_anew)} == {
        k: v for k, v in before.items() if not k.startswith(made_anew)
    }


@pytest.mark.parametrize("what", ["source", "train", "eval"])
def test_resume_of_changed_files_is_refused(command, refused, made, tmp_path, what):
    source, data = tmp_path / "timm", tmp_path / "pictures"
    shutil.copytree(made / "timm", source)
    shutil.copytree(made / "pictures", data)
    args = [source, "--data", data, "-o", tmp_path / "out", *STEPS]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        assert command(*args).code == 4
    if what == "source":
        (source / "config.json").write_text((source / "config.json").read_text() + "\n")
    else:
        folder = {"train": "train/a", "eval": "test/b"}[what]
        shutil.copy(data / folder / "000.png", data / folder / "999.png")
    message = refused(*args, "--resume")
    assert {"source": "source.config.json was", "train": "data.train was", "eval": "data.eval was"}[what] in message


def test_overwrite_starts_a_stopped_run_anew(command, stopped, undisturbed, tmp_path):
    assert command(*stopped, "--overwrite").code == 0
    same(tmp_path / "out", undisturbed)


def test_a_second_run_on_the_same_output_is_refused(refused, stopped, tmp_path):
    import filelock

    with filelock.FileLock(tmp_path / "out.partial/lock"):
        assert "another run" in refused(*stopped, "--resume")


LONG = ("--sparse-steps", "30", "--dense-steps", "4", "--set", "phases.0.refresh=10")


def wait_for(log, lines, child):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and child.ended_within(0) is None:
        if log.is_file() and log.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.005)
    raise AssertionError(child.said())


def test_real_signals(command, made, tmp_path, monkeypatch):
    """SIGTERM in the sparse phase, then SIGKILL in a later one, then on to the end: the undisturbed run's bytes."""
    preload()
    monkeypatch.setattr("dsd_refine.run.workspace.LOG_EVERY", 0.0)  # the log tells at once how far the run is
    log, args = tmp_path / "out.partial/log.jsonl", arguments(made, tmp_path / "out", *LONG)
    child = Child(run_command(*args), tmp_path / "first")
    wait_for(log, 10, child)
    child.kill(signal.SIGTERM)
    assert child.wait(60) == 4, child.said()
    assert "Traceback" not in child.said()
    assert json.loads((tmp_path / "out.partial/state.json").read_text())["run"]["progress"]["step"] < 30
    child = Child(run_command(*args, "--resume"), tmp_path / "second")
    wait_for(log, 45, child)
    child.kill(signal.SIGKILL)
    assert child.wait(60) == -signal.SIGKILL, child.said()
    assert command(*args, "--resume").code == 0
    whole(arguments(made, tmp_path / "whole", *LONG))
    same(tmp_path / "out", tmp_path / "whole")
    assert not log.exists()


def test_resume_with_another_number_of_threads_is_refused(command, refused, made, tmp_path):
    """Sums are cut into as many parts as there are threads."""
    import torch

    args = [made / "timm", "--data", made / "pictures", *STEPS, "--control", "none", "-o", tmp_path / "out"]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        assert command(*args).code == 4
    torch.set_num_threads(2)
    try:
        text = refused(*args, "--resume")
    finally:
        torch.set_num_threads(1)
    assert "threads (OMP_NUM_THREADS) was 1, is 2" in text
    assert "as it was" in text
    assert command(*args, "--resume").code == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda patch: ["--compile"], "--compile was False, is True"),
        (lambda patch: patch.setenv("MKL_CBWR", "COMPATIBLE") or [], "MKL_CBWR was None, is 'COMPATIBLE'"),
    ],
)
def test_resume_with_other_kernels_is_refused(command, refused, made, tmp_path, monkeypatch, change, said):
    args = [made / "timm", "--data", made / "pictures", *STEPS, "--control", "none", "-o", tmp_path / "out"]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        assert command(*args).code == 4
    assert said in refused(*args, *change(monkeypatch), "--resume")


@pytest.mark.parametrize("at", [1, 5, 9, 12, ALL])
def test_losses_that_are_not_waited_for_change_nothing(command, made, undisturbed, tmp_path, monkeypatch, at):
    """As on a GPU, whose losses come some steps late: the same log, stops and bytes."""
    monkeypatch.setattr("dsd_refine.training.loop.lag", lambda device: 3)
    args = arguments(made, tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_after(patch, at)
        assert command(*args).code == 4
    done = [json.loads(line) for line in (tmp_path / "out.partial/log.jsonl").read_text().splitlines()]
    assert sum(line["event"] == "step" for line in done) == at
    assert command(*args, "--resume").code == 0
    same(tmp_path / "out", undisturbed)


def test_a_loss_that_is_not_finite_is_found_though_it_comes_late(command, made, tmp_path, monkeypatch):
    args = (*arguments(made, tmp_path / "out"), "--lr", "1e30")
    at_once = command(*args)
    monkeypatch.setattr("dsd_refine.training.loop.lag", lambda device: 3)
    late = command(*args, "--overwrite")
    assert (late.code, at_once.code) == (5, 5)
    assert late.err.splitlines()[-1] == at_once.err.splitlines()[-1]
