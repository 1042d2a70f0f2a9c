"""How a checkpoint's images are prepared. The adapters make it of what their libraries' configs
say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import NoneType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import Compose, InterpolationMode, Normalize, PILToTensor

Pixels = Callable[[Image.Image], torch.Tensor]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the channels that a model takes

_SIMPLE = (str, int, float, list, tuple, dict)


@dataclass(frozen=True)
class Preprocessing:
    """A checkpoint's own: `evaluation` and `training` turn an image into a float tensor (channels,
    height, width).

    It is sent to the processes that load data, so it must be picklable (no lambda, no function
    within a function). `normalise` is the part after any cropping, `size` the training crop
    (height, width), `shown` what the report says. `input_name` is the argument of the model's
    `forward` that takes a batch of images.
    """

    channels: int
    evaluation: Pixels
    training: Pixels
    normalise: Pixels
    size: tuple[int, int]
    interpolation: InterpolationMode
    shown: dict[str, Any]
    input_name: str = "x"

    @cached_property
    def levels(self) -> Levels | None:
        """What each of a pixel's 256 levels becomes. None: `normalise` does more than to replace each level by a number."""
        return levels_of(self.normalise, self.channels)

    @property
    def is_one(self) -> bool:
        """Are images prepared for training, before any augmentation, as they are for evaluation?"""
        return self.evaluation is self.training or self.shown.get("evaluation", 0) == self.shown.get("training", 1)


@dataclass(frozen=True)
class Levels:
    """The number that each of the 256 levels of a channel is normalised to: float32, channels x 256, rising."""

    numbers: np.ndarray[Any, Any]

    def of(self, pixels: torch.Tensor) -> np.ndarray[Any, Any] | None:
        """The levels (uint8) that become exactly these pixels, channels x height x width. None: there are no such levels."""
        pairs = zip(self.numbers, pixels.numpy(), strict=True)
        levels = np.stack([np.searchsorted(numbers[1:], channel, side="right") for numbers, channel in pairs]).astype(np.uint8)
        is_exact = pixels.dtype == torch.float32 and torch.equal(self.pixels(levels), pixels)
        return levels if is_exact else None

    def pixels(self, levels: np.ndarray[Any, Any]) -> torch.Tensor:
        """The pixels that these levels become: float32, channels x height x width."""
        pairs = zip(self.numbers, levels, strict=True)
        return torch.from_numpy(np.stack([np.take(numbers, channel) for numbers, channel in pairs]))


def levels_of(normalise: Pixels, channels: int) -> Levels | None:
    """What `normalise` makes of each level, or None if that also depends on other pixels or on the place."""
    if channels not in MODES:
        return None
    # Each channel has an order of its own, so that one that takes another's place is noticed.
    levels = np.stack([np.roll(np.arange(256, dtype=np.uint8), 85 * channel).reshape(16, 16) for channel in range(channels)])
    seen = normalise(image_of(levels))
    if seen.shape != levels.shape or seen.dtype != torch.float32:
        return None
    numbers = np.empty((channels, 256), dtype=np.float32)
    np.put_along_axis(numbers, levels.reshape(channels, 256).astype(np.int64), seen.numpy().reshape(channels, 256), axis=1)
    found, other = Levels(numbers), np.roll(levels.transpose(0, 2, 1), 5, axis=1) // 2  # darker, and in another order
    rises = bool((np.diff(numbers) > 0).all())
    return found if rises and torch.equal(normalise(image_of(other)), found.pixels(other)) else None


def image_of(levels: np.ndarray[Any, Any]) -> Image.Image:
    """The image of these levels, uint8 of channels x height x width."""
    last = levels.transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(last[:, :, 0] if len(levels) == 1 else last))


def normalising(mean: Sequence[float], std: Sequence[float]) -> Pixels:
    """From a cropped image to normalised floats."""
    transform: Pixels = Compose([PILToTensor(), _as_fractions, Normalize(mean, std, inplace=True)])
    return transform


def _as_fractions(values: torch.Tensor) -> torch.Tensor:
    return values.float().div_(255)


def interpolation_mode(name: str) -> InterpolationMode:
    """torchvision's mode of this name; bicubic for a name that it does not know."""
    return InterpolationMode(name if name in {mode.value for mode in InterpolationMode} else "bicubic")


def json_values(value: Any) -> Any:
    """A config's values as JSON has them. NaN and infinity, which JSON has not, become words."""
    if isinstance(value, dict):
        return {str(name): json_values(inner) for name, inner in value.items() if isinstance(inner, _SIMPLE)}
    if isinstance(value, list | tuple):
        return [json_values(inner) for inner in value]
    finite = isinstance(value, float) and math.isfinite(value)
    return value if isinstance(value, str | int | NoneType) or finite else str(value)
