"""Data as they lie on disk or on the Hub, read into tables: files, folders, columns. No task, no model."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import datasets

from dsd_refine.checkpoint.hub import ask_hub, check_blobs, is_of_the_hub
from dsd_refine.data import imagenet
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.space import is_full

Found = TypeVar("Found")
HUB_LIMIT = 5 * 10**9
LARGEST = 10**9  # bytes of one example
AT_ONCE = 1000  # rows that wait for threads
# The names that `datasets` gives a meaning (datasets.data_files.KEYWORDS_IN_DIR_NAME_BASE_PATTERNS): name -> role.
ROLES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64", ".m4a"}
TABLE_SUFFIXES = {".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt"}


@dataclass(frozen=True)
class Table:
    """One split as read. `names` are file names relative to the data, None for a table (rows are numbered from 0).

    `folder` is what relative file names in columns count from. `classes` are the names of integer labels, in order, where
    somebody said them whom the table itself does not: the recipe, or we who know the data set. `origin` says to a reader
    what was read: a file, a folder or a split of the data. `data` is what DATA is called there, `split` the split's own name
    (where there are splits), `option` the flag that named it.
    """

    rows: datasets.Dataset
    names: list[str] | None = None
    folder: Path | None = None
    classes: tuple[str, ...] | None = None
    origin: str = ""
    data: str = ""
    split: str = ""
    option: str = ""

    def name(self, row: int) -> str | int:
        return self.names[row] if self.names is not None else row


@dataclass(frozen=True)
class Reading:
    """What DATA was read as: a table for each split, under the split's own name.

    `unused` names what lies there and was not read, each with its reason; `notes` say how what was read became rows.
    """

    tables: dict[str, Table]
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def role_of(name: str) -> str | None:
    """train, validation or test, for a split, folder or file stem of one of the names that `datasets` knows."""
    return ROLES.get(name.casefold())


def read_tables(spec: str, cache: Path, *, download: Callable[[str, int], bool]) -> Reading:
    """Read any form of `--data`. Files are parsed into `cache`.

    `download(name, bytes)` is asked before a Hub data set of more than HUB_LIMIT bytes is fetched.

    Raises:
        DataError: absent, empty, of no known form, or a download nobody agreed to.
    """
    path = Path(spec)
    if path.is_dir():
        tables = _from_folder(path, cache)
    elif path.is_file():
        tables = {"train": _from_file(path, cache)}
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", spec) and not spec.startswith("."):
        tables = _from_hub(spec, download)
    else:
        raise DataError(f"{spec}: no such file or directory, and not a Hub data set (org/name[:config])")
    if not any(len(table.rows) for table in tables.values()):
        raise DataError(f"{spec}: holds no rows")
    plain = {
        name: replace(table, rows=table.rows.with_format(None)) for name, table in tables.items()
    }  # without a saved format
    return Reading({name: replace(table, origin=table.origin or name) for name, table in plain.items()})


def _from_folder(path: Path, cache: Path) -> dict[str, Table]:
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return _named_splits(_guarded(path, lambda: _validated(datasets.load_from_disk(str(path)))), str(path))
    files = {f.stem: f for f in sorted(path.iterdir()) if role_of(f.stem) and f.suffix in TABLE_SUFFIXES}
    if files:
        return {split: _from_file(file, cache) for split, file in files.items()}
    if _metadata(path):
        return {"train": _from_metadata(path, path, cache)}
    folders = [f for f in sorted(path.iterdir()) if f.is_dir() and not f.name.startswith(".")]
    parts = [f for f in folders if role_of(f.name)]
    if not parts or (len(parts) == 1 < len(folders) and _is_a_class(parts[0])):
        return {"train": _class_folders(path, path)}
    return {f.name: _from_metadata(f, path, cache) if _metadata(f) else _class_folders(f, path) for f in parts}


def _validated(found: Any) -> Any:
    """The same, once its Arrow tables are known to be what they say: a wrong offset asks for terabytes, a text is UTF-8."""
    for rows in found.values() if isinstance(found, dict) else [found]:
        rows.data.validate(full=True)
    return found


def _class_folders(folder: Path, root: Path) -> Table:
    classes = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    names: list[str] = []
    labels: list[str] = []
    for c in classes:
        names += [file.relative_to(root).as_posix() for file in _visible_files(c)]
        labels += [c.name] * (len(names) - len(labels))
    if not names:
        raise DataError(
            f"{folder}: no images in class folders here. Known forms: class folders, train/ and test/ of them, "
            "train.csv|jsonl|parquet|txt, metadata.csv|jsonl, or a folder that save_to_disk wrote"
        )
    place = root.absolute()
    rows = datasets.Dataset.from_dict({"image": [str(place / name) for name in names], "label": labels})
    return Table(rows.cast_column("image", datasets.Image(decode=False)), names, folder)


def _is_a_class(folder: Path) -> bool:
    """A folder named like a split that has files and no folders, among others named otherwise: a train beside cars."""
    return not _metadata(folder) and not any(f.is_dir() and not f.name.startswith(".") for f in folder.iterdir())


def _visible_files(folder: Path) -> list[Path]:
    """Every file below, hidden ones left out: whether it is a picture is seen where it is decoded.

    Raises:
        DataError: a directory that cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror or error})")

    found: list[Path] = []
    for place, inner, names in os.walk(folder, onerror=refuse):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _metadata(folder: Path) -> Path | None:
    return next((folder / f"metadata.{s}" for s in ("csv", "jsonl", "parquet") if (folder / f"metadata.{s}").is_file()), None)


def _from_metadata(folder: Path, root: Path, cache: Path) -> Table:
    file = _metadata(folder)
    rows = _from_file(file, cache).rows if file else datasets.Dataset.from_dict({})
    if "file_name" not in rows.column_names:
        raise DataError(f"{file}: has no `file_name` column, only {', '.join(rows.column_names)}")
    names = [str(name) for name in rows["file_name"]]
    outside = next((name for name in names if not _inside(root, folder, name)), None)
    if outside is not None:
        raise DataError(f"{file}: the file_name {outside!r:.100} leads out of {root}; give paths inside the folder")
    kind = "audio" if any(Path(name).suffix.lower() in AUDIO_SUFFIXES for name in names) else "image"
    rows = rows.remove_columns([name for name in ("file_name", kind) if name in rows.column_names])
    rows = rows.add_column(kind, [str((folder / n).absolute()) for n in names])
    return Table(rows, [(folder / n).relative_to(root).as_posix() for n in names], folder)


def _inside(root: Path, folder: Path, name: str) -> bool:
    return "\0" not in name and Path(os.path.abspath(folder / name)).is_relative_to(root.absolute())


def _from_file(path: Path, cache: Path) -> Table:
    kind, where = path.suffix.lower(), {"cache_dir": str(cache), "keep_in_memory": False}
    readers: dict[str, Callable[[], Any]] = {
        ".csv": lambda: datasets.Dataset.from_csv(str(path), keep_default_na=False, na_values=[""], **where),
        ".tsv": lambda: datasets.Dataset.from_csv(str(path), sep="\t", keep_default_na=False, na_values=[""], **where),
        ".parquet": lambda: datasets.Dataset.from_parquet(str(path), **where),
        ".txt": lambda: datasets.Dataset.from_dict({"text": list(paragraphs(path))}),
        **dict.fromkeys((".json", ".jsonl", ".ndjson"), lambda: datasets.Dataset.from_json(str(path), **where)),
    }
    if kind not in readers:
        raise DataError(f"{path}: a {kind or 'nameless'} file; known are {', '.join(sorted(TABLE_SUFFIXES))}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty")
    rows = _guarded(path, lambda: _validated(readers[kind]()))
    return Table(rows, None, path.parent)


def paragraphs(path: Path) -> Iterable[str]:
    """The documents of a text file: runs of lines without a blank one between them, stripped of outer white space.

    Raises:
        DataError: not UTF-8.
    """
    block: list[str] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in (*file, "\n"):
                if line.strip():
                    block.append(line)
                elif block:
                    yield "".join(block).strip()
                    block = []
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (DataError, ConnectionError):
        raise
    except Exception as error:
        if is_of_the_hub(error) or is_full(error):  # not the file's fault
            raise
        # datasets, pandas and pyarrow raise whatever a broken file makes them raise
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):  # what datasets says of a table with a head and nothing below it
            raise DataError(f"{path}: holds no rows") from None
        raise DataError(f"{path}: cannot be read: {' '.join(str(cause).split())[:300] or type(cause).__name__}") from None


def _named_splits(found: Any, spec: str) -> dict[str, Table]:
    if isinstance(found, datasets.Dataset):
        return {"train": Table(found)}
    return {name: Table(rows) for name, rows in found.items()}


def _from_hub(spec: str, download: Callable[[str, int], bool]) -> dict[str, Table]:
    from huggingface_hub import HfApi

    name, _, config = spec.partition(":")
    try:
        try:
            info = ask_hub(name, lambda: HfApi().dataset_info(name, files_metadata=True), "data set")
            size = sum(file.size or 0 for file in info.siblings or [])
            if size > HUB_LIMIT and not download(name, size):
                raise DataError(f"{name}: {size / 1e9:.0f} GB to download; give --yes to agree")
        except CheckpointError as error:
            if error.__cause__ is None:
                raise
        found = _checked(name, lambda: _guarded(Path(spec), lambda: _validated(datasets.load_dataset(name, config or None))))
    except CheckpointError as error:
        raise DataError(str(error)) from None
    tables = _named_splits(found, spec)
    return named(tables, imagenet.synsets()) if name in imagenet.NUMBERED else tables


def named(tables: dict[str, Table], classes: tuple[str, ...] | None) -> dict[str, Table]:
    """The same, with `classes` for the integers of the tables that have no names for them yet."""
    return {split: replace(table, classes=table.classes or classes) for split, table in tables.items()}


def _checked(name: str, load: Callable[[], Any]) -> Any:
    """Load a data set of the Hub, and hold what was fetched for it against the Hub's checksums."""
    from huggingface_hub import constants

    started = time.time() - 2  # a file system's clock may be coarser than ours
    snapshots = Path(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}", "snapshots")
    found: Any = {}
    try:
        found = ask_hub(name, load, "data set")
    finally:  # wrong bytes are also a reason why it cannot be loaded, and the better one
        try:
            check_blobs(name, [path for path in snapshots.rglob("*") if path.is_file() and path.stat().st_mtime >= started])
        except CheckpointError:
            for file in (file for table in found.values() for file in table.cache_files):  # prepared from those bytes
                shutil.rmtree(Path(file["filename"]).parent, ignore_errors=True)
            raise
    return found


def undecoded(table: Table, name: str, feature: Any) -> Table:
    """The table with a column of a decoding `feature` (datasets.Image, datasets.Audio) left as bytes and path.

    Raises:
        DataError: no such column.
    """
    if name not in table.rows.column_names:
        raise DataError(f"a split has no column {name!r}, only {', '.join(table.rows.column_names)}")
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
    return _read(Path((table.folder or Path()) / value))


def _read(path: Path) -> bytes:
    """A regular file's bytes: a pipe would never end, and a device gives for ever.

    Raises:
        OSError: no regular file, one too large to be an example, or a name that can be none.
    """
    try:
        found = path.stat()
    except ValueError:
        raise OSError(errno.EINVAL, "not a possible file name") from None
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if found.st_size > LARGEST:
        raise OSError(errno.EFBIG, f"larger than {LARGEST / 1e9:.0f} GB")
    return path.read_bytes()


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
