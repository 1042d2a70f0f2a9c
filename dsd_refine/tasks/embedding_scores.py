"""Embedding trained on pairs of texts with a score: the cosine of two embeddings is to be the score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch

from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined, Rows
from dsd_refine.errors import DataError
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import Batch, ChanceBaseline, Corpus, Forward, Score, Scores, Tables, choose_metric, ratio
from dsd_refine.tasks.inputs.sentences import SentenceInputs
from dsd_refine.tasks.inputs.texts import text_digest
from dsd_refine.tasks.sentence_rows import Examiner, SentencePart, Sentences, divided
from dsd_refine.tasks.text_scores import SPEARMAN, pearson, scores_of, spearman

Array = np.ndarray[Any, Any]


@dataclass
class ScoredPairs(Sentences):
    """`embedding` on two texts a row with a score. `values` of a part are the scores of its rows, float32.

    The loss is the squared difference of the cosine and the score. Unlike CoSENT, which ranks the pairs of a
    batch, it is a sum over rows: it does not depend on batches, accumulation or processes.

    Per row, `stats` are 1, similarity x, score y, xy, xx, yy.
    """

    scale: tuple[float, float] = (0.0, 1.0)  # the scores that become 0 and 1

    @property
    def higher_is_better(self) -> bool:
        """False for the squared error."""
        return self.metric != "mse"

    @property
    def corpus(self) -> Corpus | None:
        """The metric of `stats`, for the bootstrap. None: it is a ratio of sums."""
        found: dict[str, Corpus] = {"spearman": SPEARMAN, "pearson": pearson}
        return found.get(self.metric)

    @property
    def chance_baselines(self) -> tuple[ChanceBaseline, ...]:
        """The figures of always giving the same score."""
        if self.metric == "mse":
            return (ChanceBaseline("mse", float(self.eval.values.astype(np.float64).var()), "always giving the mean score"),)
        return (ChanceBaseline(self.metric, 0.0, "guessing", higher_is_better=True),)

    def cosines(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The similarity of the two texts of each row, float32 of shape (rows,)."""
        one, other = self.vectors(forward, batch)
        similar: torch.Tensor = (one * other).sum(-1)
        return similar

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The summed squared difference of similarity and score, a float32 scalar."""
        return ((self.cosines(forward, batch) - batch.targets) ** 2).sum()

    def score(self, forward: Forward, batch: Batch) -> list[Score]:
        """For each row its similarity, and the sums that correlations are made of.

        `score` is the squared error (mse), or the same with a minus.
        """
        pairs = zip(self.cosines(forward, batch).double().tolist(), batch.targets.double().tolist(), strict=True)
        sign = 1 if self.metric == "mse" else -1
        return [
            Score(sign * (x - y) ** 2, 1, (x - y) ** 2, text=f"{x:.6g}", stats=(1, x, y, x * y, x * x, y * y)) for x, y in pairs
        ]

    def metrics(self, scores: Scores) -> dict[str, float]:
        """The task's metric, then the others of Spearman, Pearson, squared error, loss.

        A correlation is 0 where nothing varies.
        """
        stats = scores.stats if scores.stats is not None else np.zeros((1, 6))
        x, y = stats[:, 1], stats[:, 2]
        found = {
            "spearman": spearman(x, y),
            "pearson": float(pearson(stats.sum(0))),
            "mse": float(((x - y) ** 2).mean()),
            "loss": ratio(scores.loss, scores.count),
        }
        return {name: found[name] for name in (self.metric, *(name for name in found if name != self.metric))}

    def target(self, part: SentencePart, row: int) -> str | None:
        """The score of the row, as the loss takes it."""
        return f"{part.values[row]:g}"

    def report(self) -> Mapping[str, Any]:
        """No labels, the warnings, the loss, and how texts are read."""
        low, high = self.scale
        scaled = "" if (low, high) == (0, 1) else f"; scores from {low:g} to {high:g} become 0 to 1"
        return self.report_of(f"squared difference of {self.sentences.layout.similarity} similarity and score{scaled}")


def prepare_scored_pairs(
    recipe: Recipe, tables: Tables, evaluation: Tables | None, inputs: SentenceInputs, columns: tuple[str, ...]
) -> ScoredPairs:
    """Read the scores, skip rows that cannot be used, divide.

    Raises:
        DataError: scores that are no numbers or classes, or no usable rows.
    """
    if len(columns) != 2:
        raise DataError(f"a score is of two texts, and these are {len(columns)} columns: {', '.join(columns)}")
    metric = choose_metric("embedding on pairs with a score", recipe.metric, ("spearman", "pearson", "mse"), ("loss",))
    examiner = Examiner(inputs, columns)
    first = tables.get("train") or next(iter(tables.values()))
    _refuse_classes(first, recipe.label_column)
    every = [*tables.values(), *(evaluation or {}).values()]
    scores = {id(table): scores_of(table, recipe.label_column, may_lack=table is not first) for table in every}
    scale = _scale([score for some in scores.values() for score in some if score is not None])

    def examine(table: Table) -> Rows:
        known = scores[id(table)]

        def read(number: int, texts: Sequence[str]) -> Examined:
            score = known[number]
            return Examined(text_digest(*texts), None, "no score" if score is None else None, (str(score),))

        return examiner.examine(table, read)

    def part(rows: Rows | None) -> SentencePart | None:
        if rows is None:
            return None
        values = np.array([scores[id(rows.table)][int(number)] for number in rows.numbers], dtype=np.float64)
        return SentencePart(rows, ((values - scale[0]) / (scale[1] - scale[0])).astype(np.float32))

    parts = divided(recipe, tables, evaluation, examine)
    train, holdout, judge = (part(rows) for rows in (parts.train, parts.holdout, parts.eval))
    return ScoredPairs(columns, inputs, train, holdout, judge, metric, examiner.warnings(parts), scale=scale)  # type: ignore[arg-type]


def _refuse_classes(table: Table, name: str | None) -> None:
    """Refuse a column of classes: their numbers say nothing of how close two texts are."""
    kind = table.rows.features.get(name)
    if isinstance(kind, datasets.ClassLabel) and len(kind.names) > 2:
        raise DataError(
            f"{name!r} has classes ({', '.join(kind.names[:5])}), and embedding learns scores: give rows of texts that belong "
            "together (anchor, positive, and negative where there is one), or a column of numbers"
        )


def _scale(scores: Sequence[float]) -> tuple[float, float]:
    """The scores that become 0 and 1. Scores within -1..1 stay; others reach from 0, or the lowest, to the highest."""
    low, high = min(scores, default=0.0), max(scores, default=1.0)
    if low >= -1 and high <= 1:
        return 0.0, 1.0
    return min(low, 0.0), high if high > min(low, 0.0) else high + 1
