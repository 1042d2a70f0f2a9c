"""Columns of mappings from a language to a text, as data sets of translations have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import datasets

from dsd_refine.data.reading import Table


def with_languages(table: Table, names: Sequence[str]) -> Table:
    """Return the table with a column for each language: `translation: {en: …, de: …}` becomes `en` and `de`.

    Args:
        table: The table.
        names: The columns of mappings, in lower case. Other columns stay as they are.
    """
    rows = table.rows
    for name in rows.column_names:
        feature = rows.features[name]
        if name.strip().casefold() not in names or not isinstance(feature, dict | datasets.Translation):
            continue
        inner = list(feature.languages if isinstance(feature, datasets.Translation) else feature)
        free = {language: language for language in inner if language not in rows.column_names}
        rows = rows.flatten()
        rows = rows.rename_columns({f"{name}.{language}": free[language] for language in inner if language in free})
    return replace(table, rows=rows)
