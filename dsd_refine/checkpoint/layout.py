"""Read the layout of a source's weight files: names, shapes, dtypes, order, shards, metadata.

The layout is read before a library opens the files, and checked against the rules of the
safetensors format. The writer follows nothing else. This code knows no models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dsd_refine.checkpoint.copies import other_formats
from dsd_refine.checkpoint.pickle_file import PickleFile, find_pickle, read_pickle
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
    """The weight files of a source.

    Attributes:
        folder: The source's folder.
        files: The weight files. A pickle source has one file, which is written as safetensors.
        index: The index of a sharded checkpoint, or None.
        where: The file and the header's entry of every tensor by name.
    """

    folder: Path
    files: tuple[WeightFile, ...]
    index: Path | None
    where: dict[str, tuple[WeightFile, Entry]]

    def entry(self, name: str) -> Entry:
        """Return the header's entry of a tensor."""
        return self.where[name][1]

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, in the file's dtype."""
        file, entry = self.where[name]
        return file.tensor(entry)

    @property
    def read_from(self) -> list[str]:
        """Names of the source's files that hold the weights, and of their index."""
        index = [self.index.name] if self.index else []
        return [name for file in self.files for name in (file.read if isinstance(file, PickleFile) else [file.name])] + index

    @property
    def from_pickle(self) -> bool:
        """True if the source's weights are a pickle."""
        return any(isinstance(file, PickleFile) for file in self.files)

    @property
    def weights_key(self) -> str | None:
        """The key of the weights in a pickle, or None."""
        return next((file.key for file in self.files if isinstance(file, PickleFile)), None)

    @property
    def notes(self) -> list[str]:
        """Warnings of how a pickle was read."""
        return [note for file in self.files if isinstance(file, PickleFile) for note in file.notes]

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype of most elements, among those that hold fractions."""
        elements: Counter[torch.dtype] = Counter()
        for _, entry in self.where.values():
            elements[entry.dtype] += entry.numel if entry.dtype.is_floating_point else 0
        return elements.most_common(1)[0][0]

    def mapped(self) -> dict[str, torch.Tensor]:
        """Return every tensor by name, as views of the mapped files, which take no memory."""
        return {name: tensor for file in self.files for name, tensor in file.mapped().items()}

    def names(self) -> Iterator[str]:
        """Yield the name of every tensor, in the order of the files."""
        return (entry.name for file in self.files for entry in file.entries)


def read_layout(folder: Path, allow_pickle: bool = False, weights_key: str | None = None) -> Layout:
    """Read the layout of a checkpoint's folder.

    Args:
        folder: The folder with the weight files.
        allow_pickle: Read pickle files, with torch's weights-only loader.
        weights_key: The key of the set of weights to use, in a pickle that holds several.

    Raises:
        CheckpointError: There are no weights. A shard is missing or cut short. A file is an LFS
            pointer. A header breaks the format. The index contradicts the files. The weights are a
            pickle without `allow_pickle`. There is no set of weights under `weights_key`.
    """
    layout = _safetensors_layout(folder)
    if layout is not None and weights_key is not None:
        raise CheckpointError(
            f"--weights-key {weights_key}: {layout.files[0].path} is safetensors, which holds one set of weights; "
            "the option is for a pickle that holds several"
        )
    return layout or _pickle_layout(folder, allow_pickle, weights_key)


def _safetensors_layout(folder: Path) -> Layout | None:
    """The layout of a folder's safetensors files; None if it has none that hold a model."""
    index = folder / INDEX
    if index.is_file():
        return _sharded_layout(folder, index)
    if (folder / SINGLE).is_file():
        return _collect(folder, [read_header(folder / SINGLE)], None)
    # An adapter (for a language, or peft's) changes a model, and holds none itself.
    others = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter"))
    if len(others) == 1:
        return _collect(folder, [read_header(others[0])], None)
    if others:
        names = ", ".join(path.name for path in others)
        raise CheckpointError(f"{folder}: several weight files ({names}) and no {INDEX} to say which counts")
    return None


def _sharded_layout(folder: Path, index: Path) -> Layout:
    """The layout of a checkpoint in several safetensors files. Its index must agree with them."""
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
    """Read an index file, and return the file's name for each tensor.

    Raises:
        CheckpointError: It is no index, or names a file outside its folder.
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
    """Make a layout of files. Each tensor must be in one of them only."""
    where: dict[str, tuple[WeightFile, Entry]] = {}
    for file in files:
        for entry in file.entries:
            if entry.name in where:
                raise CheckpointError(f"{folder}: {entry.name!r} is in both {where[entry.name][0].name} and {file.name}")
            where[entry.name] = (file, entry)
    if not where:
        raise CheckpointError(f"{folder}: the weight files hold no tensors")
    return Layout(folder, tuple(files), index, where)


def _pickle_layout(folder: Path, allow_pickle: bool, weights_key: str | None) -> Layout:
    """The layout of a pickle checkpoint: that of the one safetensors file that its tensors are
    written to.
    """
    index = folder / PICKLE_INDEX
    weight_map = read_index(index) if index.is_file() else None
    paths = [folder / name for name in dict.fromkeys(weight_map.values())] if weight_map else find_pickle(folder)
    if not paths:
        refuse_lost_link(folder / "pytorch_model.bin")
        raise CheckpointError(no_weights(str(folder), [path.relative_to(folder).as_posix() for path in folder.rglob("*")]))
    if not allow_pickle:
        raise CheckpointError(needs_allow_pickle(str(folder), paths[0].name))
    if weights_key is not None and len(paths) > 1:
        raise CheckpointError(
            f"--weights-key {weights_key}: {folder} has several pickles, which are one set of weights together"
        )
    pickles = {path.name: read_pickle(path, weights_key) for path in paths}
    tensors = {name: tensor for pickled in pickles.values() for name, tensor in pickled.tensors.items()}
    where = {name: file for file, pickled in pickles.items() for name in pickled.tensors}
    if weight_map is not None and where != weight_map:
        wrong = sorted(name for name in {*where, *weight_map} if where.get(name) != weight_map.get(name))
        raise CheckpointError(f"{index}: index and shards disagree on where these tensors are: {listed(wrong)}")
    head, entries = build_header(tensors, {"format": "pt"})
    read = (*pickles, *([index.name] if weight_map else []))
    notes = tuple(note for pickled in pickles.values() for note in pickled.notes)
    key = pickles[paths[0].name].key
    file = PickleFile(SINGLE, paths[0], head, {"format": "pt"}, entries, tensors, read, key, notes)
    return _collect(folder, [file], None)


def needs_allow_pickle(where: str, name: str) -> str:
    """Return the message for weights that are a pickle, without --allow-pickle."""
    return (
        f"{where}: only pickle weights ({name}); pickles can carry code, so they are read only with "
        "--allow-pickle, and weights-only even then"
    )


def no_weights(where: str, names: Iterable[str]) -> str:
    """Return the message for a folder or repository without weights that can be read.

    `names` are its files.
    """
    formats = other_formats(names)
    message = f"{where}: no weights here (looked for {SINGLE}, {INDEX}, pytorch_model.bin, *.pth)"
    return f"{message}; {formats}" if formats else message
