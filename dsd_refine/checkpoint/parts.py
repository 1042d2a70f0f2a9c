"""Load a checkpoint by its library part by part, so that no more than a block of the model is in memory.

The tensors of all other parts are given without values. A library that stacks, splits or renames tensors does so without
values too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

BLOCK = re.compile(r"(.*?\.\d+)\.")  # a name up to its first number, which is that of a block


class Absent(torch.Tensor):
    """A tensor with shape and dtype and without values. It stays without when a library moves it to a device."""

    @staticmethod
    def like(tensor: torch.Tensor) -> Absent:
        """Return one with the shape and the dtype of a tensor."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").as_subclass(Absent)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let `to` change the dtype alone, and `cpu` nothing."""
        kwargs = kwargs or {}
        if function is torch.Tensor.cpu:
            return args[0]
        if function is torch.Tensor.to:
            dtypes = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.dtype)]
            args, kwargs = (args[0], dtypes[0] if dtypes else args[0].dtype), {}
        return super().__torch_function__(function, types, args, kwargs)  # type: ignore[no-untyped-call]


def parts_of(names: Iterable[str]) -> list[list[str]]:
    """Group names of tensors by the block that they belong to. What is outside of blocks is one group."""
    parts = defaultdict(list)
    for name in names:
        found = BLOCK.match(name)
        parts[found.group(1) if found else ""].append(name)
    return list(parts.values())


def loaded_by_parts(
    load: Callable[[dict[str, torch.Tensor]], torch.nn.Module],
    shapes: dict[str, torch.Tensor],
    names: Iterable[str],
    values: Callable[[list[str]], dict[str, torch.Tensor]],
) -> Iterator[dict[str, torch.Tensor]]:
    """Load one part of the model after the other.

    Args:
        load: Loads a model by its library from all tensors of the checkpoint.
        shapes: These tensors by name. Only their shapes and dtypes are used.
        names: Which of them are loaded.
        values: Returns the values of those of a part.

    Yields:
        The tensors of the model's state that have values, by name.
    """
    absent = {name: Absent.like(tensor) for name, tensor in shapes.items()}
    for part in parts_of(names):
        state = load({**absent, **values(part)}).state_dict()
        yield {name: tensor for name, tensor in state.items() if not tensor.is_meta}
