"""Rows of images for every head on images: how they become a model's inputs, and which can be used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch

from dsd_refine.checkpoint.preprocessing import Preprocessing
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined
from dsd_refine.data.tables import in_threads, undecoded
from dsd_refine.errors import DataError
from dsd_refine.recipe import Augment
from dsd_refine.tasks.base import Item, Tables
from dsd_refine.tasks.inputs.images import Seen, examine_picture, look_warnings, picture, pixels


class ImageRows:
    """The inputs of a task on images."""

    preprocessing: Preprocessing
    augment: Augment
    image_column: str

    def reads(self, image_column: str, preprocessing: Preprocessing, augment: Augment) -> None:
        """Set the column, the preprocessing and the augmentation."""
        self.image_column, self.preprocessing, self.augment = image_column, preprocessing, augment

    def inputs(self, part: Any, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """Decode the images, prepare them as the checkpoint does, and augment those with a seed: images x C x H x W."""
        return {self.preprocessing.input_name: torch.stack([self._pixels(part, unit, seed) for unit, seed in items])}

    def _pixels(self, part: Any, unit: int, seed: int | None) -> torch.Tensor:
        table, row = part.rows.table, int(part.rows.numbers[unit])
        try:
            image = picture(table, self.image_column, row, self.preprocessing.channels)
            return pixels(image, self.preprocessing, self.augment, seed)
        except DataError as error:  # it was readable when the run began
            raise DataError(f"{part.rows.name(unit)}: {error}") from None


class ImageExaminer:
    """Looks through rows of images before they are used: which can be used, and what to warn of."""

    def __init__(self, image: str, channels: int) -> None:
        """`image` is the column, `channels` those that the model takes."""
        self.image, self.channels = image, channels
        self.looked_at: list[tuple[str | int, Seen]] = []

    def examine(self, table: Table, labels: Sequence[str | None]) -> list[Examined]:
        """What each row of a table is."""
        examined = in_threads(lambda row: self._row(table, row, labels[row]), len(labels))
        self.looked_at += [(table.name(row), seen) for row, (used, seen) in enumerate(examined) if used.reason is None]
        return [used for used, _ in examined]

    def _row(self, table: Table, row: int, label: str | None) -> tuple[Examined, Seen]:
        if label is None:
            return Examined(b"", None, "no label"), Seen()
        digest, seen, reason = examine_picture(table, self.image, row, self.channels)
        return Examined(digest, label, reason), seen

    def warnings(self) -> list[str]:
        """What is to be said of the images."""
        return look_warnings(self.looked_at)


def with_files(tables: Tables, image: str) -> Tables:
    """The tables with the images as files, not decoded."""
    return {name: undecoded(table, image, datasets.Image) for name, table in tables.items()}
