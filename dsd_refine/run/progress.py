"""What a person sees while it runs: a bar on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

from dsd_refine.training.hooks import Hooks, Step

EVERY = 5.0  # seconds between lines


class Display(Hooks):
    """Progress and notes on stderr; silent if `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.notebook = in_notebook()
        self.terminal = sys.stderr.isatty() or self.notebook
        self.bar: Any = None
        self.label = ""
        self.began = self.last = time.monotonic()
        self.first = 0

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
        place, tried = step.place, f" try {step.place.attempt}" if step.place.tries > 1 else ""
        self.step(f"{place.arm}{tried}/{place.phase}-{place.kind}", step.step, step.steps)

    def step(self, label: str, step: int, total: int) -> None:
        """Step number `step` of `total` of the phase called `label`."""
        if self.quiet:
            return
        now = time.monotonic()
        if label != self.label:
            self._close()
            self.label, self.began, self.last, self.first = label, now, now, step
        if self.terminal:
            self._bar(step, total)
        elif now - self.last >= EVERY or step == total:
            self.last, pace = now, ""
            if step > self.first:  # the first step only starts the clock
                rate = (step - self.first) / max(1e-9, now - self.began)
                pace = f", {rate:.1f} steps/s, {(total - step) / rate:.0f} s left"
            sys.stderr.write(f"{label}: step {step}/{total}{pace}\n")
            sys.stderr.flush()

    def _bar(self, step: int, total: int) -> None:
        if self.bar is None:
            from tqdm import auto, tqdm

            self.bar = (auto.tqdm if self.notebook else tqdm)(
                total=total, initial=step - 1, desc=self.label, unit="step", leave=True
            )
        self.bar.update(step - self.bar.n)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar, self.label = None, ""


def in_notebook() -> bool:
    """Does the process serve a notebook? Its kernel has loaded ipykernel before it runs a cell."""
    return "ipykernel" in sys.modules
