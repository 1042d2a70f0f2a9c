"""Sharpness-aware minimization (Foret et al. 2021): the gradient of a step is taken uphill of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from dsd_refine.masking.masks import Masks, mask_gradients

if TYPE_CHECKING:
    from dsd_refine.training.state import Loop


@contextmanager
def uphill(loop: Loop, masks: Masks, radius: float) -> Iterator[None]:
    """Inside the context, the weights are moved by `radius` along their gradient; afterwards they are exactly as before.

    Masked weights are not moved. Buffers, such as BatchNorm's statistics, are as before too.

    Args:
        loop: The loop. Its parameters have the gradients of the step.
        masks: The masks that hold now.
        radius: The length of the whole move (rho in the paper).
    """
    mask_gradients(masks, loop.parameters)
    moved = [parameter for parameter in loop.model.parameters() if parameter.grad is not None]
    before = [tensor.detach().clone() for tensor in (*moved, *loop.model.buffers())]
    lengths = [torch.linalg.vector_norm(parameter.grad) for parameter in moved if parameter.grad is not None]
    share = radius / (torch.linalg.vector_norm(torch.stack(lengths)) + 1e-12)
    with torch.no_grad():
        for parameter in moved:
            parameter.add_(parameter.grad * share)
    yield
    with torch.no_grad():
        for tensor, value in zip((*moved, *loop.model.buffers()), before, strict=True):
            tensor.copy_(value)
