"""BatchNorm's running statistics: they are computed again after the weights changed without a batch."""

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
    """Compute BatchNorm's running statistics again, as plain means over the batches of one epoch.

    This is needed for averaged weights and for weights that were masked and not trained afterwards:
    no batch has gone through them (Izmailov et al. 2018, section 3.2). Every process goes through all
    batches, so all processes get the same statistics.

    Returns:
        False if the model has no BatchNorm with running statistics, and True otherwise.
    """
    norms = [m for m in loop.model.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]
    if not norms:
        return False
    settings = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]  # type: ignore[union-attr]
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
    for norm, momentum, tracked in settings:
        norm.momentum = momentum
        norm.num_batches_tracked.copy_(tracked)  # type: ignore[union-attr]
    loop.model.train(was_training)
    return True


def without_variance(loop: Loop) -> list[str]:
    """Names of the BatchNorm layers that get a single value per channel from one row.

    For example, a layer after a global pooling. Such a layer cannot train on a batch of one row.
    """
    names: list[str] = []

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = [*args, *kwargs.values()][0]
            if values.numel() == values.shape[1]:
                names.append(name)

        return hook

    norms = [(name, module) for name, module in loop.model.named_modules() if isinstance(module, BatchNorm)]
    hooks = [module.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, module in norms]
    loop.model.eval()
    with torch.no_grad():
        for seed in (None, 0):  # the row as in evaluation, then as in training, where an image may be smaller
            loop.task.loss(loop.model, on_device(loop, loop.task.batch(loop.task.train, [(0, seed)])))
    for hook in hooks:
        hook.remove()
    return names
