"""Start a run, in this process or in two, and stop it."""

import socket

import pytest
from conftest import process


def whole(args):
    """Run the command in this process to its end; returns OUT."""
    from dsd_refine.cli.app import main

    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    assert ended.value.code == 0
    return args[args.index("-o") + 1]


def stop_after(monkeypatch, steps):
    """Ask every run to stop once so many optimizer steps were taken, as a signal that came then would."""
    from dsd_refine.training import loop as train

    taken, step = [0], train.train_step

    def counted(loop, *args):
        taken[0] += 1
        loop.stopping = lambda: taken[0] >= steps
        return step(loop, *args)

    monkeypatch.setattr(train, "train_step", counted)


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def torchrun_arguments(*args):
    """Arguments of Python that start the command in two processes."""
    how = ("--nproc-per-node", 2, "--master-addr", "127.0.0.1", "--master-port", free_port())
    return list(map(str, ("-m", "torch.distributed.run", *how, "-m", "dsd_refine", *args)))


def torchrun(*args):
    """Run the command in two processes; returns subprocess.CompletedProcess."""
    return process(*torchrun_arguments(*args))
