"""Rows of images for every head on images: how they become a model's inputs, and which can be used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch

from dsd_refine.checkpoint.preprocessing import Preprocessing
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined
from dsd_refine.data.tables import in_threads, undecoded
from dsd_refine.errors import DataError
from dsd_refine.recipe import Augment
from dsd_refine.tasks.base import Item, Tables
from dsd_refine.tasks.inputs.held_pictures import choose_what_is_held
from dsd_refine.tasks.inputs.images import Seen, examine_picture, look_warnings
from dsd_refine.tasks.inputs.pixels import pixels


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
        return {self.preprocessing.input_name: stacked([self._pixels(part, unit, seed) for unit, seed in items])}

    def _pixels(self, part: Any, unit: int, seed: int | None) -> torch.Tensor:
        table, row = part.rows.table, int(part.rows.numbers[unit])
        try:
            return pixels(table, self.image_column, row, self.preprocessing, self.augment, seed)
        except DataError as error:  # it was readable when the run began
            raise DataError(f"{part.rows.name(unit)}: {error}") from None


def stacked(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Images of one size as a batch.

    torch's own `stack` would use several threads, which belong to the model while a thread makes the next batch.
    """
    return torch.from_numpy(np.stack([image.numpy() for image in images]))


class ImageExaminer:
    """Looks through rows of images before they are used: which can be used, and what to warn of."""

    def __init__(self, image: str, preprocessing: Preprocessing) -> None:
        """`image` is the column, `preprocessing` the model's."""
        self.image, self.preprocessing = image, preprocessing
        self.looked_at: list[tuple[str | int, Seen]] = []

    def examine(self, table: Table, labels: Sequence[str | None]) -> list[Examined]:
        """What each row of a table is."""
        examined = in_threads(lambda row: self._row(table, row, labels[row]), len(labels))
        self.looked_at += [(table.name(row), seen) for row, (used, seen) in enumerate(examined) if used.reason is None]
        return [used for used, _ in examined]

    def _row(self, table: Table, row: int, label: str | None) -> tuple[Examined, Seen]:
        if label is None:
            return Examined(b"", None, "no label"), Seen()
        digest, seen, reason = examine_picture(table, self.image, row, self.preprocessing)
        return Examined(digest, label, reason), seen

    def warnings(self) -> list[str]:
        """What is to be said of the images."""
        return look_warnings(self.looked_at)


def with_files(
    tables: Tables, evaluation: Tables | None, image: str, preprocessing: Preprocessing, augment: Augment
) -> tuple[Tables, Tables | None]:
    """Both with the images as files, not decoded. Also decides what is held of them."""
    both = []
    for given in (tables, evaluation):
        if given is not None:
            choose_what_is_held(given, preprocessing, augment, judges=given is evaluation)
            given = {name: undecoded(table, image, datasets.Image) for name, table in given.items()}
        both.append(given)
    return both[0] or {}, both[1]
