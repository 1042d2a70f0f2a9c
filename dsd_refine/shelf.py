"""The shipped recipes as files: `recipes` lists them without paying for what reads them."""

from __future__ import annotations

import difflib
from pathlib import Path

from dsd_refine.errors import RecipeError


def recipes_folder() -> Path:
    """Where the shipped recipes lie: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def shipped() -> dict[str, Path]:
    """Name -> file of every shipped recipe, sorted by name."""
    return {path.stem: path for path in sorted(recipes_folder().rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe given by shipped name or by path.

    Raises:
        RecipeError: neither a shipped name nor a file.
    """
    known = shipped()
    if name in known:
        return known[name]
    path = Path(name)
    if path.is_file():
        return path
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise RecipeError(f"no recipe {name!r}: not a file, and not one of {', '.join(known)}{hint}")
