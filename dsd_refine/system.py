"""The memory allocator of the C library, and torch's own threads."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>

NEVER = 2**31 - 1
HIGHEST = 32 << 20  # the most that glibc takes for M_MMAP_THRESHOLD on 64 bits (mallopt(3))


def keep_freed_memory() -> bool:
    """Let freed memory stay with the process, for the next step to use; True where that was done. glibc alone has it.

    glibc gives the top of its heap back whenever much of it is free, which is at the end of each step on a CPU; the next one
    fetches it again page by page (a bare loop does, in `benchmarks/throughput.py`). Tensors beyond 32 MB come and go.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(M_MMAP_THRESHOLD, HIGHEST) and library.mallopt(M_TRIM_THRESHOLD, NEVER))


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, torch works on the caller's thread alone.

    For beside threads that hash: torch cuts what a core does in milliseconds into equal parts for all cores and waits for the
    last, which is the one whose core is busy (docs/decisions.md, "One thread beside the hash").
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
