"""Image classification: images of any mode, prepared by the checkpoint's own preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import datasets
import torch

from dsd_refine.checkpoint.library import Library
from dsd_refine.checkpoint.preprocessing import Preprocessing
from dsd_refine.data.columns import IMAGE, LABEL, column
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined
from dsd_refine.data.tables import in_threads, undecoded
from dsd_refine.errors import DataError
from dsd_refine.recipe import Augment, Recipe
from dsd_refine.tasks.base import Batch, Item, Tables
from dsd_refine.tasks.classification import Classification, LabelledPart, labelled_parts, overlap_warning, skip_warnings
from dsd_refine.tasks.inputs.images import Seen, examine_picture, look_warnings, picture, pixels


class ImageClassification(Classification):
    """`image-classification` for models of all three libraries."""

    name = "image-classification"
    draws: ClassVar[bool] = True
    preprocessing: Preprocessing
    augment: Augment
    image_column: str

    def report(self) -> Mapping[str, Any]:
        """As in `Classification`, and the preprocessing of the images."""
        return {**super().report(), "preprocessing": self.preprocessing.shown}

    def batch(self, part: LabelledPart, items: Sequence[Item]) -> Batch:
        """Decode the images, prepare them as the checkpoint does, and augment those with a seed.

        The input has the shape images x C x H x W. The targets are int64 class ids, one per image.
        """
        pixels = torch.stack([self._pixels(part, unit, seed) for unit, seed in items])
        targets = torch.as_tensor(part.ids[[unit for unit, _ in items]])
        return Batch({self.preprocessing.input_name: pixels}, targets, len(items))

    def _pixels(self, part: LabelledPart, unit: int, seed: int | None) -> torch.Tensor:
        table, row = part.rows.table, int(part.rows.numbers[unit])
        try:
            image = picture(table, self.image_column, row, self.preprocessing.channels)
            return pixels(image, self.preprocessing, self.augment, seed)
        except DataError as error:  # it was readable when the run began
            raise DataError(f"{part.rows.name(unit)}: {error}") from None


def open_task(
    recipe: Recipe, library: Library, model: torch.nn.Module, tables: Tables, evaluation: Tables | None
) -> ImageClassification:
    """The task on these data, with the checkpoint's own preprocessing and class names."""
    names, classes = library.label_names()
    return prepare_images(recipe, tables, evaluation, library.preprocessing(model), names, classes)


def prepare_images(
    recipe: Recipe,
    tables: Tables,
    evaluation: Tables | None,
    preprocessing: Preprocessing,
    aliases: Sequence[Sequence[str]] | None,
    classes: int,
) -> ImageClassification:
    """Examine every image once, match labels, divide.

    Raises:
        DataError: no image or label column, no usable rows, labels that do not match.
    """
    first = next(iter(tables.values()))
    image = column(first, recipe.image_column, IMAGE)
    tables = {name: undecoded(table, image, datasets.Image) for name, table in tables.items()}
    evaluation = {name: undecoded(t, image, datasets.Image) for name, t in evaluation.items()} if evaluation else None

    def label(table: Table) -> str:
        return column(table, recipe.label_column, LABEL)

    looked_at: list[tuple[str | int, Seen]] = []

    def examine(table: Table, labels: list[str | None]) -> list[Examined]:
        def examine_row(row: int) -> tuple[Examined, Seen]:
            return _examine(table, image, row, labels[row], preprocessing.channels)

        examined = in_threads(examine_row, len(labels))
        looked_at.extend((table.name(row), seen) for row, (used, seen) in enumerate(examined) if used.reason is None)
        return [used for used, _ in examined]

    matched, parts, divided = labelled_parts(
        tables, evaluation, label, examine, aliases, classes, recipe.holdout, recipe.label_map
    )
    train, holdout, judge = parts
    said = overlap_warning(divided) + skip_warnings(divided) + look_warnings(looked_at)
    task = ImageClassification(matched, train, holdout, judge, said)  # type: ignore[arg-type]
    task.decide_by(recipe.metric)
    task.preprocessing, task.augment, task.image_column = preprocessing, recipe.augment, image
    return task


def _examine(table: Table, name: str, row: int, label: str | None, channels: int) -> tuple[Examined, Seen]:
    if label is None:
        return Examined(b"", None, "no label"), Seen()
    digest, seen, reason = examine_picture(table, name, row, channels)
    return Examined(digest, label, reason), seen
