"""Read weights from a pickle with torch's weights-only loader, and choose between several sets of
weights.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsd_refine.checkpoint.copies import READ_PICKLES
from dsd_refine.checkpoint.safetensors_file import (
    NAMES,
    Bytes,
    Entry,
    WeightFile,
    listed,
    memory,
    refuse_lost_link,
    refuse_pointer,
)
from dsd_refine.errors import CheckpointError


@dataclass(frozen=True)
class PickleFile(WeightFile):
    """The weights of a pickle source, as the one safetensors file that they are written to.

    Attributes:
        held: The tensors by name.
        read: Names of the source's files that they were read from.
        key: Their key in the pickle, or None.
        notes: Warnings of how the pickle was read.
    """

    held: dict[str, torch.Tensor] = field(default_factory=dict)
    read: tuple[str, ...] = ()
    key: str | None = None
    notes: tuple[str, ...] = ()

    def raw(self, entry: Entry) -> Bytes:
        """Return the bytes of a tensor, as a uint8 array. They are copied only if necessary."""
        return np.frombuffer(memory(self.held[entry.name]), dtype=np.uint8)

    def tensor(self, entry: Entry) -> torch.Tensor:
        """Return a copy of a tensor of the pickle."""
        return self.held[entry.name].clone()

    def mapped(self) -> dict[str, torch.Tensor]:
        """Return all tensors by name. They share the memory of `held`."""
        return dict(self.held)


def find_pickle(folder: Path) -> list[Path]:
    """Return the pickle that holds a folder's weights, or nothing.

    It is pytorch_model.bin, else the only .pth, .pt or .pth.tar.

    Raises:
        CheckpointError: There are several.
    """
    if (folder / "pytorch_model.bin").is_file():
        return [folder / "pytorch_model.bin"]
    others = sorted(path for path in folder.iterdir() if path.name.endswith(READ_PICKLES))
    if len(others) > 1:
        names = ", ".join(path.name for path in others)
        raise CheckpointError(f"{folder}: several pickle files ({names}) and no pytorch_model.bin to say which counts")
    return others


def read_pickle(path: Path, weights_key: str | None = None) -> Pickled:
    """Read the weights of a pickle.

    Args:
        path: The file.
        weights_key: The key of the set of weights to use, if the file holds several.

    Raises:
        CheckpointError: The file is missing or an LFS pointer, or a tensor cannot be kept in a
            safetensors file, or `read_weights` cannot read it.
    """
    refuse_lost_link(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: is not there; was the download completed?")
    with path.open("rb") as file:
        refuse_pointer(file.read(64), path)
    pickled = read_weights(path, weights_key)
    for name, tensor in pickled.tensors.items():
        if tensor.dtype not in NAMES or tensor.layout != torch.strided:
            raise CheckpointError(f"{path}: {name}: {tensor.dtype}, {tensor.layout} cannot be kept in a safetensors file")
    return pickled


# The keys that timm.models.load_state_dict looks for, in its order: the averaged weights come
# first.
TIMM_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
WRAPPERS = ("_orig_mod.", "module.")  # prefixes of names, from torch.compile, data parallelism and averaging
DEEPEST = 4  # levels of nested mappings that are searched for weights
AVERAGED = "n_averaged"  # the counter of torch's AveragedModel, beside the weights that it wraps
SHOWN_SETS = 8  # keys that a message names
SAFER = "where you trust the file, save its weights alone (torch.save of the state dict, or safetensors)"


class Inert:
    """Replaces an object that a training script saved beside the weights.

    It accepts anything and does nothing.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# Classes of settings (timm's `args`, with paths) and of numbers (NumPy's metrics). Inert replaces
# each of them.
BESIDE = (
    "argparse.Namespace", "types.SimpleNamespace",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype",
    "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "pathlib.PureWindowsPath",
    "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
)  # fmt: skip


@dataclass(frozen=True)
class Pickled:
    """The tensors of a pickle.

    Attributes:
        tensors: The tensors by name.
        key: Their key in the file. None: the file itself is the mapping of names to tensors.
        notes: Warnings of how the file was read.
    """

    tensors: dict[str, torch.Tensor]
    key: str | None = None
    notes: tuple[str, ...] = ()


def read_weights(path: Path, weights_key: str | None = None) -> Pickled:
    """Read the weights of a pickle, with the names that the model gives them.

    Args:
        path: The file.
        weights_key: The key of the set of weights to use, if the file holds several.

    Raises:
        CheckpointError: The weights-only loader refuses the file. Or it holds no plain mapping of
            names to tensors, or no set of weights under `weights_key`, or several sets without a
            rule to choose.
    """
    key, weights, notes = _choose(path, _load(path), weights_key)
    odd = [str(name) for name, value in weights.items() if not isinstance(value, torch.Tensor)]
    if odd:
        place = f" under {key!r}" if key else ""
        raise CheckpointError(f"{path}: holds no plain mapping of names to tensors{place}: {odd[0]!r:.100} is no tensor")
    named = {str(name): tensor.detach() for name, tensor in weights.items()}
    bare = _unwrapped(named)
    if bare is not named:
        notes = (*notes, f"{path.name}: names are written without the {_wrapper(named)!r} that a training script put there")
    return Pickled(bare, key, notes)


def _load(path: Path) -> Any:
    """Everything in a pickle, by torch's weights-only loader. Tensors are views of the mapped file, which take no memory.

    In the format before torch 1.6, which is no zip archive, they cannot be.
    """
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in BESIDE]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a pickle may make torch raise any error
        # torch's own message advises to load the file unsafely, so only the class is taken from it
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it wants {wanted[1]}, which is no tensor; {SAFER}" if wanted else "it is no whole file of tensors"
        raise CheckpointError(f"{path}: cannot be read weights-only, refused ({why})") from None


def _choose(path: Path, content: Any, weights_key: str | None) -> tuple[str | None, Mapping[Any, Any], tuple[str, ...]]:
    """The key of the set of weights to use, the set, and warnings."""
    sets = dict(_sets(content))
    if weights_key is not None:
        if weights_key not in sets:
            raise CheckpointError(f"{path}: --weights-key {weights_key}: no weights there; {_available([*sets])}")
        key = weights_key
    elif isinstance(content, Mapping) and content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return None, content, ()
    elif not sets and _has_weights(content):
        return None, content, ()  # it holds other things too; read_weights() names the first of them
    elif not sets:
        raise CheckpointError(f"{path}: does not hold a plain mapping of names to tensors; {SAFER}")
    else:
        key = _timm_key(path, content, [*sets])
    left = [name for name in sets if name != key]
    why = "--weights-key" if weights_key else "as timm does; --weights-key chooses"
    note = f"{path.name}: of its sets of weights {key!r} is taken ({why}), left: {listed(left, SHOWN_SETS)}"
    return key, sets[key], (note,) if left else ()


def _timm_key(path: Path, content: Mapping[Any, Any], sets: list[str]) -> str:
    """The key of the set that timm's loader would use, or of the only set.

    Raises:
        CheckpointError: timm's loader knows none of several sets, or its key holds further
            mappings.
    """
    by_timm = next((key for key in TIMM_KEYS if any(name == key or name.startswith(f"{key}.") for name in sets)), None)
    if by_timm in sets and not any(name.startswith(f"{by_timm}.") for name in sets):
        return by_timm
    if len(sets) > 1:
        names = listed(sets, SHOWN_SETS)
        raise CheckpointError(f"{path}: holds several sets of weights ({names}); say which with --weights-key")
    if by_timm is None and _has_weights(content, least=2):
        raise CheckpointError(
            f"{path}: holds weights, and under {sets[0]!r} another set of them; --weights-key {sets[0]} takes those, "
            "or save those that are meant alone"
        )
    return sets[0]


def _sets(content: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield the key and the mapping of each set of weights.

    Nested sets have dotted keys (`ema.module`, `ema.0`).

    Averages in a list have numbers for names. No model has such names, but messages list these sets
    too.
    """
    inner = [("", content)] if isinstance(content, Mapping) else []
    entered = {id(content)}  # a mapping may contain itself, or another one many times
    for depth in range(DEEPEST):
        outer, inner = inner, []
        for prefix, mapping in outer:
            for name, held in mapping.items():
                value = {str(number): item for number, item in enumerate(held)} if isinstance(held, list | tuple) else held
                if not isinstance(value, Mapping) or (isinstance(name, str) and name.startswith("optim")):
                    continue
                if depth and not isinstance(name, str):
                    continue  # the tensors of an optimizer have numbers
                if _has_weights(value):
                    yield f"{prefix}{name}", value
                if id(held) not in entered:
                    entered.add(id(held))
                    inner.append((f"{prefix}{name}.", value))


def _has_weights(value: Any, least: int = 1) -> bool:
    """True for a mapping with a floating-point tensor of at least `least` dimensions under a name.

    The tensors of an optimizer have numbers in place of names.
    """
    return isinstance(value, Mapping) and any(
        isinstance(name, str) and isinstance(inner, torch.Tensor) and inner.is_floating_point() and inner.ndim >= least
        for name, inner in value.items()
    )


def _available(sets: list[str]) -> str:
    """Say which sets of weights a file has."""
    return f"the file has {listed(sets, SHOWN_SETS)}" if sets else "the file is itself a mapping of tensors, or holds none"


def _unwrapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with the model's own names, without the prefix of a wrapper."""
    wrapper = _wrapper(tensors)
    if not wrapper:
        return tensors
    return {name.removeprefix(wrapper): tensor for name, tensor in tensors.items() if name != AVERAGED}


def _wrapper(tensors: Mapping[str, torch.Tensor]) -> str:
    """The prefix of every name: `module.`, `_orig_mod.`, both in any order, or nothing."""
    names, prefix = [name for name in tensors if name != AVERAGED], ""
    while more := [word for word in WRAPPERS if names and all(name.startswith(prefix + word) for name in names)]:
        prefix += more[0]
    return prefix
