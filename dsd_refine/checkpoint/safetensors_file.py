"""Reading and building safetensors files, byte for byte."""

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
HEADER_LIMIT = 100_000_000  # the format's own limit
BRACKETS = 1_000_000  # objects and lists in a header or config: three for each tensor
LONGEST_NAME = 255  # bytes of a file's name


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
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file: `head` is the length and header, byte for byte; `entries` lie in file order."""

    name: str
    path: Path
    head: bytes
    metadata: dict[str, str] | None
    entries: tuple[Entry, ...]

    def raw(self, entry: Entry) -> Bytes:
        """The bytes of one tensor as they stand in the file."""
        buffer = np.empty(entry.end - entry.begin, dtype=np.uint8)
        with self.path.open("rb") as file:
            file.seek(entry.begin)
            if file.readinto(buffer.data) != len(buffer):
                raise CheckpointError(f"{self.path}: ends before {entry.name!r} does; was it changed meanwhile?")
        return buffer

    def tensor(self, entry: Entry) -> torch.Tensor:
        """One tensor in the file's dtype, in memory of its own."""
        return from_bytes(self.raw(entry), entry.dtype, entry.shape)

    def mapped(self) -> dict[str, torch.Tensor]:
        """Every tensor as a view of the file, which takes no memory; what is written there stays out of the file."""
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < max((entry.end for entry in self.entries), default=0):
                raise CheckpointError(f"{self.path}: has become shorter; was it changed meanwhile?")
            held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return {entry.name: self._view(entry, held) for entry in self.entries}

    def _view(self, entry: Entry, held: mmap.mmap) -> torch.Tensor:
        if not entry.numel or entry.begin % entry.dtype.itemsize:
            return self.tensor(entry)
        return torch.frombuffer(held, dtype=entry.dtype, count=entry.numel, offset=entry.begin).reshape(entry.shape)


def from_bytes(raw: Bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Little-endian bytes as a tensor that shares their memory."""
    return torch.from_numpy(raw).view(dtype).reshape(shape) if len(raw) else torch.empty(shape, dtype=dtype)


def memory(tensor: torch.Tensor) -> memoryview:
    """A tensor's elements in logical order as little-endian bytes: a view where they lie so already, else a copy."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def all_finite(tensor: torch.Tensor) -> bool:
    """Is there neither NaN nor infinity? One pass that makes nothing: NaN is at both ends of any range."""
    return not tensor.numel() or all(math.isfinite(end) for end in torch.stack(tensor.aminmax()).tolist())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: cannot be read, an LFS pointer, not a JSON object.
    """
    try:
        if path.stat().st_size > HEADER_LIMIT:
            raise ValueError(f"it has more than {HEADER_LIMIT:,} bytes")
        raw = path.read_bytes()
        refuse_pointer(raw, path)
        value = json.loads(bounded_json(raw))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error!s:.300}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return value


def bounded_json(raw: bytes) -> bytes:
    """The same bytes, if no more comes of them than a checkpoint needs: an empty object takes 2 bytes here and 64 in memory.

    Raises:
        ValueError: too many objects, lists or values.
    """
    if raw.count(b"{") + raw.count(b"[") > BRACKETS or raw.count(b",") > 5 * BRACKETS:
        raise ValueError("it holds more values than any checkpoint has")
    return raw


POINTER = b"version https://git-lfs"


def is_pointer(path: Path) -> bool:
    """Is the file a git-lfs pointer? What cannot be read is none; who reads it says why."""
    try:
        with path.open("rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def refuse_pointer(start: bytes, path: Path) -> None:
    """Raise CheckpointError where the bytes are those of a git-lfs pointer instead of the file."""
    if start.startswith(POINTER):
        raise CheckpointError(f"{path}: is a git-lfs pointer, not the file; run `git lfs pull` or download it anew")


def read_header(path: Path) -> WeightFile:
    """The header of one safetensors file, held against the format: no gaps, no overlaps, known dtypes, nothing twice.

    Raises:
        CheckpointError: names what is wrong and what to do.
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
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not texts:
        raise CheckpointError(f"{path}: the safetensors metadata is not a mapping of text to text")
    entries = sorted((_entry(path, n, v, len(head)) for n, v in header.items()), key=lambda e: (e.begin, e.end))
    _check_cover(path, entries, len(head), size)
    return WeightFile(path.name, path, head, metadata, tuple(entries))


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
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
    at = start
    for entry in entries:
        if entry.begin != at:
            raise CheckpointError(f"{path}: {entry.name!r} overlaps another tensor or leaves a gap")
        at = entry.end
    if at != size:
        short = "truncated: " if size < at else ""
        raise CheckpointError(f"{path}: {short}the header speaks of {at:,} bytes, the file has {size:,}; download it anew")


def refuse_lost_link(path: Path) -> None:
    """Raise CheckpointError where the path is a link to nothing: "no such file" would not say which."""
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path}: is a link to {os.readlink(path)}, which is not there")


def build_header(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[bytes, tuple[Entry, ...]]:
    """A safetensors head and its entries for tensors in the given order (aliased tensors are stored each by itself)."""
    header: dict[str, Any] = {"__metadata__": metadata}
    at, spans = 0, []
    for name, tensor in tensors.items():
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        spans.append((name, tensor, at, end))
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, tuple(Entry(n, t.dtype, tuple(t.shape), len(head) + a, len(head) + b) for n, t, a, b in spans)


def listed(names: list[str], most: int = 5) -> str:
    """A few names for an error message, with the count of the rest."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
