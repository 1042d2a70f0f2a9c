"""Building a model whose values come from a file: drawing the random values that they replace would
be wasted time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# methods of Tensor, and functions of `torch.nn.init` that respect torch function modes
RANDOM_FILLS = frozenset({"normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_"})


class SkipInit(TorchFunctionMode):
    """Within, a parameter that a constructor would fill with random numbers is filled with zeros,
    which is much faster.

    Zeros, not uninitialised memory: `placement.place` tells by the numbers in a tensor where it
    came from, so that what is in no file must never hold such numbers by chance. Buffers are drawn:
    they may be in no file, and then their values count.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        filled = kwargs["tensor"] if "tensor" in kwargs else args[0] if args else None
        if isinstance(filled, torch.nn.Parameter) and getattr(func, "__name__", "") in RANDOM_FILLS:
            filled.detach().zero_()
            return filled
        return func(*args, **kwargs)
