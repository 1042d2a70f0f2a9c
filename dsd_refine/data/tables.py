"""Read any form of DATA, and get rows of a table and the files that they name."""

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

T = TypeVar("T")

LARGEST = 10**9  # the most bytes of one example
MOST_FOLDERS = 50  # folders in which a missing file is searched
ROWS_AT_ONCE = 1000  # rows in a block


def read_tables(
    spec: str,
    cache: Path,
    *,
    download: Callable[[str, int], bool],
    encoding: str = "utf-8",
    documents: str = "paragraphs",
) -> Reading:
    """Read DATA in any form. Every file in it is used, or named in the result's `unused`.

    Junk and papers are not named (`dsd_refine.data.listing`).

    Args:
        spec: DATA as the user wrote it.
        cache: The folder that files are parsed into.
        download: `download(name, bytes)` is called for a Hub data set of more than HUB_LIMIT bytes.
            False refuses it.
        encoding: The encoding of text files without a byte order mark.
        documents: What is a document in a .txt file: paragraphs, lines or file.

    Raises:
        DataError: The data are missing, empty, of no known form or of several, or too large to
            download.
    """
    refuse_unwritable(Path(os.path.abspath(spec)))
    reading = _read(spec, Place(cache, encoding, documents), download)
    if not any(len(table.rows) for table in reading.tables.values()):
        raise DataError(f"{spec}: holds no rows")
    tables = {
        name: replace(table, rows=table.rows.with_format(None), origin=table.origin or name)  # without a saved format
        for name, table in reading.tables.items()
    }
    return replace(reading, tables=tables, unused=shortened(reading.unused), notes=shortened(reading.notes))


def _read(spec: str, place: Place, download: Callable[[str, int], bool]) -> Reading:
    """Read a folder, a file, or a data set of the Hub."""
    path = Path(spec)
    folder, _, config = spec.rpartition(":")
    if path.is_dir():
        return with_declared_names(path, read_folder(path, None, place))
    if path.is_file():
        return _read_single_file(path, place)
    if folder and Path(folder).is_dir():
        return read_folder(Path(folder), config, place)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", spec) or spec.startswith(".") or is_table(path):
        raise DataError(f"{spec}: no such file or directory{tried(path)}, and not a Hub data set (org/name[:config])")
    try:
        return read_hub(spec, download)
    except DataError as error:
        raise DataError(f"{error} (and there is no such file or directory here{tried(path)})") from None


def _read_single_file(path: Path, place: Place) -> Reading:
    """Read a file, and find the folder that its file names start at."""
    reading = read_file(path, path.name, place)
    placed = {split: located(table) for split, table in reading.tables.items()}
    notes = tuple(line for _, lines in placed.values() for line in lines)
    return replace(reading, tables={split: table for split, (table, _) in placed.items()}, notes=reading.notes + notes)


def tried(path: Path) -> str:
    """Say where a missing file was looked for: its whole path, the part that exists, and a similar
    name there.
    """
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
    """Return whether a CSV or TSV seems to have no head, because its column names look like a row.

    A name looks so if it is also a value of its column, or a number, or a sentence.
    """
    if not re.search(r"\.[ct]sv(\.\w+)?$", table.origin):
        return False
    first = table.rows[:ROWS_AT_ONCE]
    return any(name in map(str, first[name]) or integer(name) is not None or len(name.split()) > 3 for name in first)


def undecoded(table: Table, name: str, feature: Any) -> Table:
    """Return the table so that a column of type `feature` gives bytes and paths, not decoded
    values.

    `feature` is datasets.Image or datasets.Audio.

    Raises:
        DataError: There is no such column.
    """
    if name not in table.rows.column_names:
        raise DataError(f"a split has no column {name!r}, only {listed(table.rows.column_names)}")
    if isinstance(table.rows.features[name], feature):
        return replace(table, rows=table.rows.cast_column(name, feature(decode=False)))
    return table


def raw_bytes(table: Table, name: str, row: int) -> bytes:
    """Return the bytes of the file that a column contains or names.

    Raises:
        OSError: The file cannot be read.
        TypeError: The row has no file.
    """
    return file_bytes(table.rows[row][name], table.folder)


def file_bytes(value: Any, folder: Path | None) -> bytes:
    """Return the bytes of a file from what a row has of it: bytes, a mapping of `bytes` and `path`, or a path.

    Args:
        value: What the row has.
        folder: The folder that relative paths start at.

    Raises:
        OSError: The file cannot be read.
        TypeError: It is nothing that names a file.
    """
    if isinstance(value, dict):
        content = value.get("bytes")
        return _bytes_of(Path(value.get("path"))) if content is None else bytes(content)  # type: ignore[arg-type]
    if isinstance(value, bytes):
        return value
    folder = folder or Path()
    return _bytes_of(folder / value, folder)


def _bytes_of(path: Path, folder: Path | None = None) -> bytes:
    """The bytes of a regular file. Reading a pipe or a device could take for ever.

    Raises:
        OSError: The file is missing, no regular file, too large for an example, or has an
            impossible name.
    """
    try:
        status = path.stat()
    except ValueError:
        raise OSError(errno.EINVAL, "not a possible file name") from None
    except FileNotFoundError:
        raise FileNotFoundError(
            errno.ENOENT, f"No such file or directory{tried(path)}{_deeper(path, folder)}", str(path)
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if status.st_size > LARGEST:
        raise OSError(errno.EFBIG, f"larger than {LARGEST / 1e9:.0f} GB")
    content = path.read_bytes()
    if content.startswith(POINTER):
        raise OSError(errno.EINVAL, "a Git LFS pointer, the file itself was not fetched: git lfs pull")
    return content


def _deeper(path: Path, folder: Path | None) -> str:
    """Say which folders in `folder` have the file that `folder` itself has not."""
    if folder is None or not path.is_relative_to(folder):
        return ""
    name = path.relative_to(folder)
    holding = [f"{inner.name}/" for inner in sorted(folder.glob("*/"))[:MOST_FOLDERS] if (inner / name).is_file()]
    return f"; it lies in {' and '.join(holding[:3])} there" if holding else ""


def in_words(error: Exception) -> str:
    """Write an error in one line that is the same in each run: without the addresses of python's
    objects.
    """
    text = re.sub(r"<[\w.]+ object at 0x[0-9a-f]+>", "it", str(error))
    return " ".join(text.split()) or type(error).__name__


def row_blocks(table: Table, names: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
    """Yield the values of rows in these columns, in order, in blocks of rows.

    A table is on the disk, and may not fit into the memory.
    """
    for block in table.rows.select_columns([*dict.fromkeys(names)]).iter(ROWS_AT_ONCE):
        yield list(zip(*(block[name] for name in names), strict=True))


def in_threads(function: Callable[[int], T], rows: int) -> list[T]:
    """Call `function(row)` for every row in threads, and return the results in order.

    A signal (KeyboardInterrupt) waits only for the rows that are being worked on. The rows are
    given to the threads in blocks, because each waiting row takes memory and makes Python's garbage
    collector slower.
    """
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        blocks = (range(start, min(start + ROWS_AT_ONCE, rows)) for start in range(0, rows, ROWS_AT_ONCE))
        return [result for block in blocks for result in pool.map(function, block)]
    finally:
        pool.shutdown(cancel_futures=True)
