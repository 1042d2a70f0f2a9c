"""SIGTERM and SIGINT: before the first step they end the run at once, then at the next step or batch; a second one ends it
there and then. Nothing heavy is imported here: the command holds this while the libraries are loaded.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any


class Signals:
    """Within, a signal raises KeyboardInterrupt until `wait()` is called; after that it only sets `asked`.

    KeyboardInterrupt passes every `except Exception` on its way. Outside the main thread, where Python takes no signals,
    nothing is done.
    """

    def __init__(self) -> None:
        self.asked = False
        self._at_once = True
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not None:  # None: set by other than Python, which could not be given back
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self) -> None:
        """From here on there is something to finish and to save: whoever works asks `asked`.

        Raises:
            KeyboardInterrupt: a signal came before, in a destructor, where Python only prints what is raised.
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
