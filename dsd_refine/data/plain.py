"""Turn a text file into plain UTF-8: unpack it, convert its encoding, and count its lines."""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dsd_refine.errors import DataError
from dsd_refine.files import READ_SIZE, is_full

PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

# Text shrinks by a factor of 3 to 20 when packed. A file that is made to fill a disk shrinks by
# 1000 and more. A file that unpacks to more than both limits (a factor, and bytes) is refused.
MOST_PACKED, LEAST_REFUSED = 200, 100 << 20

POINTER = b"version https://git-lfs.github.com/spec/v1"
MARKS = (  # byte order marks; UTF-32's first, because it begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class Plain:
    """A text file in UTF-8.

    Attributes:
        path: The file: the user's own, or a converted copy. It may start with a byte order mark.
        lines: The number of its lines.
        notes: How it was read, for the user.
    """

    path: Path
    lines: int
    notes: tuple[str, ...] = ()


def suffix_of(path: Path) -> str:
    """Return the suffix of a file's content in lower case: `.csv` for `Rows.CSV.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKED else suffix


def stem_of(path: Path) -> str:
    """Return a file's name without the suffixes of its content and its packing: `Rows` for
    `Rows.CSV.gz`.
    """
    return Path(path.stem).stem if path.suffix.lower() in PACKED else path.stem


def refuse_pointer(path: Path) -> None:
    """Check that a file is not a Git LFS pointer, which stands for a file that was not fetched.

    Raises:
        DataError: It is.
    """
    with path.open("rb") as file:
        is_pointer = file.read(len(POINTER)) == POINTER
    if is_pointer:
        raise DataError(
            f"{path}: is a Git LFS pointer, the file itself was not fetched: `git lfs pull` in its repository, or `hf download`"
        )


def make_plain(path: Path, cache: Path, encoding: str = "utf-8") -> Plain:
    """Read a text file once, check its encoding, and count its lines.

    A packed file, or one in another encoding, is written into `cache` as UTF-8.

    Args:
        path: The file.
        cache: The folder for copies.
        encoding: The encoding of a file without a byte order mark.

    Raises:
        DataError: The file is broken, or not in this encoding, or unpacks to far too much.
    """
    refuse_pointer(path)
    packed = PACKED.get(path.suffix.lower())
    codec = _codec_of_mark(path, packed) or _codec_of(encoding)
    text = _decode(path, packed, codec)
    if packed is None and codec.startswith("utf-8"):
        return Plain(path, _count_lines(text, None))
    name = hashlib.sha256(str(path.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:16] + suffix_of(path)
    copy = cache / "plain" / name
    copy.parent.mkdir(parents=True, exist_ok=True)
    partial = copy.with_suffix(f".{os.getpid()}.tmp")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            lines = _count_lines(text, file)
        partial.replace(copy)
    finally:
        partial.unlink(missing_ok=True)
    return Plain(copy, lines, _notes(path, packed, codec))


def _codec_of(encoding: str) -> str:
    """The codec of `--encoding`. It must be one for text, unlike `hex`."""
    try:
        "x".encode(encoding)
        return codecs.lookup(encoding).name
    except (LookupError, UnicodeError):
        raise DataError(f"--encoding {encoding}: no encoding that is known; such as latin-1, cp1252, utf-16") from None


def _open(path: Path, packed: Callable[..., Any] | None) -> IO[bytes]:
    file: IO[bytes] = path.open("rb") if packed is None else packed(path, "rb")
    return file


def _codec_of_mark(path: Path, packed: Callable[..., Any] | None) -> str | None:
    """The codec that a file's byte order mark names, or None."""
    head = next(_blocks(path, packed), b"")
    return next((codec for mark, codec in MARKS if head.startswith(mark)), None)


def _blocks(path: Path, packed: Callable[..., Any] | None) -> Iterator[bytes]:
    """Yield the unpacked bytes in blocks."""
    most = max(LEAST_REFUSED, MOST_PACKED * path.stat().st_size)
    size = 0
    try:
        with _open(path, packed) as file:
            while block := file.read(READ_SIZE):
                size += len(block)
                if packed is not None and size > most:
                    raise DataError(f"{path}: unpacks to more than {most:,} bytes; unpack it yourself if that is right")
                yield block
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be unpacked: {error}") from None
    except OSError as error:
        if packed is None or error.errno is not None or is_full(error):
            raise
        raise DataError(f"{path}: cannot be unpacked: {error}") from None


def _decode(path: Path, packed: Callable[..., Any] | None, codec: str) -> Iterator[str]:
    """Yield the text in blocks. Raise DataError, with the line, if it is not in this encoding."""
    decoder = codecs.getincrementaldecoder(codec)()
    line = 1
    try:
        for block in _blocks(path, packed):
            text = decoder.decode(block)
            if "\0" in text:
                line += text[: text.index("\0")].count("\n")
                raise DataError(
                    f"{path}: line {line} holds a NUL, so it is no {codec} text; if it is UTF-16 without a mark: "
                    "--encoding utf-16-le"
                )
            yield text
            line += text.count("\n")
        yield decoder.decode(b"", final=True)
    except UnicodeError as error:
        held = getattr(error, "object", b"")[: getattr(error, "start", 0)]
        line += held.count(b"\n") if isinstance(held, bytes) else 0
        shown = "UTF-8" if codec.startswith("utf-8") else codec
        raise DataError(
            f"{path}: is not {shown} text (line {line}: {getattr(error, 'reason', error)}); name its encoding with "
            "--encoding, such as latin-1, cp1252 or utf-16"
        ) from None


def _count_lines(text: Iterator[str], copy: IO[str] | None) -> int:
    """Count the lines, which may end in any of the three ways.

    Write the text to `copy` if there is one.
    """
    ends, last = 0, ""
    for block in text:
        if not block:
            continue
        ends += block.count("\n") + block.count("\r") - block.count("\r\n")
        ends -= last == "\r" and block[0] == "\n"
        last = block[-1]
        if copy is not None:
            copy.write(block)
    return ends + (last not in ("", "\n", "\r"))


def _notes(path: Path, packed: Callable[..., Any] | None, codec: str) -> tuple[str, ...]:
    """Say in which encoding a file was read, if it is not UTF-8."""
    if codec.startswith("utf"):
        return () if codec.startswith("utf-8") else (f"read as {codec}",)
    try:
        is_ascii = all(text.isascii() for text in _decode(path, packed, "utf-8"))
    except DataError:
        return (f"read as {codec}",)
    return () if is_ascii else (f"read as {codec}, as --encoding says, though its bytes are valid UTF-8: look at its texts",)
