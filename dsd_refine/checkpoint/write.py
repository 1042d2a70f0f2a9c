"""Write trained values into files of the same shape as the source's."""

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
from dsd_refine.checkpoint.placement import Elements, Placement, gather
from dsd_refine.checkpoint.safetensors_file import Entry, all_finite, memory
from dsd_refine.errors import RunError
from dsd_refine.files import copy_file, sync
from dsd_refine.system import one_thread

AHEAD = 1 << 24  # bytes written between two syncs
GROUP = 1 << 20  # bytes that are hashed and written at once: most of a model's hundreds of tensors are tiny
BEHIND = 4  # groups that wait in memory for their hash


def entry_value(start: torch.Tensor, entry: Entry, placement: Placement, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the values to write for one tensor of the file.

    Args:
        start: The tensor's values in the source.
        entry: Its entry in the file's header.
        placement: Where the model holds the tensors of the file.
        state: The model's tensors by name.

    Returns:
        The trained values in the file's dtype. Or `start` itself, if the model does not use the
        tensor or its values did not change. So -0.0 and the bits of unused tensors stay as they
        are.

    Raises:
        RunError: A trained value is not finite, or does not fit into the file's dtype.
    """
    if entry.name not in placement:
        return start
    value = gather(placement[entry.name], start, state).to("cpu", entry.dtype)
    if torch.equal(value, start):
        return start
    if value.is_floating_point() and not all_finite(value):
        raise RunError(f"{entry.name}: holds values that {entry.dtype} cannot; nothing was published")
    return value


def keys_in_order(layout: Layout, placement: Placement) -> Iterator[str]:
    """Yield the names of the model's tensors in the order in which `write_weights` reads them."""
    for name in layout.names():
        for tensor_slice in placement.get(name, ()):
            yield tensor_slice.key


def write_weights(layout: Layout, placement: Placement, state: Mapping[str, torch.Tensor], folder: Path) -> dict[str, str]:
    """Write every weight file of the layout, and its index, into `folder`.

    The header and the metadata are the source's bytes. The files are on the disk when this returns.

    Returns:
        The SHA-256 of every written weight file by its name.

    Raises:
        RunError: A trained value is not finite, or does not fit into the file's dtype.
    """
    digests: dict[str, Any] = {}
    syncs: list[Future[None]] = []
    with one_thread(), ExitStack() as files, ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(1) as syncing:
        for file in layout.files:
            source = file.mapped()
            values = (memory(entry_value(source[entry.name], entry, placement, state)) for entry in file.entries)
            out = files.enter_context((folder / file.name).open("wb"))
            digests[file.name] = _write(file.head, values, out, hashing, syncing, syncs)
        for synced in syncs:  # all of them, because a later sync does not repeat the error of an earlier one
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
    """Write the header and the tensors, and return their SHA-256.

    Hashing takes longer than writing, so another thread hashes, a few groups behind. A third thread
    syncs the file while it is written: a single sync at the end would take long with nothing beside
    it.
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
    """Collect values until a group has GROUP bytes."""
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


def written_dtypes(layout: Layout, placement: Placement) -> Iterator[tuple[str, str, Elements | None, torch.dtype]]:
    """Yield the slices of the model that are written in less than float32.

    Yields:
        The tensor's name in the file, its name in the model, the slice's flat indices in the
        model's tensor (None: all), and the file's dtype.
    """
    for name, slices in placement.items():
        dtype = layout.entry(name).dtype
        if dtype in (torch.float16, torch.bfloat16):
            for tensor_slice in slices:
                yield name, tensor_slice.key, None if tensor_slice.whole else tensor_slice.target, dtype
