"""Make documents of neighbouring rows, for data sets in which a row is a line or a paragraph, such as WikiText."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import datasets

from dsd_refine.data.reading import Table
from dsd_refine.errors import DataError

ALL, HEADINGS = "all", "headings"
HEADING = re.compile(r"\s*= [^=\s][^=]* =\s*")  # WikiText's title of an article: ` = Title = `
BETWEEN = "\n\n"  # as in transformers' documentation of perplexity


def join_rows(table: Table, text: str, by: str, between: str | None = None) -> Table:
    """Return the table with documents in place of rows, in a column of the same name.

    A document is named by its first and last row ("3-17"). A row without text is an empty one. A
    document of white space only is left out.

    Args:
        table: The table.
        text: The column of the rows' texts.
        by: `all`: all rows are one document. `headings`: a row ` = Title = ` begins one. Any other
            text: the name of a column; neighbouring rows with one value are a document.
        between: What stands between two rows. None: two line ends.

    Raises:
        DataError: There is no such column, or no heading.
    """
    texts = [value if isinstance(value, str) else "" for value in table.rows.select_columns([text])[:][text]]
    starts = list(_starts(table, texts, by))
    spans = zip(starts, [*starts[1:], len(texts)], strict=True)
    glue = BETWEEN if between is None else between
    documents = {f"{table.name(a)}-{table.name(b - 1)}": glue.join(texts[a:b]) for a, b in spans}
    documents = {name: document for name, document in documents.items() if document.strip()}
    rows = datasets.Dataset.from_dict({text: list(documents.values())})
    return replace(table, rows=rows, names=list(documents))


def _starts(table: Table, texts: list[str], by: str) -> Iterator[int]:
    """The numbers of the rows that begin a document. The first row always begins one."""
    if by == ALL:
        yield 0
        return
    if by == HEADINGS:
        found = [row for row, value in enumerate(texts) if HEADING.fullmatch(value)]
        if not found:
            raise DataError(f"join: headings: no row of {table.origin or 'the data'} is a heading such as ` = Title = `")
        yield from found if found[0] == 0 else [0, *found]
        return
    if by not in table.rows.column_names:
        raise DataError(
            f"join: {by}: neither `all` nor `headings`, nor a column; the data has {', '.join(table.rows.column_names)}"
        )
    values = table.rows.select_columns([by])[:][by]
    yield from (row for row, value in enumerate(values) if row == 0 or value != values[row - 1])
