"""What a caller may do while a run goes on: hear of each step, stop it, have it saved."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where in a run a phase is. `attempt` and `phase` count from 1.

    `before` are the optimizer steps of the run before this phase; `all_steps` those of the whole run.
    """

    arm: str
    attempt: int
    tries: int
    seed: int
    phase: int
    phases: int
    kind: str
    before: int
    all_steps: int


@dataclass(frozen=True)
class Step:
    """An optimizer step that has just been made: number `step` of `steps` of the phase at `place`.

    `loss` is the mean over the step's targets; `skipped` says that a loss scale (fp16) overflowed and nothing was updated.
    """

    place: Place
    step: int
    steps: int
    epoch: float
    lr: float
    loss: float
    samples: int
    skipped: bool

    @property
    def done(self) -> int:
        """Optimizer steps of the whole run that are made."""
        return self.place.before + self.step


class Hooks:
    """Called while a run goes on. Each method does nothing here; override those that you need."""

    def on_step(self, step: Step) -> None:
        """After each optimizer step (and its mask), on the main process."""
