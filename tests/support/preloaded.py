"""Imported once by the server that children of `runs.two_processes` are forked from: their start then costs no time."""

from forked import preload

preload()
