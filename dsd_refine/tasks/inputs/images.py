"""Pictures of any file, decoded safely, and what is odd about them."""

from __future__ import annotations

import hashlib
import io
import threading
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import datasets
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dsd_refine.checkpoint.preprocessing import MODES, Preprocessing
from dsd_refine.data.reading import Table
from dsd_refine.data.tables import in_words, raw_bytes, undecoded
from dsd_refine.errors import DataError
from dsd_refine.tasks.inputs.held_pictures import hold

# the formats that are opened, whatever a file's name says: others run programs (PostScript) or are
# documents
Image.init()

_SAFE = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
FORMATS: list[str] = [name for name in _SAFE if name in Image.OPEN]

PIXELS, ELONGATED = 100_000_000, 200  # limits: pixels of a picture, and its long side over its short side

ORIENTATION, TURNED = 0x0112, range(2, 9)  # EXIF's tag, and its values for a picture that is stored turned or mirrored

BITS_PER_SAMPLE = 258  # TIFF's tag
LARGE = 16_000_000  # pixels from which pictures are decoded one at a time

_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Seen:
    """What is odd about a file's picture: EXIF says that it is stored turned; the largest value,
    where it has 16 bits.
    """

    turned: bool = False
    peak: int | None = None


def decode(raw: bytes, channels: int) -> Image.Image:
    """A picture upright, in the mode that a model of this many channels takes.

    16-bit greys are scaled to 8 bits, not clipped; palettes, alpha, CMYK and greys are converted.

    Raises:
        DataError: not a picture, cut short, too large, or of a mode that has no one meaning.
    """
    return look(raw, channels)[0]


def look(raw: bytes, channels: int) -> tuple[Image.Image, Seen]:
    """The result of `decode`, and what is odd about the file. Raises as `decode` does."""
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
    """The largest value of a picture of 16 bits, None of another. Of colours Pillow keeps the upper
    8 bits alone.
    """
    if image.mode.startswith("I"):
        return int(np.asarray(image).max())
    tagged = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE)
    bits = raw[24] if raw.startswith(b"\x89PNG") else tagged[0] if isinstance(tagged, tuple) and tagged else 8
    if bits != 16:
        return None
    colours = image.convert("RGB") if image.mode.endswith("A") else image
    return 256 * int(np.asarray(colours).max()) + 255


def look_warnings(seen: Sequence[tuple[str | int, Seen]]) -> list[str]:
    """One line each for pictures that are turned upright and for those of 16 bits that come out
    nearly black.

    `seen` has a pair of name (or row) and what is odd for each picture that is used.
    """
    lines, turned = [], [name for name, picture in seen if picture.turned]
    if turned:
        lines.append(
            f"{len(turned)} of {len(seen)} pictures (the first: {turned[0]}) are turned upright, as their EXIF data say; "
            "timm and torchvision leave them as they are stored: an accuracy that these measured may differ by them"
        )
    wide = [(name, picture.peak) for name, picture in seen if picture.peak is not None]
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
    """A picture is decoded whole, and resized by its shorter side: a long one grows with the
    square.
    """
    if width * height > PIXELS:
        raise DataError(f"picture of {width} x {height} pixels: too large to decode safely")
    if max(width, height) > ELONGATED * min(width, height):
        raise DataError(f"picture of {width} x {height} pixels: too elongated to resize safely")


def _converted(image: Image.Image, channels: int) -> Image.Image:
    wanted = MODES.get(channels)
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


def is_picture(table: Table, names: Sequence[str], row: int) -> bool:
    """Can a row's picture be read, by a model of whatever channels?"""
    (image,) = names
    try:
        decode(raw_bytes(undecoded(table, image, datasets.Image), image, row), channels=3)
    except (OSError, DataError, TypeError):
        return False
    return True


def examine_picture(table: Table, name: str, row: int, preprocessing: Preprocessing) -> tuple[bytes, Seen, str | None]:
    """The digest of a row's picture, what is odd about it, and why it cannot be used (None: it can).

    A picture that can be used is held for the run, if there is room.
    """
    try:
        raw = raw_bytes(table, name, row)
        image, seen = look(raw, preprocessing.channels)
        hold(table, row, image, preprocessing)
    except OSError as error:
        return b"", Seen(), f"unreadable file ({error.strerror or error})"
    except (DataError, TypeError) as error:
        return b"", Seen(), str(error) if isinstance(error, DataError) else "no picture"
    return hashlib.sha256(raw).digest(), seen, None
