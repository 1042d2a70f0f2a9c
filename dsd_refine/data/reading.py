"""What DATA was read as: a table for each split, what is not used, and how lines became rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets

from dsd_refine.data.decoded import DecodedRows
from dsd_refine.errors import DataError

# The names of splits that `datasets` knows
# (datasets.data_files.KEYWORDS_IN_DIR_NAME_BASE_PATTERNS), and our roles.
ROLES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """One split as it was read.

    Attributes:
        rows: The rows.
        names: File names of the rows, relative to the data. None: the rows have numbers from 0.
        folder: The folder that relative file names in columns start at.
        classes: Names of integer labels, in order, that the table itself does not have. They come
            from the recipe, or from what we know of the data set.
        origin: What was read, for the user: a file, a folder or a split of the data.
        advice: What to tell the user if the rows are too few.
        data: The name of DATA, for the user.
        split: The split's name, if there are splits.
        option: The option that named the split, if one did.
        decoded: The decoded content of the rows, as far as it is held.
    """

    rows: datasets.Dataset
    names: list[str] | None = None
    folder: Path | None = None
    classes: tuple[str, ...] | None = None
    origin: str = ""
    advice: str = ""
    data: str = ""
    split: str = ""
    option: str = ""
    decoded: DecodedRows | None = None

    def name(self, row: int) -> str | int:
        """Return the name of a row for the user: a file's name, or the row's number."""
        return self.names[row] if self.names is not None else row


@dataclass(frozen=True)
class Reading:
    """What DATA was read as.

    Attributes:
        tables: A table for each split, by the split's own name.
        unused: Lines that name what was not read, each with a reason.
        notes: Lines that say how many rows were read from each file.
    """

    tables: dict[str, Table]
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def role_of(name: str) -> str | None:
    """Return train, validation or test for a name that `datasets` knows, else None."""
    return ROLES.get(name.casefold())


def named(tables: dict[str, Table], classes: tuple[str, ...] | None) -> dict[str, Table]:
    """Return the tables with `classes` as the names of their integer labels, in place of earlier
    names.
    """
    return {split: replace(table, classes=classes or table.classes) for split, table in tables.items()}


# What separates a split's name in a file's name, and how shards are numbered: as in
# datasets.data_files.
SEPARATOR = "[-._ 0-9]"
SHARD = re.compile(r"^(?P<split>.+?)-\d{5}-of-(?P<count>\d{5})")
NUMBER = re.compile(r"[-._ ]?\d+([-._ ]of[-._ ]\d+)?$")
KEYWORD = re.compile(rf"(?:^|(?<={SEPARATOR}))({'|'.join(sorted(ROLES, key=len, reverse=True))})(?={SEPARATOR}|$)")
# The beginnings of words that tell a split's role.
STARTS = {
    "train": "train", "trn": "train", "val": "validation", "dev": "validation",
    "test": "test", "tst": "test", "eval": "test", "holdout": "test", "heldout": "test",
}  # fmt: skip

WORDS = "|".join(sorted({*ROLES, *STARTS}, key=len, reverse=True))
GLUED = re.compile(f"({WORDS})(sets?|datas?|dataset|splits?|dir|folder|files?|images?|imgs?|rows|part|[a-z])?")
ENDING = re.compile(f"(?P<before>.*[^-._ ])(?P<word>{WORDS})", re.IGNORECASE)


def split_of(name: str) -> str | None:
    """Return the split that a file's stem or a folder's name tells, as `datasets` does; None: none.

    `train_0` and `imdb-train` are `train`. Other names with a role's word are splits with that
    name: `validation_matched`, and `trainset`, `TestData` and `testA` without a separator. A name
    with the words of two roles is no split.
    """
    shard = SHARD.match(name)
    if shard:
        return shard["split"]
    if len(roles_in(name)) > 1:
        return None
    bare = NUMBER.sub("", name)
    last = re.split("[-._ ]", bare)[-1]
    has_word = KEYWORD.search(name.casefold()) or is_glued(bare)
    return None if not has_word else last if role_of(last) else bare


def roles_in(name: str) -> list[str]:
    """Return the words of different roles in a name: train and test for `train_test_split`."""
    words = KEYWORD.findall(name.casefold())
    return list({ROLES[word]: word for word in reversed(words)}.values())[::-1]


def is_glued(name: str) -> bool:
    """Return whether a name has a role's word without a separator: `trainset`, `TestData`, `testA`,
    `holdout`.
    """
    return any(GLUED.fullmatch(word) for word in words_of(name))


def words_of(name: str) -> list[str]:
    """Return the words of a name in lower case. A capital after a small letter begins a word."""
    return re.split("[^a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", name).casefold())


def speaks_of(name: str) -> str | None:
    """Return the role that a word of a split's name tells: `validation_matched`, `testA`, `en.dev`;
    or None.
    """
    for word in words_of(name):
        role = role_of(word) or next((role for start, role in STARTS.items() if word.startswith(start)), None)
        if role:
            return role
    return None


def siblings(names: Iterable[str]) -> dict[str, str]:
    """Find names that differ only in a role's word at their end: `imdbtrain` and `imdbtest`.

    Returns:
        The role's word for each such name.
    """
    ends: dict[str, dict[str, str]] = {}
    for name in names:
        match = ENDING.fullmatch(name)
        if match:
            ends.setdefault(match["before"].casefold(), {})[name] = match["word"]
    return {
        name: word
        for words in ends.values()
        if len({speaks_of(word) for word in words.values()}) > 1
        for name, word in words.items()
    }


def together(parts: Iterable[Reading]) -> Reading:
    """Join several readings. Of two splits with one name, the last stays."""
    whole = Reading({})
    for part in parts:
        whole = Reading(whole.tables | part.tables, whole.unused + part.unused, whole.notes + part.notes)
    return whole


def shortened(lines: Sequence[str], most: int = 5) -> tuple[str, ...]:
    """Shorten lists of lines that say the same of different files: to the first `most` and the
    number of others.
    """
    kinds: dict[str, list[str]] = {}
    for line in lines:
        kinds.setdefault(re.sub("[0-9]+", "0", line.partition(": ")[2] or line), []).append(line)
    short: list[str] = []
    for alike in kinds.values():
        short += alike if len(alike) <= most + 1 else alike[:most]
        if len(alike) > most + 1:
            last, _, text = alike[-1].partition(": ")
            short.append(f"and {len(alike) - most} more like these, the last {last}: {text}")
    return tuple(short)


def joined(shards: list[Reading], root: Path) -> Table:
    """Join the files of one split to one table, in their order.

    Args:
        shards: The reading of each file.
        root: The folder of the data, for messages.

    Raises:
        DataError: A file has other columns than the first one, or other types of values in them.
    """
    tables = [table for shard in shards for table in shard.tables.values()]
    first, folders = tables[0], {table.folder for table in tables}
    for table in tables:
        if set(table.rows.column_names) != set(first.rows.column_names):
            raise DataError(
                f"{root}: {table.origin} has the columns {', '.join(table.rows.column_names)}, but {first.origin}, of the same "
                f"split, has {', '.join(first.rows.column_names)}"
            )
    if len(tables) == 1:
        return first
    rows = _concatenated(tables, root)
    advice = next((table.advice for table in tables if table.advice), "")
    folder = first.folder if len(folders) == 1 else root
    return replace(first, rows=rows, folder=folder, origin=first_and_last([t.origin for t in tables]), advice=advice)


def _concatenated(tables: list[Table], root: Path) -> datasets.Dataset:
    """Join the rows of tables, with the column types of the first one.

    A column that has texts in one table and integers in another becomes texts.

    Raises:
        DataError: The values of a column do not go together.
    """
    kinds = tables[0].rows.features
    try:
        return datasets.concatenate_datasets([table.rows.cast(kinds) for table in tables])
    except Exception:  # a value that does not fit may make pyarrow raise any error
        kinds = kinds.copy()
    for name in kinds:
        columns = [
            (table.origin, str(getattr(table.rows.features[name], "dtype", "?")), _is_empty(table, name)) for table in tables
        ]
        origins = {kind: origin for origin, kind, is_empty in reversed(columns) if not is_empty}  # by the column's type
        if {"string", "large_string"} & set(origins) and all(re.match("u?int|large_string|string", kind) for kind in origins):
            kinds[name] = datasets.Value("large_string")
        elif len(origins) > 1 and all(re.match("u?int|float", kind) for kind in origins):
            kinds[name] = datasets.Value("float64")
        elif len(origins) > 1:
            shown = ", ".join(f"{kind} in {origin}" for kind, origin in sorted(origins.items()))
            raise DataError(f"{root}: the column {name!r} is {shown}, of one split: write it the same way in each file")
        elif origins:
            kinds[name] = next(t.rows.features[name] for t in tables if not _is_empty(t, name))
    try:
        return datasets.concatenate_datasets([table.rows.cast(kinds) for table in tables])
    except Exception as error:  # as above
        names = first_and_last([table.origin for table in tables])
        raise DataError(f"{root}: {names} do not go together: {' '.join(str(error).split())[:200]}") from None


def _is_empty(table: Table, name: str) -> bool:
    """True if no row has a value in this column."""
    column = table.rows.data.column(name)
    return bool(column.null_count == len(column))


def first_and_last(names: list[str], most: int = 3) -> str:
    """Return names with commas between them, or the first and the last one of more than `most`."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{names[0]} … {names[-1]} ({len(names)} files)"
