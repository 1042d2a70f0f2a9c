"""Choose the recipe of a run: the given one, else the one that matches the model, changed by the flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsd_refine.errors import UsageError
from dsd_refine.recipe import Phase, Recipe, apply_flags, find_recipe, match_recipe, read_recipe, set_field, validate
from dsd_refine.search import check_space, settings_of

if TYPE_CHECKING:
    from dsd_refine.checkpoint.library import Library


def choose_recipe(library: Library, given: Mapping[str, Any], say: Callable[[str], None]) -> Recipe:
    """Return the recipe of a run.

    It is the given recipe, else the shipped one that matches the model, else the default of the task.
    `sets` and then the flags change its fields.

    Args:
        library: The adapter of the opened source. Its names and its task decide which recipe matches.
        given: The given options by name. `recipe`: a name, a file or a `Recipe`. `sets`: texts
            `a.b=v`. Every other option that is a field of a recipe or a flag for phases changes it.
        say: Called with one line of news.

    Raises:
        UsageError: Options contradict each other.
        RecipeError: The recipe is not valid.
    """
    raw, name, why = _raw_recipe(library, given.get("recipe"))
    if given.get("phases") is not None:
        raw["phases"] = _plain_phases(given["phases"])
    for assignment in given.get("sets") or ():
        set_field(raw, assignment)
    flags = {key: value for key, value in given.items() if key not in ("recipe", "sets", "task")}
    control = flags.get("control")
    if isinstance(control, tuple | list) and "none" in control:
        if len(control) > 1:
            raise UsageError("--control none cannot be combined with another --control")
        flags["control"] = []
    if isinstance(flags.get("expect"), tuple):
        flags["expect"] = _expectations(flags["expect"])
    apply_flags(raw, flags)
    if raw.get("task") not in (None, library.task):
        raise UsageError(f"the recipe {Path(name).stem} is for {raw['task']}, the model for {library.task}")
    raw["task"] = library.task
    for key in ("data", "eval_data"):
        if isinstance(raw.get(key), str) and Path(raw[key]).exists():
            raw[key] = str(Path(raw[key]).resolve())
    recipe = _with_space(validate(raw, name))
    say(f"recipe: {recipe.name} ({why})")
    return recipe


def _with_space(recipe: Recipe) -> Recipe:
    """Return the recipe with its space of a search written down, and checked.

    Raises:
        RecipeError: The space is not valid, or too small.
    """
    if recipe.search is None or not recipe.searches:
        return recipe
    space = check_space(recipe)
    settings_of(recipe)
    return recipe.model_copy(update={"search": recipe.search.model_copy(update={"space": space})})


def _raw_recipe(library: Library, wanted: str | Path | Recipe | None) -> tuple[dict[str, Any], str, str]:
    """Return the fields of the recipe, its name for messages, and why it was chosen."""
    if isinstance(wanted, Recipe):
        return wanted.model_dump(mode="json", exclude_none=True), wanted.name, "given"
    if wanted:
        path, why = find_recipe(str(wanted)), "given"
    else:
        path, why = match_recipe(library.names, library.task)
    return read_recipe(path), path.name, why


def _plain_phases(phases: object) -> object:
    """Return phases in the form of a recipe file.

    A value that is not a list is returned as it is; the validation refuses it.
    """
    if not isinstance(phases, list | tuple):
        return phases
    return [phase.model_dump(mode="json", exclude_none=True) if isinstance(phase, Phase) else phase for phase in phases]


def _expectations(texts: Sequence[str]) -> dict[str, float] | None:
    """Return metric -> value from texts METRIC=VALUE, or None if there are none."""
    values = {}
    for text in texts:
        metric, _, value = text.partition("=")
        try:
            values[metric.strip()] = float(value)
        except ValueError:
            raise UsageError(f"--expect {text}: expected METRIC=VALUE, such as accuracy=0.7613") from None
    return values or None
