"""What each of two processes does for tests/test_spread.py: runs whose tries are trained side by side, in one launch.

It is started by torchrun with a folder that holds `arguments.json`: name of a run -> its arguments. The run `stopped` is
stopped in the middle of a try, and resumed.
"""

import json
import os
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


def stopped(args):
    """Stop both processes in the middle of a try of each."""
    made, step = [0], train.train_step

    def counted(loop, *rest):
        made[0] += 1
        loop.stopping = lambda: made[0] >= 6
        return step(loop, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", counted)
        assert command(*args, "--save-every", 0) == 4


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name, given in json.loads((folder / "arguments.json").read_text()).items():
        args = [*given, "-o", folder / name, "--spread", "tries"]
        if name == "stopped":
            stopped(args)
            together(folder, "stop")
            args.append("--resume")
        assert command(*args) == 0, name
        together(folder, f"end-{name}")
    assert not dist.is_initialized()
    sys.stderr.write(f"process {os.environ['RANK']} is done\n")
