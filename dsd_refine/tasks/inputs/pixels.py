"""Images as models take them: the checkpoint's own preprocessing, and the recipe's augmentation in training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, functional

from dsd_refine.checkpoint.preprocessing import Preprocessing, image_of
from dsd_refine.data.reading import Table
from dsd_refine.data.tables import raw_bytes
from dsd_refine.recipe import Augment
from dsd_refine.tasks.inputs.held_pictures import held_pixels, held_whole
from dsd_refine.tasks.inputs.images import decode

Array = np.ndarray[Any, Any]
Place = tuple[int, int, int, int]  # top, left, height and width of a part of an image

IN_TORCH = {InterpolationMode.BILINEAR: "bilinear", InterpolationMode.BICUBIC: "bicubic"}  # torch resizes bytes only by these


def pixels(table: Table, name: str, row: int, preprocessing: Preprocessing, augment: Augment, seed: int | None) -> torch.Tensor:
    """The image of a row as the model sees it: in training with what `seed` draws, or (None) as in evaluation.

    It is taken as it is held, or decoded again. Raises as `decode` does.
    """
    if seed is not None and augment.draws:
        return augmented(whole(table, name, row, preprocessing.channels), preprocessing, augment, seed)
    prepare = preprocessing.evaluation if seed is None or preprocessing.is_one else preprocessing.training
    held = held_pixels(table, row, preprocessing) if prepare is preprocessing.evaluation else None
    return prepare(image_of(whole(table, name, row, preprocessing.channels).transpose(2, 0, 1))) if held is None else held


def whole(table: Table, name: str, row: int, channels: int) -> Array:
    """The image of a row: uint8, height x width x channels. As it is held, or decoded again."""
    held = held_whole(table, row, channels)
    if held is not None:
        return held
    image = decode(raw_bytes(table, name, row), channels)
    return np.array(image).reshape(image.height, image.width, channels)


def augmented(levels: Array, preprocessing: Preprocessing, augment: Augment, seed: int) -> torch.Tensor:
    """An image (uint8, height x width x channels) with what `seed` draws, as the model sees it."""
    draw = torch.Generator().manual_seed(seed)  # a generator of its own: the model draws from torch's at the same time
    is_mirrored = bool(augment.flip and torch.rand(1, generator=draw) < augment.flip)
    if augment.crop == "none":
        image = image_of(levels.transpose(2, 0, 1))
        return preprocessing.training(functional.hflip(image) if is_mirrored else image)
    part = cropped(levels, crop_place(levels.shape[0], levels.shape[1], augment, draw), preprocessing)
    part = part[:, :, ::-1] if is_mirrored else part
    known = preprocessing.levels
    return preprocessing.normalise(image_of(part)) if known is None else known.pixels(part)


def cropped(levels: Array, place: Place, preprocessing: Preprocessing) -> Array:
    """A part of an image in the size that the model is trained on: uint8, channels x height x width.

    torch resizes bytes some three times as fast as Pillow, with the same filter; a level may differ by one.
    """
    top, left, height, width = place
    part = levels[top : top + height, left : left + width]
    mode = IN_TORCH.get(preprocessing.interpolation)
    if mode is None:
        image = functional.resize(image_of(part.transpose(2, 0, 1)), list(preprocessing.size), preprocessing.interpolation)
        return np.array(image).reshape(*preprocessing.size, -1).transpose(2, 0, 1)
    batch = torch.from_numpy(part).permute(2, 0, 1)[None]
    resized = F.interpolate(batch, preprocessing.size, mode=mode, antialias=True, align_corners=False)
    return resized[0].numpy()


def crop_place(height: int, width: int, augment: Augment, draw: torch.Generator) -> Place:
    """Top, left, height and width of a random-resized crop, as torchvision's RandomResizedCrop draws them.

    Its own function draws from torch's global generator, which belongs to the model's dropout.
    """
    (shallow, wide), area = torch.log(torch.tensor(augment.ratio)).tolist(), height * width
    for _ in range(10):
        wanted = area * torch.empty(1).uniform_(*augment.scale, generator=draw).item()
        ratio = torch.exp(torch.empty(1).uniform_(shallow, wide, generator=draw)).item()
        w, h = round(math.sqrt(wanted * ratio)), round(math.sqrt(wanted / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(0, height - h + 1, (1,), generator=draw).item()
            left = torch.randint(0, width - w + 1, (1,), generator=draw).item()
            return int(top), int(left), h, w
    own = width / height  # no such crop fits: the largest one in the middle whose ratio is allowed
    w, h = width, height
    if own < min(augment.ratio):
        h = round(w / min(augment.ratio))
    elif own > max(augment.ratio):
        w = round(h * max(augment.ratio))
    return (height - h) // 2, (width - w) // 2, h, w
