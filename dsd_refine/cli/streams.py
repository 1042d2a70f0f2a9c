"""Replace closed standard streams. The shell's `2>&-`, some daemons and pythonw close them."""

from __future__ import annotations

import os
import sys


def fill_streams() -> None:
    """Open the null device for each of the descriptors 0 to 2 that is closed, and for streams that are None.

    Otherwise the next opened file would get the free number, and libraries would write their messages
    into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, which is `number`
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
