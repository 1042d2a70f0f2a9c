"""What DATA was read as: a table for each split, what was left unread, and how lines became rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets

from dsd_refine.errors import DataError

# The names that `datasets` gives a meaning (datasets.data_files.KEYWORDS_IN_DIR_NAME_BASE_PATTERNS): name -> role.
ROLES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """One split as read. `names` are file names relative to the data, None for a table (rows are numbered from 0).

    `folder` is what relative file names in columns count from. `classes` are the names of integer labels, in order, where
    somebody said them whom the table itself does not: the recipe, or we who know the data set. `origin` says to a reader
    what was read: a file, a folder or a split of the data. `advice` is what to say where the rows are too few. `data` is
    what DATA is called there, `split` the split's own name (where there are splits), `option` the flag that named it.
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


def named(tables: dict[str, Table], classes: tuple[str, ...] | None) -> dict[str, Table]:
    """The same, with `classes` for the integers of the tables, in place of names that they had."""
    return {split: replace(table, classes=classes or table.classes) for split, table in tables.items()}


# what stands around a split's name in a file's, and what numbers a shard: as in datasets.data_files
SEPARATOR = "[-._ 0-9]"
SHARD = re.compile(r"^(?P<split>.+?)-\d{5}-of-(?P<count>\d{5})")
NUMBER = re.compile(r"[-._ ]?\d+([-._ ]of[-._ ]\d+)?$")
KEYWORD = re.compile(rf"(?:^|(?<={SEPARATOR}))({'|'.join(sorted(ROLES, key=len, reverse=True))})(?={SEPARATOR}|$)")
# how the words begin by which a split's name speaks of a role
STARTS = {
    "train": "train", "trn": "train", "val": "validation", "dev": "validation",
    "test": "test", "tst": "test", "eval": "test", "holdout": "test", "heldout": "test",
}  # fmt: skip

WORDS = "|".join(sorted({*ROLES, *STARTS}, key=len, reverse=True))
GLUED = re.compile(f"({WORDS})(sets?|datas?|dataset|splits?|dir|folder|files?|images?|imgs?|rows|part|[a-z])?")
ENDING = re.compile(f"(?P<before>.*[^-._ ])(?P<word>{WORDS})", re.IGNORECASE)


def split_of(name: str) -> str | None:
    """The split that a file's stem or a folder's name says, where `datasets` would see one; None: no split.

    `train_0` and `imdb-train` are `train`; `validation_matched` is a split of its own.

    `trainset`, `TestData` and `testA`, where nothing parts the word from the rest, are splits of their own names. A name of
    two roles is no split.
    """
    shard = SHARD.match(name)
    if shard:
        return shard["split"]
    if len(roles_in(name)) > 1:
        return None
    bare = NUMBER.sub("", name)
    last = re.split("[-._ ]", bare)[-1]
    said = KEYWORD.search(name.casefold()) or is_glued(bare)
    return None if not said else last if role_of(last) else bare


def roles_in(name: str) -> list[str]:
    """The words of different roles that a name says: train and test of `train_test_split`."""
    said = KEYWORD.findall(name.casefold())
    return list({ROLES[word]: word for word in reversed(said)}.values())[::-1]


def is_glued(name: str) -> bool:
    """Does it hold a role's word that no separator parts from the rest: `trainset`, `TestData`, `testA`, `holdout`?"""
    return any(GLUED.fullmatch(word) for word in words_of(name))


def words_of(name: str) -> list[str]:
    """The words of a name in lower case; a capital after a small letter begins one."""
    return re.split("[^a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", name).casefold())


def speaks_of(name: str) -> str | None:
    """The role that a split's name has or speaks of: `validation_matched`, `testA`, `en.dev`, `train_small`."""
    for word in words_of(name):
        role = role_of(word) or next((role for start, role in STARTS.items() if word.startswith(start)), None)
        if role:
            return role
    return None


def siblings(names: Iterable[str]) -> dict[str, str]:
    """Name -> role's word, of names that differ in that word at their end alone: `imdbtrain` beside `imdbtest`."""
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
    """Several readings as one. Splits of the same name are the caller's to keep apart."""
    found = Reading({})
    for part in parts:
        found = Reading(found.tables | part.tables, found.unused + part.unused, found.notes + part.notes)
    return found


def shortened(lines: Sequence[str], most: int = 5) -> tuple[str, ...]:
    """The lines, where many say the same of one file each: the first of them, and how many more there are."""
    kinds: dict[str, list[str]] = {}
    for line in lines:
        kinds.setdefault(re.sub("[0-9]+", "0", line.partition(": ")[2] or line), []).append(line)
    short: list[str] = []
    for same in kinds.values():
        short += same if len(same) <= most + 1 else same[:most]
        if len(same) > most + 1:
            last, _, said = same[-1].partition(": ")
            short.append(f"and {len(same) - most} more like these, the last {last}: {said}")
    return tuple(short)


def joined(shards: list[Reading], root: Path) -> Table:
    """The rows of one split out of several files, in their order.

    Raises:
        DataError: a file with other columns than the first, or whose columns hold something else.
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
    return replace(first, rows=rows, folder=folder, origin=listed([t.origin for t in tables]), advice=advice)


def _concatenated(tables: list[Table], root: Path) -> datasets.Dataset:
    """The rows of all, as the first holds them; columns that are texts in one and whole numbers in another are texts.

    Raises:
        DataError: a column whose values do not go together.
    """
    kinds = tables[0].rows.features
    try:
        return datasets.concatenate_datasets([table.rows.cast(kinds) for table in tables])
    except Exception:  # pyarrow raises whatever a value that does not fit makes it raise
        kinds = kinds.copy()
    for name in kinds:
        held = [
            (table.origin, str(getattr(table.rows.features[name], "dtype", "?")), _is_empty(table, name)) for table in tables
        ]
        holding = {kind: origin for origin, kind, is_empty in reversed(held) if not is_empty}
        if {"string", "large_string"} & set(holding) and all(re.match("u?int|large_string|string", kind) for kind in holding):
            kinds[name] = datasets.Value("large_string")
        elif len(holding) > 1 and all(re.match("u?int|float", kind) for kind in holding):
            kinds[name] = datasets.Value("float64")
        elif len(holding) > 1:
            shown = ", ".join(f"{kind} in {origin}" for kind, origin in sorted(holding.items()))
            raise DataError(f"{root}: the column {name!r} is {shown}, of one split: write it the same way in each file")
        elif holding:
            kinds[name] = next(t.rows.features[name] for t in tables if not _is_empty(t, name))
    try:
        return datasets.concatenate_datasets([table.rows.cast(kinds) for table in tables])
    except Exception as error:  # as above
        names = listed([table.origin for table in tables])
        raise DataError(f"{root}: {names} do not go together: {' '.join(str(error).split())[:200]}") from None


def _is_empty(table: Table, name: str) -> bool:
    column = table.rows.data.column(name)
    return bool(column.null_count == len(column))


def listed(names: list[str], most: int = 3) -> str:
    """Names with commas; of many the first and the last."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{names[0]} … {names[-1]} ({len(names)} files)"
