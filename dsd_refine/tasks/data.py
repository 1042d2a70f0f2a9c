"""Where rows come from and which of them train, select and judge. No task, no model: rows have content, a label, a name."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np

from dsd_refine.checkpoint.hub import ask_hub, check_blobs, is_of_the_hub
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.space import is_full
from dsd_refine.tasks import imagenet

Found = TypeVar("Found")

SALT = b"dsd-refine holdout 1"
EVAL_SHARE = 0.2
HUB_LIMIT = 5 * 10**9
LARGEST = 10**9  # bytes of one example
AT_ONCE = 1000  # rows that wait for threads
SPLIT_NAMES = {"train": "train", "training": "train", "validation": "validation", "val": "validation",
               "valid": "validation", "dev": "validation", "test": "test"}  # fmt: skip
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64", ".m4a"}
TABLE_SUFFIXES = {".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt"}


class MissingColumn(DataError):
    """A split has no column of the name asked for, or of any known name."""


@dataclass(frozen=True)
class Table:
    """One split as read. `names` are file names relative to the data, None for a table (rows are numbered from 0).

    `folder` is what relative file names in columns count from. `classes` are the names of integer labels, in order, where
    somebody said them whom the table itself does not: the recipe, or we who know the data set.
    """

    rows: datasets.Dataset
    names: list[str] | None = None
    folder: Path | None = None
    classes: tuple[str, ...] | None = None

    def name(self, row: int) -> str | int:
        return self.names[row] if self.names is not None else row


@dataclass(frozen=True, slots=True)
class Examined:
    """What a task says of one row: `digest` of its content, `label` as text (None: has none), `reason` to skip it.

    `texts` are what the row should be turned into, where that is no class: a transcript, captions.
    """

    digest: bytes
    label: str | None = None
    reason: str | None = None
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rows:
    """The used rows of one part, in the data's order. `at` indexes `table.rows`; `labels` are texts ("" without classes).

    `texts` are each row's `Examined.texts`, empty for a task without them.
    """

    table: Table
    at: np.ndarray[Any, Any]
    digests: list[bytes]
    labels: list[str]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    texts: list[tuple[str, ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.at)

    def name(self, i: int) -> str | int:
        return self.table.name(int(self.at[i]))

    def subset(self, chosen: Sequence[int], skipped: list[dict[str, Any]] | None = None) -> Rows:
        """The rows at these positions, in this order."""
        return Rows(
            self.table,
            self.at[np.asarray(chosen, dtype=np.int64)],
            [self.digests[i] for i in chosen],
            [self.labels[i] for i in chosen],
            skipped or [],
            [self.texts[i] for i in chosen] if self.texts else [],
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over content, label and texts of every row in order."""
        digest = hashlib.sha256()
        for content, label, texts in zip(self.digests, self.labels, self.texts or [()] * len(self), strict=True):
            digest.update(content + "\n".join((label, *texts)).encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """The report's `data` entry."""
        return {"rows": len(self), "skipped": self.skipped, "fingerprint": self.fingerprint}


@dataclass(frozen=True)
class Parts:
    """The three parts of a run. `overlap` counts evaluation rows whose content also trains or selects."""

    train: Rows
    holdout: Rows | None
    eval: Rows
    overlap: int
    rule: str
    unused: tuple[str, ...] = ()


def read_tables(spec: str, cache: Path, *, download: Callable[[str, int], bool]) -> dict[str, Table]:
    """Split name (train, validation, test) -> table, for any form of `--data`. Files are parsed into `cache`.

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
    return {split: replace(table, rows=table.rows.with_format(None)) for split, table in tables.items()}  # a saved format


def _from_folder(path: Path, cache: Path) -> dict[str, Table]:
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return _named_splits(_guarded(path, lambda: _validated(datasets.load_from_disk(str(path)))), str(path))
    files = {SPLIT_NAMES[f.stem]: f for f in sorted(path.iterdir()) if f.stem in SPLIT_NAMES and f.suffix in TABLE_SUFFIXES}
    if files:
        return {split: _from_file(file, cache) for split, file in files.items()}
    if _metadata(path):
        return {"train": _from_metadata(path, path, cache)}
    folders = [f for f in sorted(path.iterdir()) if f.is_dir() and not f.name.startswith(".")]
    parts = [f for f in folders if f.name.lower() in SPLIT_NAMES]
    if not parts or (len(parts) == 1 < len(folders) and _is_a_class(parts[0])):
        return {"train": _class_folders(path, path)}
    return {
        SPLIT_NAMES[f.name.lower()]: _from_metadata(f, path, cache) if _metadata(f) else _class_folders(f, path) for f in parts
    }


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
    tables = {SPLIT_NAMES[name]: Table(rows) for name, rows in found.items() if name in SPLIT_NAMES}
    if not tables:
        raise DataError(f"{spec}: has the splits {', '.join(found)}; none is train, validation or test")
    return tables


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


def column(table: Table, asked: str | None, known: Sequence[str], what: str, flag: str, feature: Any = None) -> str:
    """The name of a column: the one asked for, else the one of a telling type, else the first of the known names.

    Raises:
        MissingColumn: lists the columns found.
    """
    columns = table.rows.column_names
    if asked is not None and asked in columns:
        return asked
    if asked is None:
        typed = [n for n, kind in table.rows.features.items() if feature is not None and isinstance(kind, feature)]
        named = [n for n in known if n in columns]
        if len(typed) == 1 or (typed and not named):
            return str(typed[0])
        if named:
            return named[0]
    missing = f"no column {asked!r}" if asked else f"no {what} column found (looked for {', '.join(known)})"
    raise MissingColumn(f"{missing}; the data has {', '.join(columns)}. Name it with {flag}")


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


def label_texts(table: Table, name: str) -> list[str | None]:
    """The label column as texts; None where a row has no label. Integers are their names, where those are known.

    Raises:
        DataError: several labels a row, numbers that are no classes, a class id out of range or of another class than the
            row's file name says.
    """
    kind, values = table.rows.features[name], table.rows.with_format(None)[name]
    if isinstance(kind, datasets.ClassLabel):
        return [_class_name(kind.names, table, row, value) for row, value in enumerate(values)]
    texts: list[str | None] = []
    known: dict[str, str] = {}  # each name once: there are few, and many rows
    for row, value in enumerate(values):
        if isinstance(value, list | dict | np.ndarray):
            raise DataError(
                f"row {table.name(row)}: {name!r} holds several labels ({value!r:.60}); multi-label is not supported"
            )
        if isinstance(value, float) and value == value and not value.is_integer():
            raise DataError(f"row {table.name(row)}: the label {value} is no class; regression is not supported")
        missing = value is None or value != value or value == ""
        text = str(int(value)) if isinstance(value, float) and not missing else str(value)
        texts.append(None if missing else known.setdefault(text, text))
    return texts if table.classes is None else _with_names(table, table.classes, texts)


def _class_name(names: Sequence[str], table: Table, row: int, value: int | None) -> str | None:
    if value is None or value == -1:  # -1 is how data sets hide the labels of a test split
        return None
    if not 0 <= value < len(names):
        raise DataError(f"row {table.name(row)}: class id {value} is outside 0..{len(names) - 1}")
    return str(names[value])


def _with_names(table: Table, names: tuple[str, ...], texts: list[str | None]) -> list[str | None]:
    """Integers as the names that they are said to be, held against the rows' own file names where these say a class."""
    found = [
        _class_name(names, table, row, int(text)) if text is not None and re.fullmatch("-?[0-9]+", text) else text
        for row, text in enumerate(texts)
    ]
    files = imagenet.spoken(table.rows) if names == imagenet.synsets() else ()
    for row, (name, said) in enumerate(zip(found, files, strict=False)):
        if name is not None and said and name not in said:
            raise DataError(
                f"row {table.name(row)}: its label {texts[row]} would be {name}, its file is of {' '.join(sorted(said))}: "
                "these integers are not ImageNet-1k's. Leave out label_names: imagenet-1k, or give the labels as names"
            )
    return found


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


def use_rows(table: Table, examined: Sequence[Examined]) -> Rows:
    """The rows of a split that can be used; the others are named with their reasons."""
    used = [i for i, row in enumerate(examined) if row.reason is None]
    skipped = [{"row": table.name(i), "reason": row.reason} for i, row in enumerate(examined) if row.reason is not None]
    return Rows(
        table,
        np.asarray(used, dtype=np.int64),
        [examined[i].digest for i in used],
        [examined[i].label or "" for i in used],
        skipped,
        [examined[i].texts for i in used] if any(row.texts for row in examined) else [],
    )


def divide(tables: dict[str, Rows], evaluation: dict[str, Rows] | None, holdout_share: float) -> Parts:
    """Which rows train, select and judge, as the contract's splits say. A split without labelled rows counts as absent.

    Raises:
        DataError: nothing left to train on or to evaluate on.
    """
    splits = {name: rows for name, rows in tables.items() if len(rows)}
    if "train" not in splits:
        raise DataError(f"no usable training rows{_why(tables.get('train'))}")
    train, test, validation = splits["train"], splits.get("test"), splits.get("validation")
    selecting = validation
    if evaluation is not None:
        given = [evaluation[name] for name in ("test", "validation", "train") if name in evaluation and len(evaluation[name])]
        if not given:
            raise DataError("no usable rows in --eval-data")
        judge, rule = given[0], "--eval-data"
    elif test is not None:
        judge, rule = test, "test"
    elif validation is not None:
        judge, rule, selecting = validation, "validation", None
    else:
        train, judge = carve(train, EVAL_SHARE)
        rule = f"carved ({EVAL_SHARE}) from the training rows"
    if selecting is None and holdout_share:
        train, selecting = carve(train, holdout_share)
        rule += f"; holdout carved ({holdout_share}) from the training rows"
    elif selecting is not None:
        rule += "; holdout is validation"
    if not len(train) or not len(judge):
        raise DataError(f"too few rows: {len(train)} left for training, {len(judge)} for evaluation")
    if selecting is not None and not len(selecting):
        raise DataError("too few rows for a holdout; give more data, or --holdout 0 with --keep last")
    seen = {*train.digests, *(selecting.digests if selecting is not None else ())}
    unused = tuple(name for name, rows in tables.items() if rows.skipped and not len(rows))
    return Parts(train, selecting, judge, sum(digest in seen for digest in judge.digests), rule, unused)


def _why(rows: Rows | None) -> str:
    if rows is None or not rows.skipped:
        return ": the data has no train split" if rows is None else ""
    reasons = Counter(item["reason"] for item in rows.skipped)
    return f": {len(rows.skipped)} rows were skipped ({', '.join(f'{n} {reason}' for reason, n in reasons.most_common(3))})"


def carve(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """(kept, carved): per class the round(share * n) rows with the smallest salted SHA-256 of content; no seed in it.

    Equal rows stay together, under whatever labels: a group at the border goes over whole, unless that would empty a class.
    """
    by_class: dict[str, list[int]] = defaultdict(list)
    for i, label in enumerate(rows.labels):
        by_class[label].append(i)
    taken: set[bytes] = set()
    for members in by_class.values():
        ordered = sorted((rows.digests[i] for i in members), key=_salted)
        count = round(share * len(ordered))
        while 0 < count < len(ordered) and ordered[count] == ordered[count - 1]:
            count += 1
        if count == len(ordered):
            count = ordered.index(ordered[-1])
        taken.update(ordered[:count])
    for _, members in sorted(by_class.items()):
        content = {rows.digests[i] for i in members}
        if content <= taken:  # what other classes take may be all that this one has
            taken.remove(max(content, key=_salted))
    kept = [i for i, digest in enumerate(rows.digests) if digest not in taken]
    return rows.subset(kept, rows.skipped), rows.subset([i for i, digest in enumerate(rows.digests) if digest in taken])


def _salted(digest: bytes) -> bytes:
    return hashlib.sha256(SALT + digest).digest()
