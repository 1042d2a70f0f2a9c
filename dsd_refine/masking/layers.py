"""Layers: the weight tensors of the file, where the model holds them, and which may be masked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from dsd_refine.checkpoint.placement import TensorSlice, first_of, storage_of
from dsd_refine.errors import UsageError
from dsd_refine.masking.kinds import find_owners, find_routers, kind_of


@dataclass(frozen=True)
class Layer:
    """One weight tensor of the file.

    Attributes:
        name: The tensor's name in the file.
        shape: The tensor's shape in the file.
        slices: Where the model holds the tensor's elements.
        groups: The number of experts that the tensor fuses along its first dimension; 1 if none.
        first_group: The number of the first of them, if these are rows of a divided tensor.
        excluded: Why the layer is not masked; None for a maskable layer.
        fixed: True if --include cannot make an excluded layer maskable.
    """

    name: str
    shape: tuple[int, ...]
    slices: tuple[TensorSlice, ...]
    groups: int = 1
    excluded: str | None = None
    fixed: bool = False
    first_group: int = 0

    @classmethod
    def of_parameter(cls, name: str, parameter: torch.Tensor) -> Layer:
        """Return the layer of a parameter that the file holds whole, under the model's name."""
        return cls(name, tuple(parameter.shape), (TensorSlice(name),))

    @property
    def weights(self) -> int:
        """The number of the tensor's elements."""
        return int(torch.Size(self.shape).numel())

    def masked(self, sparsity: float) -> int:
        """Return how many weights a mask of this sparsity sets to 0: 0 for an excluded layer."""
        return 0 if self.excluded else self.groups * masked_count(self.weights // self.groups, sparsity)


def masked_count(n: int, sparsity: float) -> int:
    """Return how many of n weights a mask sets to 0: round(sparsity * n), but at most n - 1."""
    return max(0, min(round(sparsity * n), n - 1))


def find_layers(
    model: nn.Module,
    tensors: Mapping[str, tuple[tuple[int, ...], Sequence[TensorSlice]]] | None = None,
    *,
    first: Iterable[str] = (),
    unreached: Iterable[str] = (),
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> list[Layer]:
    """Return every parameter tensor of the file as a layer, in the file's order.

    The kind of a tensor decides whether it may be masked (`dsd_refine.masking.kinds`).

    Args:
        model: The model that the file's tensors were loaded into.
        tensors: The file's tensors by name, each with its shape and its slices in the model. None: the
            file holds the model's parameters, under the model's names.
        first: Names of the modules that see the input. They are not masked.
        unreached: Names of the parameters that get no gradient. They are not masked.
        include: Glob patterns of names to mask as well.
        exclude: Glob patterns of names not to mask. They win over `include`.

    Raises:
        UsageError: A pattern matches no name, or no layer can be masked.
    """
    owners, routers = find_owners(model), find_routers(model)
    by_key = dict(model.named_parameters(remove_duplicate=False))
    if tensors is None:
        tensors = {name: (tuple(parameter.shape), (TensorSlice(name),)) for name, parameter in by_key.items()}
    first, unreached = set(first), set(unreached)
    layers: list[Layer] = []
    name_of: dict[tuple[object, ...], str] = {}
    for name, (shape, slices) in tensors.items():
        if slices[0].key not in by_key:
            continue  # a buffer
        layer = Layer(name, shape, tuple(slices))
        # Two tensors of the file may fill one fused parameter, at different elements.
        storage = (*storage_of(by_key[slices[0].key]), first_of(slices[0].target))
        if storage in name_of:
            layers.append(replace(layer, excluded=f"the same storage as {name_of[storage]}", fixed=True))
            continue
        name_of[storage] = name
        keys = [tensor_slice.key for tensor_slice in layer.slices]
        places = [place for key in keys for place in owners[storage_of(by_key[key])]]
        reason, fixed, groups = kind_of(shape, keys, places, by_key[keys[0]], routers)
        if reason is None and any(module_name in first for module_name, _, _ in places):
            reason = "the first layer: it sees the input"
        if reason is None and all(tensor_slice.key in unreached for tensor_slice in layer.slices):
            reason = "the task's loss does not reach it"
        layers.append(replace(layer, excluded=reason, fixed=fixed, groups=groups))
    layers = _apply_patterns(layers, tuple(include), tuple(exclude))
    if not any(layer.excluded is None for layer in layers):
        raise UsageError("the model has no layer to mask; see `plan` for each parameter's reason, and --include")
    return layers


def _apply_patterns(layers: list[Layer], include: tuple[str, ...], exclude: tuple[str, ...]) -> list[Layer]:
    """Exclude and include layers by glob patterns.

    A pattern matches the name in the file or in the model.
    """

    def matches(layer: Layer, patterns: tuple[str, ...]) -> bool:
        names = {layer.name, *(tensor_slice.key for tensor_slice in layer.slices)}
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
