"""What the source's weight files are: names, shapes, dtypes, order, shards, metadata. The file is the truth.

Read before any library touches the files, checked against the safetensors format's own rules, and the only thing that
writing goes by. Nothing here knows a model.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch

from dsd_refine.checkpoint.copies import READ_PICKLES, other_formats
from dsd_refine.checkpoint.pickles import Pickled, read_pickle
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

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"
HEADER_LIMIT = 100_000_000  # the format's own limit
BRACKETS = 1_000_000  # objects and lists in a header or config: three for each tensor
LONGEST_NAME = 255  # bytes of a file's name
BLOCK = 1 << 20


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


@dataclass(frozen=True)
class PickleFile(WeightFile):
    """Tensors of a pickle source, already read weights-only; they come out as one safetensors file."""

    held: dict[str, torch.Tensor] = field(default_factory=dict)
    read: tuple[str, ...] = ()
    key: str | None = None
    notes: tuple[str, ...] = ()

    def raw(self, entry: Entry) -> Bytes:
        return np.frombuffer(memory(self.held[entry.name]), dtype=np.uint8)

    def tensor(self, entry: Entry) -> torch.Tensor:
        return self.held[entry.name].clone()

    def mapped(self) -> dict[str, torch.Tensor]:
        return dict(self.held)


@dataclass(frozen=True)
class Layout:
    """The weight files of a source, its index if it has one, and every tensor by name."""

    folder: Path
    files: tuple[WeightFile, ...]
    index: Path | None
    where: dict[str, tuple[WeightFile, Entry]]

    def entry(self, name: str) -> Entry:
        return self.where[name][1]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in the file's dtype."""
        file, entry = self.where[name]
        return file.tensor(entry)

    @property
    def read_from(self) -> list[str]:
        """The source's files that the weights were read from, index included."""
        index = [self.index.name] if self.index else []
        return [name for file in self.files for name in (file.read if isinstance(file, PickleFile) else [file.name])] + index

    @property
    def from_pickle(self) -> bool:
        return any(isinstance(file, PickleFile) for file in self.files)

    @property
    def weights_key(self) -> str | None:
        """The key of a pickle that the weights stood under."""
        return next((file.key for file in self.files if isinstance(file, PickleFile)), None)

    @property
    def notes(self) -> list[str]:
        """What is to be said of how a pickle was read."""
        return [note for file in self.files if isinstance(file, PickleFile) for note in file.notes]

    def names(self) -> Iterator[str]:
        """Every tensor's name, file by file, in file order."""
        return (entry.name for file in self.files for entry in file.entries)


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


def read_layout(folder: Path, allow_pickle: bool = False, weights_key: str | None = None) -> Layout:
    """The layout of a checkpoint folder. `weights_key` says which of a pickle's sets of weights is meant.

    Raises:
        CheckpointError: no weights, a missing or truncated shard, an LFS pointer, a header that breaks the format, an
            index that contradicts the files, pickle files without `allow_pickle`, or a `weights_key` that is none.
    """
    found = _safe(folder)
    if found is not None and weights_key is not None:
        raise CheckpointError(
            f"--weights-key {weights_key}: {found.files[0].path} is safetensors, which holds one set of weights; "
            "the option is for a pickle that holds several"
        )
    return found or _pickled(folder, allow_pickle, weights_key)


def _safe(folder: Path) -> Layout | None:
    """The layout of a folder's safetensors files, if it has any that are its model."""
    index = folder / INDEX
    if index.is_file():
        return _sharded(folder, index)
    if (folder / SINGLE).is_file():
        return _collect(folder, [read_header(folder / SINGLE)], None)
    # adapters (of a language, of peft) are laid over a model, and are none
    others = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter"))
    if len(others) == 1:
        return _collect(folder, [read_header(others[0])], None)
    if others:
        names = ", ".join(path.name for path in others)
        raise CheckpointError(f"{folder}: several weight files ({names}) and no {INDEX} to say which counts")
    return None


def _sharded(folder: Path, index: Path) -> Layout:
    weight_map = read_index(index)
    if (folder / SINGLE).is_file() and SINGLE not in weight_map.values():
        raise CheckpointError(
            f"{folder}: both {SINGLE} and {INDEX}, and the index does not name that file; "
            "loaders disagree on which counts, so remove one of them"
        )
    files = []
    for name in dict.fromkeys(weight_map.values()):
        if not (folder / name).is_file():
            raise CheckpointError(f"{index}: names the shard {name}, which is not there; was the download completed?")
        files.append(read_header(folder / name))
    layout = _collect(folder, files, index)
    held = {name: file.name for name, (file, _) in layout.where.items()}
    wrong = sorted(name for name in {*held, *weight_map} if held.get(name) != weight_map.get(name))
    if wrong:
        raise CheckpointError(f"{index}: index and shards disagree on where these tensors are: {listed(wrong)}")
    return layout


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name of an index file.

    Raises:
        CheckpointError: not such an index, or a file name that leads out of the folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: has no usable `weight_map`")
    for name in weight_map.values():
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{index}: names the file {name!r:.200} outside its own folder; refused")
        if len(name.encode(errors="replace")) > LONGEST_NAME:
            raise CheckpointError(f"{index}: names a file of {len(name):,} letters; refused")
    return weight_map


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


def _collect(folder: Path, files: list[WeightFile], index: Path | None) -> Layout:
    where: dict[str, tuple[WeightFile, Entry]] = {}
    for file in files:
        for entry in file.entries:
            if entry.name in where:
                raise CheckpointError(f"{folder}: {entry.name!r} is in both {where[entry.name][0].name} and {file.name}")
            where[entry.name] = (file, entry)
    if not where:
        raise CheckpointError(f"{folder}: the weight files hold no tensors")
    return Layout(folder, tuple(files), index, where)


def _pickled(folder: Path, allow_pickle: bool, weights_key: str | None) -> Layout:
    index = folder / PICKLE_INDEX
    weight_map = read_index(index) if index.is_file() else None
    paths = [folder / name for name in dict.fromkeys(weight_map.values())] if weight_map else _single_pickle(folder)
    if not paths:
        refuse_lost_link(folder / "pytorch_model.bin")
        raise CheckpointError(no_weights(str(folder), [path.relative_to(folder).as_posix() for path in folder.rglob("*")]))
    if not allow_pickle:
        raise CheckpointError(needs_leave(str(folder), paths[0].name))
    if weights_key is not None and len(paths) > 1:
        raise CheckpointError(
            f"--weights-key {weights_key}: {folder} has several pickles, which are one set of weights together"
        )
    pickles = {path.name: _read_pickle(path, weights_key) for path in paths}
    held = {name: tensor for found in pickles.values() for name, tensor in found.tensors.items()}
    where = {name: file for file, found in pickles.items() for name in found.tensors}
    if weight_map is not None and where != weight_map:
        wrong = sorted(name for name in {*where, *weight_map} if where.get(name) != weight_map.get(name))
        raise CheckpointError(f"{index}: index and shards disagree on where these tensors are: {listed(wrong)}")
    head, entries = build_header(held, {"format": "pt"})
    read = (*pickles, *([index.name] if weight_map else []))
    notes = tuple(note for found in pickles.values() for note in found.notes)
    key = pickles[paths[0].name].key
    file = PickleFile(SINGLE, paths[0], head, {"format": "pt"}, entries, held, read, key, notes)
    return _collect(folder, [file], None)


def needs_leave(where: str, name: str) -> str:
    """What to say of weights that are a pickle, where pickles are not to be read."""
    return (
        f"{where}: only pickle weights ({name}); pickles can carry code, so they are read only with "
        "--allow-pickle, and weights-only even then"
    )


def no_weights(where: str, names: Iterable[str]) -> str:
    """What to say where there are no weights that can be read: what is there, and what is needed."""
    found = other_formats(names)
    said = f"{where}: no weights here (looked for {SINGLE}, {INDEX}, pytorch_model.bin, *.pth)"
    return f"{said}; {found}" if found else said


def refuse_lost_link(path: Path) -> None:
    """Raise CheckpointError where the path is a link to nothing: "no such file" would not say which."""
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path}: is a link to {os.readlink(path)}, which is not there")


def _single_pickle(folder: Path) -> list[Path]:
    """The one pickle that holds the weights: pytorch_model.bin, else the only .pth, .pt or .pth.tar."""
    if (folder / "pytorch_model.bin").is_file():
        return [folder / "pytorch_model.bin"]
    others = sorted(path for path in folder.iterdir() if path.name.endswith(READ_PICKLES))
    if len(others) > 1:
        names = ", ".join(path.name for path in others)
        raise CheckpointError(f"{folder}: several pickle files ({names}) and no pytorch_model.bin to say which counts")
    return others


def _read_pickle(path: Path, weights_key: str | None) -> Pickled:
    refuse_lost_link(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: is not there; was the download completed?")
    with path.open("rb") as file:
        refuse_pointer(file.read(64), path)
    found = read_pickle(path, weights_key)
    for name, tensor in found.tensors.items():
        if tensor.dtype not in NAMES or tensor.layout != torch.strided:
            raise CheckpointError(f"{path}: {name}: {tensor.dtype}, {tensor.layout} cannot be kept in a safetensors file")
    return found


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


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    return sha256_files([path])[path]


def sha256_files(paths: Iterable[Path]) -> dict[Path, str]:
    """Path -> hex SHA-256 of the file's bytes, several files at a time. A signal waits for the blocks at work alone."""
    asked, stopped = [*paths], Event()

    def digest(path: Path) -> str:
        found, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
        with path.open("rb", buffering=0) as file:
            while not stopped.is_set() and (count := file.readinto(block)):
                found.update(block[:count])
        return found.hexdigest()

    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        return dict(zip(asked, pool.map(digest, asked), strict=True))
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def listed(names: list[str], most: int = 5) -> str:
    """A few names for an error message, with the count of the rest."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
