"""What a peer does, written down where none of its packages holds it."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import nn


def timm_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Train as the loop of timm's train.py does on one device: zero, forward, backward, step, meters and schedule."""
    from timm.scheduler import CosineLRScheduler
    from timm.utils import AverageMeter

    model.train()
    schedule, loss_of = CosineLRScheduler(optimizer, t_initial=10**6, t_in_epochs=False), nn.CrossEntropyLoss()
    losses, seconds, began = AverageMeter(), AverageMeter(), time.time()
    for number, (x, y) in enumerate(batches):
        x = x.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        loss = loss_of(model(x), y)
        loss.backward()
        optimizer.step()
        losses.update(loss.item(), x.size(0))
        schedule.step_update(num_updates=number, metric=losses.avg)
        seconds.update(time.time() - began)
        began = time.time()
