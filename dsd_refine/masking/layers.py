"""Which weights may be masked: a layer, and the slices of the model's tensors that hold it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from dsd_refine.errors import UsageError
from dsd_refine.masking.kinds import find_owners, find_routers, kind_of, storage


@dataclass(frozen=True)
class Spot:
    """Elements of a parameter: `source` in the file's tensor are `target` in the parameter `key` (empty: all, in order)."""

    key: str
    source: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True)
class Layer:
    """One weight tensor of the file. `groups` > 1 where it fuses that many experts along its first dimension.

    `excluded` is None for a maskable layer, else the reason. `weights` is its number of elements.
    """

    name: str
    shape: tuple[int, ...]
    spots: tuple[Spot, ...]
    groups: int = 1
    excluded: str | None = None
    fixed: bool = False

    @property
    def weights(self) -> int:
        return int(torch.Size(self.shape).numel())

    def masked(self, sparsity: float) -> int:
        """How many weights a mask of this sparsity takes out of the layer (0 if excluded)."""
        return 0 if self.excluded else self.groups * masked_count(self.weights // self.groups, sparsity)


def masked_count(n: int, sparsity: float) -> int:
    """The one formula: round(s * n) weights of n are masked, at most n - 1."""
    return max(0, min(round(sparsity * n), n - 1))


def find_layers(
    model: nn.Module,
    tensors: Mapping[str, tuple[tuple[int, ...], Sequence[Spot]]],
    *,
    first: Iterable[str] = (),
    unreached: Iterable[str] = (),
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> list[Layer]:
    """Every parameter tensor of the file as a layer, maskable or with the reason why not, in file order.

    `tensors` maps a file's tensor to its shape and its spots in the model; `first` names the modules that see the input,
    `unreached` the parameters without gradient. What may be masked is decided by kind (`dsd_refine.kinds`).

    Raises:
        UsageError: a pattern that matches nothing, or nothing left to mask.
    """
    owners, routers = find_owners(model), find_routers(model)
    by_key = dict(model.named_parameters(remove_duplicate=False))
    first, unreached = set(first), set(unreached)
    layers: list[Layer] = []
    seen: dict[tuple[object, ...], str] = {}
    for name, (shape, spots) in tensors.items():
        if spots[0].key not in by_key:
            continue  # a buffer
        layer = Layer(name, shape, tuple(spots))
        identity = (*storage(by_key[spots[0].key]), int(spots[0].target[0]) if len(spots[0].target) else None)
        if identity in seen:
            layers.append(replace(layer, excluded=f"the same storage as {seen[identity]}", fixed=True))
            continue
        seen[identity] = name
        keys = [spot.key for spot in layer.spots]
        places = [place for key in keys for place in owners[storage(by_key[key])]]
        reason, fixed, groups = kind_of(shape, keys, places, by_key[keys[0]], routers)
        if reason is None and any(module_name in first for module_name, _, _ in places):
            reason = "the first layer: it sees the input"
        if reason is None and all(spot.key in unreached for spot in layer.spots):
            reason = "the task's loss does not reach it"
        layers.append(replace(layer, excluded=reason, fixed=fixed, groups=groups))
    layers = _apply_patterns(layers, tuple(include), tuple(exclude))
    if not any(layer.excluded is None for layer in layers):
        raise UsageError("the model has no layer to mask; see `plan` for each parameter's reason, and --include")
    return layers


def _apply_patterns(layers: list[Layer], include: tuple[str, ...], exclude: tuple[str, ...]) -> list[Layer]:
    def matches(layer: Layer, patterns: tuple[str, ...]) -> bool:
        names = {layer.name, *(spot.key for spot in layer.spots)}
        return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)

    for pattern in (*include, *exclude):
        if not any(matches(layer, (pattern,)) for layer in layers):
            raise UsageError(f"the pattern {pattern!r} matches no parameter; `plan` lists the names")
    result = []
    for layer in layers:
        if matches(layer, exclude):
            layer = replace(layer, excluded=layer.excluded or "excluded by --exclude")
        elif layer.excluded and not layer.fixed and matches(layer, include):
            layer = replace(layer, excluded=None)
        result.append(layer)
    return result
