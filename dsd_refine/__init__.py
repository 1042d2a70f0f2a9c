"""Refine a released checkpoint with Dense-Sparse-Dense training (Han et al., ICLR 2017), and say whether it helped.

The names in `__all__` are public. Each is imported when it is first used, so that `import dsd_refine`
is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsd_refine.api import apply_masks, compare, make_masks, plan, refine, verify
    from dsd_refine.checkpoint.checkpoint import open_checkpoint
    from dsd_refine.errors import (
        CheckpointError,
        DataError,
        DsdError,
        Interrupted,
        RecipeError,
        RunError,
        UsageError,
        VerifyError,
    )
    from dsd_refine.own_loop import Masker
    from dsd_refine.recipe import Augment, Phase, Recipe
    from dsd_refine.report.report import Report
    from dsd_refine.trainer_callback import DSDCallback
    from dsd_refine.training.hooks import Hooks, Step

__version__ = "0.1.0"

_ERRORS = ("CheckpointError", "DataError", "DsdError", "Interrupted", "RecipeError", "RunError", "UsageError", "VerifyError")
_MODULES = {  # public name -> the module that defines it
    **dict.fromkeys(("apply_masks", "compare", "make_masks", "plan", "refine", "verify"), "api"),
    **dict.fromkeys(("Augment", "Phase", "Recipe"), "recipe"),
    **dict.fromkeys(("Hooks", "Step"), "training.hooks"),
    **dict.fromkeys(_ERRORS, "errors"),
    "DSDCallback": "trainer_callback",
    "Masker": "own_loop",
    "Report": "report.report",
    "open_checkpoint": "checkpoint.checkpoint",
}

__all__ = [
    "Augment",
    "CheckpointError",
    "DSDCallback",
    "DataError",
    "DsdError",
    "Hooks",
    "Interrupted",
    "Masker",
    "Phase",
    "Recipe",
    "RecipeError",
    "Report",
    "RunError",
    "Step",
    "UsageError",
    "VerifyError",
    "__version__",
    "apply_masks",
    "compare",
    "make_masks",
    "open_checkpoint",
    "plan",
    "refine",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"dsd_refine.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'dsd_refine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
