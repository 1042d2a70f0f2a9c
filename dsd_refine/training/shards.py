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
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dsd_refine.errors import Diverged, UsageError
from dsd_refine.masking.layers import Layer
from dsd_refine.masking.masks import Group, Masks, make_masks

T = TypeVar("T")


class Shards:
    """The shards that this process has of a model. Making it divides the model.

    Every method is called by all processes together, and in the same order.

    Attributes:
        parameters: name -> the rows of the parameter that this process has, as a plain tensor that shares
            the parameter's memory. A tied parameter has one tensor under each of its names.
        shapes: name -> shape of the whole parameter.

    Args:
        model: A model with whole parameters, equal in all processes.
        device: The device of this process.

    Raises:
        UsageError: The model has no repeated blocks, or FSDP2 cannot divide it.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        _divide(model, device)
        self._divided = dict(model.named_parameters(remove_duplicate=False))
        own = {id(parameter): _own_rows(parameter) for parameter in self._divided.values()}
        self.parameters = {name: own[id(parameter)] for name, parameter in self._divided.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the model's state by name: the rows of this process, and whole buffers."""
        state = self.model.state_dict()
        return {name: value.to_local() if isinstance(value, DTensor) else value for name, value in state.items()}

    def take_gradients(self) -> None:
        """Move the gradients, which are summed over the processes by then, to the tensors of `parameters`."""
        for name, parameter in self._divided.items():
            if parameter.grad is not None:
                self.parameters[name].grad = parameter.grad.to_local()  # type: ignore[attr-defined]
                parameter.grad = None

    @torch.no_grad()
    def clip(self, limit: float) -> None:
        """Clip the norm over all gradients of all processes, as `torch.nn.utils.clip_grad_norm_` does for one process."""
        tensors = [tensor for tensor in unique(self.parameters) if tensor.grad is not None]
        norm = nn.utils.get_total_norm([tensor.grad for tensor in tensors if tensor.grad is not None])
        square = norm.to(self.device).square()
        dist.all_reduce(square)
        nn.utils.clip_grads_with_norm_(tensors, limit, square.sqrt())

    def whole(self, own: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Return the whole tensors of which each process has its rows in `own`. Each is gathered when it is read."""
        return Wholes(self, own)

    @torch.no_grad()
    def gathered(self, name: str, own: torch.Tensor) -> torch.Tensor:
        """Return a whole tensor, from the rows that each process has of it.

        Args:
            name: The name of the parameter. The tensor may be another one of its shape.
            own: The rows of this process. What is no parameter is not divided, and is returned as it is.
        """
        if name not in self.shapes:
            return own
        shape = self.shapes[name]
        rows = self._rows(shape)
        padded = torch.zeros(rows, *shape[1:], dtype=own.dtype, device=self.device)
        padded[: len(own)] = own
        whole = padded.new_empty(rows * self.world, *shape[1:])
        dist.all_gather_into_tensor(whole, padded)
        return whole[: shape[0]]

    def cut(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """Return a copy of the rows that this process has of a tensor with the shape of a parameter."""
        start = self.rank * self._rows(self.shapes[name])
        return whole[start : start + len(self.parameters[name])].clone()

    def _rows(self, shape: Sequence[int]) -> int:
        """The rows of each process but the last ones, which may have less or none (as `torch.chunk` divides)."""
        return -(-shape[0] // self.world)

    def own_layers(self, layers: Sequence[Layer]) -> list[Layer]:
        """Return the layers with the shapes of the rows that this process has."""
        return [replace(layer, shape=tuple(self.parameters[layer.slices[0].key].shape)) for layer in layers]

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

        Each process makes the mask of each whole layer, one layer at a time. So count and ties are those
        of the whole layer.
        """
        whole = self.whole(own)
        return {
            name: self.cut(name, mask)
            for layer in layers
            for name, mask in make_masks([layer], whole, sparsity, criterion, seed, counts).items()
        }

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

    def __init__(self, shards: Shards, own: Mapping[str, torch.Tensor]) -> None:
        self._shards, self._own = shards, own

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._shards.gathered(name, self._own[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


def unique(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors, and one that has several names only once."""
    return list({id(tensor): tensor for tensor in tensors.values()}.values())


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model repeats, such as its transformer layers. They are divided one by one.

    They are the modules of the classes that transformers names in `_no_split_modules`. Of a model without
    such names (timm), they are the members of lists of modules of one class. Blocks inside other blocks
    are left out.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    named = [module for module in model.modules() if type(module).__name__ in names]
    counts = Counter(type(module) for module in named)
    blocks = [module for module in named if counts[type(module)] > 1]
    return _outermost(blocks) or _outermost([member for module in model.modules() for member in _members(module)])


def _members(module: nn.Module) -> list[nn.Module]:
    """The members of a list of at least two modules of one class that have parameters."""
    members = list(module) if isinstance(module, nn.ModuleList | nn.Sequential) else []
    is_repeated = len(members) > 1 and len({type(member) for member in members}) == 1
    return members if is_repeated and all(any(True for _ in member.parameters()) for member in members) else []


def _outermost(modules: Sequence[nn.Module]) -> list[nn.Module]:
    inner = {id(inside) for module in modules for inside in module.modules() if inside is not module}
    return [module for module in modules if id(module) not in inner]


def _divide(model: nn.Module, device: torch.device) -> None:
    """Divide each block of the model, and what is outside of blocks, among all processes, in place."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = repeated_blocks(model)
    if not blocks:
        raise UsageError("--shard: the model repeats no blocks, which could be divided; train it without --shard")
    _refuse_shared(model, blocks)
    try:
        for block in blocks:
            fully_shard(block, mesh=mesh)
        # Else the root's parameters would stay whole after a forward, and its shards would be out of date.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
    except (ValueError, NotImplementedError) as error:
        raise UsageError(f"--shard: FSDP2 cannot divide this model: {error}") from None


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
