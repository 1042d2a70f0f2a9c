"""How a checkpoint's images are prepared. The adapters make it of what their libraries' configs
say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import Compose, InterpolationMode, Normalize, PILToTensor

Pixels = Callable[[Image.Image], torch.Tensor]

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
