"""A task with its data, as a run opens it, and without the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsd_refine.checkpoint.library import Library
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import Task
from dsd_refine.tasks.registry import look_at_data, prepare_task


def open_task(recipe: Recipe, library: Library, model: Any, cache: Path) -> Task:
    """Read the recipe's data for the library's task, and prepare them for the model. Nothing is
    downloaded.
    """
    given = look_at_data(recipe, library.task, library, cache, lambda name, size: False)
    return prepare_task(recipe, library.task, library, model, given)
