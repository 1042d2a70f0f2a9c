"""Killed, stopped, signalled: whatever ends a run, what it has saved is whole, and OUT is the whole result or absent."""

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import accelerate
import psutil
import pytest
from conftest import ROOT
from forked import Child, preload, watched
from forked import command as run_command
from outputs import same
from runs import fresh, run_program

from dsd_refine.data import tables
from dsd_refine.data.tables import in_threads
from dsd_refine.run.signals import Signals

STEPS = ("--gate", "none", "--batch-size", "8", "--device", "cpu", "--quiet", "--sparse-steps", "6", "--dense-steps", "3")


@pytest.fixture(scope="module", autouse=True)
def imported():
    preload()


@pytest.fixture
def child(tmp_path):
    """Start the command in a forked process: `child(*args)` -> Child. Whatever still runs at the end is killed."""
    started = []

    def start(*args, work=None):
        started.append(Child(work or run_command(*args), tmp_path / f"log{len(started)}"))
        return started[-1]

    yield start
    for one in started:
        if psutil.pid_exists(one.pid) and psutil.Process(one.pid).status() != psutil.STATUS_ZOMBIE:
            one.kill(signal.SIGKILL)


def pictures(made, out, *more):
    return (made / "timm", "--data", made / "pictures", "-o", out, *STEPS, *more)


def wait_until(true, child, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, child.said()
        time.sleep(0.005)


def logged(out, lines):
    log = out.with_name(out.name + ".partial") / "log.jsonl"
    return lambda: log.is_file() and log.read_bytes().count(b"\n") >= lines


def test_ten_kills():
    """The short form of benchmarks/kills.py, whose long one is recorded in benchmarks/results/."""
    found = fresh(run_program, ROOT / "benchmarks/kills.py", 10, 3)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "10 kills" in found.stdout


def test_stopped_and_continued_by_the_shell(child, command, made, tmp_path):
    one = child(*pictures(made, tmp_path / "one"))
    for lines in (2, 9, 14):
        wait_until(logged(tmp_path / "one", lines), one)
        one.kill(signal.SIGSTOP)
        before = (tmp_path / "one.partial/log.jsonl").read_bytes()
        time.sleep(0.1)
        assert (tmp_path / "one.partial/log.jsonl").read_bytes() == before
        one.kill(signal.SIGCONT)
    assert one.wait() == 0, one.said()
    assert command(*pictures(made, tmp_path / "two")).code == 0
    same(tmp_path / "one", tmp_path / "two")


def slowly(begun, place, call, seconds, *args):
    """The command, with the function `call` of the module `place` taking its time; the file `begun` says that it does."""

    def work():
        import importlib

        module = importlib.import_module(place)
        real = getattr(module, call)

        def slow(*given, **named):
            begun.touch()
            time.sleep(seconds)
            return real(*given, **named)

        setattr(module, call, slow)
        run_command(*args)()

    return work


@pytest.mark.parametrize(
    ("place", "call", "says", "saved"),
    [
        ("dsd_refine.tasks.image_rows", "in_threads", "stopped before the first step", False),
        ("dsd_refine.tasks.classification", "logits_of", "stopped", None),
        ("dsd_refine.run.publish", "verify", "stopped while the result was written", True),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_takes_long_within_seconds(child, made, tmp_path, place, call, says, saved, number):
    """While the data are looked at, in an evaluation, while publishing: exit code 4, and the run goes on from there."""
    out, begun = tmp_path / "out", tmp_path / "begun"
    one = child(work=slowly(begun, place, call, 1.0, *pictures(made, out)))
    wait_until(begun.exists, one)
    started = time.monotonic()
    one.kill(number)
    assert one.wait(15) == 4, one.said()
    assert time.monotonic() - started < 5
    assert says in one.said()
    assert "Traceback" not in one.said()
    assert not out.exists()
    if saved is not None:
        assert (tmp_path / "out.partial/state.json").is_file() == saved
    if saved is False:
        assert not (tmp_path / "out.partial").exists()


def test_a_signal_while_rows_are_handed_out_does_not_wait_for_them_all(monkeypatch):
    """It may come while the threads have begun and most rows are still to be handed to them."""
    submit, given, begun = ThreadPoolExecutor.submit, [], []

    def interrupted(pool, *args):
        given.append(args)
        if len(given) == 50:
            raise KeyboardInterrupt
        return submit(pool, *args)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_threads(lambda row: begun.append(time.sleep(0.05)), 1000)
    assert len(given) == 50
    assert len(begun) < 25


def test_rows_are_handed_to_threads_some_at_a_time_and_come_back_in_order(monkeypatch):
    submit, waiting, most = ThreadPoolExecutor.submit, [], []

    def counted(pool, *args):
        waiting.append(submit(pool, *args))
        most.append(sum(not future.done() for future in waiting))
        return waiting[-1]

    monkeypatch.setattr(ThreadPoolExecutor, "submit", counted)
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 10)
    assert in_threads(lambda row: time.sleep(0.001) or row, 205) == list(range(205))
    assert max(most) <= 10
    assert in_threads(lambda row: row, 0) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_came_where_nothing_can_be_raised_ends_the_run_before_its_first_step():
    class Lost:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with Signals() as signals:
        Lost()
        with pytest.raises(KeyboardInterrupt):
            signals.wait()


def test_a_second_signal_ends_at_once(child, made, tmp_path):
    one = child(
        work=slowly(tmp_path / "begun", "dsd_refine.training.loop", "train_step", 30, *pictures(made, tmp_path / "out"))
    )
    wait_until((tmp_path / "begun").exists, one)
    one.kill(signal.SIGTERM)
    assert one.ended_within(0.5) is None  # the step is finished first
    one.kill(signal.SIGTERM)
    assert one.wait(5) == 128 + signal.SIGTERM


def test_a_stop_at_an_epoch_s_end_leaves_the_evaluation_to_the_resumed_run(command, made, tmp_path):
    """The signal comes in the last step of an epoch: its state is saved before the evaluation that follows it."""
    from dsd_refine.training import loop as train

    args = pictures(made, tmp_path / "out", "--control", "none")
    with pytest.MonkeyPatch.context() as patch:
        step, taken = train.train_step, []

        def counted(loop, *given):
            taken.append(1)
            loop.stopping = lambda: len(taken) == 9  # the last step of the last phase
            return step(loop, *given)

        patch.setattr(train, "train_step", counted)
        assert command(*args).code == 4
    state = json.loads((tmp_path / "out.partial/state.json").read_text())
    assert (state["run"]["progress"]["step"], state["run"]["progress"]["ended"]) == (3, 0)
    assert command(*args, "--resume").code == 0
    assert command(*pictures(made, tmp_path / "whole", "--control", "none")).code == 0
    same(tmp_path / "out", tmp_path / "whole")


def test_save_every_says_how_much_a_kill_may_cost(command, made, tmp_path, monkeypatch):
    from dsd_refine.run.workspace import Workspace

    counts, save = {}, Workspace.save
    for minutes in ("0", "10"):
        saves = counts[minutes] = []

        def counted(self, tensors, *given, saves=saves):
            saves.append(tensors is None)
            save(self, tensors, *given)

        monkeypatch.setattr(Workspace, "save", counted)
        command(*pictures(made, tmp_path / minutes, "--save-every", minutes, "--control", "none"))
    assert counts["0"].count(False) == 9 + 1  # each step, and the end of the first phase
    assert counts["10"].count(False) == 1
    assert "--save-every" in command("run", "--help").out
    assert command(*pictures(made, tmp_path / "x", "--save-every", "-1")).code == 2


def test_two_at_once_on_one_output(child, refused, made, tmp_path):
    """The second refuses at once and names the first's process; a killed one's lock does not block."""
    first = child(
        work=slowly(tmp_path / "begun", "dsd_refine.training.loop", "train_step", 10, *pictures(made, tmp_path / "out"))
    )
    wait_until((tmp_path / "begun").exists, first)
    for how in ("--resume", "--overwrite"):
        message = refused(*pictures(made, tmp_path / "out", how))
        assert first.ended_within(0) is None  # it waited for nothing: the first is in its step yet
        assert f"another run (process {first.pid}) uses this folder" in message
    first.kill(signal.SIGKILL)
    first.wait()
    last = child(*pictures(made, tmp_path / "out", "--resume"))
    assert last.wait() == 0, last.said()


def test_a_kill_after_the_rename_leaves_a_finished_run(child, command, made, tmp_path):
    """OUT is there and OUT.partial still: --resume says that it is finished, and removes what is left."""

    def die(count, event, path):
        if event == "os.remove" and (tmp_path / "out").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    args = pictures(made, tmp_path / "out", "--control", "none")
    one = child(work=watched(run_command(*args), tmp_path / "out", die))
    assert one.wait() == -signal.SIGKILL, one.said()
    assert (tmp_path / "out.partial").is_dir()
    assert (tmp_path / "out/dsd/report.json").is_file()
    found = command(*args, "--resume")
    assert found.code == 0, found.err
    assert not (tmp_path / "out.partial").exists()


def test_a_stopped_run_that_is_to_replace_a_finished_one_goes_on(command, made, tmp_path):
    """--resume alone leaves the finished OUT as it is; with --overwrite the stopped run goes on and takes its place."""
    from dsd_refine.training import loop as train

    args = pictures(made, tmp_path / "out", "--control", "none")
    assert command(*args).code == 0
    old = (tmp_path / "out/model.safetensors").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        step = train.train_step

        def asked(loop, *given):
            loop.stopping = lambda: True
            return step(loop, *given)

        patch.setattr(train, "train_step", asked)
        assert command(*args, "--seed", "5", "--overwrite").code == 4
    found = command(*args, "--seed", "5", "--resume")
    assert found.code == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == old
    assert (tmp_path / "out.partial/state.json").is_file()
    assert command(*args, "--seed", "5", "--resume", "--overwrite").code == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() != old
    assert not (tmp_path / "out.partial").exists()


def test_a_finished_run_of_the_default_name_is_not_started_again(command, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = (made / "timm", "--data", made / "pictures", *STEPS, "--control", "none")
    assert command(*args).code == 0
    found = command(*args, "--resume")
    assert found.code == 0, found.err


@pytest.mark.parametrize("target", ["..", "/", "made/timm"])
def test_an_output_that_can_be_none_is_refused_first(refused, made, tmp_path, monkeypatch, target):
    (tmp_path / "here/inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/inner")
    message = refused(*pictures(made, made / "timm" if target == "made/timm" else target))
    assert "directory" in message or "not empty" in message or "source" in message


def test_an_output_that_is_a_link_is_written_where_it_leads(command, made, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk/out")
    assert command(*pictures(made, tmp_path / "out", "--control", "none")).code == 0
    assert (tmp_path / "disk/out/dsd/report.json").is_file()
    assert (tmp_path / "out").is_symlink()


# ---------------------------------------------------------------- several processes


def pair(child, run):
    """Two processes that call `run()`, without a launcher that would end the other."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]

    def rank(number):
        def work():
            ranks = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            os.environ |= {name: str(value) for name, value in ranks.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            # what this process knows of devices and processes came from the tests that it ran
            accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
            run()

        return work

    return [child(work=rank(number)) for number in (0, 1)]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_of_one_of_two_ends_the_other(child, made, tmp_path, victim):
    both = pair(child, run_command(*pictures(made, tmp_path / "out", "--sparse-steps", "500")))
    wait_until(logged(tmp_path / "out", 10), both[0])
    both[victim].kill(signal.SIGKILL)
    assert both[1 - victim].wait(30) == 5, both[1 - victim].said()
    assert "another process of this run has ended" in both[1 - victim].said()
    assert "Traceback" not in both[1 - victim].said()
    assert not (tmp_path / "out").exists()


def test_a_signal_to_one_of_two_stops_both_in_an_evaluation(child, made, tmp_path):
    """Only one process is told; both stop between two batches of the evaluation, with the code of a stopped run."""
    args = pictures(made, tmp_path / "out", "--batch-size", "2")
    both = pair(child, slowly(tmp_path / "begun", "dsd_refine.tasks.classification", "logits_of", 0.3, *args))
    wait_until(logged(tmp_path / "out", 0), both[0])
    time.sleep(0.7)  # both are in the evaluation of the source now, which takes seconds
    both[1].kill(signal.SIGTERM)
    assert [one.wait(15) for one in both] == [4, 4], both[0].said() + both[1].said()
    assert not (tmp_path / "out").exists()


def test_workers_end_with_a_killed_parent(child, made, tmp_path):
    args = pictures(made, tmp_path / "out", "--workers", "2")
    one = child(work=slowly(tmp_path / "begun", "dsd_refine.training.loop", "train_step", 10, *args))
    wait_until((tmp_path / "begun").exists, one)
    workers = psutil.Process(one.pid).children(recursive=True)
    assert len(workers) >= 2
    one.kill(signal.SIGKILL)
    one.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
