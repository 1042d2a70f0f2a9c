"""Texts with several labels: each class of the model is right or not (multi-label classification)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from dsd_refine.data.columns import TEXT, choose, column, label_set
from dsd_refine.data.labels import LabelMap, left_out, match_labels
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Rows, divide, use_rows
from dsd_refine.data.tables import row_blocks
from dsd_refine.errors import DataError
from dsd_refine.forward import logits_of
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import Batch, ChanceBaseline, Forward, Item, Score, Scores, Tables, choose_metric
from dsd_refine.tasks.class_counts import average_precision, class_stats, f1_macro, f1_micro
from dsd_refine.tasks.classification import overlap_warning, skip_warnings
from dsd_refine.tasks.inputs.texts import TextInputs
from dsd_refine.tasks.inputs.tokens import beyond_warnings
from dsd_refine.tasks.text_rows import TextExaminer, TextRows

Array = np.ndarray[Any, Any]
METRICS = {"f1_micro": f1_micro, "f1_macro": f1_macro}


@dataclass(frozen=True)
class LabelSetPart:
    """Rows with what is right of each: float32 of shape (rows, classes), 0 or 1."""

    rows: Rows
    truth: Array

    @property
    def units(self) -> int:
        """The number of rows: each row is one unit."""
        return len(self.rows)

    def row_of(self, unit: int) -> int:
        """The unit itself, because each row is one unit."""
        return unit


@dataclass
class TextLabels(TextRows):
    """`text-classification` of models for several labels a row. A real target is a class of a row.

    A class is predicted if its logit is above 0. Per row, `stats` are those of `class_counts`.
    """

    names: LabelMap
    train: LabelSetPart
    holdout: LabelSetPart | None
    eval: LabelSetPart
    metric: str
    warnings: list[str] = field(default_factory=list)
    name: str = "text-classification"
    higher_is_better: bool = True
    draws: ClassVar[bool] = False

    @property
    def corpus(self) -> Callable[[Array], Array]:
        """The metric of summed `stats`, for the bootstrap."""
        return METRICS[self.metric]

    @property
    def chance_baselines(self) -> tuple[ChanceBaseline, ...]:
        """The F1 of naming every class for every row."""
        truth = self.eval.truth > 0
        every = class_stats(torch.ones(truth.shape, dtype=torch.bool), torch.from_numpy(truth), torch.zeros(truth.shape))
        value = float(self.corpus(every.sum(0)))
        return (ChanceBaseline(self.metric, value, "naming every class for every row", higher_is_better=True),)

    def batch(self, part: LabelSetPart, items: Sequence[Item]) -> Batch:
        """Tokenize the rows and pad them. The targets are float32 of shape rows x classes, 0 or 1."""
        targets = torch.from_numpy(part.truth[[unit for unit, _ in items]])
        return Batch(self.inputs(part, items), targets, targets.numel())

    def logits(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Rows x classes."""
        return logits_of(forward, batch.inputs)

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The summed binary cross-entropy over rows and classes, a float32 scalar."""
        return F.binary_cross_entropy_with_logits(self.logits(forward, batch), batch.targets, reduction="sum")

    def score(self, forward: Forward, batch: Batch) -> list[Score]:
        """For each row the counts that F1 is made of, its loss, and the predicted classes.

        `score` is twice the classes that are right, `count` the predicted and the true ones.
        """
        logits = self.logits(forward, batch)
        losses = F.binary_cross_entropy_with_logits(logits, batch.targets, reduction="none").double().sum(1).tolist()
        predicted, true = logits > 0, batch.targets > 0
        right = (predicted & true).sum(1).tolist()
        both = (predicted.sum(1) + true.sum(1)).tolist()
        texts = [self._shown(row) for row in predicted.tolist()]
        rows = zip(right, both, losses, texts, class_stats(predicted, true, logits).tolist(), strict=True)
        return [Score(2.0 * hits, count, loss, text=text, stats=tuple(stats)) for hits, count, loss, text, stats in rows]

    def _shown(self, row: Sequence[Any]) -> str:
        return ", ".join(name for name, is_right in zip(self.names.model, row, strict=True) if is_right)

    def metrics(self, scores: Scores) -> dict[str, float]:
        """The task's metric, then the other F1, the mean average precision, and the loss per class of a row."""
        stats = scores.stats if scores.stats is not None else np.zeros((1, 4 * len(self.names.model)))
        found = {name: float(function(stats.sum(0))) for name, function in METRICS.items()}
        found |= {"map": average_precision(stats), "loss": float(scores.loss.mean() / len(self.names.model))}
        return {name: found[name] for name in (self.metric, *(name for name in found if name != self.metric))}

    def target(self, part: LabelSetPart, row: int) -> str | None:
        """The classes that are right, with commas between them."""
        return self._shown(part.truth[row].tolist())

    def shown(self, prediction: int) -> str | None:
        """None: a row has several classes, which are its text."""
        return None

    def report(self) -> Mapping[str, Any]:
        """The matching of labels and the warnings."""
        labels = {"model": list(self.names.model), "data": list(self.names.data), "rule": self.names.rule}
        return {"labels": labels, "warnings": [*self.warnings, *self.names.warnings]}


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
    metric = choose_metric("a classifier with several labels a row", recipe.metric, tuple(METRICS), ("map", "loss"))
    first = tables.get("train") or next(iter(tables.values()))
    kinds = (TEXT, label_set([names[0] for names in aliases or ()]))
    chosen = choose(first, kinds, {"text": recipe.text_column, "label": recipe.label_column})
    examiner = TextExaminer(inputs, ends)
    read: dict[int, list[list[str] | None]] = {}  # id of a table -> the labels of each row

    def examined(table: Table) -> Rows:
        labels = read[id(table)] = _labels_of(table, chosen["label"], _model_names(aliases, classes), aliases is None)
        texts = [None if row is None else "" for row in labels]
        rows = examiner.examine(table, row_blocks(table, [column(table, name, TEXT) for name in chosen["text"]]), texts)
        return use_rows(table, [replace(row, label=None) for row in rows])

    used = {name: examined(table) for name, table in tables.items()}
    judged = {name: examined(table) for name, table in evaluation.items()} if evaluation else None
    divided = divide(used, judged, recipe.holdout)
    every = [
        [label for n in rows.numbers for label in read[id(rows.table)][int(n)] or ()]
        for rows in (*used.values(), *(judged or {}).values())
    ]
    left = left_out(recipe.label_map, every)
    matched = _matched(recipe, every, left, aliases, classes, _declared(first, chosen["label"]))

    def part(rows: Rows | None) -> LabelSetPart | None:
        if rows is None:
            return None
        truth = np.zeros((len(rows), classes), dtype=np.float32)
        for row, number in enumerate(rows.numbers):
            truth[row, [matched.ids[label] for label in read[id(rows.table)][int(number)] or () if label not in left]] = 1
        return LabelSetPart(rows, truth)

    train, holdout, judge = (part(rows) for rows in (divided.train, divided.holdout, divided.eval))
    warnings = overlap_warning(divided) + skip_warnings(divided) + beyond_warnings(inputs.tokenizer, inputs.size)
    task = TextLabels(matched, train, holdout, judge, metric, warnings + examiner.warnings())  # type: ignore[arg-type]
    task.reads(chosen["text"], inputs)
    return task


def _matched(
    recipe: Recipe,
    every: Sequence[Sequence[str]],
    left: frozenset[str],
    aliases: Sequence[Sequence[str]] | None,
    classes: int,
    declared: list[str] | None,
) -> LabelMap:
    """The labels of all splits, matched with the model's classes; those in `left` are not used."""
    spoken = {label for labels in every for label in labels} - left
    if not spoken:
        raise DataError("no row has a label")
    said = {label: name for label, name in recipe.label_map.items() if name is not None}
    return match_labels(aliases, classes, spoken, declared, said)


def _declared(table: Table, columns: Sequence[str]) -> list[str] | None:
    """The names of integer labels, in order: the recipe's, else the data set's own; None if there are none."""
    if len(columns) > 1:
        return None
    names = table.classes or getattr(getattr(table.rows.features[columns[0]], "feature", None), "names", None)
    return list(names) if names else None


def _model_names(aliases: Sequence[Sequence[str]] | None, classes: int) -> list[str]:
    return [names[0] for names in aliases] if aliases is not None else [f"LABEL_{k}" for k in range(classes)]


def _labels_of(table: Table, columns: Sequence[str], model: Sequence[str], are_numbers: bool) -> list[list[str] | None]:
    """The labels of each row: names or numbers in a list, or a list of 0 and 1 for all classes, or a column of
    0 and 1 for each class. None: the row does not say.

    Args:
        table: The table.
        columns: Its columns of labels.
        model: The names of the model's classes.
        are_numbers: Numbers are the model's classes, which have no names.

    Raises:
        DataError: a value is neither.
    """
    if not set(columns) <= set(table.rows.column_names):  # such as a test split with secret labels
        return [None] * len(table.rows)
    if len(columns) > 1:
        values = [table.rows.with_format(None)[name] for name in columns]
        return [_of_flags(row, columns, table, n) for n, row in enumerate(zip(*values, strict=True))]
    (name,) = columns
    rows = table.rows.with_format(None)[name]
    names = _declared(table, columns) or (list(model) if are_numbers else None)
    lists = [row for row in rows if isinstance(row, list)]
    are_flags = bool(lists) and all(len(row) == len(model) and all(value in (0, 1) for value in row) for row in lists)
    flags = table.classes if table.classes and len(table.classes) == len(model) else model
    read: list[list[str] | None] = []
    for number, row in enumerate(rows):
        if row is None:
            read.append(None)
        elif not isinstance(row, list):
            raise DataError(
                f"row {table.name(number)}: {name!r} is {row!r:.40}, and the model gives several labels a row: write a list"
            )
        elif are_flags:
            read.append(_of_flags(row, flags, table, number))
        else:
            read.append([_named(label, names, table, number) for label in row])
    return read


def _of_flags(row: Sequence[Any], names: Sequence[str], table: Table, number: int) -> list[str] | None:
    if any(value is None for value in row):
        return None
    odd = next((value for value in row if value not in (0, 1)), None)
    if odd is not None:
        raise DataError(f"row {table.name(number)}: the label {odd!r:.40} is neither 0 nor 1")
    return [name for name, value in zip(names, row, strict=True) if value]


def _named(label: Any, names: Sequence[str] | None, table: Table, number: int) -> str:
    if isinstance(label, str):
        return label
    if not isinstance(label, int) or (names is not None and not 0 <= label < len(names)):
        raise DataError(f"row {table.name(number)}: the label {label!r:.40} is no class")
    return str(label) if names is None else names[label]
