"""torch's own threads, where they would be in the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
