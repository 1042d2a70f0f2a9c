"""What the source's weight files are: names, shapes, dtypes, order, shards, metadata. The file is the truth.

Read before any library touches the files, checked against the safetensors format's own rules, and the only thing that
writing goes by. Nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dsd_refine.checkpoint.copies import other_formats
from dsd_refine.checkpoint.pickle_file import PickleFile, _read_pickle, _single_pickle
from dsd_refine.checkpoint.safetensors_file import (
    LONGEST_NAME,
    Entry,
    WeightFile,
    build_header,
    listed,
    read_header,
    read_json,
    refuse_lost_link,
)
from dsd_refine.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"


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
