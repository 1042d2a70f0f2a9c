"""The machine: the memory allocator of the C library, torch's threads, energy counters."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>

POWERCAP = Path("/sys/class/powercap")  # Linux: an energy counter for each CPU package (RAPL), Intel and AMD
# Seconds between two readings. A counter of 262 kJ wraps around in this time only above 4 kW.
SAMPLED = 60.0

NEVER = 2**31 - 1
HIGHEST = 32 << 20  # bytes, the highest value that glibc accepts for M_MMAP_THRESHOLD on 64 bits (mallopt(3))
LARGE = 1 << 18  # bytes of a tensor that is returned at once in a sharded run


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


def return_freed_memory() -> bool:
    """Return freed memory of large tensors to the system at once.

    Return whether the C library (glibc) can do so.

    A model that is divided among processes is gathered block by block. glibc would keep the freed blocks, in a heap of
    each thread that exchanges them: together several times the model.
    """
    return platform.libc_ver()[0] == "glibc" and bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE))


def host_memory() -> int:
    """Return the bytes of this machine's memory. 0: it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no such question
        return 0


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
    """A counter of energy.

    Attributes:
        read: Returns the joules since some moment.
        span: After so many joules the counter wraps around to 0. Infinite: it never does.
    """

    read: Callable[[], float]
    span: float


def energy_counters(device: torch.device, powercap: Path = POWERCAP) -> list[EnergyCounter]:
    """Return the energy counter of the GPU (NVML, needs pynvml), or those of the CPU packages.

    The list is empty if there is no counter, or if this user may not read it.
    """
    try:
        return [_gpu_counter(device)] if device.type == "cuda" else _cpu_counters(powercap)
    # pynvml may be missing. It has its own errors for an old GPU, a MIG slice or a missing driver.
    except Exception:
        return []


def _gpu_counter(device: torch.device) -> EnergyCounter:
    nvml = import_module("pynvml")
    nvml.nvmlInit()
    number = torch.cuda.current_device() if device.index is None else device.index
    handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(number).uuid}")
    counter = EnergyCounter(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, math.inf)
    counter.read()  # fails here if the GPU has no counter (older than Volta)
    return counter


def _cpu_counters(powercap: Path) -> list[EnergyCounter]:
    """Return one counter for each CPU package.

    Counters of its parts (cores, memory) and of the whole board (psys) are left out, because they
    would count the same energy twice.
    """

    def joules(file: Path) -> float:
        return int(file.read_text()) / 1e6

    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if (zone / "name").read_text().startswith("package")]
    counters = [
        EnergyCounter(lambda file=zone / "energy_uj": joules(file), joules(zone / "max_energy_range_uj"))  # type: ignore[misc]
        for zone in zones
    ]
    for counter in counters:
        counter.read()  # fails here if only the administrator may read it, as on most systems
    return counters


class EnergyMeter:
    """Measures the energy used by the device inside a `with` block, including that of other programs.

    The counter of a CPU package wraps around after minutes of work, so a thread reads it regularly.

    Args:
        counters: The counters of the device.
        sampled: Seconds between two readings.
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
        """Return the joules used so far, or None if they are not known."""
        with self._lock:
            try:
                now = [counter.read() for counter in self.counters]
            except Exception:  # a counter that was readable at first is not any more
                now = [math.nan] * len(self.counters)
            for counter, before, after in zip(self.counters, self._last, now, strict=True):
                self._used += (after - before) % counter.span  # infinite if a counter that never wraps went back
            self._last = now
            return self._used if math.isfinite(self._used) else None
