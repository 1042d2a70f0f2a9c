"""Weights out of a pickle: read weights-only, and which of several sets of weights in one file is meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsd_refine.checkpoint.copies import READ_PICKLES
from dsd_refine.checkpoint.safetensors_file import NAMES, Bytes, Entry, WeightFile, memory, refuse_lost_link, refuse_pointer
from dsd_refine.errors import CheckpointError


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


# What timm.models.load_state_dict looks for, in its order: the averaged weights come first.
TIMM_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
WRAPPERS = ("_orig_mod.", "module.")  # what torch.compile, data parallelism and averaging put before each name
DEEPEST = 4  # mappings in mappings that are looked into for weights
AVERAGED = "n_averaged"  # the counter of torch's AveragedModel, beside the weights that it wraps
SAFER = "where you trust the file, save its weights alone (torch.save of the state dict, or safetensors)"


class Inert:
    """Stands in for what a training script saves beside the weights. It takes anything and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# Settings (timm's `args`, paths in them) and numbers (a metric that NumPy computed): none of them is made, Inert is.
BESIDE = (
    "argparse.Namespace", "types.SimpleNamespace",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype",
    "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "pathlib.PureWindowsPath",
    "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
)  # fmt: skip


@dataclass(frozen=True)
class Pickled:
    """The tensors of a pickle; the key that they stand under (None: the file is the mapping itself); what is to be said."""

    tensors: dict[str, torch.Tensor]
    key: str | None = None
    notes: tuple[str, ...] = ()


def read_pickle(path: Path, asked: str | None = None) -> Pickled:
    """The weights of a pickle, those under the key `asked` where it is given.

    Raises:
        CheckpointError: it needs more than weights-only, holds no plain mapping of tensors, no such key, or several
            sets of weights of which timm's rule says nothing.
    """
    key, found, notes = _chosen(path, _loaded(path), asked)
    odd = [str(name) for name, value in found.items() if not isinstance(value, torch.Tensor)]
    if odd:
        place = f" under {key!r}" if key else ""
        raise CheckpointError(f"{path}: holds no plain mapping of names to tensors{place}: {odd[0]!r:.100} is no tensor")
    named = {str(name): tensor.detach() for name, tensor in found.items()}
    bare = _unwrapped(named)
    if bare is not named:
        notes = (*notes, f"{path.name}: names are written without the {_wrapper(named)!r} that a training script put there")
    return Pickled(bare, key, notes)


def _loaded(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in BESIDE]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the pickle makes it raise
        wanted = re.search(r"GLOBAL (\S+)", str(error))  # torch's own text advises to load it unsafely
        why = f"it wants {wanted[1]}, which is no tensor; {SAFER}" if wanted else "it is no whole file of tensors"
        raise CheckpointError(f"{path}: cannot be read weights-only, refused ({why})") from None


def _chosen(path: Path, found: Any, asked: str | None) -> tuple[str | None, Mapping[Any, Any], tuple[str, ...]]:
    """(key, what stands there, what is to be said) of the weights that are meant."""
    sets = dict(_sets(found))
    if asked is not None:
        if asked not in sets:
            raise CheckpointError(f"{path}: --weights-key {asked}: no weights there; {_offered([*sets])}")
        key = asked
    elif isinstance(found, Mapping) and found and all(isinstance(value, torch.Tensor) for value in found.values()):
        return None, found, ()
    elif not sets and _has_weights(found):
        return None, found, ()  # and something else besides, which is named
    elif not sets:
        raise CheckpointError(f"{path}: does not hold a plain mapping of names to tensors; {SAFER}")
    else:
        key = _by_timm(path, found, [*sets])
    left = [name for name in sets if name != key]
    why = "--weights-key" if asked else "as timm does; --weights-key chooses"
    said = f"{path.name}: of its sets of weights {key!r} is taken ({why}), left: {_few(left)}"
    return key, sets[key], (said,) if left else ()


def _by_timm(path: Path, found: Mapping[Any, Any], sets: list[str]) -> str:
    """The set that timm's loader would take, or the only one.

    Raises:
        CheckpointError: that loader knows none of them, or finds further mappings under its key instead of the weights.
    """
    by_timm = next((key for key in TIMM_KEYS if any(name == key or name.startswith(f"{key}.") for name in sets)), None)
    if by_timm in sets and not any(name.startswith(f"{by_timm}.") for name in sets):
        return by_timm
    if len(sets) > 1:
        raise CheckpointError(f"{path}: holds several sets of weights ({_few(sets)}); say which with --weights-key")
    if by_timm is None and _has_weights(found, least=2):
        raise CheckpointError(
            f"{path}: holds weights, and under {sets[0]!r} another set of them; --weights-key {sets[0]} takes those, "
            "or save those that are meant alone"
        )
    return sets[0]


def _sets(found: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """(key, mapping) of each set of weights in a mapping, those inside others under dotted keys (`ema.module`, `ema.0`).

    Averages kept as a list have numbers for names: no model takes them, but they are there, and are named.
    """
    inner = [("", found)] if isinstance(found, Mapping) else []
    entered = {id(found)}  # a mapping may hold itself, or another one many times
    for depth in range(DEEPEST):
        outer, inner = inner, []
        for place, mapping in outer:
            for name, held in mapping.items():
                value = {str(number): each for number, each in enumerate(held)} if isinstance(held, list | tuple) else held
                if not isinstance(value, Mapping) or (isinstance(name, str) and name.startswith("optim")):
                    continue
                if depth and not isinstance(name, str):
                    continue  # an optimizer numbers its own
                if _has_weights(value):
                    yield f"{place}{name}", value
                if id(held) not in entered:
                    entered.add(id(held))
                    inner.append((f"{place}{name}.", value))


def _has_weights(value: Any, least: int = 1) -> bool:
    """Is it a mapping that holds a floating-point tensor of so many dimensions under a name? (An optimizer numbers its own.)"""
    return isinstance(value, Mapping) and any(
        isinstance(name, str) and isinstance(inner, torch.Tensor) and inner.is_floating_point() and inner.ndim >= least
        for name, inner in value.items()
    )


def _few(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _offered(sets: list[str]) -> str:
    return f"the file has {_few(sets)}" if sets else "the file is itself a mapping of tensors, or holds none"


def _unwrapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names that the model itself gives them, where a wrapper put something before all of them."""
    wrapper = _wrapper(tensors)
    if not wrapper:
        return tensors
    return {name.removeprefix(wrapper): tensor for name, tensor in tensors.items() if name != AVERAGED}


def _wrapper(tensors: Mapping[str, torch.Tensor]) -> str:
    """What stands before every name: `module.`, `_orig_mod.`, one before the other, or nothing."""
    names, found = [name for name in tensors if name != AVERAGED], ""
    while each := [one for one in WRAPPERS if names and all(name.startswith(found + one) for name in names)]:
        found += each[0]
    return found
