"""Self-distillation: the source, as it was, teaches beside the labels (Hinton et al., 2015)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dsd_refine.recipe import Distill
from dsd_refine.tasks.base import Batch, Forward


def distilled(task: Any, teacher: nn.Module, distill: Distill) -> Callable[[Forward, Batch], torch.Tensor]:
    """The task's summed loss, mixed with the divergence from the teacher summed over the same targets.

    The task has `logits(forward, batch)`: targets x classes, one row for each target that its loss counts.
    (1 - weight) * loss + weight * T^2 * KL(teacher || model), both at temperature T: T^2 keeps the size of the gradient.
    """

    def loss(forward: Forward, batch: Batch) -> torch.Tensor:
        seen: list[Any] = []

        @wraps(forward, assigned=(), updated=())  # so that `forward` is asked what it takes
        def recorded(*args: Any, **inputs: Any) -> Any:
            seen.append(forward(*args, **inputs))
            return seen[-1]

        own: torch.Tensor = task.loss(recorded, batch)
        again = iter(seen)  # a task may need several calls
        student = task.logits(lambda *args, **inputs: next(again), batch)
        with torch.no_grad():
            taught = task.logits(teacher, batch)
        t = distill.temperature
        logs = F.log_softmax(student / t, dim=-1), F.log_softmax(taught / t, dim=-1)
        apart = F.kl_div(*logs, reduction="sum", log_target=True) * t**2
        return (1 - distill.weight) * own + distill.weight * apart

    return loss
