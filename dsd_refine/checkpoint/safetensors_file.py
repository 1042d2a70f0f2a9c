"""Read and build safetensors files, byte for byte."""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsd_refine.errors import CheckpointError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

NAMES = {dtype: name for name, dtype in DTYPES.items()}
TRAINABLE = {torch.float16, torch.bfloat16, torch.float32}
HEADER_LIMIT = 100_000_000  # bytes, the format's own limit
BRACKETS = 1_000_000  # the most objects and lists in a header or config; a header has three for each tensor
LONGEST_NAME = 255  # bytes of a file's name, the limit of common file systems


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. `begin` and `end` are byte offsets in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file.

    Attributes:
        name: Its file name.
        path: Its path.
        head: Its first bytes: the header's length and the header.
        metadata: The header's metadata, or None.
        entries: The tensors in the order of the file.
    """

    name: str
    path: Path
    head: bytes
    metadata: dict[str, str] | None
    entries: tuple[Entry, ...]

    def raw(self, entry: Entry) -> Bytes:
        """Read the bytes of one tensor."""
        buffer = np.empty(entry.end - entry.begin, dtype=np.uint8)
        with self.path.open("rb") as file:
            file.seek(entry.begin)
            if file.readinto(buffer.data) != len(buffer):
                raise CheckpointError(f"{self.path}: ends before {entry.name!r} does; was it changed meanwhile?")
        return buffer

    def tensor(self, entry: Entry) -> torch.Tensor:
        """Read one tensor, in the file's dtype."""
        return from_bytes(self.raw(entry), entry.dtype, entry.shape)

    def mapped(self) -> dict[str, torch.Tensor]:
        """Return every tensor as a view of the mapped file, which takes no memory.

        Writing to it keeps the file.
        """
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < max((entry.end for entry in self.entries), default=0):
                raise CheckpointError(f"{self.path}: has become shorter; was it changed meanwhile?")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return {entry.name: self._view(entry, mapped) for entry in self.entries}

    def _view(self, entry: Entry, mapped: mmap.mmap) -> torch.Tensor:
        if not entry.numel or entry.begin % entry.dtype.itemsize:
            return self.tensor(entry)  # torch makes no views without elements or at such an offset
        return torch.frombuffer(mapped, dtype=entry.dtype, count=entry.numel, offset=entry.begin).reshape(entry.shape)


def from_bytes(raw: Bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Return little-endian bytes as a tensor that shares their memory."""
    return torch.from_numpy(raw).view(dtype).reshape(shape) if len(raw) else torch.empty(shape, dtype=dtype)


def memory(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's elements in logical order, as little-endian bytes.

    They are copied only if necessary.
    """
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def all_finite(tensor: torch.Tensor) -> bool:
    """Return whether there is neither NaN nor infinity.

    One pass finds the lowest and the highest value, and both are NaN if any is. It takes no memory.
    """
    return not tensor.numel() or all(math.isfinite(end) for end in torch.stack(tensor.aminmax()).tolist())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: The file cannot be read, is an LFS pointer, or is no JSON object.
    """
    value = _json_value(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return value


def read_json_list(path: Path) -> list[Any]:
    """Read a JSON list from a file.

    Raises:
        CheckpointError: The file cannot be read, is an LFS pointer, or is no JSON list.
    """
    value = _json_value(path)
    if not isinstance(value, list):
        raise CheckpointError(f"{path}: is not a JSON list")
    return value


def _json_value(path: Path) -> Any:
    try:
        if path.stat().st_size > HEADER_LIMIT:
            raise ValueError(f"it has more than {HEADER_LIMIT:,} bytes")
        raw = path.read_bytes()
        refuse_pointer(raw, path)
        return json.loads(bounded_json(raw))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error!s:.300}") from None


def bounded_json(raw: bytes) -> bytes:
    """Return the same bytes if they hold no more values than a checkpoint needs.

    Otherwise a small file could fill the memory: an empty object has 2 bytes here and 64 in memory.

    Raises:
        ValueError: There are too many objects, lists or values.
    """
    if raw.count(b"{") + raw.count(b"[") > BRACKETS or raw.count(b",") > 5 * BRACKETS:
        raise ValueError("it holds more values than any checkpoint has")
    return raw


POINTER = b"version https://git-lfs"


def is_pointer(path: Path) -> bool:
    """Return whether a file is a git-lfs pointer.

    An unreadable file is none: its reader reports the error.
    """
    try:
        with path.open("rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def refuse_pointer(start: bytes, path: Path) -> None:
    """Check that the first bytes of a file are not those of a git-lfs pointer.

    Raises:
        CheckpointError: They are.
    """
    if start.startswith(POINTER):
        raise CheckpointError(f"{path}: is a git-lfs pointer, not the file; run `git lfs pull` or download it anew")


def read_header(path: Path) -> WeightFile:
    """Read the header of a safetensors file, and check it against the format.

    There must be no gaps, no overlaps, no unknown dtypes, and no name twice.

    Raises:
        CheckpointError: The file cannot be read or breaks the format.
    """
    refuse_lost_link(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            refuse_pointer(start + file.read(64), path)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise CheckpointError(f"{path}: not a safetensors file, or cut short (header of {length} bytes)")
            file.seek(0)
            head = file.read(8 + length)
        header = json.loads(bounded_json(head[8:]).decode("utf-8"), object_pairs_hook=_no_doubles)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is broken: {error!s:.300}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not an object")
    metadata = header.pop("__metadata__", None)
    only_texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not only_texts:
        raise CheckpointError(f"{path}: the safetensors metadata is not a mapping of text to text")
    entries = sorted((_entry(path, n, v, len(head)) for n, v in header.items()), key=lambda e: (e.begin, e.end))
    _check_cover(path, entries, len(head), size)
    return WeightFile(path.name, path, head, metadata, tuple(entries))


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object.

    Readers differ on which of two equal names counts, so these are refused.
    """
    by_name = dict(pairs)
    if len(by_name) != len(pairs):
        raise ValueError("a name occurs twice")
    return by_name


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    """Check one tensor of the header. `start` is the offset of the data in the file."""
    try:
        shape, offsets = value["shape"], value["data_offsets"]
        numbers = [*shape, *offsets]
        if not isinstance(shape, list) or len(offsets) != 2 or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError
        dtype_name = str(value["dtype"])
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: the header's entry for {name!r} is broken") from None
    dtype = DTYPES.get(dtype_name)
    if dtype is None:
        raise CheckpointError(f"{path}: {name!r} has the dtype {dtype_name}, which is quantised or unknown; refused")
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise CheckpointError(f"{path}: {name!r} of shape {shape} does not fit its {offsets[1] - offsets[0]} bytes")
    return Entry(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _check_cover(path: Path, entries: list[Entry], start: int, size: int) -> None:
    """Check that the tensors fill the file from `start` to its end, without gaps."""
    end = start
    for entry in entries:
        if entry.begin != end:
            raise CheckpointError(f"{path}: {entry.name!r} overlaps another tensor or leaves a gap")
        end = entry.end
    if end != size:
        short = "truncated: " if size < end else ""
        raise CheckpointError(f"{path}: {short}the header speaks of {end:,} bytes, the file has {size:,}; download it anew")


def refuse_lost_link(path: Path) -> None:
    """Check that a path is not a link to a missing file.

    The system's own error would not name that file.

    Raises:
        CheckpointError: It is.
    """
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path}: is a link to {os.readlink(path)}, which is not there")


def build_header(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[bytes, tuple[Entry, ...]]:
    """Build the first bytes of a safetensors file, and the entries of its tensors.

    The file has the tensors in the given order. Tensors that share memory are stored separately.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    begin, spans = 0, []
    for name, tensor in tensors.items():
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        spans.append((name, tensor, begin, end))
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, tuple(Entry(n, t.dtype, tuple(t.shape), len(head) + a, len(head) + b) for n, t, a, b in spans)


def listed(names: list[str], most: int = 5) -> str:
    """Return the first `most` names for a message, and the number of the others."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
