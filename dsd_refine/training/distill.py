"""Self-distillation: the unchanged source model is the teacher, beside the labels (Hinton et al., 2015)."""

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
    """Return a function that computes the task's summed loss with distillation, a scalar tensor.

    The loss is (1 - weight) * task loss + weight * T^2 * KL(teacher || model). Both are sums over the
    same targets. Both distributions of the KL term have the temperature T; the factor T^2 keeps the
    size of its gradient.

    Args:
        task: has `logits(forward, batch)`, which returns targets x classes: one row for each target
            that the loss counts.
        teacher: the unchanged source model. It gets no gradient.
    """

    def loss(forward: Forward, batch: Batch) -> torch.Tensor:
        outputs: list[Any] = []

        # with `wraps`, `inspect.unwrap` finds the model behind `recorded`, to see which arguments it takes
        @wraps(forward, assigned=(), updated=())
        def recorded(*args: Any, **inputs: Any) -> Any:
            outputs.append(forward(*args, **inputs))
            return outputs[-1]

        task_loss: torch.Tensor = task.loss(recorded, batch)
        # the logits come from the outputs of the calls above (a task may call the model several times per batch)
        recorded_outputs = iter(outputs)
        student_logits = task.logits(lambda *args, **inputs: next(recorded_outputs), batch)
        with torch.no_grad():
            teacher_logits = task.logits(teacher, batch)
        t = distill.temperature
        log_probabilities = F.log_softmax(student_logits / t, dim=-1), F.log_softmax(teacher_logits / t, dim=-1)
        divergence = F.kl_div(*log_probabilities, reduction="sum", log_target=True) * t**2
        return (1 - distill.weight) * task_loss + distill.weight * divergence

    return loss
