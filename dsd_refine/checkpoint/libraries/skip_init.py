"""Building a model whose values come from a file: the random ones that they replace need not be drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# what a constructor fills a parameter with: Tensor's own methods, and those of `torch.nn.init` that modes are asked about
DRAWN = frozenset({"normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_"})


class Undrawn(TorchFunctionMode):
    """Within, parameters that would be filled with random numbers are zeros, which are made much sooner.

    Zeros, not what happens to lie there: loading is traced by numbers in the tensors (`placement.place`), and what is in no
    file must never hold such numbers. Buffers are drawn: they may be in no file, and count.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        filled = kwargs["tensor"] if "tensor" in kwargs else args[0] if args else None
        if isinstance(filled, torch.nn.Parameter) and getattr(func, "__name__", "") in DRAWN:
            filled.detach().zero_()
            return filled
        return func(*args, **kwargs)
