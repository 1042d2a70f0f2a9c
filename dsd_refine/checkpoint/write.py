"""The same-shape writer: trained values laid over the source's own bytes."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch

from dsd_refine.checkpoint.layout import Layout
from dsd_refine.checkpoint.placement import Placement, gather
from dsd_refine.checkpoint.safetensors_file import Entry, all_finite, memory
from dsd_refine.errors import RunError
from dsd_refine.files import copy_file, sync
from dsd_refine.system import one_thread

AHEAD = 1 << 24  # bytes written before the disk is asked to write them
GROUP = 1 << 20  # bytes that are hashed and written at a time: of a model's hundreds of tensors most are next to nothing
BEHIND = 4  # groups that are held until they are hashed


def entry_value(start: torch.Tensor, entry: Entry, placement: Placement, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What one tensor of the file is written as; `start` is the source's.

    A tensor that the model does not own, or whose values did not change, is the source's own (so that -0.0 and the
    bits of foreign tensors survive).

    Raises:
        RunError: a trained value is not finite, or overflows the file's dtype.
    """
    if entry.name not in placement:
        return start
    value = gather(placement[entry.name], start, state).to("cpu", entry.dtype)
    if torch.equal(value, start):
        return start
    if value.is_floating_point() and not all_finite(value):
        raise RunError(f"{entry.name}: holds values that {entry.dtype} cannot; nothing was published")
    return value


def write_weights(layout: Layout, placement: Placement, state: Mapping[str, torch.Tensor], folder: Path) -> dict[str, str]:
    """Write every weight file of the layout into `folder`; returns file name -> SHA-256 of what was written.

    Header and metadata are the source's bytes; the files are synced before this returns.
    """
    digests: dict[str, Any] = {}
    syncs: list[Future[None]] = []
    with one_thread(), ExitStack() as files, ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(1) as syncing:
        for file in layout.files:
            source = file.mapped()
            values = (memory(entry_value(source[entry.name], entry, placement, state)) for entry in file.entries)
            out = files.enter_context((folder / file.name).open("wb"))
            digests[file.name] = _write(file.head, values, out, hashing, syncing, syncs)
        for synced in syncs:  # all of them: what one sync has said of the disk, a later one does not say again
            synced.result()
    if layout.index is not None:
        copy_file(layout.index, folder / layout.index.name)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _write(
    head: bytes,
    values: Iterable[memoryview],
    out: IO[bytes],
    hashing: Executor,
    syncing: Executor,
    syncs: list[Future[None]],
) -> Any:
    """Head and tensors; returns their SHA-256, which takes longer than to write and is made beside, a few groups behind.

    The disk is asked to write all the while, since at the end it would have everything to do and nothing beside; the last
    bytes, while the hash catches up.
    """
    digest = hashlib.sha256(head)
    out.write(head)
    behind: deque[Future[None]] = deque()
    ahead = 0
    for group in _grouped(values):
        if len(behind) == BEHIND:
            behind.popleft().result()
        behind.append(hashing.submit(_update, digest, group))
        out.writelines(group)
        ahead += sum(map(len, group))
        if ahead >= AHEAD and (not syncs or syncs[-1].done()):
            syncs.append(syncing.submit(os.fsync, out.fileno()))
            ahead = 0
    syncs.append(syncing.submit(sync, out))
    for hashed in behind:
        hashed.result()
    return digest


def _grouped(values: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    group: list[memoryview] = []
    size = 0
    for data in values:
        group.append(data)
        size += len(data)
        if size >= GROUP:
            yield group
            group, size = [], 0
    yield group


def _update(digest: Any, group: list[memoryview]) -> None:
    for data in group:
        digest.update(data)


def written_dtypes(layout: Layout, placement: Placement) -> Iterator[tuple[str, str, torch.Tensor | None, torch.dtype]]:
    """What is written in less than float32: (the file's name, the model's, flat elements or None for all, dtype)."""
    for name, parts in placement.items():
        dtype = layout.entry(name).dtype
        if dtype in (torch.float16, torch.bfloat16):
            for part in parts:
                yield name, part.key, None if part.whole else part.target, dtype
