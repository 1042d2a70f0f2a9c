"""The entry to reading DATA, and what is asked of a table: its columns, its rows, the files that they name."""

from __future__ import annotations

import difflib
import errno
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dsd_refine.data.configs import with_declared_names
from dsd_refine.data.files import Place, is_table, read_file
from dsd_refine.data.folders import located, read_folder
from dsd_refine.data.hub_data import read_hub
from dsd_refine.data.listing import refuse_unwritable
from dsd_refine.data.names import integer, listed
from dsd_refine.data.plain import POINTER
from dsd_refine.data.reading import Reading, Table, shortened
from dsd_refine.errors import DataError

Found = TypeVar("Found")

LARGEST = 10**9  # bytes of one example
AT_MOST = 50  # folders that are looked into for a file that is not there
AT_ONCE = 1000  # rows that wait for threads


def read_tables(spec: str, cache: Path, *, download: Callable[[str, int], bool], encoding: str = "utf-8") -> Reading:
    """Read any form of `--data`. Files are parsed into `cache`; text files are in `encoding`, unless they are marked.

    Everything that lies in DATA is used, or in the reading's `unused`, but for junk and papers (dsd_refine.data.listing).
    `download(name, bytes)` is asked before a Hub data set of more than HUB_LIMIT bytes is fetched.

    Raises:
        DataError: absent, empty, of no known form or of several, or a download nobody agreed to.
    """
    refuse_unwritable(Path(os.path.abspath(spec)))
    found = _opened(spec, Place(cache, encoding), download)
    if not any(len(table.rows) for table in found.tables.values()):
        raise DataError(f"{spec}: holds no rows")
    plain = {
        name: replace(table, rows=table.rows.with_format(None), origin=table.origin or name)  # without a saved format
        for name, table in found.tables.items()
    }
    return replace(found, tables=plain, unused=shortened(found.unused), notes=shortened(found.notes))


def _opened(spec: str, place: Place, download: Callable[[str, int], bool]) -> Reading:
    path = Path(spec)
    folder, _, config = spec.rpartition(":")
    if path.is_dir():
        return with_declared_names(path, read_folder(path, None, place))
    if path.is_file():
        return _read_alone(path, place)
    if folder and Path(folder).is_dir():
        return read_folder(Path(folder), config, place)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", spec) or spec.startswith(".") or is_table(path):
        raise DataError(f"{spec}: no such file or directory{tried(path)}, and not a Hub data set (org/name[:config])")
    try:
        return read_hub(spec, download)
    except DataError as error:
        raise DataError(f"{error} (and there is no such file or directory here{tried(path)})") from None


def _read_alone(path: Path, place: Place) -> Reading:
    found = read_file(path, path.name, place)
    placed = {split: located(table) for split, table in found.tables.items()}
    notes = tuple(line for _, lines in placed.values() for line in lines)
    return replace(found, tables={split: table for split, (table, _) in placed.items()}, notes=found.notes + notes)


def tried(path: Path) -> str:
    """Where a file was looked for that is not there: its whole path, what of it there is, and a name that is close."""
    whole = Path(os.path.abspath(path))
    there = next((parent for parent in whole.parents if os.path.isdir(parent)), whole)
    missing = whole.relative_to(there).parts[0] if whole != there else whole.name
    try:
        close = difflib.get_close_matches(missing, sorted(os.listdir(there)), n=1, cutoff=0.7)
    except OSError:
        close = []
    hint = f", which has {close[0]!r}" if close else ""
    return f": looked for {whole}; {there} has no {missing!r}{hint}" if there != whole else f": looked for {whole}"


def lacks_head(table: Table) -> bool:
    """Is it a CSV or TSV whose names of columns look like a row: one is among the values below it, a number, or a sentence?"""
    if not re.search(r"\.[ct]sv(\.\w+)?$", table.origin):
        return False
    first = table.rows[:AT_ONCE]
    return any(name in map(str, first[name]) or integer(name) is not None or len(name.split()) > 3 for name in first)


def undecoded(table: Table, name: str, feature: Any) -> Table:
    """The table with a column of a decoding `feature` (datasets.Image, datasets.Audio) left as bytes and path.

    Raises:
        DataError: no such column.
    """
    if name not in table.rows.column_names:
        raise DataError(f"a split has no column {name!r}, only {listed(table.rows.column_names)}")
    if isinstance(table.rows.features[name], feature):
        return replace(table, rows=table.rows.cast_column(name, feature(decode=False)))
    return table


def raw_bytes(table: Table, name: str, row: int) -> bytes:
    """The file that a column holds or names. Raises OSError where it cannot be read, TypeError where there is none."""
    value = table.rows[row][name]
    if isinstance(value, dict):
        held = value.get("bytes")
        return _read(Path(value.get("path"))) if held is None else bytes(held)  # type: ignore[arg-type]
    if isinstance(value, bytes):
        return value
    folder = table.folder or Path()
    return _read(folder / value, folder)


def _read(path: Path, folder: Path | None = None) -> bytes:
    """A regular file's bytes: a pipe would never end, and a device gives for ever.

    Raises:
        OSError: not there, no regular file, one too large to be an example, or a name that can be none.
    """
    try:
        found = path.stat()
    except ValueError:
        raise OSError(errno.EINVAL, "not a possible file name") from None
    except FileNotFoundError:
        raise FileNotFoundError(
            errno.ENOENT, f"No such file or directory{tried(path)}{_deeper(path, folder)}", str(path)
        ) from None
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if found.st_size > LARGEST:
        raise OSError(errno.EFBIG, f"larger than {LARGEST / 1e9:.0f} GB")
    held = path.read_bytes()
    if held.startswith(POINTER):
        raise OSError(errno.EINVAL, "a Git LFS pointer, the file itself was not fetched: git lfs pull")
    return held


def _deeper(path: Path, folder: Path | None) -> str:
    """Which folders in that one hold a file of this name, though `folder` itself does not."""
    if folder is None or not path.is_relative_to(folder):
        return ""
    name = path.relative_to(folder)
    found = [f"{each.name}/" for each in sorted(folder.glob("*/"))[:AT_MOST] if (each / name).is_file()]
    return f"; it lies in {' and '.join(found[:3])} there" if found else ""


def in_words(error: Exception) -> str:
    """An error as one line that is the same in each run: without the addresses of python's objects."""
    text = re.sub(r"<[\w.]+ object at 0x[0-9a-f]+>", "it", str(error))
    return " ".join(text.split()) or type(error).__name__


def row_blocks(table: Table, names: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
    """What rows hold in these columns, in order, a block of rows at a time: a table is on disk, and may not fit in memory."""
    for block in table.rows.select_columns([*dict.fromkeys(names)]).iter(AT_ONCE):
        yield list(zip(*(block[name] for name in names), strict=True))


def in_threads(one: Callable[[int], Found], rows: int) -> list[Found]:
    """`one(row)` of every row, in order. A signal (KeyboardInterrupt) waits for the rows at work, not for those to come.

    Handed out by AT_ONCE: a pool holds more for a row that waits than most rows are, and the more wait the longer Python looks
    for what it could let go of.
    """
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        blocks = (range(start, min(start + AT_ONCE, rows)) for start in range(0, rows, AT_ONCE))
        return [found for block in blocks for found in pool.map(one, block)]
    finally:
        pool.shutdown(cancel_futures=True)
