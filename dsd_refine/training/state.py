"""What training and evaluation share (`Loop`), and a phase while it runs (`PhaseState`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from dsd_refine.masking.layers import Layer
from dsd_refine.masking.masks import Masks, masker
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.tasks.base import Batch, Forward, Task
from dsd_refine.training.average import Average
from dsd_refine.training.hooks import Hooks, Place
from dsd_refine.training.optimizer import make_optimizer
from dsd_refine.training.packing import pack_masks, pack_optimizer, unpack_masks, unpack_optimizer


@dataclass
class Loop:
    """What training and evaluation share. `forward` is `model` wrapped for several processes or compiled."""

    accelerator: Accelerator
    model: nn.Module
    forward: Callable[..., Any]
    task: Task
    recipe: Recipe
    as_written: Callable[[nn.Module], AbstractContextManager[None]]
    hooks: Hooks = field(default_factory=Hooks)
    workers: int = 0
    has_batchnorm: bool = False
    channels_last: bool = False
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    layers: Sequence[Layer] = ()
    begun: bool = False  # has a step been trained, or tried?
    loss: Callable[[Forward, Batch], torch.Tensor] | None = None  # in place of the task's own

    def stopping(self) -> bool:
        """Has this process been asked to stop?"""
        return self.hooks.should_stop()

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


@dataclass
class PhaseState:
    """A phase while it runs: what a stop in its middle must keep, and what its end needs.

    `masks` are empty in a dense phase; `stash` holds the values that a random mask took out and that
    come back with the next one. `restored` are the saved tensors that a phase goes on from after a
    stop in its middle (`resumed`). `average` and `optimizer` are made by `begin`.
    """

    place: Place
    progress: Progress = field(default_factory=Progress)
    earlier: tuple[Phase, ...] = ()  # of the same try
    last: bool = False  # is it the last phase of its try?
    resumed: bool = False
    restored: dict[str, torch.Tensor] = field(default_factory=dict)
    masks: Masks = field(default_factory=dict)
    stash: dict[str, torch.Tensor] = field(default_factory=dict)
    average: Average = field(init=False)
    optimizer: AcceleratedOptimizer = field(init=False)
    started: float = 0.0  # when the step that runs began to load its batches, in seconds of `time.perf_counter`
    reestimated: str | None = None  # why BatchNorm's statistics were computed again at its end
    apply: Callable[[], None] = field(default=lambda: None, init=False)  # sets the masked weights to 0

    @property
    def key(self) -> Key:
        """What order, augmentation and dropout of this phase are functions of."""
        return Key(self.place.seed, self.place.phase - 1)

    def begin(self, loop: Loop, phase: Phase) -> None:
        """Make what the phase needs besides the weights, or load it where the phase goes on after a stop."""
        self.average = Average(phase, loop.parameters, self.restored)
        self.optimizer = make_optimizer(loop, phase)
        unpack_optimizer(self.restored, self.optimizer)
        self.stash = {k.removeprefix("stash."): v for k, v in self.restored.items() if k.startswith("stash.")}
        self.use(unpack_masks(self.restored, loop.parameters), loop.parameters)
        self.restored = {}

    def use(self, masks: Masks, parameters: Mapping[str, torch.Tensor]) -> None:
        """From now on these masks hold. They are applied."""
        self.masks, self.apply = masks, masker(masks, parameters)
        self.apply()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors that a stop in the middle of the phase must keep, besides the model's."""
        stash = {f"stash.{name}": values for name, values in self.stash.items()}
        return pack_masks(self.masks) | pack_optimizer(self.optimizer) | self.average.pack() | stash


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


def on_device(loop: Loop, batch: Batch) -> Batch:
    batch = batch.to(loop.accelerator.device)
    if loop.channels_last:
        inputs = {n: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for n, v in batch.inputs.items()}
        batch = replace(batch, inputs=inputs)
    return batch
