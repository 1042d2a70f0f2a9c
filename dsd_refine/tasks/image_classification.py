"""Image classification: pictures of any mode, through the checkpoint's own preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch

from dsd_refine.data.columns import IMAGE, LABEL, column
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined
from dsd_refine.data.tables import in_threads, raw_bytes, undecoded
from dsd_refine.errors import DataError
from dsd_refine.recipe import Augment, Recipe
from dsd_refine.tasks.base import Batch, Item
from dsd_refine.tasks.classification import Classification, LabelledPart, labelled_parts, overlap_warning, skip_warnings
from dsd_refine.tasks.inputs.images import Preprocessing, Seen, examine_picture, look_warnings, pixels


class ImageClassification(Classification):
    """`image-classification` for models of all three libraries."""

    name = "image-classification"
    preprocessing: Preprocessing
    augment: Augment
    image_column: str

    def report(self) -> Mapping[str, Any]:
        return {**super().report(), "preprocessing": self.preprocessing.shown}

    def batch(self, part: LabelledPart, items: Sequence[Item]) -> Batch:
        pixels = torch.stack([self._pixels(part, unit, seed) for unit, seed in items])
        targets = torch.as_tensor(part.ids[[unit for unit, _ in items]])
        return Batch({self.input_name: pixels}, targets, len(items))

    input_name = "x"

    def _pixels(self, part: LabelledPart, unit: int, seed: int | None) -> torch.Tensor:
        raw = raw_bytes(part.rows.table, self.image_column, int(part.rows.numbers[unit]))
        try:
            return pixels(raw, self.preprocessing, self.augment, seed)
        except DataError as error:  # it was readable when the run began
            raise DataError(f"{part.rows.name(unit)}: {error}") from None


def prepare_images(
    recipe: Recipe,
    tables: dict[str, Table],
    evaluation: dict[str, Table] | None,
    preprocessing: Preprocessing,
    aliases: Sequence[Sequence[str]] | None,
    classes: int,
    input_name: str,
) -> ImageClassification:
    """Examine every picture once, match labels, divide.

    Raises:
        DataError: no image or label column, no usable rows, labels that do not match.
    """
    first = next(iter(tables.values()))
    image = column(first, recipe.image_column, IMAGE)
    tables = {name: undecoded(table, image, datasets.Image) for name, table in tables.items()}
    evaluation = {name: undecoded(t, image, datasets.Image) for name, t in evaluation.items()} if evaluation else None

    def label(table: Table) -> str:
        return column(table, recipe.label_column, LABEL)

    looked: list[tuple[str | int, Seen]] = []

    def examine(table: Table, labels: list[str | None]) -> list[Examined]:
        def one(row: int) -> tuple[Examined, Seen]:
            return _examine(table, image, row, labels[row], preprocessing.channels)

        found = in_threads(one, len(labels))
        looked.extend((table.name(row), seen) for row, (used, seen) in enumerate(found) if used.reason is None)
        return [used for used, _ in found]

    matched, parts, divided = labelled_parts(
        tables, evaluation, label, examine, aliases, classes, recipe.holdout, recipe.label_map
    )
    train, holdout, judge = parts
    said = overlap_warning(divided) + skip_warnings(divided) + look_warnings(looked)
    task = ImageClassification(matched, train, holdout, judge, said)  # type: ignore[arg-type]
    task.preprocessing, task.augment, task.image_column, task.input_name = preprocessing, recipe.augment, image, input_name
    return task


def _examine(table: Table, name: str, row: int, label: str | None, channels: int) -> tuple[Examined, Seen]:
    if label is None:
        return Examined(b"", None, "no label"), Seen()
    digest, seen, reason = examine_picture(table, name, row, channels)
    return Examined(digest, label, reason), seen
