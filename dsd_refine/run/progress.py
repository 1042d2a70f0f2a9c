"""What a person sees while it runs: a bar on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from dsd_refine.training.hooks import Hooks, Place, Step

EVERY = 5.0  # seconds between lines
# tqdm's own time left is the phase's; ours is the whole run's, and stands after the loss
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{rate_fmt}{postfix}]"


class Display(Hooks):
    """Progress and notes on stderr; silent if `quiet`. `clock` gives seconds."""

    def __init__(self, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.quiet = quiet
        self.clock = clock
        self.notebook = in_notebook()
        self.terminal = self.notebook or (sys.stderr is not None and sys.stderr.isatty())
        self.bar: Any = None
        self.place: Place | None = None
        self.first: Step | None = None  # that this process heard of
        self.began = self.last = clock()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def say(self, text: str) -> None:
        """One line of news."""
        if not self.quiet:
            self._close()
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def on_step(self, step: Step) -> None:
        """One more optimizer step: move the bar, or write a line now and then."""
        if self.quiet:
            return
        now = self.clock()
        if self.first is None:
            self.first, self.began, self.last = step, now, now  # the first step only starts the clock
        if step.place != self.place:
            self._close()
            self.place = step.place
        if self.terminal:
            self._bar(step, now)
        elif now - self.last >= EVERY or step.step == step.steps:
            self.last = now
            left = self._left(step, now)
            sys.stderr.write(f"{headline(step)}: step {step.step}/{step.steps}, loss {step.loss:.4g}{left}\n")
            sys.stderr.flush()

    def _left(self, step: Step, now: float) -> str:
        """The time that the whole run needs still, by the pace of this process; evaluations are in it as they fall."""
        if self.first is None or step.done <= self.first.done:
            return ""
        seconds = (now - self.began) / (step.done - self.first.done) * (step.place.all_steps - step.done)
        return f", {in_words(seconds)} left of the run"

    def _bar(self, step: Step, now: float) -> None:
        if self.bar is None:
            from tqdm import auto, tqdm

            bar = auto.tqdm if self.notebook else tqdm
            self.bar = bar(
                total=step.steps, initial=step.step - 1, desc=headline(step), unit=" steps", leave=True, bar_format=BAR
            )
        self.bar.set_postfix_str(f"loss {step.loss:.4g}{self._left(step, now)}", refresh=False)
        self.bar.update(step.step - self.bar.n)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar, self.place = None, None


def headline(step: Step) -> str:
    """Where a step is: arm, try where there are several, phase n of m and its kind."""
    place = step.place
    tried = f" try {place.attempt} of {place.tries}" if place.tries > 1 else ""
    return f"{place.arm}{tried}, phase {place.phase} of {place.phases} ({place.kind})"


def in_words(seconds: float) -> str:
    """A length of time: `42 s`, `3 min`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def in_notebook() -> bool:
    """Does the process serve a notebook? Its kernel has loaded ipykernel before it runs a cell."""
    return "ipykernel" in sys.modules
