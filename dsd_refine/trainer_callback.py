"""Dense-sparse-dense training by the Trainer of transformers: a callback that runs the phases."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from typing import Any

from transformers import TrainerCallback

from dsd_refine.errors import UsageError
from dsd_refine.own_loop import Masker
from dsd_refine.recipe import AutoRate, Phase
from dsd_refine.training.optimizer import learning_rate, set_rate

PLAIN = {
    "refresh",
    "average",
    "distill",
    "dropout",
    "frozen",
    "threshold",
    "ramp",
    "restore",
    "lr_scale",
    "sam",
}  # fields of a phase that only our own loop can do


class DSDCallback(TrainerCallback):
    """Runs the phases of a recipe inside a `Trainer`.

    The mask is made at the beginning of a sparse phase and applied after each optimizer step. Each
    phase has its own learning rates, so the Trainer's scheduler has no effect. Each phase after the
    first begins with an empty optimizer state, as with a new optimizer. The steps of all phases
    together must be those of the Trainer (`max_steps`).

    A run resumed by `resume_from_checkpoint` goes on in its phase.

    Args:
        phases: The phases, in order. Fields that only our own loop can do (such as refresh, average and
            frozen) must have their defaults.
        include: Globs of parameter names to mask too.
        exclude: Globs of parameter names not to mask.
        first: The names of the modules whose input is pixels or sound. They are not masked.
        seed: The seed of a random mask.

    Raises:
        UsageError: There is no phase, or one has a field that the callback cannot do.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        first: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        if not phases:
            raise UsageError("phases: give at least one")
        for number, phase in enumerate(phases):
            for name in PLAIN:
                if getattr(phase, name) != Phase.model_fields[name].get_default(call_default_factory=True):
                    raise UsageError(f"phases.{number}.{name}: the callback cannot do this; `dsd_refine.refine` can")
            if isinstance(phase.lr, AutoRate):
                raise UsageError(f"phases.{number}.lr: the callback cannot test a rate; give a number")
        self.phases = tuple(phases)
        self.masking: dict[str, Any] = {
            "include": tuple(include),
            "exclude": tuple(exclude),
            "first": tuple(first),
            "seed": seed,
        }
        self.lengths: list[int] = []
        self.masker: Masker | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Check the number of steps. In a resumed run, make the mask of the current phase again.

        Raises:
            UsageError: The steps of the phases are not those of the Trainer, or the parameters are
                sharded.
        """
        if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
            raise UsageError("DSDCallback: masks of sharded parameters (DeepSpeed, FSDP) are not supported")
        loader = given.get("train_dataloader")
        per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps) if isinstance(loader, Sized) else 1
        self.lengths = [phase.total_steps(per_epoch) for phase in self.phases]
        if sum(self.lengths) != state.max_steps:
            raise UsageError(
                f"DSDCallback: the phases have {sum(self.lengths)} steps, the Trainer {state.max_steps}; set max_steps"
            )
        self.masker = None
        number, step = self._place(state.global_step + 1)
        if step > 1 and self.phases[number].kind == "sparse":
            # The masked weights are 0 in the checkpoint, so they are the smallest ones.
            self._mask(given["model"], self.phases[number], "magnitude")

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Begin a phase if it is time, and set the learning rate of the step."""
        number, step = self._place(state.global_step + 1)
        if step == 1:
            first = number
            while first and not self.lengths[first - 1]:
                first -= 1  # phases without a step, whose masks are applied all the same
            for phase in self.phases[first : number + 1]:
                self._enter(phase, given["model"])
            if state.global_step:
                given["optimizer"].state.clear()
        set_rate(given["optimizer"], learning_rate(self.phases[number], step, self.lengths[number]))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Apply the mask after the optimizer step."""
        if self.masker is not None:
            self.masker.apply()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Enter the phases without a step at the end, whose masks are applied all the same."""
        if state.global_step == sum(self.lengths):
            last = max((number for number, length in enumerate(self.lengths) if length), default=-1)
            for phase in self.phases[last + 1 :]:
                self._enter(phase, given["model"])

    def _place(self, step: int) -> tuple[int, int]:
        """Return the number of the phase (from 0) of a step of the Trainer, and its step in it (from 1)."""
        number = 0
        while number < len(self.lengths) - 1 and step > self.lengths[number]:
            step -= self.lengths[number]
            number += 1
        return number, step

    def _enter(self, phase: Phase, model: Any) -> None:
        if self.masker is not None:
            self.masker.release()
            self.masker = None
        if phase.kind == "sparse":
            self._mask(model, phase, phase.criterion)

    def _mask(self, model: Any, phase: Phase, criterion: str) -> None:
        self.masker = Masker(model, sparsity=phase.sparsity or 0.0, criterion=criterion, **self.masking)
