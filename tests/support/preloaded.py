"""Imported once by the server that children of `runs.fresh` and `runs.in_two` are forked from: their start then costs no time."""

from forked import preload

preload()

import runs  # noqa: E402, F401  # and what the tests import, after what reads this process's environment
