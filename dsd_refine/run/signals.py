"""Handle SIGTERM and SIGINT.

Before the first step a signal ends the run at once. Later it ends the run at the next step or batch,
after a save. A second signal ends the process at once.

This module imports nothing heavy, because the command uses it while the libraries are imported.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any


class Signals:
    """Handles signals inside a `with` block.

    A signal raises KeyboardInterrupt until `wait()` is called. After that it only sets `asked`.
    `except Exception` does not catch KeyboardInterrupt. Outside the main thread nothing is done,
    because Python handles signals only there.

    Attributes:
        asked: Whether a signal has come.
    """

    def __init__(self) -> None:
        self.asked = False
        self._at_once = True
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                # None: the handler was not set by Python, so we could not restore it.
                if signal.getsignal(number) is not None:
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self) -> None:
        """Let later signals only set `asked`, because from now on there is a state to save.

        Raises:
            KeyboardInterrupt: A signal has come already, during a destructor. Python only prints
                exceptions that are raised there.
        """
        if self.asked:
            raise KeyboardInterrupt
        self._at_once = False

    def _ask(self, number: int, _: object) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True
        if self._at_once:
            raise KeyboardInterrupt
