"""Refine a released checkpoint with Dense-Sparse-Dense training (Han et al., ICLR 2017), and say whether it helped.

The names below are the public ones; they load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "refine": "method",
    "Recipe": "recipe",
    "Phase": "recipe",
    "Augment": "recipe",
    "Report": "report.report",
    "open_checkpoint": "checkpoint",
    "verify": "checkpoint",
    "DsdError": "errors",
}

__all__ = ["Augment", "DsdError", "Phase", "Recipe", "Report", "__version__", "open_checkpoint", "refine", "verify"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"dsd_refine.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dsd_refine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
