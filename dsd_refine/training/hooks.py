"""Hooks into a running run: follow each step, stop the run, or have its state saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """The position of a phase in a run. `attempt` and `phase` count from 1.

    `tries` and `phases` are how many there are. `before` is the number of optimizer steps of the run
    before this phase, `all_steps` that of the whole run.
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
        """The name of the phase in messages, e.g. `refined try 2/1-sparse`."""
        return f"{self.arm}{f' try {self.attempt}' if self.tries > 1 else ''}/{self.phase}-{self.kind}"

    @property
    def logged(self) -> dict[str, Any]:
        """The fields `arm`, `phase` and, if there are several tries, `try` of a log line."""
        attempt = {"try": self.attempt} if self.tries > 1 else {}
        return {"arm": self.arm, "phase": f"{self.phase}-{self.kind}", **attempt}


@dataclass(frozen=True)
class Step:
    """A finished optimizer step: number `step` (from 1) of the `steps` of the phase at `place`.

    `epoch` is the number of epochs done, with a fraction. `lr` is the learning rate. `loss` is the
    mean over the step's targets. `samples` is the number of examples over all processes. `skipped`
    means that the gradients overflowed (fp16 with a loss scale) and no weight was updated.
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
        """The number of optimizer steps of the whole run that are finished."""
        return self.place.before + self.step


class Hooks:
    """Methods that a run calls while it trains. Here they do nothing; override those that you need.

    In a run with several processes, only the main process calls them.
    """

    def on_phase_begin(self, place: Place) -> None:
        """Called before a phase changes anything, but not when a stopped phase is resumed.

        Args:
            place: Where in the run the phase is.
        """

    def on_masked(self, place: Place) -> None:
        """Called after the mask of a sparse phase is made and applied, before its first step.

        Args:
            place: Where in the run the phase is.
        """

    def on_step(self, step: Step) -> None:
        """Called after each optimizer step and after the mask is applied again. On a GPU the calls come a few
        steps late, because the loss is not waited for.

        Args:
            step: The finished step, with its loss.
        """

    def on_epoch_end(self, place: Place, epoch: int) -> None:
        """Called after the last step of each epoch and of the phase.

        Args:
            place: Where in the run the phase is.
            epoch: The number of the epoch, from 1.
        """

    def on_phase_end(self, place: Place) -> None:
        """Called at the end of a phase, when the model holds the weights that the next phase starts from.

        Args:
            place: Where in the run the phase is.
        """

    def on_holdout(self, place: Place, step: int, metrics: Mapping[str, float]) -> None:
        """Called after an evaluation on the holdout.

        Args:
            place: Where in the run the phase is.
            step: The steps of the phase so far.
            metrics: The metrics by name.
        """

    def on_report(self, report: Mapping[str, Any]) -> None:
        """Called at the very end, when the output is published.

        Args:
            report: The content of report.json.
        """

    def should_stop(self) -> bool:
        """Called after each step and between the batches of an evaluation.

        Return True to stop the run: it saves its state and raises `Interrupted`.
        """
        return False

    def should_save(self) -> bool:
        """Called after each step. Return True to save the state in the middle of the phase."""
        return False

    def save(self) -> None:
        """Called after the state was saved."""


class Together(Hooks):
    """Several hooks as one. Only the methods that a hook overrides are called.

    A hook is any object with some methods of `Hooks`; it need not be a subclass.
    """

    def __init__(self, hooks: Iterable[object]) -> None:
        self.hooks = tuple(hooks)
        self._called = {name: self._overriding(name) for name in vars(Hooks) if not name.startswith("_")}

    def _overriding(self, name: str) -> list[Callable[..., Any]]:
        methods = [(hook, getattr(type(hook), name, None)) for hook in self.hooks]
        return [getattr(hook, name) for hook, method in methods if method not in (None, getattr(Hooks, name))]

    def _call_all(self, name: str, *arguments: Any) -> None:
        for method in self._called[name]:
            method(*arguments)

    def on_phase_begin(self, place: Place) -> None:
        """Call `on_phase_begin` of every hook that overrides it, in order."""
        self._call_all("on_phase_begin", place)

    def on_masked(self, place: Place) -> None:
        """Call `on_masked` of every hook that overrides it, in order."""
        self._call_all("on_masked", place)

    def on_step(self, step: Step) -> None:
        """Call `on_step` of every hook that overrides it, in order."""
        self._call_all("on_step", step)

    def on_epoch_end(self, place: Place, epoch: int) -> None:
        """Call `on_epoch_end` of every hook that overrides it, in order."""
        self._call_all("on_epoch_end", place, epoch)

    def on_phase_end(self, place: Place) -> None:
        """Call `on_phase_end` of every hook that overrides it, in order."""
        self._call_all("on_phase_end", place)

    def on_holdout(self, place: Place, step: int, metrics: Mapping[str, float]) -> None:
        """Call `on_holdout` of every hook that overrides it, in order."""
        self._call_all("on_holdout", place, step, metrics)

    def on_report(self, report: Mapping[str, Any]) -> None:
        """Call `on_report` of every hook that overrides it, in order."""
        self._call_all("on_report", report)

    def should_stop(self) -> bool:
        """True as soon as one hook wants the run to stop; the hooks after it are not called."""
        return any(method() for method in self._called["should_stop"])

    def should_save(self) -> bool:
        """True as soon as one hook wants the state saved; the hooks after it are not called."""
        return any(method() for method in self._called["should_save"])

    def save(self) -> None:
        """Call `save` of every hook that overrides it, in order."""
        self._call_all("save")
