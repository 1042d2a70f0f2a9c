"""The memory allocator of the C library, and torch's threads."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>

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
