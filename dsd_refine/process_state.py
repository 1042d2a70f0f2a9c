"""Restore the state of the process after a call of the Python API, because the process belongs to the caller."""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from dsd_refine.compat import accelerate_states
from dsd_refine.quiet import LIBRARIES


@contextmanager
def as_found() -> Iterator[None]:
    """Restore the state of the process at the end of a `with` block, also after an error.

    The state is: torch's deterministic mode, threads, default dtype and gradient mode; the random
    generators of python, numpy and torch; environment variables; levels of loggers and filters of
    warnings; progress bars; the state of Accelerate. Inside the block, Accelerate starts without a
    state, so that a call may use another device or precision than the call before.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        for restored in (_torch_modes, _random_generators, _environment, _loggers, _progress_bars, _accelerate):
            stack.enter_context(restored())
        yield


@contextmanager
def _torch_modes() -> Iterator[None]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    threads, dtype, gradients = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)


@contextmanager
def _random_generators() -> Iterator[None]:
    ours, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpy)


@contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _loggers() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in LIBRARIES}
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _progress_bars() -> Iterator[None]:
    """Switch off the progress bars of datasets. The Hub shows its own bars, but only in a terminal."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


@contextmanager
def _accelerate() -> Iterator[None]:
    """Empty the dicts in which all objects of Accelerate share their state, and restore them later."""
    shared = accelerate_states()
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        yield
    finally:
        for state, saved in zip(shared, before, strict=True):
            state.clear()
            state.update(saved)
