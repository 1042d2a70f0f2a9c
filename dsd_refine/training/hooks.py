"""What a caller may do while a run goes on: hear of each step, stop the run, have its state saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


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

    @property
    def label(self) -> str:
        """What messages call the phase: `refined try 2/1-sparse`."""
        return f"{self.arm}{f' try {self.attempt}' if self.tries > 1 else ''}/{self.phase}-{self.kind}"

    @property
    def logged(self) -> dict[str, Any]:
        """The fields of a log line that say where it belongs."""
        tried = {"try": self.attempt} if self.tries > 1 else {}
        return {"arm": self.arm, "phase": f"{self.phase}-{self.kind}", **tried}


@dataclass(frozen=True)
class Step:
    """An optimizer step that has just been made: number `step` of `steps` of the phase at `place`.

    `loss` is the mean over the step's targets; `skipped` says that a loss scale (fp16) overflowed
    and nothing was updated.
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
    """Called while a run goes on. Each method does nothing here; override those that you need.

    In a run of several processes the main one calls them.
    """

    def on_phase_begin(self, place: Place) -> None:
        """Before a phase changes anything; not in a phase that goes on after a stop."""

    def on_masked(self, place: Place) -> None:
        """After the mask of a sparse phase is made and applied, before its first step."""

    def on_step(self, step: Step) -> None:
        """After each optimizer step and its mask."""

    def on_epoch_end(self, place: Place, epoch: int) -> None:
        """After the last step of each epoch, and of the phase. `epoch` counts from 1."""

    def on_phase_end(self, place: Place) -> None:
        """After a phase, with the weights that it gives to the next one."""

    def should_stop(self) -> bool:
        """Asked after each step and between batches of an evaluation. True: save, then end with `Interrupted`."""
        return False

    def should_save(self) -> bool:
        """Asked after each step. True: save the state in the middle of the phase."""
        return False

    def save(self) -> None:
        """After the state was saved."""


class Together(Hooks):
    """Several hooks as one. A method that a hook does not override is never called."""

    def __init__(self, hooks: Iterable[object]) -> None:
        self.hooks = tuple(hooks)
        self._called = {name: self._overriding(name) for name in vars(Hooks) if not name.startswith("_")}

    def _overriding(self, name: str) -> list[Callable[..., Any]]:
        methods = [(hook, getattr(type(hook), name, None)) for hook in self.hooks]
        return [getattr(hook, name) for hook, method in methods if method not in (None, getattr(Hooks, name))]

    def _all(self, name: str, *given: Any) -> None:
        for method in self._called[name]:
            method(*given)

    def on_phase_begin(self, place: Place) -> None:
        self._all("on_phase_begin", place)

    def on_masked(self, place: Place) -> None:
        self._all("on_masked", place)

    def on_step(self, step: Step) -> None:
        self._all("on_step", step)

    def on_epoch_end(self, place: Place, epoch: int) -> None:
        self._all("on_epoch_end", place, epoch)

    def on_phase_end(self, place: Place) -> None:
        self._all("on_phase_end", place)

    def should_stop(self) -> bool:
        return any(method() for method in self._called["should_stop"])

    def should_save(self) -> bool:
        return any(method() for method in self._called["should_save"])

    def save(self) -> None:
        self._all("save")
