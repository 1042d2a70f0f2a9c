"""Decoded pictures and sounds of a run, so that no row is decoded once an epoch and arm."""

from __future__ import annotations

import os
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsd_refine.files import free_bytes

ENTRY = struct.Struct("<qqii")  # where a row's bytes begin, how many they are (0: not held), and two numbers of their shape
SHARE = 0.25  # of the free disk space, the most that is taken
MOST = 64 << 30  # bytes: more is not taken whatever is free


@dataclass
class Budget:
    """The bytes that decoded rows may still take. `full` is set once a row did not fit."""

    left: int
    full: bool = False
    lock: Any = field(default_factory=threading.Lock)

    def take(self, size: int) -> bool:
        """Reserve `size` bytes; False if they are not left."""
        with self.lock:
            fits = size <= self.left
            self.left -= size if fits else 0
            self.full |= not fits
            return fits


class DecodedRows:
    """The decoded content of a table's rows: one file of values, and one of an ENTRY for each row.

    The files lie in OUT.partial/cache, which each start of a run empties: they are never synced, and
    so may be torn after a kill. Several processes read the same files; one writes them. A row that is
    not held is decoded again by whoever needs it, so nothing depends on what is held.

    Args:
        path: The file of values, without its suffix.
        rows: The number of the table's rows.
        budget: The bytes that are left, shared with other tables.
        writes: This process makes the files. Others only read them.

    Attributes:
        prepared: The rows are held as the model sees them, not only decoded.
    """

    def __init__(self, path: Path, rows: int, budget: Budget, writes: bool) -> None:
        self.path, self.budget, self.writes, self.prepared = path, budget, writes, False
        self._end, self._lock = 0, threading.Lock()
        self._files: tuple[int, int] | None = None
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".values").write_bytes(b"")
            path.with_suffix(".rows").write_bytes(b"")
            os.truncate(path.with_suffix(".rows"), rows * ENTRY.size)  # zeros, which take no space

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes, which only read."""
        return {"path": self.path, "prepared": self.prepared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self.prepared = state["path"], state["prepared"]
        self.writes, self._files, self._lock = False, None, threading.Lock()

    def __del__(self) -> None:
        for descriptor in self._files or ():
            with suppress(OSError):
                os.close(descriptor)

    def _open(self) -> tuple[int, int]:
        with self._lock:
            if self._files is None:
                mode = os.O_RDWR if self.writes else os.O_RDONLY
                values, entries = (os.open(self.path.with_suffix(suffix), mode) for suffix in (".values", ".rows"))
                self._files = values, entries
            return self._files

    def put(self, row: int, content: bytes, first: int, second: int) -> None:
        """Hold the decoded content of a row, if there is room. Safe in threads.

        Args:
            row: Its number in the table.
            content: Its values.
            first: A number of its shape, such as the height.
            second: Another one, such as the width.
        """
        if not self.writes or not content or not self.budget.take(len(content)):
            return
        with self._lock:
            begin, self._end = self._end, self._end + len(content)
        try:
            values, entries = self._open()
            if os.pwrite(values, content, begin) == len(content):
                os.pwrite(entries, ENTRY.pack(begin, len(content), first, second), row * ENTRY.size)
        except OSError:  # no room on the disk after all: what is held stays, the rest is decoded each time
            self.budget.take(1 << 62)
            self.writes = False

    def get(self, row: int) -> tuple[bytearray, int, int] | None:
        """Return the content of a row and the two numbers of its shape, or None if it is not held."""
        try:
            values, entries = self._open()
            begin, size, first, second = ENTRY.unpack(os.pread(entries, ENTRY.size, row * ENTRY.size))
            content = bytearray(size)
            read = os.preadv(values, [content], begin)
        except (OSError, struct.error):  # another machine's processes have no such files
            return None
        return (content, first, second) if size and read == size else None


class Store:
    """Where decoded rows are held during a run, and how many bytes of them.

    Args:
        folder: A folder for the files, on the disk of the output.
        limit: The most bytes. None: a quarter of what is free there.
        writes: This process makes the files. Others only read them.
    """

    def __init__(self, folder: Path, limit: int | None, writes: bool) -> None:
        self.folder, self.writes, self.tables = folder, writes, 0
        disk = next(place for place in (folder, *folder.parents) if place.is_dir())
        self.budget = Budget(min(MOST, int(SHARE * free_bytes(disk))) if limit is None else limit)

    def rows(self, number: int) -> DecodedRows | None:
        """Return the place for the decoded content of a table of so many rows. None if nothing is to be held."""
        if self.budget.left <= 0:
            return None
        self.tables += 1
        return DecodedRows(self.folder / f"table-{self.tables}", number, self.budget, self.writes)
