"""What the performance benchmarks share: ratios of interleaved pairs, and the memory of this process."""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PEERS = ROOT / ".venv-peers"
CLOCK: list[Callable[[], float]] = [time.perf_counter]


def machine() -> str:
    """One line: what the figures were measured on."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "transformers", "numpy"))
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{model or platform.machine()}, {cores}, Python {platform.python_version()}, {versions}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def arguments(description: str | None, rounds: int, **options: tuple[Any, str]) -> argparse.Namespace:
    """The command line: `--quick` for a look while developing, `--rounds`, and a benchmark's own options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: no figures to report")
    parser.add_argument("--cpu", action="store_true", help="one thread, processor seconds: for a machine that others use")
    parser.add_argument("--rounds", type=int, help=f"pairs per figure ({rounds})")
    for name, (default, text) in options.items():
        parser.add_argument(f"--{name}", default=default, type=type(default) if default is not None else str, help=text)
    given = parser.parse_args()
    given.rounds = given.rounds or (3 if given.quick else rounds)
    if given.cpu:
        torch.set_num_threads(1)
        CLOCK.append(time.process_time)
    return given


def interleaved(ways: Mapping[str, Callable[[], Any]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each way, round by round. All run in each round, in turning order, so that noise falls on all."""
    names, found = list(ways), {name: [] for name in ways}
    gc.disable()  # a collection falls on whoever happens to run
    try:
        for number in range(-warm, rounds):
            start = number % len(names)
            for name in names[start:] + names[:start]:
                gc.collect()
                began = CLOCK[-1]()
                ways[name]()
                if number >= 0:
                    found[name].append(CLOCK[-1]() - began)
    finally:
        gc.enable()
    return found


Round = Callable[[], float]  # does its work once and says how many seconds count


def timed(work: Callable[[], Any]) -> Round:
    """A round that counts all of it, with no collection falling on it."""

    def spent() -> float:
        gc.collect()
        gc.disable()
        began = CLOCK[-1]()
        work()
        ended = CLOCK[-1]()
        gc.enable()
        return ended - began

    return spent


def apart(
    ways: Mapping[str, Callable[[], AbstractContextManager[Round]]], rounds: int, warm: int = 1
) -> dict[str, list[float]]:
    """`interleaved`, each way in a process of its own: what one does to allocator, kernels and caches stays with it."""
    context, found = multiprocessing.get_context("spawn"), {name: [] for name in ways}
    pipes, names, processes = {name: context.Pipe() for name in ways}, list(ways), []
    for name, way in ways.items():
        served = (way, CLOCK[-1] is time.process_time, pipes[name][1])
        processes.append(context.Process(target=_serve, args=served))  # no daemon: it may have loading processes of its own
        processes[-1].start()
        pipes[name][1].close()  # so that the end of a process that fails is seen
        pipes[name][0].recv()  # it is ready: nobody prepares while others are measured
    for number in range(-warm, rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            pipes[name][0].send(True)
            seconds = pipes[name][0].recv()
            if number >= 0:
                found[name].append(seconds)
    for (pipe, _), process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()
    return found


def _serve(way: Callable[[], AbstractContextManager[Round]], cpu: bool, pipe: Connection) -> None:
    if cpu:
        torch.set_num_threads(1)
        CLOCK.append(time.process_time)
    with way() as work:
        pipe.send(None)
        while pipe.recv():
            pipe.send(work())


def ratio(times: Mapping[str, Sequence[float]], name: str, base: str) -> str:
    """Median over the rounds of one way's time over another's, with the quartiles."""
    low, high = spread(times, name, base)
    return f"{middle(times, name, base):.3f} [{low:.3f}, {high:.3f}]"


def spread(times: Mapping[str, Sequence[float]], name: str, base: str) -> tuple[float, float]:
    """The quartiles alone."""
    found = [one / other for one, other in zip(times[name], times[base], strict=True)]
    low, _, high = quantiles(found, n=4, method="inclusive") if len(found) > 1 else (found[0],) * 3
    return low, high


def middle(times: Mapping[str, Sequence[float]], name: str, base: str) -> float:
    """The median alone."""
    return median(one / other for one, other in zip(times[name], times[base], strict=True))


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; the first column to the left, the others to the right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    print(f"\n{title}")
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        print("  " + "  ".join(cells).rstrip())
    sys.stdout.flush()


def verdict(what: str, value: float, limit: float, at_least: bool = False) -> None:
    """Say whether a target is reached."""
    reached = value >= limit if at_least else value <= limit
    print(f"  {'reached' if reached else 'NOT reached'}: {what} {value:.3f}, {'at least' if at_least else 'at most'} {limit:g}")
    sys.stdout.flush()


def rates(
    title: str, unit: str, times: Mapping[str, Sequence[float]], count: int, peers: Mapping[str, tuple[str, float]]
) -> None:
    """Units a second of each way, which had `count` of them, and ours over each peer's: name -> (shown, what to reach)."""
    rate = {name: count / median(found) for name, found in times.items()}
    rows = [["dsd-refine", f"{rate['ours']:.1f}", ""]]
    rows += [[shown, f"{rate[name]:.1f}", ratio(times, name, "ours")] for name, (shown, _) in peers.items()]
    table(title, ["", f"{unit}/s", "ours / this one"], rows)
    for name, (shown, limit) in peers.items():
        verdict(f"{unit} a second, ours / {shown}", middle(times, name, "ours"), limit, at_least=True)


def each_in_a_place(given: argparse.Namespace, *kinds: Callable[[argparse.Namespace, Path], None]) -> None:
    """The machine, then every kind of measurement with a folder of its own."""
    print(machine())
    for kind in kinds:
        with place() as folder:
            kind(given, folder)


def missing(peer: str) -> str:
    """Why a peer is not in the table: the last words of its installation, without places of this machine."""
    log = PEERS / f"{peer}.log"
    if not PEERS.is_dir():
        return "not installed: run benchmarks/peers.sh"
    lines = [line for line in log.read_text().splitlines() if line.startswith("ERROR")] if log.is_file() else []
    return f"not installable here: {lines[-1][:120] if lines else 'see its log'}"


# ------------------------------------------------------------------------------------------------------------------ memory


def anonymous() -> int:
    """Bytes of memory of this process that no file stands behind."""
    return next((int(line.split()[1]) * 1024 for line in _lines("/proc/self/status") if line.startswith("RssAnon")), 0)


class Peak:
    """Within, the most anonymous memory that was held above what was held before, looked at every millisecond."""

    def __init__(self) -> None:
        self.before = self.most = 0

    def __enter__(self) -> Peak:
        trim()
        self.before = self.most = anonymous()
        self.ended = threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()
        return self

    def _watch(self) -> None:
        while not self.ended.wait(0.001):
            self.most = max(self.most, anonymous())

    def __exit__(self, *_: object) -> None:
        self.most = max(self.most, anonymous())
        self.ended.set()
        self.watcher.join()

    @property
    def bytes(self) -> int:
        return self.most - self.before


def trim() -> None:
    """Give freed memory back to the system, so that it is not counted as held."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def place() -> Iterator[Path]:
    """A folder that goes away."""
    with tempfile.TemporaryDirectory(prefix="dsd-bench-") as folder:
        yield Path(folder)


def copy_synced(source: Path, target: Path) -> None:
    """A plain copy with fsync: what writing is held against."""
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, 1 << 22)
        write.flush()
        os.fsync(write.fileno())
