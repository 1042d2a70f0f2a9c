"""What training and evaluation share (`Loop`), and how far a phase is (`Progress`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import Batch, Forward, Task
from dsd_refine.training.hooks import Hooks, Place


@dataclass
class Loop:
    """What training and evaluation share. `forward` is `model` wrapped for several processes or compiled."""

    accelerator: Accelerator
    model: nn.Module
    forward: Callable[..., Any]
    task: Task
    recipe: Recipe
    as_written: Callable[[nn.Module], AbstractContextManager[None]]
    log: Callable[[dict[str, Any]], None]
    stopping: Callable[[], bool]
    save: Callable[[], None]
    save_due: Callable[[], bool]
    workers: int = 0
    has_batchnorm: bool = False
    channels_last: bool = False
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    hooks: Sequence[Hooks] = ()
    place: Place | None = None  # of the phase that runs
    begun: bool = False  # has a step been trained, or tried?
    loss: Callable[[Forward, Batch], torch.Tensor] | None = None  # in place of the task's own

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the incomplete last group is a step of its own."""
        micro = micro_count(self.task.train.units, self.recipe.batch_size * self.world, self.has_batchnorm)
        return math.ceil(micro / self.recipe.gradient_accumulation_steps)


@dataclass
class Progress:
    """How far a phase is: everything that a stop in its middle must keep, and what its report entry says."""

    step: int = 0
    optimizer_steps: int = 0
    samples: int = 0
    lr_first: float | None = None
    lr_peak: float | None = None
    lr_last: float | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    seconds: float = 0.0
    ended: int = 0  # the step of the last epoch whose end was attended to
    early: list[float] = field(default_factory=list)  # the losses of the first EARLY steps
    without_gradient: list[Any] | None = None  # pieces of masked layers that no step has given a gradient yet


class Key(NamedTuple):
    """What order, augmentation and dropout of a phase are functions of."""

    seed: int
    phase: int


def micro_batches(units: int, size: int, has_batchnorm: bool) -> list[range]:
    """Positions of an epoch's order that each micro-batch (over all processes) takes.

    A last one of a single row joins the one before where there is BatchNorm, which has no statistics of one row.
    """
    found = [range(start, min(start + size, units)) for start in range(0, units, size)]
    if has_batchnorm and len(found) > 1 and len(found[-1]) == 1:
        found[-2:] = [range(found[-2].start, units)]
    return found


def micro_count(units: int, size: int, has_batchnorm: bool) -> int:
    """How many `micro_batches` makes, without making them: this is asked for at every step."""
    joined = has_batchnorm and units > size and units % size == 1
    return math.ceil(units / size) - joined


def place_of(label: str) -> dict[str, Any]:
    """A label such as `refined try 2/1-sparse` as fields of a log line."""
    arm, _, phase = label.partition("/")
    arm, _, number = arm.partition(" try ")
    return {"arm": arm, "phase": phase, **({"try": int(number)} if number else {})}


def _on_device(loop: Loop, batch: Batch) -> Batch:
    batch = batch.to(loop.accelerator.device)
    if loop.channels_last:
        inputs = {n: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for n, v in batch.inputs.items()}
        batch = replace(batch, inputs=inputs)
    return batch
