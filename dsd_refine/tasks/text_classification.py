"""Text classification: one label for each row. Other heads on texts are in `text_scores`, `text_pairs`
and `text_labels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dsd_refine.checkpoint.library import Library
from dsd_refine.data.columns import LABEL, PREFERENCE, SCORE, TEXT, Kind, choose, column, is_preference, label_set
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined
from dsd_refine.data.tables import row_blocks
from dsd_refine.errors import CheckpointError
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import Batch, Item, Tables, Task
from dsd_refine.tasks.classification import Classification, LabelledPart, labelled_parts, overlap_warning, skip_warnings
from dsd_refine.tasks.inputs.texts import TextInputs, open_text_inputs
from dsd_refine.tasks.inputs.tokens import beyond_warnings
from dsd_refine.tasks.text_labels import prepare_label_sets
from dsd_refine.tasks.text_pairs import prepare_preferences
from dsd_refine.tasks.text_rows import TextExaminer, TextRows, answer_end, fit_padding
from dsd_refine.tasks.text_scores import prepare_scores


class TextClassification(TextRows, Classification):
    """`text-classification` for transformers models."""

    name = "text-classification"

    def batch(self, part: LabelledPart, items: Sequence[Item]) -> Batch:
        """Tokenize the rows and pad them to the longest one, on the side that `fit_padding` chose.

        Each of the tokenizer's outputs (`input_ids`, `attention_mask`, …) is an int64 input of shape
        rows x longest row. The targets are int64 class ids, one per row. The seeds of the items are
        not used.
        """
        targets = torch.as_tensor(part.ids[[unit for unit, _ in items]])
        return Batch(self.inputs(part, items), targets, len(items))


def head_of(library: Library) -> str:
    """Return what the model's head gives: `classes`, `labels` (several classes may be right), or `score`.

    Raises:
        CheckpointError: it has several outputs that are no classes.
    """
    config = library.config
    kind, outputs = getattr(config, "problem_type", None), int(config.num_labels)
    if kind == "regression" and outputs > 1:
        raise CheckpointError(
            f"{library.folder}: a regression with {outputs} outputs is not supported; supported are heads with one output "
            "(regression, ranking), one label a row, and several labels a row (multi_label_classification)"
        )
    if outputs == 1:
        return "score"
    return "labels" if kind == "multi_label_classification" else "classes"


def kinds(library: Library) -> tuple[tuple[Kind, ...], ...]:
    """The kinds of columns that the head is trained on; of several ways, the first that the data have."""
    head = head_of(library)
    if head == "score":
        return (PREFERENCE,), (TEXT, SCORE)
    if head == "labels":
        names, _ = library.label_names()
        return ((TEXT, label_set([name[0] for name in names or ()])),)
    return ((TEXT, LABEL),)


def open_task(recipe: Recipe, library: Library, model: torch.nn.Module, tables: Tables, evaluation: Tables | None) -> Task:
    """The task on these data, with the checkpoint's own tokenizer and class names, padded as its
    model wants it.
    """
    inputs, ends = open_text_inputs(recipe, library, model), answer_end(library.config)
    names, classes = library.label_names()
    head = head_of(library)
    task: Any
    if head == "labels":
        task = prepare_label_sets(recipe, tables, evaluation, inputs, names, classes, ends)
    elif head == "score" and is_preference((recipe.text_column or "").split(",")):
        task = prepare_preferences(recipe, tables, evaluation, inputs, ends)
    elif head == "score":
        task = prepare_scores(recipe, tables, evaluation, inputs, library.config, ends)
    else:
        task = prepare_texts(recipe, tables, evaluation, inputs.tokenizer, inputs.max_length, names, classes, inputs.size, ends)
    fit_padding(task, model)
    opened: Task = task
    return opened


def prepare_texts(
    recipe: Recipe,
    tables: Tables,
    evaluation: Tables | None,
    tokenizer: Any,
    max_length: int,
    aliases: Sequence[Sequence[str]] | None,
    classes: int,
    size: int | None = None,
    ends: int | None = None,
) -> TextClassification:
    """Match labels, skip rows without label or readable text, divide. `--text-column a,b` gives the
    tokenizer a pair.

    `size` is the number of the model's embeddings, `ends` an id that the model must find equally
    often in all rows.

    Raises:
        DataError: no text or label column, no usable rows, labels that do not match.
    """
    first = tables.get("train") or next(iter(tables.values()))
    columns = choose(first, (TEXT, LABEL), {"text": recipe.text_column, "label": recipe.label_column})["text"]

    def label(table: Table) -> str:
        return column(table, recipe.label_column, LABEL)

    inputs = TextInputs(tokenizer, max_length, size)
    examiner = TextExaminer(inputs, ends)

    def examine(table: Table, labels: list[str | None]) -> list[Examined]:
        return examiner.examine(table, row_blocks(table, [column(table, name, TEXT) for name in columns]), labels)

    matched, parts, divided = labelled_parts(
        tables, evaluation, label, examine, aliases, classes, recipe.holdout, recipe.label_map
    )
    train, holdout, judge = parts
    task = TextClassification(matched, train, holdout, judge, overlap_warning(divided) + skip_warnings(divided))  # type: ignore[arg-type]
    task.warnings += beyond_warnings(tokenizer, size) + examiner.warnings()
    task.reads(columns, inputs)
    task.decide_by(recipe.metric)
    return task
