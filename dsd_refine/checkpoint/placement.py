"""Where each tensor of the file lives in the model, found by watching the library's own loader instead of imitating it.

Most tensors keep name, shape and values: nothing to find. For the rest (legacy names, prefixes, weight-norm pairs, fused
or split or permuted tensors) the library loads the checkpoint once more with every element replaced by a number of its
own; where that number comes to lie in the model is where the element lives. A loader that computes instead of moving
cannot be undone exactly, shows itself by numbers that are none of ours, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from dsd_refine.checkpoint.layout import Layout
from dsd_refine.checkpoint.safetensors_file import Entry, listed
from dsd_refine.errors import CheckpointError

FIRST_ID = 1024  # above what initialisers write (0, 1, small noise), so that a re-made tensor is not taken for a moved one
EMPTY = torch.empty(0, dtype=torch.int64)

Load = Callable[[dict[str, torch.Tensor], torch.dtype], torch.nn.Module]


@dataclass(frozen=True)
class Part:
    """Elements `source` of a file's tensor are elements `target` of the model's tensor `key` (flat, logical order).

    `whole` means all elements in the same order; `source` and `target` are empty then.
    """

    key: str
    source: torch.Tensor = EMPTY
    target: torch.Tensor = EMPTY

    @property
    def whole(self) -> bool:
        return self.source is EMPTY


Placement = dict[str, tuple[Part, ...]]


def gather(parts: tuple[Part, ...], start: torch.Tensor, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The file's tensor rebuilt from the model. `start` (the file's values) stays where no part says otherwise."""
    if parts[0].whole:
        return state[parts[0].key].detach().reshape(start.shape)
    out = start.to(torch.float32).reshape(-1).clone()
    for part in parts:
        values = state[part.key].detach().to("cpu", torch.float32).reshape(-1)
        out[part.source] = values[part.target]
    return out.reshape(start.shape)


def place(layout: Layout, model: torch.nn.Module, load: Load | None, same: Callable[[str], bool]) -> Placement:
    """File tensor -> parts, for every tensor of the file that is the model's. Tensors left out pass through.

    `same(name)` says whether the model's tensor of that name holds the file's values (always, on the meta device).
    `load` repeats the library's loading with given tensors and dtype; None skips what would need it.

    Raises:
        CheckpointError: a parameter that no tensor of the file accounts for, or a loader that does more than move.
    """
    state = model.state_dict(keep_vars=True)
    found: Placement = {}
    for name in layout.names():
        if name in state and tuple(state[name].shape) == layout.entry(name).shape and same(name):
            found[name] = (Part(name),)
    # an unplaced tensor may be foreign, or the model's under another name, also as a second copy of a tied one
    unplaced = [n for n in layout.names() if n not in found and _traceable(layout.entry(n))]
    if unplaced and load is not None:
        found.update(_trace(layout, load, [key for key in state if key not in found], found))
    _refuse_uncovered(layout, model, found, state)
    return found


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    if tensor.is_meta:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def _traceable(entry: Entry) -> bool:
    """Weights and statistics, and single whole numbers, which count (`num_batches_tracked`); others are tables that stay."""
    return entry.dtype.is_floating_point or (entry.dtype == torch.int64 and entry.numel == 1)


def _trace(layout: Layout, load: Load, keys: Iterable[str], placed: Placement) -> Placement:
    numbered, starts, at = {}, {}, FIRST_ID
    for name in layout.names():
        entry = layout.entry(name)
        if _traceable(entry):
            ids = torch.arange(at, at + entry.numel, dtype=torch.float64 if entry.dtype.is_floating_point else torch.int64)
            numbered[name], starts[name] = ids.reshape(entry.shape), at
            at += entry.numel
        else:
            numbered[name] = layout.tensor(name)
    traced = load(numbered, torch.float64).state_dict()
    parts: dict[str, list[Part]] = {}
    for key in keys:
        for name, part in _origins(key, traced[key], starts, at):
            if name not in placed:
                whole = traced[key].numel() == layout.entry(name).numel and _in_order(part)
                parts.setdefault(name, []).append(Part(key) if whole else part)
    return {name: tuple(found) for name, found in parts.items()}


def _origins(key: str, values: torch.Tensor, starts: dict[str, int], end: int) -> Iterable[tuple[str, Part]]:
    ids = values.reshape(-1)
    whole = ids.round().to(torch.int64)
    ours = bool(((whole == ids) & (whole >= FIRST_ID) & (whole < end)).all())
    if not ours or len(torch.unique(whole)) != len(whole):
        return  # not moved from the file: initialised or computed; place() refuses it if it is a parameter
    names = list(starts)
    bounds = torch.tensor([*starts.values()])
    owner = torch.bucketize(whole, bounds, right=True) - 1
    for number in torch.unique(owner).tolist():
        target = (owner == number).nonzero().reshape(-1)
        yield names[number], Part(key, whole[target] - starts[names[number]], target)


def _in_order(part: Part) -> bool:
    """Is it all elements in the same order, as after a mere renaming?"""
    return torch.equal(part.source, part.target) and torch.equal(part.source, torch.arange(len(part.source)))


def _refuse_other_sizes(layout: Layout, lost: list[str], state: dict[str, torch.Tensor]) -> None:
    """Refuse tensors that the library resized on loading, as a table of positions to another size of picture."""
    for name in lost:
        if name in layout.where and layout.entry(name).shape != tuple(state[name].shape):
            raise CheckpointError(f"{layout.folder}: {other_size(name, layout.entry(name).shape, state[name].shape)}")


def other_size(name: str, filed: Sequence[int], wanted: Sequence[int]) -> str:
    """What to say of a tensor whose shape in the file is not what the config makes it."""
    ours, theirs = ("x".join(map(str, shape)) for shape in (filed, wanted))
    hint = " (the size of pictures: timm's `img_size` in model_args, transformers' `image_size`)" if "pos" in name else ""
    return f"{name} is {ours} in the file, but {theirs} in the model that config.json asks for; correct config.json{hint}"


def _refuse_uncovered(layout: Layout, model: torch.nn.Module, found: Placement, state: dict[str, torch.Tensor]) -> None:
    covered = {_identity(state[part.key]) for parts in found.values() for part in parts}
    # a parameter that never trains and is in no file is one the model computes itself (sinusoidal positions)
    lost = [n for n, p in model.named_parameters() if p.requires_grad and p.numel() and _identity(p) not in covered]
    _refuse_other_sizes(layout, lost, state)
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            named = {f"{name}.{one}" for one in ("running_mean", "running_var")} & set(state)
            lost += sorted(one for one in named if _identity(state[one]) not in covered)
    if lost:
        raise CheckpointError(
            f"these parameters are not in the file as they are in the model: {listed(lost)}. Either they are missing, "
            "or the library computes them on loading, which cannot be written back exactly"
        )
