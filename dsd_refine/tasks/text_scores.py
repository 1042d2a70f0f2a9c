"""Texts with a score: heads with one output, for similarity (regression) and relevance (cross-encoders)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from torch.nn import functional as F

from dsd_refine.data.columns import SCORE, TEXT, MissingColumn, choose, column
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined, Rows, divide, use_rows
from dsd_refine.data.tables import row_blocks
from dsd_refine.errors import DataError
from dsd_refine.forward import logits_of
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import (
    Batch,
    ChanceBaseline,
    Corpus,
    Forward,
    Item,
    RowMetric,
    RowPart,
    Score,
    Scores,
    Tables,
    choose_metric,
    ratio,
)
from dsd_refine.tasks.classification import overlap_warning, skip_warnings
from dsd_refine.tasks.inputs.texts import TextInputs
from dsd_refine.tasks.inputs.tokens import beyond_warnings
from dsd_refine.tasks.text_rows import TextExaminer, TextRows

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ScoredPart(RowPart):
    """Rows with the score of each, float32."""

    scores: Array


@dataclass
class TextScores(TextRows):
    """`text-classification` of models with one output.

    `sigmoid`: the output is a logit, and the loss is binary cross-entropy (cross-encoders). Else the
    loss is the squared error (regression). Per row, `stats` are 1, prediction x, score y, xy, xx, yy.
    """

    train: ScoredPart
    holdout: ScoredPart | None
    eval: ScoredPart
    sigmoid: bool
    metric: str
    warnings: list[str] = field(default_factory=list)
    name: str = "text-classification"
    draws: ClassVar[bool] = False

    @property
    def higher_is_better(self) -> bool:
        """False for the squared error."""
        return self.metric != "mse"

    @property
    def corpus(self) -> Corpus | None:
        """The correlation of `stats`, for the bootstrap. None: the metric is a ratio of sums."""
        return CORRELATIONS.get(self.metric)

    @property
    def chance_baselines(self) -> tuple[ChanceBaseline, ...]:
        """The figures of always giving the same score."""
        truth = self.eval.scores.astype(np.float64)
        if self.metric in CORRELATIONS:
            return (ChanceBaseline(self.metric, 0.0, "guessing", higher_is_better=True),)
        if self.metric == "mse":
            return (ChanceBaseline("mse", float(truth.var()), "always giving the mean score"),)
        share = float((truth >= 0.5).mean())
        how = "always giving the commoner answer"
        return (ChanceBaseline("accuracy", max(share, 1 - share), how, len(truth), higher_is_better=True),)

    def batch(self, part: ScoredPart, items: Sequence[Item]) -> Batch:
        """Tokenize the rows and pad them. The targets are their scores, float32 of shape (rows,)."""
        targets = torch.from_numpy(part.scores[[unit for unit, _ in items]])
        return Batch(self.inputs(part, items), targets, len(items))

    def logits(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Rows x 1."""
        return logits_of(forward, batch.inputs)

    def _losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.sigmoid:
            return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        return F.mse_loss(outputs, targets, reduction="none")

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The summed loss of the rows, a float32 scalar."""
        return self._losses(self.logits(forward, batch)[:, 0], batch.targets).sum()

    def score(self, forward: Forward, batch: Batch) -> list[Score]:
        """For each row its loss, the predicted score, and the sums that correlations are made of.

        `score` is 1 if a yes or no is right (accuracy), the squared error (mse), or the squared error
        with a minus (correlations).
        """
        outputs = self.logits(forward, batch)[:, 0]
        losses = self._losses(outputs, batch.targets).tolist()
        shown = outputs.sigmoid() if self.sigmoid else outputs
        return [self._score(*values) for values in zip(shown.tolist(), batch.targets.tolist(), losses, strict=True)]

    def _score(self, x: float, y: float, loss: float) -> Score:
        error = (x - y) ** 2
        values = {"accuracy": float((x >= 0.5) == (y >= 0.5)), "mse": error, "pearson": -error, "spearman": -error}
        return Score(values[self.metric], 1, loss, text=f"{x:.6g}", stats=(1.0, x, y, x * y, x * x, y * y))

    def metrics(self, scores: Scores) -> dict[str, float]:
        """The task's metric, then the others; Pearson and Spearman are 0 where all scores are the same."""
        stats = scores.stats if scores.stats is not None else np.zeros((1, 6))
        x, y = stats[:, 1], stats[:, 2]
        found = {"pearson": float(pearson(stats.sum(0))), "spearman": spearman(x, y), "mse": float(((x - y) ** 2).mean())}
        if self.sigmoid and set(np.unique(self.eval.scores)) <= {0.0, 1.0}:
            found = {"accuracy": float(((x >= 0.5) == (y >= 0.5)).mean())} | found
        found["loss"] = ratio(scores.loss, scores.count)
        return {name: found[name] for name in (self.metric, *(name for name in found if name != self.metric))}

    def target(self, part: ScoredPart, row: int) -> str | None:
        """The score of the row."""
        return f"{part.scores[row]:g}"

    def shown(self, prediction: int) -> str | None:
        """None: this task predicts no class."""
        return None

    def report(self) -> Mapping[str, Any]:
        """No labels, the warnings, and the loss."""
        loss = "binary cross-entropy of the output as a logit" if self.sigmoid else "squared error of the output"
        return {"labels": None, "preprocessing": {"loss": loss}, "warnings": self.warnings}


def pearson(sums: Array) -> Array:
    """Pearson's correlation of summed `stats` (…, statistics); 0 where predictions or scores do not vary."""
    n, x, y, xy, xx, yy = (sums[..., k] for k in range(6))
    spread = (n * xx - x * x) * (n * yy - y * y)
    some = spread > 1e-18 * np.maximum(1.0, n) ** 4
    return np.where(some, (n * xy - x * y) / np.sqrt(np.where(some, spread, 1.0)), 0.0)


def _spearmans(stats: Array, times: Array) -> Array:
    """Spearman's rank correlation for samples of rows, from the rows' `stats` (rows, statistics); 0 where one
    does not vary. `times` says how often each row is in each sample, shape (samples, rows).
    """
    x, y = _ranks(stats[:, 1], times), _ranks(stats[:, 2], times)
    sums = [times, times * x, times * y, times * x * y, times * x * x, times * y * y]
    return pearson(np.stack([each.sum(1) for each in sums], axis=-1))


def _ranks(values: Array, times: Array) -> Array:
    """The rank of each row in each sample, shape (samples, rows): equal values have their mean rank."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    is_first = np.append(True, ordered[1:] != ordered[:-1])
    counts = np.add.reduceat(times[:, order], np.flatnonzero(is_first), axis=1)
    middles = counts.cumsum(1) - (counts - 1) / 2
    ranks = np.empty(times.shape)
    ranks[:, order] = middles[:, np.cumsum(is_first) - 1]
    ranks -= times.sum(1, keepdims=True) / 2  # around 0, so that no digits are lost
    return ranks


SPEARMAN = RowMetric(_spearmans)
CORRELATIONS: dict[str, Corpus] = {"pearson": pearson, "spearman": SPEARMAN}


def spearman(x: Array, y: Array) -> float:
    """Spearman's rank correlation; 0 where one does not vary."""
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic) if len(set(x.tolist())) > 1 < len(set(y.tolist())) else 0.0


def prepare_scores(
    recipe: Recipe, tables: Tables, evaluation: Tables | None, inputs: TextInputs, config: Any, ends: int | None
) -> TextScores:
    """Read the scores, skip rows without score or readable text, divide.

    Raises:
        DataError: no text or score column, scores that are no numbers, or no usable rows.
    """
    if recipe.label_names or recipe.label_map:
        raise DataError("label_names and label_map are of classes, and a head with one output has none: leave them out")
    first = tables.get("train") or next(iter(tables.values()))
    asked = {"text": recipe.text_column, "label": recipe.label_column}
    columns = choose(first, (TEXT, SCORE), asked)["text"]
    examiner = TextExaminer(inputs, ends)
    read: dict[int, list[float | None]] = {}  # id of a table -> the score of each row
    every = [*tables.values(), *(evaluation or {}).values()]
    for table in every:
        read[id(table)] = scores_of(table, recipe.label_column, may_lack=table is not first)
    held = {score for scores in read.values() for score in scores if score is not None}
    is_yes_or_no = held <= {0.0, 1.0}

    def examined(table: Table) -> Rows:
        texts = [None if score is None else f"{score:g}" for score in read[id(table)]]
        if all(text is None for text in texts):
            return use_rows(table, [Examined(b"", reason="no score")] * len(texts))
        rows = examiner.examine(table, row_blocks(table, [column(table, name, TEXT) for name in columns]), texts)
        rows = [replace(row, reason="no score") if row.reason == "no label" else row for row in rows]
        return use_rows(table, rows if is_yes_or_no else [replace(row, label=None) for row in rows])

    used = {name: examined(table) for name, table in tables.items()}
    judged = {name: examined(table) for name, table in evaluation.items()} if evaluation else None
    divided = divide(used, judged, recipe.holdout)
    sigmoid = _is_logit(config, held)
    allowed = ("accuracy", "pearson", "spearman", "mse") if sigmoid and is_yes_or_no else ("pearson", "spearman", "mse")
    metric = choose_metric("a head with one output", recipe.metric, allowed, ("loss",))

    def part(rows: Rows | None) -> ScoredPart | None:
        if rows is None:
            return None
        return ScoredPart(rows, np.asarray([read[id(rows.table)][int(n)] for n in rows.numbers], dtype=np.float32))

    train, holdout, judge = (part(rows) for rows in (divided.train, divided.holdout, divided.eval))
    warnings = overlap_warning(divided) + skip_warnings(divided) + beyond_warnings(inputs.tokenizer, inputs.size)
    task = TextScores(train, holdout, judge, sigmoid, metric, warnings + examiner.warnings())  # type: ignore[arg-type]
    task.reads(columns, inputs)
    return task


def scores_of(table: Table, asked: str | None, may_lack: bool) -> list[float | None]:
    """The score of each row; all None where the table has no column of them and `may_lack` it."""
    try:
        name = column(table, asked, SCORE)
    except MissingColumn:
        if not may_lack:
            raise
        return [None] * len(table.rows)
    is_class = isinstance(table.rows.features[name], datasets.ClassLabel)
    values = table.rows.with_format(None)[name]
    return [_number(value, is_class, table, row, name) for row, value in enumerate(values)]


def _number(value: Any, is_class: bool, table: Table, row: int, name: str) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()) or (is_class and value == -1):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DataError(
            f"row {table.name(row)}: {name!r} is {value!r:.40}, and the model's head has one output, which learns numbers: "
            "scores (regression), or 0 and 1 (relevance)"
        ) from None
    return number if math.isfinite(number) else None


def _is_logit(config: Any, scores: set[float]) -> bool:
    """Is the output the logit of a yes? So it is with scores of 0 and 1 alone, and where the checkpoint says
    that sentence-transformers puts a sigmoid behind it. `problem_type: regression` says that it is not.
    """
    if getattr(config, "problem_type", None) == "regression":
        return False
    if scores <= {0.0, 1.0}:
        return True
    newer = getattr(config, "sentence_transformers", None)
    named = newer.get("activation_fn") if isinstance(newer, dict) else None
    named = named or getattr(config, "sbert_ce_default_activation_function", None)
    return isinstance(named, str) and named.endswith("Sigmoid") and min(scores) >= 0 and max(scores) <= 1
