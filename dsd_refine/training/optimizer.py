"""The optimizer and the learning rate of a phase."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer

from dsd_refine.recipe import Phase

if TYPE_CHECKING:
    from dsd_refine.training.state import Loop


def learning_rate(phase: Phase, step: int, total: int) -> float:
    """The learning rate of a step in 1..total.

    The first W = `warmup_steps` steps rise linearly to `lr`. Step t after them has the value of the
    schedule's curve at x = (t - W - 1) / (total - W). `linear` and `cosine` fall towards 0. `step`
    falls to a tenth at x = 1/3 and again at x = 2/3. `constant` stays at `lr`.
    """
    if step <= phase.warmup_steps:
        return phase.lr * step / phase.warmup_steps
    x = (step - phase.warmup_steps - 1) / (total - phase.warmup_steps)
    curves = {
        "constant": 1.0,
        "linear": 1 - x,
        "cosine": 0.5 * (1 + math.cos(math.pi * x)),
        "step": 0.1 ** int(3 * x + 1e-9),
    }
    return phase.lr * curves[phase.schedule]


def make_optimizer(loop: Loop, phase: Phase) -> torch.optim.Optimizer:
    """Make a new optimizer for a phase: SGD (no Nesterov) or AdamW, without weight decay on 1-D parameters.

    The optimizer is fused: it goes over the weights once and not four to ten times, also on a CPU. It
    is not fused with a loss scale, where a fused optimizer skips steps and does not report it.
    Only a loss scale needs Accelerate's wrapper, which costs time in every step. It is used directly,
    because `accelerator.prepare` would keep the optimizer of every phase, with its state, in memory
    until the end of the run.
    """
    recipe = loop.recipe
    groups: list[dict[str, Any]] = []
    named: dict[int, tuple[str, torch.Tensor]] = {}
    for name, parameter in loop.parameters.items():
        named.setdefault(id(parameter), (name, parameter))  # a tied parameter counts once, under its first name
    for factor in dict.fromkeys((1.0, *phase.lr_scale.values())):
        trained = [p for name, p in named.values() if p.requires_grad and rate_factor(phase, name) == factor]
        decaying, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        if not recipe.weight_decay:
            decaying, others = [], decaying + others  # one group is one pass
        groups += [
            {"params": decaying, "weight_decay": recipe.weight_decay, "factor": factor},
            {"params": others, "weight_decay": 0.0, "factor": factor},
        ]
    groups = [group for group in groups if group["params"]]
    scaler = loop.accelerator.scaler
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=phase.lr, fused=scaler is None)
    else:
        optimizer = torch.optim.SGD(groups, lr=phase.lr, momentum=recipe.momentum, fused=scaler is None)
    return optimizer if scaler is None else AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)


def let_go_of_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Free the gradients. `zero_grad` does the same, and takes longer than a small layer's step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Set the learning rate of every parameter group, times its factor. Returns the rate without a factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)
    return rate


def rate_factor(phase: Phase, name: str) -> float:
    """Return the factor of the learning rate of a parameter (see `Phase.lr_scale`)."""
    return next((factor for pattern, factor in phase.lr_scale.items() if fnmatchcase(name, pattern)), 1.0)
