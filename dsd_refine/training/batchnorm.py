"""BatchNorm's running statistics: computed again where the weights changed without a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from dsd_refine.compat import BatchNorm
from dsd_refine.seeding import stable_seed
from dsd_refine.training.batches import epoch_order, loader
from dsd_refine.training.blame import computed
from dsd_refine.training.state import Key, Loop, micro_batches, on_device


@torch.no_grad()
def reestimate(loop: Loop, key: Key) -> bool:
    """BatchNorm's statistics anew: plain means over the batches of one epoch. False for a model without them.

    Averaged weights, and weights masked without training after, have seen no batch (Izmailov et al. 2018, section 3.2).
    Every process goes over all batches, so that all find the same.
    """
    norms = [m for m in loop.model.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]
    if not norms:
        return False
    kept = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]  # type: ignore[union-attr]
    was_training = loop.model.training
    loop.model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    order = epoch_order(key, 0, loop.task.train.units)
    micro = [order[np.asarray(m)] for m in micro_batches(loop.task.train.units, loop.recipe.batch_size * loop.world, True)]
    plan = [([(int(u), stable_seed(*key, 0, int(u), "augment")) for u in units], True) for units in micro]
    for batch in loader(loop, loop.task.train, plan):
        computed(loop, loop.task.train, loop.model, on_device(loop, batch), loop.task.loss)
    for norm, momentum, tracked in kept:
        norm.momentum = momentum
        norm.num_batches_tracked.copy_(tracked)  # type: ignore[union-attr]
    loop.model.train(was_training)
    return True


def without_variance(loop: Loop) -> list[str]:
    """Names of the BatchNorm layers that see a single value of each channel in a row, as after a global pooling."""
    found: list[str] = []

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = [*args, *kwargs.values()][0]
            if values.numel() == values.shape[1]:
                found.append(name)

        return hook

    norms = [(name, module) for name, module in loop.model.named_modules() if isinstance(module, BatchNorm)]
    hooks = [module.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, module in norms]
    loop.model.eval()
    with torch.no_grad():
        for seed in (None, 0):  # as evaluation sees the row, and as training does, which may be smaller
            loop.task.loss(loop.model, on_device(loop, loop.task.batch(loop.task.train, [(0, seed)])))
    for hook in hooks:
        hook.remove()
    return found
