"""What image and text classification share: one label a row, cross-entropy, right or wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from dsd_refine.data.columns import MissingColumn
from dsd_refine.data.given import Given
from dsd_refine.data.labels import (
    LabelMap,
    has_integers,
    label_texts,
    left_out,
    match_labels,
    refuse_one_output,
    without_hidden,
)
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined, Parts, Rows, divide, use_rows
from dsd_refine.errors import DataError
from dsd_refine.forward import logits_of, weighted_logits
from dsd_refine.tasks.base import Batch, ChanceBaseline, Forward, RowPart, Score, Scores, Tables, choose_metric, ratio
from dsd_refine.tasks.class_counts import CLASS_METRICS, MOST_CLASSES, Metric, class_stats


@dataclass(frozen=True)
class LabelledPart(RowPart):
    """Rows with the model's class id of each."""

    ids: np.ndarray[Any, Any]


@dataclass
class Classification:
    """What a classification task is apart from its inputs."""

    labels: LabelMap
    train: LabelledPart
    holdout: LabelledPart | None
    eval: LabelledPart
    warnings: list[str] = field(default_factory=list)
    metric: str = "accuracy"
    higher_is_better: bool = True
    draws: ClassVar[bool] = False
    corpus: Metric | None = None  # of summed statistics, if the metric is not the accuracy

    def decide_by(self, asked: str | None) -> None:
        """Let another metric than the accuracy decide.

        Raises:
            DataError: the metric is not one of classes, or the model has too many of them.
        """
        classes = len(self.labels.model)
        names = [name for name in CLASS_METRICS if name != "f1" or classes == 2]
        self.metric = choose_metric(f"a classifier of {classes} classes", asked, ("accuracy", *names), ("loss",))
        self.corpus = CLASS_METRICS.get(self.metric)
        if self.corpus is not None and classes > MOST_CLASSES:
            raise DataError(f"metric: {asked}: is for at most {MOST_CLASSES} classes, the model has {classes:,}")

    @property
    def chance_baselines(self) -> tuple[ChanceBaseline, ...]:
        """The accuracy of guessing, and of always predicting the most frequent evaluation class.

        The first is 1 / number of the model's classes.
        """
        classes, rows = len(self.labels.model), len(self.eval.ids)
        counts = np.bincount(self.eval.ids, minlength=classes)
        most = int(counts.argmax())
        always = f"always naming {self.labels.model[most]!r}, the commonest class here,"
        return (
            ChanceBaseline("accuracy", 1 / classes, "guessing", rows, higher_is_better=True),
            ChanceBaseline("accuracy", float(counts[most] / rows), always, rows, higher_is_better=True),
        )

    def logits(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Rows x classes."""
        return logits_of(forward, batch.inputs)

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The summed cross-entropy of the rows, a float32 scalar.

        The loss of each auxiliary head of the model is added with the weight of that head.
        """
        heads = weighted_logits(forward, batch.inputs)
        losses = [weight * F.cross_entropy(logits, batch.targets, reduction="sum") for weight, logits in heads]
        return torch.stack(losses).sum()

    def score(self, forward: Forward, batch: Batch) -> list[Score]:
        """For each row: 1 if the class with the largest logit is its label, else 0, with the count 1, and
        the statistics of another metric that decides.

        The loss is the cross-entropy of the main head alone, and the prediction is the class id.
        """
        logits = self.logits(forward, batch)
        losses = F.cross_entropy(logits, batch.targets, reduction="none").tolist()
        predictions = logits.argmax(-1)
        hits = (predictions == batch.targets).tolist()
        scores = [Score(float(h), 1, n, p) for h, n, p in zip(hits, losses, predictions.tolist(), strict=True)]
        if self.corpus is None:
            return scores
        predicted, true = (F.one_hot(ids, logits.shape[1]).bool() for ids in (predictions, batch.targets))
        stats = class_stats(predicted, true, logits).tolist()
        return [replace(score, stats=tuple(of_row)) for score, of_row in zip(scores, stats, strict=True)]

    def metrics(self, scores: Scores) -> dict[str, float]:
        """The share of rows whose predicted class is right, and the mean cross-entropy per row.

        If another metric decides, it stands before them.
        """
        usual = {"accuracy": ratio(scores.score, scores.count), "loss": ratio(scores.loss, scores.count)}
        if self.corpus is None or scores.stats is None:
            return usual
        return {self.metric: float(self.corpus(scores.stats.sum(0)))} | usual

    def target(self, part: LabelledPart, row: int) -> str | None:
        """The model's name of the class that the row is labelled with."""
        return self.labels.model[int(part.ids[row])]

    def shown(self, prediction: int) -> str | None:
        """The model's name of the class with this id."""
        return self.labels.model[prediction]

    def report(self) -> Mapping[str, Any]:
        """The matching of labels and the warnings.

        `labels` has the names of the model's classes, those of the data, and the rule that matched them.
        """
        labels = {"model": list(self.labels.model), "data": list(self.labels.data), "rule": self.labels.rule}
        return {"labels": labels, "warnings": [*self.warnings, *self.labels.warnings]}


Examine = Callable[[Table, list[str | None]], list[Examined]]


def labelled_parts(
    tables: Tables,
    evaluation: Tables | None,
    label_column: Callable[[Table], str],
    examine: Examine,
    aliases: Sequence[Sequence[str]] | None,
    classes: int,
    holdout: float,
    label_map: Mapping[str, str | None],
) -> tuple[LabelMap, list[LabelledPart | None], Parts]:
    """Read labels, match them once for all splits, skip what cannot be used, and divide.

    Raises:
        DataError: as `match_labels` and `divide` say.
    """
    refuse_one_output(classes)
    both = [*tables.items(), *(evaluation or {}).items()]
    columns = [
        _labels(table, label_column, may_lack=number < len(tables) and name != "train")
        for number, (name, table) in enumerate(both)
    ]
    columns = without_hidden(columns, aliases, label_map)
    left = left_out(label_map, columns)
    rows_of = [_examined(table, texts, left, examine) for (_, table), texts in zip(both, columns, strict=True)]
    used = dict(zip(tables, rows_of, strict=False))
    judged = dict(zip(evaluation, rows_of[len(tables) :], strict=True)) if evaluation else None
    everything = [*used.values(), *(judged or {}).values()]
    labels_used = {label for rows in everything for label in rows.labels}
    if not labels_used:
        reasons = Counter(item["reason"] for rows in everything for item in rows.skipped)
        if set(reasons) <= {"no label"}:
            raise DataError("no row has a label")
        shown = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
        first = next(item["row"] for rows in everything for item in rows.skipped)
        raise DataError(f"no row can be used: {shown}{', …' if len(reasons) > 5 else ''}; the first is {first}")
    said = {label: name for label, name in label_map.items() if name is not None}
    labels = match_labels(aliases, classes, labels_used, _declared(tables, label_column), said)
    labels = _with_said_names(aliases, labels, [*tables.values(), *(evaluation or {}).values()], label_column)
    parts = divide(used, judged, holdout)
    return labels, [_with_ids(rows, labels) for rows in (parts.train, parts.holdout, parts.eval)], parts


def check_labels(
    given: Given,
    aliases: Sequence[Sequence[str]] | None,
    classes: int,
    label_map: Mapping[str, str | None],
    is_usable: Callable[[Table, tuple[str, ...], int], bool],
) -> None:
    """Match the labels of all splits with the classes before any row is examined, and so before a
    model is needed.

    Only where that fails, rows are looked at: a label counts if some row that has it can be used
    (`is_usable`).

    Raises:
        DataError: no labels, or as `match_labels` says.
    """
    (label,) = given.columns["label"]
    content = next(names for what, names in given.columns.items() if what != "label")
    tables = [*given.tables.values(), *(given.evaluation or {}).values()]
    labelled = [table for table in tables if label in table.rows.column_names]
    columns = without_hidden([label_texts(table, label) for table in labelled], aliases, label_map)
    left = left_out(label_map, columns)
    held = list(zip(labelled, columns, strict=True))
    declared = _declared(given.tables, lambda table: label)
    spoken = {text for _, texts in held for text in texts if text is not None} - left
    said = {text: name for text, name in label_map.items() if name is not None}
    if not spoken:
        raise DataError(f"no row has a label (column {label!r})")
    try:
        match_labels(aliases, classes, spoken, declared, said)
    except DataError:
        used: set[str] = set()
        for table, texts in held:
            for row, text in enumerate(texts):
                if text is not None and text not in left and text not in used and is_usable(table, content, row):
                    used.add(text)
        if used == spoken:
            raise
        if used:  # where no row at all can be used, the examination of rows says so with the reasons
            match_labels(aliases, classes, used, declared, said)


def _labels(table: Table, label_column: Callable[[Table], str], may_lack: bool) -> list[str | None]:
    """The labels of a split; all None where it has no label column and `may_lack` it."""
    try:
        return label_texts(table, label_column(table))
    except MissingColumn:
        if not may_lack:
            raise
        return [None] * len(table.rows)


def _examined(table: Table, labels: list[str | None], left: frozenset[str], examine: Examine) -> Rows:
    """The usable rows of a split, without those whose label `label_map` leaves out (`left`)."""
    asked = [None if label in left else label for label in labels]
    if all(label is None for label in asked):
        examined = [Examined(b"", reason="no label")] * len(labels)
    else:
        examined = examine(table, asked)
    return use_rows(
        table,
        [
            replace(row, reason=f"label {label!r} left out by label_map") if label in left else row
            for row, label in zip(examined, labels, strict=True)
        ],
    )


def _declared(tables: Tables, label_column: Callable[[Table], str]) -> list[str] | None:
    table = tables.get("train") or next(iter(tables.values()))
    names = table.classes or getattr(table.rows.features[label_column(table)], "names", None)
    return list(names) if names else None


def _with_said_names(
    aliases: Sequence[Sequence[str]] | None, labels: LabelMap, tables: Sequence[Table], label_column: Callable[[Table], str]
) -> LabelMap:
    """The same, and what was done with the names that the recipe gives to integer labels."""
    told = [table for table in tables if table.classes]
    if not told:
        return labels
    if any(_has_integers(table, label_column) for table in told):
        return replace(labels, rule=f"{labels.rule}, integers by the names that the recipe or the data set's own name gives")
    if aliases is None and labels.guessed:
        return replace(labels, rule="the order of label_names (the model has no names)")
    unused = "label_names names integers, and the labels of the data are texts: it is not used (label_map maps texts)"
    return replace(labels, warnings=(*labels.warnings, unused))


def _has_integers(table: Table, label_column: Callable[[Table], str]) -> bool:
    try:
        return has_integers(table, label_column(table))
    except MissingColumn:  # a test split without labels
        return False


def _with_ids(rows: Rows | None, labels: LabelMap) -> LabelledPart | None:
    if rows is None:
        return None
    return LabelledPart(rows, np.asarray([labels.ids[label] for label in rows.labels], dtype=np.int64))


def overlap_warning(parts: Parts) -> list[str]:
    """Counts of evaluation rows that also train or select, and of those that are equal to another
    evaluation row.
    """
    rows = len(parts.eval)
    lines = []
    if parts.overlap:
        lines.append(
            f"{parts.overlap} of {rows} evaluation rows have the content of a training or holdout row: the figures flatter"
        )
    repeated = rows - len(set(parts.eval.digests))
    if repeated:
        lines.append(
            f"{repeated} of {rows} evaluation rows repeat the content of another: p and interval count equal rows as one, "
            f"{rows - repeated} in all"
        )
    return lines


def skip_warnings(parts: Parts) -> list[str]:
    """One line for each split that could not be used, and for each part that lost rows."""
    lines = [f"the {name} split has no usable rows with labels: it is not used" for name in parts.unused]
    for name, rows in (("training", parts.train), ("holdout", parts.holdout), ("evaluation", parts.eval)):
        for item in (rows.skipped if rows else [])[:1]:
            lines.append(f"{len(rows.skipped)} {name} rows skipped, the first: {item['row']} ({item['reason']})")  # type: ignore[union-attr]
    return lines
