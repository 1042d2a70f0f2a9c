"""What each of two processes does for tests/test_spread.py: runs whose tries are trained side by side, in one launch.

It is started by torchrun with a folder that holds `arguments.json`: name of a run -> its arguments. The run `killed` is
the first: one of its processes is killed in the middle of a try, and the launcher starts both anew.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dsd_refine.cli.app import main
from dsd_refine.training import loop as train


def command(*args):
    """Run the command in this process, and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    return ended.value.code


def together(folder, label):
    """Wait for the other process, as a launcher waits between two runs."""
    (folder / f"{label}-{os.environ['RANK']}").touch()
    while not all((folder / f"{label}-{rank}").exists() for rank in range(2)):
        time.sleep(0.1)


def killed(folder, args):
    """Kill the second process in the middle of a try, once the first one trains. The launcher then stops the first, and
    starts both anew."""
    step, made, trains = train.train_step, [0], folder / "first-process-trains"

    def first(*given):
        trains.touch()
        return step(*given)

    def second(*given):
        made[0] += 1
        if made[0] == 7:
            while not trains.exists():
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", second if os.environ["RANK"] == "1" else first)
        sys.stderr.write(f"process {os.environ['RANK']} ended with {command(*args)}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name, given in json.loads((folder / "arguments.json").read_text()).items():
        args = [*given, "-o", folder / name, "--spread", "tries"]
        if name == "killed" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            killed(folder, [*args, "--save-every", 0])
            sys.exit(1)
        args += ["--resume"] if name == "killed" else []
        assert command(*args) == 0, name
        together(folder, f"end-{name}")
    assert not dist.is_initialized()
    sys.stderr.write(f"process {os.environ['RANK']} is done\n")
