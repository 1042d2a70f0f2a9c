"""Images as transformers' image processors prepare them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dsd_refine.checkpoint.preprocessing import Pixels, Preprocessing, interpolation_mode, json_values, normalising
from dsd_refine.errors import CheckpointError

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear"}  # Pillow's numbers in a processor's config; others are bicubic
INPUT = "pixel_values"


def processor_preprocessing(folder: Path, config: Any, trust_remote_code: bool = False) -> Preprocessing:
    """What the checkpoint's image processor does. Of a model in two parts `config` is the whole's.

    Raises:
        CheckpointError: the folder has no usable processor config.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers raises whatever a strange config makes it raise
        raise CheckpointError(f"{folder}: its image processor cannot be loaded: {error!s:.200}") from None

    if hasattr(processor, "data_config"):
        return _wrapped_preprocessing(folder, processor)
    pixels = partial(_processed, processor)
    normalise = partial(_processed, processor, do_resize=False, do_center_crop=False)
    vision = getattr(config, "encoder", None) or getattr(config, "vision_config", config)
    channels = getattr(vision, "num_channels", 3)
    return Preprocessing(
        channels=channels,
        evaluation=pixels,
        training=pixels,
        normalise=normalise,
        size=_tried(folder, pixels, normalise, channels),
        interpolation=interpolation_mode(RESAMPLE.get(getattr(processor, "resample", 3), "bicubic")),
        shown=json_values(processor.to_dict()),
        input_name=INPUT,
    )


def _wrapped_preprocessing(folder: Path, processor: Any) -> Preprocessing:
    """What transformers' processor of a timm model does: timm's own transform, built from
    `pretrained_cfg`.

    Raises:
        CheckpointError: it cannot do it, or not to one size.
    """
    config = processor.data_config
    pixels = partial(_processed, processor)
    normalise = normalising(config["mean"], config["std"])
    channels = int(config["input_size"][0])
    return Preprocessing(
        channels=channels,
        evaluation=pixels,
        training=pixels,
        normalise=normalise,
        size=_tried(folder, pixels, normalise, channels),
        interpolation=interpolation_mode(config["interpolation"]),
        shown=json_values(config),
        input_name=INPUT,
    )


def _processed(processor: Any, image: Image.Image, **options: Any) -> torch.Tensor:
    pixels: torch.Tensor = processor(image, return_tensors="pt", **options)[INPUT][0]
    return pixels


def _tried(folder: Path, pixels: Pixels, normalise: Pixels, channels: Any) -> tuple[int, int]:
    """The (height, width) that every image comes out as, tried on two.

    Raises:
        CheckpointError: the processor cannot do it, or not to one size.
    """
    mode = "RGB" if channels == 3 else "L"
    try:
        tried = [pixels(Image.new(mode, size)) for size in ((64, 64), (40, 90))]
        normalise(Image.new(mode, (tried[0].shape[-1], tried[0].shape[-2])))
        shapes = {tuple(each.shape) for each in tried}
        if len(shapes) != 1 or tried[0].ndim != 3 or tried[0].shape[0] != channels or not tried[0].isfinite().all():
            raise ValueError(f"it makes {' and '.join(map(str, sorted(shapes)))} of two pictures, for {channels} channels")
    except Exception as error:  # transformers raises whatever a strange config makes it raise
        raise CheckpointError(f"{folder}: its image processor is not usable: {' '.join(str(error).split())[:200]}") from None
    return tried[0].shape[-2], tried[0].shape[-1]
