"""Start a run, in this process, in another or in two, and stop it."""

import errno
import os
import runpy
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
    """Run the command in two processes of a group, as torchrun does; see `in_two`."""
    return in_two(run_command, *map(str, args), timeout=timeout)


def in_two(work, *given, timeout=200):
    """Call `work(*given)` in two processes of a group; see `in_group`."""
    return in_group(2, work, *given, timeout=timeout)


def in_group(count, work, *given, timeout=200):
    """Call `work(*given)` in processes of a group, as torchrun does, forked from a server that has imported everything.

    Returns `returncode`, the first that is not 0, and `stdout` and `stderr`, what all wrote. `work` is a function of a module.
    """
    size, port = str(count), str(free_port())
    where = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [environment(RANK=str(rank), LOCAL_RANK=str(rank), **where) for rank in range(count)]
    with tempfile.TemporaryDirectory() as place:
        group = [_started(env, Path(place) / str(rank), work, given) for rank, env in enumerate(ranks)]
        group[0].join(timeout)
        for one in group[1:]:
            one.join(10 if group[0].exitcode else timeout)
        return _ended(group, Path(place))


def start(*args, absent):
    """Run the command in a Python that starts for it; returns subprocess.CompletedProcess.

    Raises:
        AssertionError: At its end the library `absent` was imported.
    """
    last = f"sys.stderr.write('{absent}: ' + str('{absent}' in sys.modules))"
    found = process("-c", f"import sys\nfrom dsd_refine.cli.app import main\ntry:\n    main()\nfinally:\n    {last}", *args)
    assert found.stderr.endswith(f"{absent}: False"), found.stderr
    return found


def fresh(work, *given, timeout=300, **env):
    """Call `work(*given)` in a process that has imported everything and run nothing: as a new one, but it starts at once.

    Returns `returncode`, `stdout` and `stderr`. Variables that a library reads when it is imported come too late. `work` is a
    function of a module.
    """
    with tempfile.TemporaryDirectory() as place:
        one = _started(environment(**env), Path(place) / "0", work, given)
        one.join(timeout)
        return _ended([one], Path(place))


def run_command(*args):
    """Work for `fresh`: the command, as a terminal calls it."""
    from dsd_refine.cli.app import main

    sys.argv = ["dsd-refine", *map(str, args)]
    main()


def run_on_full_disk(*args):
    """Work for `in_group`: the command, whose main process has no room for the result."""
    from dsd_refine.checkpoint import checkpoint

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if os.environ["RANK"] == "0":
        checkpoint.write_weights = full
    run_command(*args)


def run_program(path, *args):
    """Work for `fresh`: a program of the repository."""
    sys.argv = [str(path), *map(str, args)]
    runpy.run_path(str(path), run_name="__main__")


def run_server():
    """Start the server that new processes are forked from, if it does not run yet."""
    get_context("forkserver").set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:  # the server finds its modules by the environment alone
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/support"))))
        forkserver.ensure_running()


def _started(env, log, work, given):
    run_server()
    one = get_context("forkserver").Process(target=_become, args=(env, log, work, given))
    one.start()
    return one


def _become(env, log, work, given):
    os.environ |= env
    os.chdir(ROOT)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        path, how = (os.devnull, "r") if number == 0 else (f"{log}.{name}", "w")
        with open(path, how) as file:
            os.dup2(file.fileno(), number)
        setattr(sys, name, os.fdopen(number, how, buffering=1, closefd=False))
    work(*given)


def _ended(processes, place):
    for one in processes:
        one.kill()
        one.join()
    said = ("".join(path.read_text() for path in sorted(place.glob(f"*.{name}"))) for name in ("stdout", "stderr"))
    return SimpleNamespace(
        returncode=next(filter(None, (one.exitcode for one in processes)), 0),
        **dict(zip(("stdout", "stderr"), said, strict=True)),
    )
