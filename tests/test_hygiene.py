"""A run of days uses no more of anything at its end than at its start."""

import json
import os
from itertools import pairwise

import psutil
import pytest
from forked import Child, preload
from forked import command as run_command

QUIET = ("--gate", "none", "--control", "none", "--device", "cpu", "--quiet")
EVERY = 250


def watched_run(made, tmp_path, *args):
    """What the process holds after every so many steps: [(step, resident bytes, open files, bytes of log)]."""

    def work():
        from dsd_refine.training import loop as train

        step, taken, me = train.train_step, [0], psutil.Process()
        log, seen = tmp_path / "out.partial/log.jsonl", (tmp_path / "seen").open("w")

        def counted(*given):
            found = step(*given)
            taken[0] += 1
            if taken[0] % EVERY == 0:
                held = (taken[0], me.memory_info().rss, len(os.listdir("/proc/self/fd")), log.stat().st_size)
                seen.write(json.dumps(held) + "\n")
                seen.flush()
            return found

        train.train_step = counted
        run_command(*args, "-o", tmp_path / "out", *QUIET)()

    child = Child(work, tmp_path / "log")
    assert child.wait(300) == 0, child.said()
    return [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]


def test_two_thousand_steps_hold_no_more_than_two_hundred(made, tmp_path):
    """Epochs of a few steps, a mask that is made again and again, a save every second or so: memory, files, the log's growth."""
    preload()
    epochs = (
        "phases=[{kind: sparse, steps: 1000, lr: 0.001, sparsity: 0.3, refresh: 50}, {kind: dense, steps: 1000, lr: 0.001}]"
    )
    found = watched_run(
        made, tmp_path, made / "bert", "--data", made / "texts.csv", "--set", epochs, "--batch-size", 4, "--save-every", 0.02,
        "--keep", "last",
    )  # fmt: skip
    assert [row[0] for row in found] == list(range(EVERY, 2001, EVERY))
    _, resident, files, log = zip(*found, strict=True)
    assert max(resident[2:]) - resident[1] < 16 << 20
    assert max(files) - min(files) <= 1
    growth = [(after - before) / EVERY for before, after in pairwise(log)]
    assert max(growth) < 400  # bytes a step: its own line, and a share of an evaluation's


@pytest.mark.parametrize("workers", [0, 2])
def test_phases_leave_no_files_open(made, tmp_path, workers):
    """Each phase and each evaluation opens loaders of its own."""
    preload()
    phases = "phases=[" + ", ".join(["{kind: dense, steps: 2, lr: 0.001}"] * 8) + "]"
    counts = tmp_path / "counts"

    def work():
        from dsd_refine import method

        leave = method.leave_phase

        def counted(*given):
            leave(*given)
            with counts.open("a") as file:
                file.write(f"{len(os.listdir('/proc/self/fd'))} {len(psutil.Process().children())}\n")

        method.leave_phase = counted
        run_command(
            made / "timm", "--data", made / "pictures", "--set", phases, "--batch-size", 8, "--workers", workers,
            "-o", tmp_path / "out", *QUIET,
        )()  # fmt: skip

    child = Child(work, tmp_path / "log")
    assert child.wait() == 0, child.said()
    files, children = zip(*(map(int, line.split()) for line in counts.read_text().splitlines()), strict=True)
    assert len(files) == 8
    assert files[-1] <= files[1] + 1
    assert max(children) <= 2 * workers
