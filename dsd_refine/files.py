"""Files: hashes, copies, atomic replacement, sync, links, and what is said when the disk is full."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import IO, Any

from dsd_refine.errors import RunError

BLOCK = 1 << 20


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    return sha256_files([path])[path]


def sha256_files(paths: Iterable[Path]) -> dict[Path, str]:
    """Path -> hex SHA-256 of the file's bytes, several files at a time. A signal waits for the blocks at work alone."""
    asked, stopped = [*paths], Event()

    def digest(path: Path) -> str:
        found, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
        with path.open("rb", buffering=0) as file:
            while not stopped.is_set() and (count := file.readinto(block)):
                found.update(block[:count])
        return found.hexdigest()

    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        return dict(zip(asked, pool.map(digest, asked), strict=True))
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy bytes (not mode or times: modes follow the umask) and sync."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, 1 << 22)
        sync(write)


def write_text(path: Path, text: str) -> None:
    """Write and sync a text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        sync(file)


def sync(file: IO[Any]) -> None:
    """Ask for what was written to be on the disk before anything is renamed: python's own buffer first."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Sync a directory's own entries, as a rename into it needs."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def leads_out(path: Path, folder: Path) -> bool:
    """Is the path, or a folder on the way to it, a link to something that is not the folder's own?

    Its own is what lies in it, and for a snapshot in the Hub's cache also the cache's blobs, which its files link to.
    """
    real, root = os.path.realpath(path), os.path.realpath(folder)
    return not any(os.path.commonpath([real, own]) == own for own in (root, *_blobs(root)))


def _blobs(root: str) -> list[str]:
    """`…/blobs` of `…/snapshots/COMMIT`."""
    place, _ = os.path.split(root)
    above, name = os.path.split(place)
    return [os.path.join(above, "blobs")] if name == "snapshots" else []


def remove(path: Path) -> None:
    """Remove a file or a directory."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def sync_file(path: Path) -> None:
    """Ask for a file's bytes to be on the disk, whoever wrote it."""
    with path.open("rb") as file:
        sync(file)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that at every moment it holds the old text or the new."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """The same for bytes. Raises RunError where they cannot be written (no room, a read-only place)."""
    replace_parts(path, [data], len(data))


def replace_parts(path: Path, parts: Iterable[bytes | memoryview], size: int) -> str:
    """The same for `size` bytes that come in parts, each made when it is written; returns their SHA-256."""
    temporary, digest = path.with_name(path.name + ".tmp"), hashlib.sha256()
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
                digest.update(part)
            sync(file)
        os.replace(temporary, path)
        sync_folder(path.parent)  # what comes after, a removal above all, must not reach the disk before this
    except OSError as error:
        temporary.unlink(missing_ok=True)
        free = f"; {in_words(free_bytes(path.parent))} are free" if error.errno in FULL else ""
        raise RunError(
            f"{path}: cannot write {size:,} bytes: {error.strerror or error}{free}. What was saved before is whole: "
            "make room, then go on with --resume"
        ) from None
    return digest.hexdigest()


def umask() -> int:
    """The process's umask (there is no way to read it but to set it)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def no_room(error: OSError, place: Path, need: int) -> RunError:
    """What is said when a write found no room: where, how much the whole run needs, how much is free, what to do."""
    where = error.filename or place
    free = f"{in_words(free_bytes(place))} are free" if place.is_dir() else "it is gone"
    return RunError(
        f"{where}: {os.strerror(error.errno or errno.ENOSPC)}. The run needs about {in_words(need)} in {place}, {free}. "
        "What was saved before is whole: make room, then go on with --resume"
    )


def is_full(error: BaseException | None) -> OSError | None:
    """The lack of room behind an error, however many libraries have wrapped it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


def free_bytes(place: Path) -> int:
    return shutil.disk_usage(place).free


def in_words(size: int) -> str:
    """A number of bytes in the largest unit that keeps it above 1."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if size >= 10**power:
            return f"{size / 10**power:.1f} {unit}"
    return f"{size} bytes"
