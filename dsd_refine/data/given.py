"""Read the data that the user gave, before any model: the roles of splits, the columns, and what is
not used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets

from dsd_refine.data.columns import Kind, aligned, choose, fits, in_short, unused_columns
from dsd_refine.data.reading import Reading, Table, speaks_of
from dsd_refine.data.splits import Rows, Splits, by_role, where_of
from dsd_refine.data.tables import read_tables
from dsd_refine.data.translations import with_languages
from dsd_refine.errors import DataError

Columns = dict[str, tuple[str, ...]]

ROLE_COLUMN = re.compile(r"(?:.*[_ -])?(splits?|set|fold|subset|partition)", re.IGNORECASE)
MOST_ROLES = 20  # the most different values of a column that tells each row's split
PLAIN_FILE = re.compile(r".*\.txt(\.\w+)?", re.IGNORECASE)
TEXT_FILE = re.compile(r".*\.(csv|tsv|txt|json|jsonl|ndjson)(\.\w+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Given:
    """The data of a run, as a task needs them.

    Attributes:
        tables: The tables of DATA by role.
        evaluation: The tables of the evaluation data by role, or None.
        columns: The used columns by what they contain (`text`, `label`, …).
        unused: Lines that name what is not used, without paths of the machine.
        notes: Lines that say how the rows were read, without paths of the machine.
        kinds: What the columns were chosen as.
    """

    tables: dict[str, Table]
    evaluation: dict[str, Table] | None
    columns: Columns
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = ()

    def entry(self, parts: Mapping[str, Rows | None]) -> dict[str, Any]:
        """Return the report's `data`: the rows of each part, their places, the rule, the columns,
        and what is not used.
        """
        present = {name: rows for name, rows in parts.items() if rows is not None}
        return {
            **{name: rows.summary() if rows is not None else None for name, rows in parts.items()},
            "sources": [_source(name, rows) for name, rows in present.items()],
            "columns": {what: ",".join(names) for what, names in self.columns.items()},
            "rule": "; ".join(rows.why for rows in reversed(present.values()) if rows.why),
            "unused": [*self._unused_splits(present), *self.unused],
            "notes": list(self.notes),
        }

    def _unused_splits(self, present: Mapping[str, Rows]) -> list[str]:
        """Lines that name the splits with a role that no part uses."""
        of_data = {_place(rows.table) for part, rows in present.items() if part != "eval" or self.evaluation is None}
        lines = [
            f"the {table.split or role} split has no usable rows with labels: it is not used"
            for role, table in self.tables.items()
            if _place(table) not in of_data
        ]
        evaluates = _place(present["eval"].table)
        others = (self.evaluation or {}).values()
        return lines + [f"split {table.split} of {table.data}: not used" for table in others if _place(table) != evaluates]


@dataclass(frozen=True)
class _Side:
    """DATA, or the evaluation data, as they were read."""

    spec: str
    reading: Reading
    splits: Splits

    def public(self, lines: Sequence[str], *, several: bool) -> list[str]:
        """Remove the machine's paths from lines about these data.

        If there are `several` data, add their name.
        """
        name, path = where_of(self.spec)
        for place in [path.absolute(), path.resolve()] if path else []:
            lines = [line.replace(str(place), place.name) for line in lines]
        return [f"{name}: {line}" if several and not line.startswith(name) else line for line in lines]

    def with_languages(self, names: Sequence[str]) -> _Side:
        """Make columns of the entries of these columns of mappings."""
        tables = {role: with_languages(table, names) for role, table in self.splits.tables.items()}
        return replace(self, splits=replace(self.splits, tables=tables))

    def aligned(
        self, columns: Columns, kinds: Sequence[Kind], asked: Mapping[str, str | None], *, may_lack_label: bool
    ) -> _Side:
        """Rename the columns of all splits to the names in `columns`."""
        tables = {
            role: aligned(table, columns, kinds, asked, may_lack_label=may_lack_label)
            for role, table in self.splits.tables.items()
        }
        return replace(self, splits=replace(self.splits, tables=tables))

    def unused(self, columns: Columns, beside: Sequence[str]) -> list[str]:
        """Lines that name what is not used of these data. The columns `beside` are used elsewhere."""
        used = {**columns, "beside": tuple(beside)}
        left = [name for table in self.splits.tables.values() for name in unused_columns(table, used)]
        names = f"columns not used: {in_short(list(dict.fromkeys(left)))}"
        return [*self.reading.unused, *self.splits.unused, *([names] if left else [])]


def read_given(
    data: str,
    eval_data: str | None,
    splits: tuple[str | None, str | None],
    ways: Sequence[Sequence[Kind]],
    asked: Mapping[str, str | None],
    cache: Path,
    download: Callable[[str, int], bool],
    encoding: str = "utf-8",
    documents: str | None = None,
    beside: Sequence[str] = (),
) -> Given:
    """Read the data, give each split its role, and find the columns to use.

    Args:
        data: DATA as the user wrote it.
        eval_data: The evaluation data as the user wrote them, or None.
        splits: The names that `--eval-split` and `--holdout-split` give.
        ways: What the task looks for: of several ways to train it, the first whose columns are there,
            else the last.
        asked: The columns that the user named, by `Kind.what`.
        cache: The folder that files are parsed into.
        download: As in `read_tables`.
        encoding: The encoding of text files without a byte order mark.
        documents: What is a document in a .txt file. None: a paragraph.
        beside: Columns that are read for something else.

    Raises:
        DataError: The data, their splits or their columns cannot be used, or could mean several
            things.
    """
    evaluates, selects = splits
    how: dict[str, Any] = {"download": download, "encoding": encoding, "documents": documents or "paragraphs"}
    reading = read_tables(data, cache, **how)
    own = {"use": "train"} if eval_data else {"evaluates": evaluates}
    sides = [_Side(data, reading, by_role(reading, data, selects=selects, **own))]
    if eval_data:
        reading = read_tables(eval_data, cache, **how)
        sides.append(_Side(eval_data, reading, by_role(reading, eval_data, evaluates=evaluates, use="evaluate")))
    if inside := [name for way in ways for kind in way for name in kind.inside]:
        sides = [side.with_languages(inside) for side in sides]
    train = sides[0].splits.tables["train"]
    kinds = next((way for way in ways[:-1] if all(fits(train, kind, asked[kind.what]) for kind in way)), ways[-1])
    columns = choose(train, kinds, asked)
    sides = [side.aligned(columns, kinds, asked, may_lack_label=not number) for number, side in enumerate(sides)]
    several = len(sides) > 1
    if not several and len(reading.tables) == 1:
        _refuse_role_column(sides[0].splits.tables["train"], columns, data)
    unread = _unused_options(sides, encoding, documents)
    return Given(
        sides[0].splits.tables,
        sides[1].splits.tables if several else None,
        columns,
        (*(line for side in sides for line in side.public(side.unused(columns, beside), several=several)), *unread),
        tuple(line for side in sides for line in side.public(side.reading.notes, several=several)),
        tuple(kinds),
    )


def _unused_options(sides: Sequence[_Side], encoding: str, documents: str | None) -> list[str]:
    """Lines that name the options about text files, if there are no such files."""
    lines = []
    if encoding != "utf-8" and not any(_read_text(side.reading) for side in sides):
        lines.append(f"--encoding {encoding}: not used, no text file is read")
    if documents is not None and not any(_read_text(side.reading, PLAIN_FILE) for side in sides):
        lines.append(f"--documents {documents}: not used, no .txt file is read")
    return lines


def _read_text(reading: Reading, kind: re.Pattern[str] = TEXT_FILE) -> bool:
    """True if we read a text file of this kind. The notes name each such file before a colon."""
    return any(kind.fullmatch(note.split(": ")[0]) for note in reading.notes)


def _refuse_role_column(table: Table, columns: Columns, data: str) -> None:
    """Refuse data with an unused column that tells each row's split, because all rows would train."""
    for name in unused_columns(table, columns):
        if not ROLE_COLUMN.fullmatch(name.strip()):
            continue
        kind = table.rows.features[name]
        if isinstance(kind, datasets.ClassLabel):
            values = list(kind.names)
        elif getattr(kind, "dtype", None) in ("string", "large_string"):
            values = [value for value in table.rows.unique(name) if value]
        else:
            continue
        roles = {speaks_of(value) for value in values} - {None}
        if len(values) <= MOST_ROLES and len(roles) > 1:
            raise DataError(
                f"{data}: the column {name!r} says which split a row is of ({in_short(sorted(values))}), and is not read: all "
                "rows would train. Write a file for each split (train.csv, test.csv), or save_to_disk a DatasetDict with "
                "these splits; where rows of other data evaluate, give --eval-data"
            )


def _place(table: Table) -> tuple[str, str, str]:
    """A key that is equal for two tables of the same split."""
    return table.data, table.origin, table.split


def _source(part: str, rows: Rows) -> dict[str, Any]:
    """The report's entry of where a part's rows are: the file or folder, and the split if there are
    splits.
    """
    table = rows.table
    split = {"split": table.split} if table.split else {}
    return {"part": part, "file": table.origin, **split, "rows": len(rows)}
