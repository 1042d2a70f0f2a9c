"""What is held of a table's pictures for the run: whole pictures, or pictures as the model sees them.

A whole picture is levels of height x width x channels, uint8. A prepared one is what `Preprocessing.evaluation` makes, as the
levels of channels x height x width, uint8, that become exactly its pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from dsd_refine.checkpoint.preprocessing import Preprocessing
from dsd_refine.data.reading import Table
from dsd_refine.recipe import Augment

Array = np.ndarray[Any, Any]


def choose_what_is_held(tables: Mapping[str, Table], preprocessing: Preprocessing, augment: Augment, judges: bool) -> None:
    """Hold prepared pictures where no random part is taken of them, else whole ones.

    What is chosen decides the time alone: a picture that is needed otherwise is decoded again.

    Args:
        tables: The tables by their role: train, validation, test.
        judges: Are these the evaluation data? Then they never train.
    """
    trains_alike = preprocessing.is_one and not augment.draws
    for role, table in tables.items():
        if table.decoded is not None:
            table.decoded.prepared = preprocessing.levels is not None and (judges or role != "train" or trains_alike)


def hold(table: Table, row: int, image: Image.Image, preprocessing: Preprocessing) -> None:
    """Hold a row's decoded picture, if the run holds pictures and there is room."""
    if table.decoded is None or not table.decoded.writes:
        return
    levels: Array | None = np.asarray(image)
    if table.decoded.prepared and preprocessing.levels is not None:
        levels = preprocessing.levels.of(preprocessing.evaluation(image))
    if levels is not None:
        height, width = levels.shape[-2:] if table.decoded.prepared else levels.shape[:2]
        table.decoded.put(row, levels.tobytes(), height, width)


def held_whole(table: Table, row: int, channels: int) -> Array | None:
    """The whole picture of a row, height x width x channels, if it is held."""
    held = table.decoded.get(row) if table.decoded is not None and not table.decoded.prepared else None
    return None if held is None else np.frombuffer(held[0], np.uint8).reshape(*held[1:], channels)


def held_pixels(table: Table, row: int, preprocessing: Preprocessing) -> torch.Tensor | None:
    """The picture of a row as the model sees it in evaluation, channels x height x width, if it is held."""
    if table.decoded is None or not table.decoded.prepared or preprocessing.levels is None:
        return None
    held = table.decoded.get(row)
    if held is None:
        return None
    return preprocessing.levels.pixels(np.frombuffer(held[0], np.uint8).reshape(-1, *held[1:]))
