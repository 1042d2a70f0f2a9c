"""Start a run, in this process or in two, and stop it."""

import os
import socket
import sys
import tempfile
from multiprocessing import forkserver, get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, environment, process


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


def two_processes(*args, timeout=200):
    """Run the command in two processes of a group, as torchrun does, forked from a server that has imported everything.

    Returns `returncode`, the first that is not 0, and `stderr`, what both wrote.
    """
    context, port = get_context("forkserver"), str(free_port())
    context.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:  # the server finds its modules by the environment alone
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/support"))))
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as place:
        logs = [Path(place) / f"log{rank}" for rank in range(2)]
        where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [environment(RANK=str(rank), LOCAL_RANK=str(rank), **where) for rank in range(2)]
        both = [
            context.Process(target=_one_of_two, args=(env, list(map(str, args)), log))
            for env, log in zip(ranks, logs, strict=True)
        ]
        for one in both:
            one.start()
        both[0].join(timeout)
        both[1].join(10 if both[0].exitcode else timeout)
        for one in both:
            one.kill()
            one.join()
        codes = [one.exitcode for one in both]
        return SimpleNamespace(returncode=next(filter(None, codes), 0), stderr="".join(log.read_text() for log in logs))


def _one_of_two(env, args, log):
    from dsd_refine.cli.app import main

    os.environ |= env
    os.chdir(ROOT)
    with log.open("w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        main(args)
