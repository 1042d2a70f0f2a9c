"""The machine: the memory allocator of the C library, torch's threads, energy counters."""

from __future__ import annotations

import ctypes
import math
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>

POWERCAP = Path("/sys/class/powercap")  # Linux: a counter for each CPU package (RAPL), of Intel's and of AMD's
SAMPLED = 60.0  # seconds between two readings; a counter of 262 kJ would need 4 kW to go round in that time

NEVER = 2**31 - 1
HIGHEST = 32 << 20  # bytes, the highest value that glibc accepts for M_MMAP_THRESHOLD on 64 bits (mallopt(3))


def keep_freed_memory() -> bool:
    """Keep freed memory in the process for the next step.

    Return whether the C library (glibc) can do so.

    On a CPU, glibc returns the free top of its heap to the system at the end of each step. The next
    step then gets it back page by page, which takes time (`benchmarks/throughput.py` measures it).
    Tensors of more than 32 MB are still returned.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(M_MMAP_THRESHOLD, HIGHEST) and library.mallopt(M_TRIM_THRESHOLD, NEVER))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside a `with` block.

    It is for code beside threads that hash. torch divides even short work among all cores, and
    waits for the core that is busy hashing (docs/decisions.md, "One thread beside the hash").
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class EnergyCounter(NamedTuple):
    """`read` gives joules since some moment; behind `span` joules the counter begins at 0 again (inf: it never does)."""

    read: Callable[[], float]
    span: float


def energy_counters(device: torch.device, powercap: Path = POWERCAP) -> list[EnergyCounter]:
    """The GPU's total energy counter (through NVML, where pynvml is installed) or those of the CPU packages.

    Empty where there is none, or none that this user may read.
    """
    try:
        return [_gpu_counter(device)] if device.type == "cuda" else _cpu_counters(powercap)
    except Exception:  # pynvml is missing, or has errors of its own for an old GPU, a MIG slice, a missing driver
        return []


def _gpu_counter(device: torch.device) -> EnergyCounter:
    nvml = import_module("pynvml")
    nvml.nvmlInit()
    number = torch.cuda.current_device() if device.index is None else device.index
    handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(number).uuid}")
    counter = EnergyCounter(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, math.inf)
    counter.read()  # a GPU older than Volta has none
    return counter


def _cpu_counters(powercap: Path) -> list[EnergyCounter]:
    """One for each package. Its parts (cores, memory) and the whole board (psys) would be counted twice."""

    def joules(file: Path) -> float:
        return int(file.read_text()) / 1e6

    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if (zone / "name").read_text().startswith("package")]
    found = [
        EnergyCounter(lambda file=zone / "energy_uj": joules(file), joules(zone / "max_energy_range_uj"))  # type: ignore[misc]
        for zone in zones
    ]
    for counter in found:
        counter.read()  # on most systems the administrator alone may
    return found


class EnergyMeter:
    """Energy used since `with` began, by everything on the device: other programs on it are not told apart.

    A CPU package's counter begins at 0 again after minutes of work, so a thread reads it every SAMPLED seconds.
    """

    def __init__(self, counters: Sequence[EnergyCounter], sampled: float = SAMPLED) -> None:
        self.counters, self.sampled = counters, sampled
        self._used = 0.0 if counters else math.nan
        self._last: list[float] = []
        self._lock, self._over = threading.Lock(), threading.Event()

    def __enter__(self) -> EnergyMeter:
        self._last = [counter.read() for counter in self.counters]
        if any(math.isfinite(counter.span) for counter in self.counters):
            threading.Thread(target=self._sample, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _sample(self) -> None:
        while not self._over.wait(self.sampled):
            self.joules()

    def joules(self) -> float | None:
        """What was used so far; None where that is not known."""
        with self._lock:
            try:
                now = [counter.read() for counter in self.counters]
            except Exception:  # what could be read at first cannot be any more
                now = [math.nan] * len(self.counters)
            for counter, before, after in zip(self.counters, self._last, now, strict=True):
                self._used += (after - before) % counter.span  # inf, where a counter that never wraps went back
            self._last = now
            return self._used if math.isfinite(self._used) else None
