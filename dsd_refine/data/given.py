"""The data that a user gave, read and sorted before any model: splits with roles, columns, and what is left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets

from dsd_refine.data.columns import Kind, aligned, choose, in_short, unused_columns
from dsd_refine.data.reading import Reading, Table, speaks_of
from dsd_refine.data.splits import Rows, Splits, by_role, where_of
from dsd_refine.data.tables import read_tables
from dsd_refine.errors import DataError

Columns = dict[str, tuple[str, ...]]

ROLE_COLUMN = re.compile(r"(?:.*[_ -])?(splits?|set|fold|subset|partition)", re.IGNORECASE)
MOST_ROLES = 20  # values of a column that says which row is of which split
TEXT_FILE = re.compile(r".*\.(csv|tsv|txt|json|jsonl|ndjson)(\.\w+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Given:
    """What DATA and the evaluation data hold for a task. `columns` are those used, by what they are (`text`, `label`, …).

    `unused` names what is left out, `notes` say how what was read became rows; both without paths of the machine.
    """

    tables: dict[str, Table]
    evaluation: dict[str, Table] | None
    columns: Columns
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def entry(self, parts: Mapping[str, Rows | None]) -> dict[str, Any]:
        """The report's `data`: the rows of each part, where they lie, by which rule, which columns, what is left out."""
        held = {name: rows for name, rows in parts.items() if rows is not None}
        return {
            **{name: rows.summary() if rows is not None else None for name, rows in parts.items()},
            "sources": [_source(name, rows) for name, rows in held.items()],
            "columns": {what: ",".join(names) for what, names in self.columns.items()},
            "rule": "; ".join(rows.why for rows in reversed(held.values()) if rows.why),
            "unused": [*self._unused_splits(held), *self.unused],
            "notes": list(self.notes),
        }

    def _unused_splits(self, held: Mapping[str, Rows]) -> list[str]:
        """The splits with a role that no part is made of."""
        of_data = {_place(rows.table) for part, rows in held.items() if part != "eval" or self.evaluation is None}
        lines = [
            f"the {table.split or role} split has no usable rows with labels: it is not used"
            for role, table in self.tables.items()
            if _place(table) not in of_data
        ]
        judges = _place(held["eval"].table)
        judged = (self.evaluation or {}).values()
        return lines + [f"split {table.split} of {table.data}: not used" for table in judged if _place(table) != judges]


@dataclass(frozen=True)
class _Side:
    """DATA, or the evaluation data, as read."""

    spec: str
    reading: Reading
    splits: Splits

    def public(self, lines: Sequence[str], *, several: bool) -> list[str]:
        """Lines about these data: without the paths of the machine, and with the data's name where there are `several`."""
        name, path = where_of(self.spec)
        for place in [path.absolute(), path.resolve()] if path else []:
            lines = [line.replace(str(place), place.name) for line in lines]
        return [f"{name}: {line}" if several and not line.startswith(name) else line for line in lines]

    def aligned(
        self, columns: Columns, kinds: Sequence[Kind], asked: Mapping[str, str | None], *, may_lack_label: bool
    ) -> _Side:
        tables = {
            role: aligned(table, columns, kinds, asked, may_lack_label=may_lack_label)
            for role, table in self.splits.tables.items()
        }
        return replace(self, splits=replace(self.splits, tables=tables))

    def unused(self, columns: Columns) -> list[str]:
        left = [name for table in self.splits.tables.values() for name in unused_columns(table, columns)]
        names = f"columns not used: {in_short(list(dict.fromkeys(left)))}"
        return [*self.reading.unused, *self.splits.unused, *([names] if left else [])]


def read_given(
    data: str,
    eval_data: str | None,
    splits: tuple[str | None, str | None],
    kinds: Sequence[Kind],
    asked: Mapping[str, str | None],
    cache: Path,
    download: Callable[[str, int], bool],
    encoding: str = "utf-8",
) -> Given:
    """Read the data, give each split its role, and find the columns that are used.

    `splits` are the names that `--eval-split` and `--holdout-split` give, `asked` the columns asked for, by `Kind.what`.

    Raises:
        DataError: data whose form, splits or columns cannot be used, or have no one meaning.
    """
    evaluates, selects = splits
    reading = read_tables(data, cache, download=download, encoding=encoding)
    own = {"use": "train"} if eval_data else {"evaluates": evaluates}
    sides = [_Side(data, reading, by_role(reading, data, selects=selects, **own))]
    if eval_data:
        reading = read_tables(eval_data, cache, download=download, encoding=encoding)
        sides.append(_Side(eval_data, reading, by_role(reading, eval_data, evaluates=evaluates, use="evaluate")))
    columns = choose(sides[0].splits.tables["train"], kinds, asked)
    sides = [side.aligned(columns, kinds, asked, may_lack_label=not number) for number, side in enumerate(sides)]
    several = len(sides) > 1
    if not several and len(reading.tables) == 1:
        _refuse_role_column(sides[0].splits.tables["train"], columns, data)
    unread = [] if encoding == "utf-8" or any(_read_text(side.reading) for side in sides) else [
        f"--encoding {encoding}: not used, no text file is read"
    ]  # fmt: skip
    return Given(
        sides[0].splits.tables,
        sides[1].splits.tables if several else None,
        columns,
        (*(line for side in sides for line in side.public(side.unused(columns), several=several)), *unread),
        tuple(line for side in sides for line in side.public(side.reading.notes, several=several)),
    )


def _read_text(reading: Reading) -> bool:
    """Was a text file read by us? The notes name each file that was, before a colon."""
    return any(TEXT_FILE.fullmatch(note.split(": ")[0]) for note in reading.notes)


def _refuse_role_column(table: Table, columns: Columns, data: str) -> None:
    """Raises DataError where a column that is not used says which rows train and which judge, and all would train."""
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
    return table.data, table.origin, table.split


def _source(part: str, rows: Rows) -> dict[str, Any]:
    """Where a part's rows lie: the file or folder from DATA on, and the split where there are splits."""
    table = rows.table
    split = {"split": table.split} if table.split else {}
    return {"part": part, "file": table.origin, **split, "rows": len(rows)}
