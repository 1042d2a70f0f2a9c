"""Which recipe a run follows: the given one, else the one that matches the model, with flags laid over it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsd_refine.errors import UsageError
from dsd_refine.recipe import Phase, Recipe, apply_flags, find_recipe, match_recipe, read_recipe, set_field, validate

if TYPE_CHECKING:
    from dsd_refine.checkpoint.library import Library


def choose_recipe(library: Library, given: Mapping[str, Any], say: Callable[[str], None]) -> Recipe:
    """The recipe named, else the one that matches the model, else the task's; with `sets` and flags laid over it.

    Args:
        library: the adapter of the opened source; its names and its task choose.
        given: the options by name. `recipe`: a name, a file or a `Recipe`; `sets`: texts `a.b=v`;
            every other one that is a field of a recipe, or a flag for phases, is laid over it.
        say: takes one line of news.

    Raises:
        UsageError: options that do not go together. RecipeError: fields that do not validate.
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
            raise UsageError("--control none goes alone")
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
    recipe = validate(raw, name)
    say(f"recipe: {recipe.name} ({why})")
    return recipe


def _raw_recipe(library: Library, wanted: str | Path | Recipe | None) -> tuple[dict[str, Any], str, str]:
    """The fields, the name for messages, and why this one was chosen."""
    if isinstance(wanted, Recipe):
        return wanted.model_dump(mode="json", exclude_none=True), wanted.name, "given"
    if wanted:
        path, why = find_recipe(str(wanted)), "given"
    else:
        path, why = match_recipe(library.names, library.task)
    return read_recipe(path), path.name, why


def _plain_phases(phases: object) -> object:
    """Phases as a recipe file has them; what is no list of phases stays, and is refused with the other mistakes."""
    if not isinstance(phases, list | tuple):
        return phases
    return [phase.model_dump(mode="json", exclude_none=True) if isinstance(phase, Phase) else phase for phase in phases]


def _expectations(texts: Sequence[str]) -> dict[str, float] | None:
    values = {}
    for text in texts:
        metric, _, value = text.partition("=")
        try:
            values[metric.strip()] = float(value)
        except ValueError:
            raise UsageError(f"--expect {text}: expected METRIC=VALUE, such as accuracy=0.7613") from None
    return values or None
