"""The data that training and evaluation share (`Loop`), and the state of a running phase (`PhaseState`)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from dsd_refine.masking.layers import Layer
from dsd_refine.masking.masks import Masks, masker
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.tasks.base import Batch, Forward, Scores, Task
from dsd_refine.training.average import Average
from dsd_refine.training.hooks import Hooks, Place
from dsd_refine.training.optimizer import make_optimizer
from dsd_refine.training.packing import pack_masks, pack_optimizer, unpack_masks, unpack_optimizer

if TYPE_CHECKING:
    from dsd_refine.training.shards import Shards


@dataclass
class Loop:
    """The data that training and evaluation share.

    Attributes:
        forward: `model`, wrapped for several processes or compiled.
        as_written: a context in which a model has its weights rounded as in the written checkpoint.
        workers: number of worker processes that load batches.
        parameters: name -> parameter of the model; in a sharded run the rows of it that this process has.
        layers: the layers that masks may take weights of, with the shapes of `parameters`.
        loss: a summed loss that replaces the task's own (with distillation).
        evaluation_batch: rows of a batch in evaluation; None: as many as in training.
        shards: how the model is divided among the processes; None: each process has all of it.
    """

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
    begun: bool = False  # has the training of a phase begun?
    loss: Callable[[Forward, Batch], torch.Tensor] | None = None
    evaluation_batch: int | None = None
    shards: Shards | None = None

    def stopping(self) -> bool:
        """Has this process been asked to stop?"""
        return self.hooks.should_stop()

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the model computes: with a mixed precision, Accelerate's autocast.

        A sharded model computes in bf16 by itself.
        """
        context: AbstractContextManager[Any] = nullcontext()
        return context if self.shards is not None or self.accelerator.mixed_precision == "no" else self.accelerator.autocast()

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors of the model's state by name; in a sharded run the rows of them that this process has."""
        return self.model.state_dict() if self.shards is None else self.shards.state()

    def whole(self, own: Mapping[str, torch.Tensor], to: int | None = None) -> Mapping[str, torch.Tensor]:
        """The whole tensors of which this process has rows in `own`: `own` itself, unless the run is sharded.

        In a sharded run, all processes must read the same tensors in the same order. With `to`, only the process of this
        number gets them.
        """
        return own if self.shards is None else self.shards.whole(own, to)

    def summed(self, counts: dict[str, int]) -> dict[str, int]:
        """Counts of `layers`, summed over the processes of a sharded run, which must all call this."""
        return counts if self.shards is None else self.shards.summed(counts)

    @cached_property
    def world(self) -> int:
        """The number of processes of the run. Every step asks for it several times."""
        return int(self.accelerator.num_processes)

    @property
    def joins_single(self) -> bool:
        """Whether a last micro-batch of one row joins the one before: BatchNorm, or a loss that compares rows, needs two."""
        return self.has_batchnorm or bool(getattr(self.task, "needs_several_rows", False))

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimizer steps per epoch. An incomplete last group of micro-batches is one step."""
        micro = micro_count(self.task.train.units, self.recipe.batch_size * self.world, self.joins_single)
        return math.ceil(micro / self.recipe.gradient_accumulation_steps)


@dataclass
class Progress:
    """The progress of a phase: numbers for its report entry, and for a resume in its middle."""

    step: int = 0
    optimizer_steps: int = 0
    samples: int = 0
    lr_first: float | None = None
    lr_peak: float | None = None
    lr_last: float | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    seconds: float = 0.0
    ended: int = 0  # the last step of the latest epoch whose end is completely handled
    early: list[float] = field(default_factory=list)  # the losses of the first EARLY steps
    without_gradient: list[Any] | None = None  # pieces of masked layers that have had no gradient in any step


class Key(NamedTuple):
    """The seeds of a phase: they decide its order, augmentation and dropout. `phase` counts from 0."""

    seed: int
    phase: int


Counts = Sequence[int] | torch.Tensor  # the numbers of targets and of samples of a step


class Pending(NamedTuple):
    """Step number `step` of `total`, which is made, and what is still to be fetched from the device.

    `sums` is the summed loss; with several processes also how many of them were asked to stop, and to save.
    `copied` is an event of the GPU: once it is reached, `sums` and `counts` are in the host's memory.
    None if they are there already.
    """

    step: int
    total: int
    lr: float
    skipped: bool
    sums: torch.Tensor
    counts: Counts
    copied: torch.cuda.Event | None


@dataclass
class PhaseState:
    """The state of a running phase.

    `masks` is empty in a dense phase. `stash` holds the values of the weights that a random mask set to
    0; they return when the next mask is drawn. If the phase was stopped in its middle and is resumed,
    `resumed` is True and `restored` holds its saved tensors. `begin` makes `average` and `optimizer`.
    """

    place: Place
    progress: Progress = field(default_factory=Progress)
    earlier: tuple[Phase, ...] = ()  # the phases before it in the same try
    last: bool = False  # is it the last phase of its try?
    resumed: bool = False
    restored: dict[str, torch.Tensor] = field(default_factory=dict)
    masks: Masks = field(default_factory=dict)
    stash: dict[str, torch.Tensor] = field(default_factory=dict)
    average: Average = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    started: float = 0.0  # when the current step began to load its batches, in seconds of `time.perf_counter`
    reestimated: str | None = None  # why BatchNorm's statistics were computed again at the end of the phase
    apply: Callable[[], None] = field(default=lambda: None, init=False)  # sets the masked weights to 0
    lost: str | None = field(default=None, init=False)  # why the try is lost: it ends here
    scores: Scores | None = field(default=None, init=False)  # on the holdout, of the weights at the end of the latest epoch
    must_stop: bool = field(default=False, init=False)  # was one of several processes asked to stop?
    must_save: bool = field(default=False, init=False)  # was one of several processes asked to save?
    pending: deque[Pending] = field(default_factory=deque, init=False)  # finished steps whose losses are not fetched yet

    @property
    def key(self) -> Key:
        """The seeds of this phase: they decide its order, augmentation and dropout."""
        return Key(self.place.seed, self.place.phase - 1)

    def begin(self, loop: Loop, phase: Phase) -> None:
        """Make the average, the optimizer and the masks; in a resumed phase, load them from `restored`."""
        self.average = Average(phase, loop.parameters, self.restored)
        self.optimizer = make_optimizer(loop, phase)
        unpack_optimizer(self.restored, self.optimizer)
        self.stash = {k.removeprefix("stash."): v for k, v in self.restored.items() if k.startswith("stash.")}
        self.use(unpack_masks(self.restored, loop.parameters), loop.parameters)
        self.restored = {}

    def use(self, masks: Masks, parameters: Mapping[str, torch.Tensor]) -> None:
        """Take these masks for the steps from now on, and set the masked weights to 0.

        Args:
            masks: name of a parameter -> bool tensor of its shape.
            parameters: name -> parameter of the model.
        """
        self.masks, self.apply = masks, masker(masks, parameters)
        self.apply()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors to save in the middle of the phase, without those of the model."""
        stash = {f"stash.{name}": values for name, values in self.stash.items()}
        return pack_masks(self.masks) | pack_optimizer(self.optimizer) | self.average.pack() | stash


def micro_batches(units: int, size: int, joins_single: bool) -> list[range]:
    """Divide the positions 0..units-1 of an epoch's order into micro-batches of `size` (over all processes).

    `joins_single`: a last micro-batch of a single row is joined to the one before it, because BatchNorm
    cannot compute statistics of a single row, and a loss that compares rows cannot compare it.
    """
    groups = [range(start, min(start + size, units)) for start in range(0, units, size)]
    if joins_single and len(groups) > 1 and len(groups[-1]) == 1:
        groups[-2:] = [range(groups[-2].start, units)]
    return groups


def micro_count(units: int, size: int, joins_single: bool) -> int:
    """The number of `micro_batches`, without building the list, because every step needs the number."""
    is_joined = joins_single and units > size and units % size == 1
    return math.ceil(units / size) - is_joined


def on_device(loop: Loop, batch: Batch) -> Batch:
    """Move a batch to the accelerator. With `loop.channels_last`, its pictures, 4-D floats, get that memory format."""
    if loop.accelerator.device.type != "cpu":
        batch = batch.to(loop.accelerator.device)
    if loop.channels_last:
        # masks of pictures stay as they are: models take views of them
        pictures = {name: value for name, value in batch.inputs.items() if value.ndim == 4 and value.is_floating_point()}
        converted = {name: value.contiguous(memory_format=torch.channels_last) for name, value in pictures.items()}
        batch = replace(batch, inputs=batch.inputs | converted)
    return batch
