"""A text file as plain UTF-8: unpacked, its encoding known, its lines counted. What it says is for others to read."""

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
from dsd_refine.files import is_full

BLOCK = 1 << 20
PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

MOST_PACKED, LEAST_REFUSED = 200, 100 << 20  # text packs by 3 to 20; a file made to fill a disk by 1000 and more

POINTER = b"version https://git-lfs.github.com/spec/v1"
MARKS = (  # the longer first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class Plain:
    """`path` holds the text in UTF-8 (perhaps with its mark), `lines` is how many it has, `notes` how it was read."""

    path: Path
    lines: int
    notes: tuple[str, ...] = ()


def suffix_of(path: Path) -> str:
    """The suffix in lower case that says what a file holds, below what packs it: `.csv` of `Rows.CSV.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKED else suffix


def stem_of(path: Path) -> str:
    """The name without that suffix, and without what packs it."""
    return Path(path.stem).stem if path.suffix.lower() in PACKED else path.stem


def refuse_pointer(path: Path) -> None:
    """Raises DataError where the file is what Git LFS leaves in place of a file that was not fetched."""
    with path.open("rb") as file:
        is_pointer = file.read(len(POINTER)) == POINTER
    if is_pointer:
        raise DataError(
            f"{path}: is a Git LFS pointer, the file itself was not fetched: `git lfs pull` in its repository, or `hf download`"
        )


def make_plain(path: Path, cache: Path, encoding: str = "utf-8") -> Plain:
    """Read a text file once: hold it against its encoding, count its lines, and where it is packed or of another encoding
    write it into `cache` as UTF-8. A byte order mark wins over `encoding`.

    Raises:
        DataError: not of that encoding, broken, or packed to fill a disk.
    """
    refuse_pointer(path)
    packed = PACKED.get(path.suffix.lower())
    codec = _marked(path, packed) or _known(encoding)
    text = _decoded(path, packed, codec)
    if packed is None and codec.startswith("utf-8"):
        return Plain(path, _counted(text, None))
    name = hashlib.sha256(str(path.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:16] + suffix_of(path)
    copy = cache / "plain" / name
    copy.parent.mkdir(parents=True, exist_ok=True)
    partial = copy.with_suffix(f".{os.getpid()}.tmp")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            lines = _counted(text, file)
        partial.replace(copy)
    finally:
        partial.unlink(missing_ok=True)
    return Plain(copy, lines, _said(path, packed, codec))


def _known(encoding: str) -> str:
    try:
        "x".encode(encoding)  # of text: hex and the like are none
        return codecs.lookup(encoding).name
    except (LookupError, UnicodeError):
        raise DataError(f"--encoding {encoding}: no encoding that is known; such as latin-1, cp1252, utf-16") from None


def _opened(path: Path, packed: Callable[..., Any] | None) -> IO[bytes]:
    file: IO[bytes] = path.open("rb") if packed is None else packed(path, "rb")
    return file


def _marked(path: Path, packed: Callable[..., Any] | None) -> str | None:
    head = next(_blocks(path, packed), b"")
    return next((codec for mark, codec in MARKS if head.startswith(mark)), None)


def _blocks(path: Path, packed: Callable[..., Any] | None) -> Iterator[bytes]:
    """The unpacked bytes, a block at a time."""
    most = max(LEAST_REFUSED, MOST_PACKED * path.stat().st_size)
    size = 0
    try:
        with _opened(path, packed) as file:
            while block := file.read(BLOCK):
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


def _decoded(path: Path, packed: Callable[..., Any] | None, codec: str) -> Iterator[str]:
    """The text, a block at a time. Raises DataError with the line where it is not of this encoding."""
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


def _counted(text: Iterator[str], copy: IO[str] | None) -> int:
    """Write the text on to `copy`; returns its lines, whichever of the three ways they end."""
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


def _said(path: Path, packed: Callable[..., Any] | None, codec: str) -> tuple[str, ...]:
    if codec.startswith("utf"):
        return () if codec.startswith("utf-8") else (f"read as {codec}",)
    try:
        plain = all(text.isascii() for text in _decoded(path, packed, "utf-8"))
    except DataError:
        return (f"read as {codec}",)
    return () if plain else (f"read as {codec}, as --encoding says, though its bytes are valid UTF-8: look at its texts",)
