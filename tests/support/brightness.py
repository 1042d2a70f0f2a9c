"""A toy task, to show how little a task needs: the model's first output is to be the mean of the
image's pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import torch

from dsd_refine.checkpoint.library import Library
from dsd_refine.checkpoint.preprocessing import Preprocessing
from dsd_refine.data.columns import IMAGE, column
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined, Rows, divide, use_rows
from dsd_refine.data.tables import raw_bytes, undecoded
from dsd_refine.forward import logits_of
from dsd_refine.recipe import Augment, Recipe
from dsd_refine.tasks.base import Batch, ChanceBaseline, Forward, Item, Score, Scores, Tables, ratio
from dsd_refine.tasks.inputs.pixels import pixels


@dataclass(frozen=True)
class ImagePart:
    """One image a row."""

    rows: Rows

    @property
    def units(self) -> int:
        return len(self.rows)

    def row_of(self, unit: int) -> int:
        return unit


@dataclass
class Brightness:
    """`brightness`: a real target is an image; loss and metric are the mean squared error."""

    train: ImagePart
    holdout: ImagePart | None
    eval: ImagePart
    preprocessing: Preprocessing
    image_column: str
    name: str = "brightness"
    metric: str = "loss"
    higher_is_better: bool = False
    draws: ClassVar[bool] = True
    chance_baselines: tuple[ChanceBaseline, ...] = ()

    def batch(self, part: ImagePart, items: Sequence[Item]) -> Batch:
        rows = [(int(part.rows.numbers[unit]), seed) for unit, seed in items]
        given = part.rows.table, self.image_column
        images = torch.stack([pixels(*given, row, self.preprocessing, Augment(), seed) for row, seed in rows])
        return Batch({self.preprocessing.input_name: images}, images.mean((1, 2, 3)), len(items))

    def logits(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Rows x outputs."""
        return logits_of(forward, batch.inputs)

    def _errors(self, forward: Forward, batch: Batch) -> torch.Tensor:
        return (self.logits(forward, batch)[:, 0] - batch.targets) ** 2

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        return self._errors(forward, batch).sum()

    def score(self, forward: Forward, batch: Batch) -> list[Score]:
        return [Score(error, 1, error) for error in self._errors(forward, batch).tolist()]

    def metrics(self, scores: Scores) -> dict[str, float]:
        return {"loss": ratio(scores.score, scores.count)}

    def target(self, part: ImagePart, row: int) -> str | None:
        return None

    def shown(self, prediction: int) -> str | None:
        return None

    def report(self) -> Mapping[str, Any]:
        return {"labels": None, "preprocessing": self.preprocessing.shown, "warnings": []}


def open_task(
    recipe: Recipe, library: Library, model: torch.nn.Module, tables: Tables, evaluation: Tables | None
) -> Brightness:
    """Every row of the image column is used; a real task would examine each one, and skip what it
    cannot read.
    """
    name = column(next(iter(tables.values())), recipe.image_column, IMAGE)

    def rows_of(table: Table) -> Rows:
        table = undecoded(table, name, datasets.Image)
        digests = [hashlib.sha256(raw_bytes(table, name, row)).digest() for row in range(len(table.rows))]
        return use_rows(table, [Examined(digest) for digest in digests])

    used = {split: rows_of(table) for split, table in tables.items()}
    judged = {split: rows_of(table) for split, table in evaluation.items()} if evaluation else None
    parts = divide(used, judged, recipe.holdout)
    train, holdout, judge = (ImagePart(rows) if rows else None for rows in (parts.train, parts.holdout, parts.eval))
    return Brightness(train, holdout, judge, library.preprocessing(model), name)  # type: ignore[arg-type]
