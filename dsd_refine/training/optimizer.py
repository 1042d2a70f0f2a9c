"""The optimizer of a phase and its learning rate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from accelerate.optimizer import AcceleratedOptimizer

from dsd_refine.recipe import Phase

if TYPE_CHECKING:
    from dsd_refine.training.state import Loop


def learning_rate(phase: Phase, step: int, total: int) -> float:
    """Rate of step 1..total: linear warm-up over W steps, then the curve at (t - W - 1) / (T - W), towards 0.

    `step` falls to a tenth at each third of the way.
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


def make_optimizer(loop: Loop, phase: Phase) -> AcceleratedOptimizer:
    """A new optimizer for a phase: SGD (no Nesterov) or AdamW, without decay on 1-D parameters.

    Fused: one pass over the weights in place of four to ten, on a CPU as well; but with a loss scale it would skip steps
    without saying so. Wrapped by hand: `accelerator.prepare` would hold every phase's optimizer, with its state, until the
    end of the run.
    """
    recipe = loop.recipe
    trained = [p for p in loop.model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    scaler = loop.accelerator.scaler
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=phase.lr, fused=scaler is None)
    else:
        optimizer = torch.optim.SGD(groups, lr=phase.lr, momentum=recipe.momentum, fused=scaler is None)
    return AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)


def set_rate(optimizer: AcceleratedOptimizer, rate: float) -> float:
    """Give every parameter group this rate; returns it."""
    for parameters in optimizer.param_groups:
        parameters["lr"] = rate
    return rate
