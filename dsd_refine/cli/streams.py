"""The standard streams where whoever started the process has closed them, as `2>&-`, some daemons and pythonw do."""

from __future__ import annotations

import os
import sys


def fill_streams() -> None:
    """Lead what is closed of the descriptors 0 to 2, and what Python has None for, to nowhere.

    Else the next file to be opened gets the number, and what a library says on its standard error is written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free, which is this one
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
