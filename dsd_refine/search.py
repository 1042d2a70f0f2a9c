"""A search over settings by successive halving (Jamieson and Talwalkar 2016), plain and seeded.

A setting is a recipe in which some fields have other values. All settings are tried with few steps;
the best of them on the holdout are tried again from the source with more steps, and so on. The last
tries are as long as the recipe. Everything here is a function of the recipe and of the results so
far, so that a stopped search goes on to the same bytes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsd_refine.errors import RecipeError
from dsd_refine.recipe import AutoRate, Phase, Recipe, put_field, times, validate

# Fields that may be searched. The others decide what the data, the arms or the judgement are.
SEARCHED = ("phases", "augment", "optimizer", "momentum", "weight_decay", "max_grad_norm")
MOST_RUNGS = 4  # shorter tries than factor ** -3 of the recipe's length show little
MOST_DRAWS = 1000  # draws of a setting that has not been drawn before
SPARSITIES = (0.1, 0.3, 0.5, 0.8)
LEARN_FROM_SOURCE = ("image-classification", "text-classification")  # tasks whose default space has distillation


@dataclass(frozen=True)
class Setting:
    """A setting: the `changes` to the recipe (field -> value), and the `recipe` with them."""

    changes: Mapping[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Rung:
    """`size` tries of equal length, number `first` (from 0) and the next ones, in the order of tries.

    `share` is their number of optimizer steps as a share of the recipe's.
    """

    first: int
    size: int
    share: float


def settings_of(recipe: Recipe) -> list[Setting]:
    """Return the settings to try. The first is the recipe itself.

    Without a search they are the recipe with each of its sparsities.

    Raises:
        RecipeError: A field or a value of the space is not valid, or it has too few settings.
    """
    search = recipe.search
    if search is None or search.tries is None:
        shares = [{} if share is None else {"sparsity": share} for share in recipe.tried]
        return [Setting(share, _at_sparsity(recipe, share.get("sparsity"))) for share in shares]
    space = check_space(recipe)
    chance = random.Random(f"search {recipe.seed}")  # a text gives the same numbers on every machine
    columns = {path: _balanced(values, search.tries - 1, chance) for path, values in space.items()}
    settings = [Setting({}, recipe)]
    known = {_fields(recipe)}
    for number in range(search.tries - 1):
        changes = {path: column[number] for path, column in columns.items()}
        for _ in range(MOST_DRAWS):
            changed = with_changes(recipe, changes)
            if _fields(changed) not in known:
                break
            changes = {path: chance.choice(values) for path, values in space.items()}
        else:
            raise RecipeError(
                f"search: the space has no {search.tries} different settings, only {len(settings)} were found; give a smaller "
                "--search N, or more values in search.space"
            )
        known.add(_fields(changed))
        settings.append(Setting(changes, changed))
    return settings


def _at_sparsity(recipe: Recipe, sparsity: float | None) -> Recipe:
    return recipe if sparsity is None else recipe.model_copy(update={"phases": recipe.phases_at(sparsity), "sparsities": ()})


def _balanced(values: Sequence[Any], count: int, chance: random.Random) -> list[Any]:
    """`count` values in random order, in which each value occurs about equally often."""
    column: list[Any] = []
    while len(column) < count:
        column += chance.sample(list(values), len(values))
    return column[:count]


def _fields(recipe: Recipe) -> str:
    return recipe.model_dump_json(include=set(SEARCHED))


def with_changes(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe with other values in some fields, such as {"phases.0.lr": 0.01}.

    Raises:
        RecipeError: A field does not exist, or a value is not valid.
    """
    raw = recipe.model_dump(mode="json", exclude_none=True)
    for path, value in changes.items():
        put_field(raw, path, value, f"search.space {path}")
    changed = validate(raw, "search.space: " + ", ".join(f"{path}={value}" for path, value in changes.items()))
    return recipe.model_copy(update={name: getattr(changed, name) for name in SEARCHED})


def check_space(recipe: Recipe) -> dict[str, tuple[Any, ...]]:
    """Return the space of a recipe: its own, else the default one. Every value is tried alone.

    Raises:
        RecipeError: A field or a value is not valid.
    """
    space = dict(recipe.search.space) if recipe.search and recipe.search.space else default_space(recipe)
    for path, values in space.items():
        if path.split(".")[0] not in SEARCHED:
            raise RecipeError(f"search.space: {path} cannot be searched; fields of {', '.join(SEARCHED)} can")
        for value in values:
            with_changes(recipe, {path: value})
    return space


def default_space(recipe: Recipe) -> dict[str, tuple[Any, ...]]:
    """Return the space for a recipe that has none: its own values, and values around them.

    It has the sparsities, the rates, the lengths of sparse phases relative to the others, averaging in
    the last phase, learning from the source, and the recipe's augmentation on or off.
    """
    space: dict[str, tuple[Any, ...]] = {}
    for number, phase in enumerate(recipe.phases):
        if phase.sparsity is not None:
            space[f"phases.{number}.sparsity"] = tuple(sorted({*SPARSITIES, phase.sparsity}))
        if phase.lr:
            factors = (0.1, 0.3, 1, 3) if phase.kind == "sparse" else (0.3, 1, 3)
            space[f"phases.{number}.lr"] = tuple(_shown(times(phase.lr, factor)) for factor in factors)
        if phase.kind == "sparse" and phase.epochs and len(recipe.phases) > 1:
            space[f"phases.{number}.epochs"] = (phase.epochs / 2, phase.epochs, 2 * phase.epochs)
        if phase.kind == "sparse" and phase.steps and len(recipe.phases) > 1:
            space[f"phases.{number}.steps"] = tuple(dict.fromkeys((-(-phase.steps // 2), phase.steps, 2 * phase.steps)))
    last = len(recipe.phases) - 1
    if not recipe.phases[last].refresh:
        space[f"phases.{last}.average"] = ("none", "swa")
    if recipe.task in LEARN_FROM_SOURCE:
        space[f"phases.{last}.distill"] = (None, {"weight": 0.5})
    if recipe.augment.crop != "none":
        space["augment.crop"] = (recipe.augment.crop, "none")
    return space


def _shown(rate: float) -> float | str:
    return str(rate) if isinstance(rate, AutoRate) else rate


def rungs_of(recipe: Recipe) -> list[Rung]:
    """Return the rungs of one seed of an arm: each has 1 / `factor` of the tries of the one before."""
    search = recipe.search
    if search is None or search.tries is None:
        return [Rung(0, len(recipe.tried), 1.0)]
    sizes = [search.tries]
    while sizes[-1] > 1 and len(sizes) < MOST_RUNGS:
        sizes.append(math.ceil(sizes[-1] / search.factor))
    shares = [search.factor**-power for power in reversed(range(len(sizes)))]
    return [Rung(sum(sizes[:i]), size, float(share)) for i, (size, share) in enumerate(zip(sizes, shares, strict=True))]


def setting_of(rungs: Sequence[Rung], number: int, ranked: Sequence[Sequence[int]]) -> int | None:
    """Return which setting a try has. None: too few settings of the rung before are left.

    Args:
        rungs: The rungs.
        number: The number of the try, from 0.
        ranked: For each finished rung, the settings that may go on, the best first.
    """
    rung = rung_of(rungs, number)
    place = number - rungs[rung].first
    if rung == 0:
        return place
    return ranked[rung - 1][place] if place < len(ranked[rung - 1]) else None


def rung_of(rungs: Sequence[Rung], number: int) -> int:
    """Return the number of the rung that a try belongs to, from 0."""
    return max(i for i, rung in enumerate(rungs) if rung.first <= number)


def steps_at(total: int, share: float) -> int:
    """Return the optimizer steps of a try, from those of the recipe. A share of some steps is at least one step."""
    return max(1, round(total * share)) if total else 0


def resized(phases: Sequence[Phase], steps: int, steps_per_epoch: int) -> tuple[Phase, ...]:
    """Return the phases with `steps` optimizer steps in all, divided as their own lengths are.

    Warm-ups are as long as before, relative to their phases. Phases that have so many steps already
    stay as they are.
    """
    lengths = [phase.total_steps(steps_per_epoch) for phase in phases]
    total = sum(lengths)
    if total == steps:
        return tuple(phases)
    return tuple(_resized(phases, lengths, steps / total if total else 0.0))


def _resized(phases: Sequence[Phase], lengths: Sequence[int], ratio: float) -> Iterator[Phase]:
    end = 0
    for phase, length in zip(phases, lengths, strict=True):
        begin, end = end, end + length
        steps = round(ratio * end) - round(ratio * begin)
        warmup = min(steps, round(ratio * phase.warmup_steps))
        yield phase.model_copy(update={"epochs": None, "steps": steps, "warmup_steps": warmup})
