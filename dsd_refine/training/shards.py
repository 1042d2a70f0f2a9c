"""A model that is divided among the processes of a run: PyTorch's FSDP2 (`fully_shard`).

FSDP2 gathers the parameters of one block when its forward or backward needs them, and frees them
afterwards. Between the steps each process has some rows of every parameter, its shard. This module
gives the shards out as plain tensors, so that optimizer, masks, averages and the saved state work on
them as they work on a whole model. What needs whole tensors gathers them one at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from dsd_refine.checkpoint.placement import Placement, TensorSlice, count, within
from dsd_refine.errors import Diverged, UsageError
from dsd_refine.masking.layers import Layer
from dsd_refine.masking.masks import Group, Masks, counts_of, make_masks
from dsd_refine.training.blocks import divided_parts, repeated_blocks

T = TypeVar("T")
KEPT = 2  # gathered tensors that are kept, of those that hold several tensors of the file


@dataclass(frozen=True)
class Policy:
    """How FSDP2 computes and where it keeps the shards.

    Attributes:
        half: Gather parameters and compute in bfloat16. Shards and sums of gradients are float32.
        offload: Keep shards, gradients and the optimizer's state in the memory of the host.
    """

    half: bool = False
    offload: bool = False

    def options(self) -> dict[str, Any]:
        """Return the arguments of `fully_shard`."""
        options: dict[str, Any] = {}
        if self.half:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if self.offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        return options


class Shards:
    """The shards that this process has of a model. Making it divides the model.

    Every method is called by all processes together, and in the same order. What processes exchange is on `device`; with
    `offload` the shards are in the memory of the host.

    Attributes:
        parameters: name -> the rows of the parameter that this process has, as a plain tensor that shares
            the parameter's memory. A tied parameter has one tensor under each of its names.
        shapes: name -> shape of the whole parameter.
        joint: The names of the parameters that hold several tensors of the file (`own_placement` finds them).

    Args:
        model: A model with whole parameters, equal in all processes, or with parameters on the meta device.
        device: The device of this process.
        values: The whole values of parameters and buffers on the meta device, by name, such as views of mapped files. Each
            process reads its rows of them.
        policy: How FSDP2 computes: with which dtypes, and whether shards are kept by the host.

    Raises:
        UsageError: The model has no repeated blocks, or FSDP2 cannot divide it.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        values: Mapping[str, torch.Tensor] | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.model, self.device, self.policy = model, device, policy or Policy()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.joint: frozenset[str] = frozenset()
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        _divide(model, device, self.policy)
        _give_memory(model, torch.device("cpu") if self.policy.offload else device)
        self._divided = dict(model.named_parameters(remove_duplicate=False))
        own = {id(parameter): _own_rows(parameter) for parameter in self._divided.values()}
        self.parameters = {name: own[id(parameter)] for name, parameter in self._divided.items()}
        if values:
            self._read(values)

    @torch.no_grad()
    def _read(self, values: Mapping[str, torch.Tensor]) -> None:
        """Copy the rows of this process, and the buffers, from whole values."""
        for name, value in self.state().items():
            if name in values:
                value.copy_(self.cut(name, values[name]))

    def source(self, values: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Return the state (see `state`) with the values of the source, in float32. Its rows take no memory.

        Args:
            values: The whole values by name, as views of the files. A tied parameter has one of its names.
        """
        state = self.state()
        first = {id(self.parameters[name]): name for name in self.parameters if name in values}
        names = {name: first[id(parameter)] for name, parameter in self.parameters.items() if id(parameter) in first}
        # Buffers, and parameters that the model computes itself.
        others = {name: value.clone() for name, value in state.items() if name not in names}
        return Rows(self, values, names, others)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the model's state by name: the rows of this process, and whole buffers."""
        state = self.model.state_dict()
        return {name: self.parameters[name].detach() if name in self.parameters else value for name, value in state.items()}

    def take_gradients(self) -> None:
        """Move the gradients, which are summed over the processes by then, to the tensors of `parameters` that train.

        FSDP2 computes those of frozen parameters too, because it settles what trains when it divides a model.
        """
        for name, parameter in self._divided.items():
            if parameter.grad is not None:
                own = self.parameters[name]
                own.grad = parameter.grad.to_local() if own.requires_grad else None  # type: ignore[attr-defined]
                parameter.grad = None

    @torch.no_grad()
    def clip(self, limit: float) -> None:
        """Clip the norm over all gradients of all processes, as `torch.nn.utils.clip_grad_norm_` does for one process."""
        tensors = [tensor for tensor in unique(self.parameters) if tensor.grad is not None]
        norm = nn.utils.get_total_norm([tensor.grad for tensor in tensors if tensor.grad is not None])
        nn.utils.clip_grads_with_norm_(tensors, limit, self.norms(norm))

    @torch.no_grad()
    def norms(self, own: torch.Tensor) -> torch.Tensor:
        """Return the norms of whole tensors, from those of the rows that each process has."""
        squares = own.to(self.device).square()
        dist.all_reduce(squares)
        return squares.sqrt()

    def whole(self, own: Mapping[str, torch.Tensor], to: int | None = None) -> Mapping[str, torch.Tensor]:
        """Return the whole tensors of which each process has its rows in `own`. Each is gathered when it is read.

        Args:
            own: The rows of this process, by name.
            to: The number of the process that gets the whole tensors; the others get their rows. None: all get them.
        """
        return Wholes(self, own, to)

    @torch.no_grad()
    def gathered(self, name: str, own: torch.Tensor, to: int | None = None) -> torch.Tensor:
        """Return a whole tensor, from the rows that each process has of it.

        Args:
            name: The name of the parameter. The tensor may be another one of its shape.
            own: The rows of this process. What is no parameter is not divided, and is returned as it is.
            to: The number of the process that gets the whole tensor; the others get `own`. None: all get it.
        """
        if name not in self.shapes:
            return own
        shape = self.shapes[name]
        padded = self._padded(own, shape)
        if to not in (None, self.rank):
            dist.gather(padded, None, dst=to)
            return own
        whole = padded.new_empty(self.world * len(padded), *shape[1:])
        if to is None:
            dist.all_gather_into_tensor(whole, padded)
        else:
            dist.gather(padded, list(torch.split(whole, len(padded))), dst=to)
        return whole[: shape[0]]

    def scattered(self, name: str, whole: torch.Tensor | None, owner: int) -> torch.Tensor:
        """Return the rows of this process of a flag for each element of a parameter.

        Args:
            name: The name of the parameter.
            whole: The flags, bool tensor of the whole parameter's shape, in the process `owner`. Elsewhere None.
            owner: The number of the process that has them.
        """
        shape, own = self.shapes[name], self.parameters[name]
        rows = torch.zeros(self._rows(shape), *shape[1:], dtype=torch.uint8, device=self.device)
        parts = None
        if whole is not None:
            padded = rows.new_zeros(self.world * len(rows), *shape[1:])
            padded[: shape[0]] = whole
            parts = list(torch.split(padded, len(rows)))
        dist.scatter(rows, parts, src=owner)
        return rows[: len(own)].to(own.device, torch.bool)

    def _padded(self, own: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Rows of a tensor with this shape on `device`, filled up to as many as other processes have."""
        if len(own) == self._rows(shape) and own.is_contiguous():
            return own.to(self.device)
        padded = torch.zeros(self._rows(shape), *shape[1:], dtype=own.dtype, device=self.device)
        padded[: len(own)] = own
        return padded

    def cut(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """Return the rows that this process has of a tensor with the shape of a parameter: a view of them."""
        if name not in self.shapes:
            return whole
        start = self.rank * self._rows(self.shapes[name])
        return whole[start : start + len(self.parameters[name])]

    def _rows(self, shape: Sequence[int]) -> int:
        """The rows of each process but the last ones, which may have less or none (as `torch.chunk` divides)."""
        return -(-shape[0] // self.world)

    def own_slices(self, slices: Sequence[TensorSlice]) -> tuple[TensorSlice, ...]:
        """Return the slices of a tensor of the file in the rows of this process. Where it has no elements, there is none.

        The elements of a tensor that is held in another form are numbered anew, from 0.
        """
        if slices[0].whole:
            return tuple(slices)
        own, before = [], 0
        for each in slices:
            rows, size = self.parameters[each.key], self._row_size(each.key)
            first = self.rank * self._rows(self.shapes[each.key]) * size
            here = within(each.target, first, first + len(rows) * size)
            if here is not None:
                own.append(TensorSlice(each.key, slice(before, before + count(here)), here))
                before += count(here)
        return tuple(own)

    def _row_size(self, name: str) -> int:
        return int(torch.Size(self.shapes[name][1:]).numel())

    def own_placement(self, placement: Placement) -> Placement:
        """Return where the rows of this process have the tensors of the file."""
        held = Counter(each.key for slices in placement.values() for each in slices)
        self.joint = frozenset(key for key, tensors in held.items() if tensors > 1)
        divided = {name: slices for name, slices in placement.items() if slices[0].key in self.shapes}
        own = {name: self.own_slices(slices) for name, slices in divided.items()}
        return {name: slices for name, slices in ({**placement, **own}).items() if slices}

    def own_layers(self, layers: Sequence[Layer]) -> list[Layer]:
        """Return the layers with the shapes of the rows that this process has. Layers without any are left out.

        Of a tensor that fuses experts, these are whole experts (see `divides_experts`).
        """
        own = [replace(layer, slices=self.own_slices(layer.slices)) for layer in layers]
        own = [replace(layer, shape=self._own_shape(layer.slices)) for layer in own if layer.slices]
        return [
            self._with_own_experts(layer) if layer.groups > 1 else layer for layer in own if layer.groups == 1 or layer.weights
        ]

    def _with_own_experts(self, layer: Layer) -> Layer:
        whole = self.shapes[layer.slices[0].key]
        rows = whole[0] // layer.groups  # of an expert
        return replace(layer, groups=layer.shape[0] // rows, first_group=self.rank * self._rows(whole) // rows)

    def divides_experts(self, layer: Layer) -> bool:
        """Return whether the rows of a process may begin or end within an expert of a tensor that fuses several."""
        if layer.groups == 1 or not layer.slices[0].whole:
            return layer.groups > 1
        whole = self.shapes[layer.slices[0].key]
        return whole[0] % layer.groups != 0 or self._rows(whole) % (whole[0] // layer.groups) != 0

    def _own_shape(self, slices: Sequence[TensorSlice]) -> tuple[int, ...]:
        if slices[0].whole:
            return tuple(self.parameters[slices[0].key].shape)
        return (sum(count(each.target) for each in slices),)

    def make_masks(
        self,
        layers: Sequence[Layer],
        own: Mapping[str, torch.Tensor],
        sparsity: float,
        criterion: str,
        seed: Sequence[int | str],
        counts: Mapping[Group, int] | None = None,
    ) -> Masks:
        """Make masks as `masks.make_masks` does, and return the rows of this process.

        The layers are dealt out: each process makes the masks of some whole layers, one at a time (those that one parameter
        holds together). So count and ties are those of the whole layer.
        """
        groups = _together([layer for layer in layers if any(counts_of(layer, sparsity, counts))])
        masks: Masks = {}
        for start in range(0, len(groups), self.world):
            dealt = groups[start : start + self.world]
            wholes = [{key: self.gathered(key, own[key], owner) for key in _keys(group)} for owner, group in enumerate(dealt)]
            mine: Masks = {}
            if self.rank < len(dealt):
                mine = make_masks(dealt[self.rank], wholes[self.rank], sparsity, criterion, seed, counts)
            for owner, group in enumerate(dealt):
                masks |= {key: self.scattered(key, mine.get(key), owner) for key in _keys(group)}
        return masks

    def summed(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Return the sum of each count over all processes. A process may lack names."""
        total: Counter[str] = Counter()
        for part in self.exchanged(dict(counts)):
            total.update(part)
        return dict(total)

    def in_all(self, groups: Sequence[Group]) -> list[Group]:
        """Return those of the groups of this process that all processes have, such as those without a gradient."""
        sets = [{tuple(group) for group in part} for part in self.exchanged(list(groups))]
        return [group for group in groups if all(tuple(group) in each for each in sets)]

    def exchanged(self, value: T) -> list[T]:
        """Return the values of all processes. They must be small, because they are pickled."""
        values: list[T] = [value] * self.world
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def agreed(self, context: AbstractContextManager[None]) -> Iterator[None]:
        """Enter a context. If it raises `Diverged` in one process, it is raised in all, so that none waits for another."""
        with ExitStack() as stack:
            error = None
            try:
                stack.enter_context(context)
            except Diverged as diverged:
                error = str(diverged)
            errors = [each for each in self.exchanged(error) if each is not None]
            if errors:
                raise Diverged(errors[0])
            yield


class Wholes(Mapping[str, torch.Tensor]):
    """Tensors of which each process has some rows. Reading one gathers it: all processes must read it together."""

    def __init__(self, shards: Shards, own: Mapping[str, torch.Tensor], to: int | None) -> None:
        self._shards, self._own, self._to = shards, own, to
        self._kept: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._shards.joint:
            return self._shards.gathered(name, self._own[name], self._to)
        if name not in self._kept:
            # The file's tensors of the experts of a block are read in turn from the same two tensors of the model.
            self._kept = dict([*self._kept.items()][1 - KEPT :])
            self._kept[name] = self._shards.gathered(name, self._own[name], self._to)
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


class Rows(Mapping[str, torch.Tensor]):
    """This process's rows of whole tensors, such as views of mapped files. Reading some copies them, in float32."""

    def __init__(
        self,
        shards: Shards,
        whole: Mapping[str, torch.Tensor],
        names: Mapping[str, str],
        others: Mapping[str, torch.Tensor],
    ) -> None:
        self._shards, self._whole, self._names, self._others = shards, whole, names, others

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._others:
            return self._others[name]
        own = self._names[name]
        return self._shards.cut(own, self._whole[own]).to(torch.float32)

    def __contains__(self, name: object) -> bool:
        return name in self._others or name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter([*self._names, *self._others])

    def __len__(self) -> int:
        return len(self._names) + len(self._others)


def _keys(layers: Sequence[Layer]) -> list[str]:
    """The names of the parameters that hold layers."""
    return list(dict.fromkeys(each.key for layer in layers for each in layer.slices))


def _together(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Group layers that are held by the same parameter, such as the experts of a mixture."""
    groups: list[list[Layer]] = []
    for layer in layers:
        keys = set(_keys([layer]))
        joined = [group for group in groups if keys & set(_keys(group))] if not layer.slices[0].whole else []
        groups = [group for group in groups if not any(group is each for each in joined)]
        groups.append([*(each for group in joined for each in group), layer])
    return groups


def unique(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors, and one that has several names only once."""
    return list({id(tensor): tensor for tensor in tensors.values()}.values())


def _divide(model: nn.Module, device: torch.device, policy: Policy) -> None:
    """Divide each block of the model, the embeddings, and what is left, among all processes, in place."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = repeated_blocks(model)
    if not blocks:
        raise UsageError("--shard: the model repeats no blocks, which could be divided; train it without --shard")
    _refuse_shared(model, blocks)
    try:
        # What is left to the root is whole during a forward and a backward, and so is its gradient.
        for part in divided_parts(model):
            fully_shard(part, mesh=mesh, **policy.options())
        # Else the root's parameters would stay whole after a forward, and its shards would be out of date.
        fully_shard(model, mesh=mesh, reshard_after_forward=True, **policy.options())
    except (ValueError, NotImplementedError) as error:
        raise UsageError(f"--shard: FSDP2 cannot divide this model: {error}") from None


@torch.no_grad()
def _give_memory(model: nn.Module, device: torch.device) -> None:
    """Give shards on the meta device memory without values. A tied parameter stays one tensor."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        return
    names = [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)]
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)  # type: ignore[no-untyped-call]
    first: dict[int, str] = {}
    for name, identity in names:
        if first.setdefault(identity, name) != name:
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, model.get_parameter(first[identity]))


def _refuse_shared(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Refuse a parameter that two blocks share, or a block and the rest: FSDP2 gathers each block by itself."""
    block_of = {id(inside): number for number, block in enumerate(blocks) for inside in block.modules()}
    holder: dict[int, int] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            block = block_of.get(id(module), -1)
            if holder.setdefault(id(parameter), block) != block:
                place = f"{name}.{attribute}".lstrip(".")
                raise UsageError(f"--shard: {place} is shared by two blocks of the model, which cannot be divided")


def _own_rows(parameter: torch.Tensor) -> torch.Tensor:
    """The rows of a divided parameter that this process has, as a plain tensor."""
    rows: torch.Tensor = parameter.detach().to_local()  # type: ignore[attr-defined]
    return rows.detach().requires_grad_(parameter.requires_grad)
