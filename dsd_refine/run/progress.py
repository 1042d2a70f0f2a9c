"""Show progress: a bar in a terminal or a notebook, else a plain line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from dsd_refine.training.hooks import Hooks, Place, Step

EVERY = 5.0  # seconds between lines
# tqdm would show the time left of the phase. We show the time left of the whole run, after the loss.
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{rate_fmt}{postfix}]"


class Display(Hooks):
    """Writes progress and news to stderr.

    Args:
        quiet: Write nothing.
        clock: Returns the current time in seconds.
    """

    def __init__(self, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.quiet = quiet
        self.clock = clock
        self.notebook = in_notebook()
        self.terminal = self.notebook or (sys.stderr is not None and sys.stderr.isatty())
        self.bar: Any = None
        self.place: Place | None = None
        self.first: Step | None = None  # the first step of this process, which may have resumed a run
        self.began = self.last = clock()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def say(self, text: str) -> None:
        """Write one line of news."""
        if not self.quiet:
            self._close()
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def on_step(self, step: Step) -> None:
        """Show that an optimizer step is done: move the bar, or write a line every few seconds."""
        if self.quiet:
            return
        now = self.clock()
        if self.first is None:
            self.first, self.began, self.last = step, now, now  # the first step only starts the measurement
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
        """Return the text for the time left of the whole run.

        It is estimated from the time that the steps of this process took, including the evaluations
        between them.
        """
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
    """Return where a step is: the arm, the try if there are several, the phase and its kind."""
    place = step.place
    tried = f" try {place.attempt} of {place.tries}" if place.tries > 1 else ""
    return f"{place.arm}{tried}, phase {place.phase} of {place.phases} ({place.kind})"


def in_words(seconds: float) -> str:
    """Return a duration as text: `42 s`, `3 min`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def in_notebook() -> bool:
    """Return whether this process runs a notebook. Its kernel imports ipykernel before any cell runs."""
    return "ipykernel" in sys.modules
