"""Saliency (Lee et al. 2019, SNIP): how much the loss depends on each weight, measured on a few batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsd_refine.training.batches import loader
from dsd_refine.training.blame import computed
from dsd_refine.training.evaluate import first_items
from dsd_refine.training.state import Key, on_device

if TYPE_CHECKING:
    from dsd_refine.training.state import Loop

BATCHES = 8  # batches whose gradients are added


def saliency(loop: Loop, key: Key) -> dict[str, torch.Tensor]:
    """Return |weight * gradient| for each parameter, of its shape and strides. The model stays unchanged.

    The gradient is that of the task's own loss on the first rows of a phase, with their augmentation, in evaluation
    mode. Every process computes all of it, so all have the same values.

    Args:
        loop: The training loop.
        key: The seeds of the phase.
    """
    size, was_training = loop.recipe.batch_size, loop.model.training
    items = first_items(loop, key, BATCHES * size)
    plan = [(items[start : start + size], True) for start in range(0, len(items), size)]
    loop.model.eval()
    loop.model.zero_grad(set_to_none=True)
    # cuDNN's recurrent layers have no backward in evaluation mode.
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        for batch in loader(loop, loop.task.train, plan):
            loss = computed(loop, loop.task.train, loop.model, on_device(loop, batch), loop.task.loss)
            loss.backward()  # type: ignore[no-untyped-call]
    values = {name: torch.zeros_like(parameter) for name, parameter in loop.parameters.items()}
    for name, parameter in loop.parameters.items():
        if parameter.grad is not None:
            values[name].copy_((parameter.detach() * parameter.grad).abs())
    loop.model.zero_grad(set_to_none=True)
    loop.model.train(was_training)
    return values
