"""Images as models take them: decoding, and the checkpoint's own preprocessing."""

from __future__ import annotations

import hashlib
import io
import math
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms import Compose, InterpolationMode, Normalize, PILToTensor, RandomResizedCrop, functional

from dsd_refine.data.reading import Table
from dsd_refine.data.tables import in_words, raw_bytes, undecoded
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.recipe import Augment
from dsd_refine.seeding import seed_all

Pixels = Callable[[Image.Image], torch.Tensor]

# what is opened at all: others bring programs along (PostScript) or documents, whatever the file's name says
Image.init()

_SAFE = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
FORMATS: list[str] = [name for name in _SAFE if name in Image.OPEN]

PIXELS, ELONGATED = 100_000_000, 200  # the most that is decoded; long side over short side

ORIENTATION, TURNED = 0x0112, range(2, 9)  # EXIF's tag, and its values for a picture that is stored turned or mirrored

BITS_PER_SAMPLE = 258  # TIFF's tag
LARGE = 16_000_000  # pixels from which pictures are decoded one at a time

_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Preprocessing:
    """A checkpoint's own: `evaluation` and `training` turn a picture into a float tensor (channels, height, width).

    It goes to the processes that load data: what is in it can be pickled (no lambda, no function within a function).
    `normalise` is the part after any cropping, `size` the training crop (height, width), `shown` what the report says.
    """

    channels: int
    evaluation: Pixels
    training: Pixels
    normalise: Pixels
    size: tuple[int, int]
    interpolation: InterpolationMode
    shown: dict[str, Any]


def timm_preprocessing(model: torch.nn.Module) -> Preprocessing:
    """What `pretrained_cfg` says: the test size for evaluation, the input size for training.

    Raises:
        CheckpointError: nothing that can be done to a picture.
    """
    _refuse_other_channels(model)
    try:
        found = _timm_preprocessing(model)
        for transform in (found.evaluation, found.training):
            transform(Image.new("RGB" if found.channels == 3 else "L", (40, 64)))
    except Exception as error:  # timm and torchvision raise whatever a strange config makes them raise
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the preprocessing of config.json (pretrained_cfg) is not usable: {text}") from None
    return found


def _refuse_other_channels(model: torch.nn.Module) -> None:
    """A mean (or deviation) for each channel, or one for all, as the library's own transform takes them."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    for size in ("input_size", "test_input_size"):
        channels = (cfg.get(size) or (3,))[0]
        for name in ("mean", "std"):
            values = cfg.get(name)
            if isinstance(values, list | tuple) and len(values) not in (1, channels):
                raise CheckpointError(
                    f"config.json: pretrained_cfg has {len(values)} values of `{name}`, and `{size}` says {channels} channels "
                    f"(in_chans): give `{name}` one value for each channel, as it was trained with"
                )


def _timm_preprocessing(model: torch.nn.Module) -> Preprocessing:
    from timm.data import create_transform, resolve_data_config

    test = resolve_data_config({}, model=model, use_test_size=True)
    train = resolve_data_config({}, model=model, use_test_size=False)
    return Preprocessing(
        channels=test["input_size"][0],
        evaluation=create_transform(**test, is_training=False),
        training=create_transform(**train, is_training=False),
        normalise=_normalising(test["mean"], test["std"]),
        size=tuple(train["input_size"][1:]),
        interpolation=_interpolation(train["interpolation"]),
        shown={"evaluation": _plain(test), "training": _plain(train)},
    )


def _normalising(mean: Sequence[float], std: Sequence[float]) -> Pixels:
    """From a cropped picture to floats, in place."""
    found: Pixels = Compose([PILToTensor(), _as_fractions, Normalize(mean, std, inplace=True)])
    return found


def _as_fractions(values: torch.Tensor) -> torch.Tensor:
    return values.float().div_(255)


def torchvision_preprocessing(config: dict[str, Any]) -> Preprocessing:
    """torchvision's own transform of its released weights, with the sizes and statistics of a torchvision config.

    Raises:
        CheckpointError: an unknown interpolation, or values that are no sizes.
    """
    from torchvision.transforms._presets import ImageClassification as Preset

    try:
        mode = InterpolationMode(config["interpolation"])
        transform = Preset(**{**config, "interpolation": mode})
        size = int(config["crop_size"])
        transform(Image.new("RGB", (8, 8)))
    except (TypeError, ValueError, RuntimeError) as error:  # torch raises the last one for two means of three channels
        raise CheckpointError(f"the preprocessing of config.json is not usable: {error}") from None
    return Preprocessing(
        channels=3,
        evaluation=transform,
        training=transform,
        normalise=_normalising(config["mean"], config["std"]),
        size=(size, size),
        interpolation=mode,
        shown=_plain(config),
    )


def transformers_preprocessing(folder: Path, config: Any, trust_remote_code: bool = False) -> Preprocessing:
    """What the checkpoint's image processor says.

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
    channels = getattr(config, "num_channels", 3)
    size = _tried(folder, pixels, normalise, channels)
    return Preprocessing(
        channels=channels,
        evaluation=pixels,
        training=pixels,
        normalise=normalise,
        size=size,
        interpolation=_interpolation(
            {0: "nearest", 1: "lanczos", 2: "bilinear"}.get(getattr(processor, "resample", 3), "bicubic")
        ),
        shown=_plain(processor.to_dict()),
    )


def _wrapped_preprocessing(folder: Path, processor: Any) -> Preprocessing:
    """What transformers' processor of a timm model does: timm's own transform, built from `pretrained_cfg`.

    Raises:
        CheckpointError: it cannot do it, or not to one size.
    """
    config = processor.data_config
    pixels = partial(_processed, processor)
    normalise = _normalising(config["mean"], config["std"])
    channels = int(config["input_size"][0])
    return Preprocessing(
        channels=channels,
        evaluation=pixels,
        training=pixels,
        normalise=normalise,
        size=_tried(folder, pixels, normalise, channels),
        interpolation=_interpolation(config["interpolation"]),
        shown=_plain(config),
    )


def _processed(processor: Any, image: Image.Image, **options: Any) -> torch.Tensor:
    found: torch.Tensor = processor(image, return_tensors="pt", **options)["pixel_values"][0]
    return found


def _tried(folder: Path, pixels: Pixels, normalise: Pixels, channels: Any) -> tuple[int, int]:
    """The (height, width) that every picture comes out as, tried on two.

    Raises:
        CheckpointError: the processor cannot do it, or not to one size.
    """
    mode = "RGB" if channels == 3 else "L"
    try:
        found = [pixels(Image.new(mode, size)) for size in ((64, 64), (40, 90))]
        normalise(Image.new(mode, (found[0].shape[-1], found[0].shape[-2])))
        shapes = {tuple(each.shape) for each in found}
        if len(shapes) != 1 or found[0].ndim != 3 or found[0].shape[0] != channels or not found[0].isfinite().all():
            raise ValueError(f"it makes {' and '.join(map(str, sorted(shapes)))} of two pictures, for {channels} channels")
    except Exception as error:  # transformers raises whatever a strange config makes it raise
        raise CheckpointError(f"{folder}: its image processor is not usable: {' '.join(str(error).split())[:200]}") from None
    return found[0].shape[-2], found[0].shape[-1]


def _interpolation(name: str) -> InterpolationMode:
    return InterpolationMode(name if name in {mode.value for mode in InterpolationMode} else "bicubic")


def _plain(value: Any) -> Any:
    """A config's values as JSON has them. NaN and infinity, which it has not, are words."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items() if isinstance(one, _PLAIN)}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return (
        value if isinstance(value, str | int | NoneType) or (isinstance(value, float) and math.isfinite(value)) else str(value)
    )


_PLAIN = (str, int, float, list, tuple, dict)


@dataclass(frozen=True)
class Seen:
    """What a file's picture is, where it is not what it seems: turned by its EXIF, the largest of its 16-bit values."""

    turned: bool = False
    peak: int | None = None


def decode(raw: bytes, channels: int) -> Image.Image:
    """A picture in the mode that a model of this many channels sees, upright.

    16-bit greys are scaled to 8 bits, not clipped; palettes, alpha, CMYK and greys are converted.

    Raises:
        DataError: not a picture, cut short, too large, or of a mode that has no one meaning.
    """
    return look(raw, channels)[0]


def look(raw: bytes, channels: int) -> tuple[Image.Image, Seen]:
    """What `decode` gives and raises, and what is odd about the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(raw), formats=FORMATS)
            _refuse_bomb(*image.size)
            with _one_at_a_time if image.width * image.height > LARGE else nullcontext():
                image.load()
                seen = Seen(image.getexif().get(ORIENTATION) in TURNED, _peak(image, raw))
                image = ImageOps.exif_transpose(image)
                return _converted(image, channels), seen
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"unreadable picture ({_what_else(raw)})") from None
    except Image.DecompressionBombError:
        raise DataError("picture too large to decode safely") from None
    except MemoryError:
        raise DataError("picture too large for the memory that there is") from None
    except Exception as error:  # decoders raise whatever a broken file makes them raise
        raise DataError(f"unreadable picture ({in_words(error)[:80]})") from None


def _what_else(raw: bytes) -> str:
    if raw.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS in place of the file: `git lfs pull` fetches it"
    return "not one of the known formats" if raw else "the file is empty"


def _peak(image: Image.Image, raw: bytes) -> int | None:
    """The largest value of a picture of 16 bits, None of another. Of colours Pillow keeps the upper 8 bits alone."""
    if image.mode.startswith("I"):
        return int(np.asarray(image).max())
    tagged = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE)
    bits = raw[24] if raw.startswith(b"\x89PNG") else tagged[0] if isinstance(tagged, tuple) and tagged else 8
    if bits != 16:
        return None
    colours = image.convert("RGB") if image.mode.endswith("A") else image
    return 256 * int(np.asarray(colours).max()) + 255


def look_warnings(seen: Sequence[tuple[str | int, Seen]]) -> list[str]:
    """One line each for pictures that are turned upright and for those of 16 bits that come out nearly black.

    `seen` has a pair of name (or row) and what is odd for each picture that is used.
    """
    lines, turned = [], [name for name, one in seen if one.turned]
    if turned:
        lines.append(
            f"{len(turned)} of {len(seen)} pictures (the first: {turned[0]}) are turned upright, as their EXIF data say; "
            "timm and torchvision leave them as they are stored: an accuracy that these measured may differ by them"
        )
    wide = [(name, one.peak) for name, one in seen if one.peak is not None]
    most = max((peak for _, peak in wide), default=0)
    dark = wide if most < 2**14 else [(name, peak) for name, peak in wide if peak < 2**12]
    if dark:
        top = max(peak for _, peak in dark)
        bits = next(bits for bits in (8, 10, 12, 14) if top < 2**bits)
        lines.append(
            f"{len(dark)} of {len(wide)} pictures of 16 bits (the first: {dark[0][0]}) hold no value above {top}: scaled from "
            f"0…65535 they are nearly black, at most {top // 257} of 255. If their full range is {2**bits - 1}, "
            f"multiply their values by {2 ** (16 - bits)} and write them anew"
        )
    return lines


def _refuse_bomb(width: int, height: int) -> None:
    """A picture is decoded whole, and resized by its shorter side: a long one grows with the square."""
    if width * height > PIXELS:
        raise DataError(f"picture of {width} x {height} pixels: too large to decode safely")
    if max(width, height) > ELONGATED * min(width, height):
        raise DataError(f"picture of {width} x {height} pixels: too elongated to resize safely")


def _converted(image: Image.Image, channels: int) -> Image.Image:
    wanted = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
    if wanted is None:
        raise DataError(f"the model sees {channels} channels, which pictures do not have")
    if image.mode == "F":
        raise DataError("picture of floating-point pixels: their range is not known")
    if image.mode.startswith("I"):
        wide = np.asarray(image, dtype=np.float32)  # exact for 16 bits
        if wide.min() < 0 or wide.max() > 65535:
            raise DataError("picture of more than 16 bits: its range is not known")
        image = Image.fromarray(np.rint(wide / 257).astype(np.uint8), mode="L") if wide.ndim == 2 else image
    return image if image.mode == wanted else image.convert(wanted)


def pixels(raw: bytes, preprocessing: Preprocessing, augment: Augment, seed: int | None) -> torch.Tensor:
    """A picture as the model sees it: augmented by what `seed` draws, or (None) as in evaluation."""
    image = decode(raw, preprocessing.channels)
    if seed is None:
        return preprocessing.evaluation(image)
    seed_all(seed)
    if augment.flip and torch.rand(1) < augment.flip:
        image = functional.hflip(image)
    if augment.crop == "none":
        return preprocessing.training(image)
    place = RandomResizedCrop.get_params(image, augment.scale, augment.ratio)
    return preprocessing.normalise(functional.resized_crop(image, *place, preprocessing.size, preprocessing.interpolation))


def is_picture(table: Table, names: Sequence[str], row: int) -> bool:
    """Can a row's picture be read, by a model of whatever channels?"""
    (image,) = names
    try:
        decode(raw_bytes(undecoded(table, image, datasets.Image), image, row), channels=3)
    except (OSError, DataError, TypeError):
        return False
    return True


def examine_picture(table: Table, name: str, row: int, channels: int) -> tuple[bytes, Seen, str | None]:
    """The digest of a row's picture, what is odd about it, and why it cannot be used (None: it can)."""
    try:
        raw = raw_bytes(table, name, row)
        seen = look(raw, channels)[1]
    except OSError as error:
        return b"", Seen(), f"unreadable file ({error.strerror or error})"
    except (DataError, TypeError) as error:
        return b"", Seen(), str(error) if isinstance(error, DataError) else "no picture"
    return hashlib.sha256(raw).digest(), seen, None
