"""Texts with several labels a row."""

from __future__ import annotations

from collections.abc import Sequence

from dsd_refine.data.columns import TEXT, choose, column, label_set
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined
from dsd_refine.data.tables import row_blocks
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import Tables
from dsd_refine.tasks.classification import overlap_warning, skip_warnings
from dsd_refine.tasks.inputs.texts import TextInputs
from dsd_refine.tasks.inputs.tokens import beyond_warnings
from dsd_refine.tasks.label_sets import LabelSets, decide_by, label_set_parts
from dsd_refine.tasks.text_rows import TextExaminer, TextRows


class TextLabels(TextRows, LabelSets):
    """`text-classification` of models for several labels a row."""

    name = "text-classification"


def prepare_label_sets(
    recipe: Recipe,
    tables: Tables,
    evaluation: Tables | None,
    inputs: TextInputs,
    aliases: Sequence[Sequence[str]] | None,
    classes: int,
    ends: int | None,
) -> TextLabels:
    """Match the labels of all splits once, skip rows without labels or readable text, divide.

    Raises:
        DataError: no text or label column, labels that do not match, or no usable rows.
    """
    metric = decide_by(recipe.metric)
    first = tables.get("train") or next(iter(tables.values()))
    kinds = (TEXT, label_set([names[0] for names in aliases or ()]))
    chosen = choose(first, kinds, {"text": recipe.text_column, "label": recipe.label_column})
    examiner = TextExaminer(inputs, ends)

    def examine(table: Table, labels: Sequence[str | None]) -> list[Examined]:
        return examiner.examine(table, row_blocks(table, [column(table, name, TEXT) for name in chosen["text"]]), labels)

    matched, (train, holdout, judge), divided = label_set_parts(
        recipe, tables, evaluation, chosen["label"], examine, aliases, classes
    )
    warnings = overlap_warning(divided) + skip_warnings(divided) + beyond_warnings(inputs.tokenizer, inputs.size)
    task = TextLabels(matched, train, holdout, judge, metric, warnings + examiner.warnings())  # type: ignore[arg-type]
    task.reads(chosen["text"], inputs)
    return task
