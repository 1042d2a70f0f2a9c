"""Several labels a row: each class of the model is right or not (multi-label classification), whatever the rows hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from dsd_refine.data.labels import LabelMap, left_out, match_labels
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined, Parts, Rows, divide, use_rows
from dsd_refine.errors import DataError
from dsd_refine.forward import logits_of, weighted_logits
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import (
    Batch,
    ChanceBaseline,
    Corpus,
    Forward,
    Item,
    RowPart,
    Score,
    Scores,
    Tables,
    choose_metric,
    corpus_value,
)
from dsd_refine.tasks.class_counts import average_precision, class_stats, f1_macro, f1_micro

Array = np.ndarray[Any, Any]
METRICS: dict[str, Corpus] = {"f1_micro": f1_micro, "f1_macro": f1_macro, "map": average_precision}


@dataclass(frozen=True)
class LabelSetPart(RowPart):
    """Rows with what is right of each: float32 of shape (rows, classes), 0 or 1."""

    truth: Array


@dataclass
class LabelSets:
    """A task whose models have several labels a row, apart from its inputs. A real target is a class of a row.

    A child says what the model's inputs are (`inputs`) and what the task is called (`name`).

    A class is predicted if its logit is above 0. Per row, `stats` are those of `class_counts`.
    """

    names: LabelMap
    train: LabelSetPart
    holdout: LabelSetPart | None
    eval: LabelSetPart
    metric: str
    warnings: list[str] = field(default_factory=list)
    higher_is_better: bool = True
    draws: ClassVar[bool] = False

    @property
    def corpus(self) -> Corpus:
        """The metric of `stats`, for the bootstrap."""
        return METRICS[self.metric]

    @property
    def chance_baselines(self) -> tuple[ChanceBaseline, ...]:
        """The metric of naming every class for every row, each as surely as the others."""
        truth = self.eval.truth > 0
        every = class_stats(torch.ones(truth.shape, dtype=torch.bool), torch.from_numpy(truth), torch.zeros(truth.shape))
        value = corpus_value(self.corpus, every)
        return (ChanceBaseline(self.metric, value, "naming every class for every row", higher_is_better=True),)

    def batch(self, part: LabelSetPart, items: Sequence[Item]) -> Batch:
        """The inputs of the rows. The targets are float32 of shape rows x classes, 0 or 1."""
        targets = torch.from_numpy(part.truth[[unit for unit, _ in items]])
        return Batch(self.inputs(part, items), targets, targets.numel())

    def inputs(self, part: Any, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """What goes into the model for these rows, by name."""
        raise NotImplementedError

    def logits(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Rows x classes."""
        return logits_of(forward, batch.inputs)

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The summed binary cross-entropy over rows and classes, a float32 scalar.

        The loss of each auxiliary head of the model is added with the weight of that head.
        """
        heads = weighted_logits(forward, batch.inputs)
        losses = [w * F.binary_cross_entropy_with_logits(logits, batch.targets, reduction="sum") for w, logits in heads]
        return torch.stack(losses).sum()

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
        """The task's metric, then the others of F1 and mean average precision, and the loss per class of a row."""
        stats = scores.stats if scores.stats is not None else np.zeros((1, 4 * len(self.names.model)))
        found = {name: corpus_value(metric, stats) for name, metric in METRICS.items()}
        found["loss"] = float(scores.loss.mean() / len(self.names.model))
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


Read = Callable[[Table, Sequence[str | None]], list[Examined]]  # what each row is; None: it has no labels


def label_set_parts(
    recipe: Recipe,
    tables: Tables,
    evaluation: Tables | None,
    columns: Sequence[str],
    examine: Read,
    aliases: Sequence[Sequence[str]] | None,
    classes: int,
) -> tuple[LabelMap, list[LabelSetPart | None], Parts]:
    """Match the labels of all splits once, skip rows without labels or content, divide.

    Args:
        recipe: Its `label_map` and `holdout` are read.
        tables: The tables of DATA.
        evaluation: The tables of the evaluation data, or None.
        columns: Their columns of labels: one of lists, or one of 0 and 1 for each class.
        examine: Looks through the rows of a table.
        aliases: The names of each class of the model, or None.
        classes: The number of the model's classes.

    Raises:
        DataError: labels that do not match, or no usable rows.
    """
    first = tables.get("train") or next(iter(tables.values()))
    read: dict[int, list[list[str] | None]] = {}  # id of a table -> the labels of each row

    def examined(table: Table) -> Rows:
        labels = read[id(table)] = _labels_of(table, columns, _model_names(aliases, classes), aliases is None)
        rows = examine(table, [None if row is None else "" for row in labels])
        return use_rows(table, [replace(row, label=None) for row in rows])

    used = {name: examined(table) for name, table in tables.items()}
    judged = {name: examined(table) for name, table in evaluation.items()} if evaluation else None
    divided = divide(used, judged, recipe.holdout)
    every = [
        [label for n in rows.numbers for label in read[id(rows.table)][int(n)] or ()]
        for rows in (*used.values(), *(judged or {}).values())
    ]
    left = left_out(recipe.label_map, every)
    matched = _matched(recipe, every, left, aliases, classes, _declared(first, columns))

    def part(rows: Rows | None) -> LabelSetPart | None:
        if rows is None:
            return None
        truth = np.zeros((len(rows), classes), dtype=np.float32)
        for row, number in enumerate(rows.numbers):
            truth[row, [matched.ids[label] for label in read[id(rows.table)][int(number)] or () if label not in left]] = 1
        return LabelSetPart(rows, truth)

    return matched, [part(rows) for rows in (divided.train, divided.holdout, divided.eval)], divided


def decide_by(asked: str | None) -> str:
    """The metric of several labels a row that decides.

    Raises:
        DataError: the asked one cannot.
    """
    return choose_metric("a classifier with several labels a row", asked, tuple(METRICS), ("loss",))


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
