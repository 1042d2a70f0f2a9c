"""The values of a checkpoint's files under the names that its model has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch

from dsd_refine.checkpoint.placement import Placement, TensorSlice, on


class FileValues(Mapping[str, torch.Tensor]):
    """The model's tensors by name, in the dtypes of the files. Tensors that the files hold whole are views of the files.

    The others, such as the experts that a model fuses, are put together whenever they are read.

    Args:
        placement: Where the model holds the tensors of the files.
        tensors: The tensors of the files by name, as views of the files.
        state: The model's tensors by name. Only their shapes are used.
    """

    def __init__(self, placement: Placement, tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        self._tensors, self._pieces = tensors, defaultdict[str, list[tuple[str, TensorSlice]]](list)
        for name, slices in placement.items():
            for each in slices:
                self._pieces[each.key].append((name, each))
        self._shapes = {key: state[key].shape for key in self._pieces}

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self._pieces:
            raise KeyError(key)
        name, first = self._pieces[key][0]
        if first.whole:
            return self._tensors[name]
        flat = self._tensors[name].new_empty(self._shapes[key].numel())
        for name, each in self._pieces[key]:
            flat[on(each.target, flat.device)] = each.of_file(self._tensors[name].reshape(-1))
        return flat.reshape(self._shapes[key])

    def __contains__(self, key: object) -> bool:
        return key in self._pieces

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)
