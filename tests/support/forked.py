"""Children that run the command: forked from a process that has imported everything and run nothing, so a start costs no time.

A child can be killed, stopped, starved of room or of memory, and watched at each file it touches.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import pkgutil
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
UNEXPECTED = 70  # exit code of a child that raised


def alone(home: Path) -> None:
    """For a program of its own: offline, one thread, nothing of the user's."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    preload()


def preload() -> None:
    """Import what the command imports, so that children need not. What has been run before must have left no thread."""
    ours = [found.name for found in pkgutil.walk_packages([str(ROOT / "dsd_refine")], "dsd_refine.")]
    for name in ("accelerate.optimizer", "datasets", "pyarrow.parquet", "timm", *ours):
        if not name.endswith("__main__"):
            importlib.import_module(name)
    import torch
    import transformers

    torch.set_num_threads(1)
    for name in ("BertForSequenceClassification", "GPT2LMHeadModel", "ViTForImageClassification", "AutoTokenizer"):
        getattr(transformers, name)  # it imports when asked


class Child:
    """A forked process. `log` holds what it wrote to stdout and stderr."""

    def __init__(self, work: Callable[[], object], log: Path) -> None:
        self.log = log
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(work, log)

    def wait(self, timeout: float = 120) -> int:
        """Its exit code, negative for a signal.

        Raises:
            TimeoutError: it did not end in time; it is killed.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        self.kill(signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"process {self.pid} did not end in {timeout} s:\n{self.said()}")

    def ended_within(self, seconds: float) -> int | None:
        """Its exit code if it ends within so many seconds."""
        deadline = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= deadline:
                return None
            time.sleep(min(0.002, max(0.0, deadline - time.monotonic())))

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def _become(work: Callable[[], object], log: Path) -> None:
    code = UNEXPECTED
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        work()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(*args: Any) -> Callable[[], None]:
    """The work of a child: the command with these arguments."""

    def work() -> None:
        from dsd_refine.cli.app import main

        main([str(arg) for arg in args])

    return work


def unprivileged(work: Callable[[], object]) -> Callable[[], None]:
    """The same with no privilege of root's over other people's files (the files of root's own stay its own)."""

    def bare() -> None:
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # Linux: capability version 3, empty sets
        if ctypes.CDLL(None, use_errno=True).capset(header, none):
            raise OSError(ctypes.get_errno(), "capset")
        work()

    return bare


def limited(work: Callable[[], object], **limits: int) -> Callable[[], None]:
    """The same under resource limits, such as `RLIMIT_AS=2 << 30`."""

    def starved() -> None:
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, name), (value, value))
        work()

    return starved


def watched(work: Callable[[], object], place: Path, at: Callable[[int, str, Path], None]) -> Callable[[], None]:
    """The same, calling `at(number, event, path)` before each change to a file below `place`'s parent named after it."""
    prefix = str(place)

    def spied() -> None:
        count = 0

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
            if event in CHANGES and isinstance(args[0], str | os.PathLike) and os.fspath(args[0]).startswith(prefix):
                count += 1
                at(count, event, Path(args[0]))

        sys.addaudithook(hook)
        work()

    return spied


CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
