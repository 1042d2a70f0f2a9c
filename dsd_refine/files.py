"""Files: hashes, copies, atomic replacement, sync, links, and the message for a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import IO, Any

from dsd_refine.errors import RunError

READ_SIZE = 1 << 20  # bytes read at once


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    return sha256_files([path])[path]


def sha256_files(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the hexadecimal SHA-256 of each file by its path, in as many threads as there are
    cores.
    """
    with hashing(paths) as hashes:
        return hashes()


@contextmanager
def hashing(paths: Iterable[Path]) -> Iterator[Callable[[], dict[Path, str]]]:
    """Begin to compute the hexadecimal SHA-256 of each file, in as many threads as there are cores.

    The threads stop at the end of the `with` block, after the block of the file that they are reading.

    Yields:
        a function that waits for the hashes and returns them by path. It raises OSError for a file that cannot be read.
    """
    files, stopped = [*paths], Event()

    def digest(path: Path) -> str:
        sha256, block = hashlib.sha256(), memoryview(bytearray(READ_SIZE))
        with path.open("rb", buffering=0) as file:
            while not stopped.is_set() and (count := file.readinto(block)):
                sha256.update(block[:count])
        return sha256.hexdigest()

    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        digests = pool.map(digest, files)
        yield lambda: dict(zip(files, digests, strict=True))
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a file, and sync them.

    The mode follows the umask, and the times are not copied.
    """
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
    """Write everything of an open file to the disk. It must be there before a rename."""
    file.flush()  # python's own buffer
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk, so that a rename into it is not lost."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def leads_out(path: Path, folder: Path) -> bool:
    """Return whether links lead from a path to a place outside the folder.

    The files of a snapshot in the Hub's cache are links to the cache's blobs, which count as
    inside.
    """
    real, root = os.path.realpath(path), os.path.realpath(folder)
    return not any(os.path.commonpath([real, own]) == own for own in (root, *_blobs(root)))


def _blobs(root: str) -> list[str]:
    """Return the folder `…/blobs` of a snapshot `…/snapshots/COMMIT`; an empty list for other folders."""
    parent, _ = os.path.split(root)
    repository, name = os.path.split(parent)
    return [os.path.join(repository, "blobs")] if name == "snapshots" else []


def remove(path: Path) -> None:
    """Remove a file or a directory."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def sync_file(path: Path) -> None:
    """Write a closed file's bytes to the disk."""
    with path.open("rb") as file:
        sync(file)


def replace_text(path: Path, text: str) -> None:
    """Replace a file's content by a text. At every moment the file has the old or the new content.

    Raises:
        RunError: The file cannot be written: no room, or a read-only place.
    """
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """Replace a file's content by bytes, as `replace_text` does.

    Raises:
        RunError: The file cannot be written: no room, or a read-only place.
    """
    replace_parts(path, [data], len(data))


def replace_parts(path: Path, parts: Iterable[bytes | memoryview], size: int) -> str:
    """Replace a file's content by `size` bytes that come in parts, as `replace_text` does.

    Each part is made when it is written, so that they need not be in memory together.

    Returns:
        The hexadecimal SHA-256 of the bytes.

    Raises:
        RunError: The file cannot be written: no room, or a read-only place.
    """
    temporary, digest = path.with_name(path.name + ".tmp"), hashlib.sha256()
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
                digest.update(part)
            sync(file)
        os.replace(temporary, path)
        sync_folder(path.parent)  # a later change, such as a removal, must not reach the disk before this one
    except OSError as error:
        temporary.unlink(missing_ok=True)
        free = f"; {in_words(free_bytes(path.parent))} are free" if error.errno in FULL else ""
        raise RunError(
            f"{path}: cannot write {size:,} bytes: {error.strerror or error}{free}. What was saved before is whole: "
            "make room, then go on with --resume"
        ) from None
    return digest.hexdigest()


def umask() -> int:
    """Return the process's umask. It can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def no_room(error: OSError, place: Path, need: int) -> RunError:
    """Return the error for a full disk: where, how much the run needs, how much is free, and what
    to do.

    Args:
        error: The system's error.
        place: The folder that the run writes to.
        need: The bytes that the whole run needs there.
    """
    where = error.filename or place
    free = f"{in_words(free_bytes(place))} are free" if place.is_dir() else "it is gone"
    return RunError(
        f"{where}: {os.strerror(error.errno or errno.ENOSPC)}. The run needs about {in_words(need)} in {place}, {free}. "
        "What was saved before is whole: make room, then go on with --resume"
    )


def is_full(error: BaseException | None) -> OSError | None:
    """Return the system's error for a full disk that caused an error, or None.

    Libraries may have wrapped it.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


def free_bytes(place: Path) -> int:
    """Return the free bytes of the disk that a folder is on."""
    return shutil.disk_usage(place).free


def in_words(size: int) -> str:
    """Write a number of bytes in the largest unit in which it is at least 1."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if size >= 10**power:
            return f"{size / 10**power:.1f} {unit}"
    return f"{size} bytes"
