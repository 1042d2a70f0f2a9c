"""Warnings that training makes the source worse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

from dsd_refine.evidence.baseline_checks import UNBOUNDED
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import ChanceBaseline, Score, Task

FEWEST = 20  # rows or steps from which damage is spoken of
ERRORS = 3.0  # standard errors that it must be beyond
RARE = 0.001  # what is likelier than this may be chance


def view_warnings(task: Task, plain: Sequence[Score], seen: Sequence[Score], recipe: Recipe) -> list[str]:
    """Does the source still know its rows as training shows them? `plain` and `seen` are scores of the same training rows.

    Said where it loses more than half of what it is better than guessing by, beyond ERRORS standard errors of the rows'
    differences: augmentation that suits the pictures costs far less.
    """
    guess = next((each for each in task.chance_baselines if each.rows is not None or each.metric == "loss"), None)
    if guess is None or len(plain) < FEWEST:
        return []
    before, after = (np.array([_value(one, guess) for one in scores]) for scores in (plain, seen))
    sign = 1.0 if guess.higher_is_better else -1.0
    ahead, lost = sign * (before.mean() - guess.value), sign * (before - after)
    if ahead <= 0 or lost.mean() <= ahead / 2 or not _surely_above(lost, 0.0):
        return []
    milder = _milder(recipe, task)
    return [
        f"as training shows them, the source's {guess.metric} on {len(plain):,} training rows is {after.mean():.4f}; with the "
        f"preprocessing of evaluation it is {before.mean():.4f}. Training on such rows costs what the source knows; "
        f"{f'try {milder}' if milder else 'is the preprocessing of training right?'}"
    ]


def _value(score: Score, guess: ChanceBaseline) -> float:
    """A row's own share of the guess's metric; a caption's loss is over the targets that end its statistics."""
    count = score.count or (score.stats[-1] if score.stats else 1)
    return (score.loss if guess.metric == "loss" else score.score) / max(1, count)


def _surely_above(values: np.ndarray[Any, Any], limit: float) -> bool:
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return bool(values.mean() - ERRORS * error > limit)


def rising_warnings(label: str, losses: Sequence[float], source: float, *, masked: bool = False) -> list[str]:
    """Has the loss of an arm's first steps risen far above the `source`'s own on the first rows as training sees them?

    Of a `masked` arm: above its first step's too, for a mask raises the loss at once.

    Far: twice as high, and higher by more than 1. Surely: so many of the steps after the fifth are, that it could hardly be
    chance were half of all steps so (a sign test, for single losses can be of any size then).
    """
    first = max(source, losses[0]) if masked and losses else source
    late, limit = np.array(losses[5:]), max(2 * first, first + 1)
    if len(late) < FEWEST or binomtest(int((late > limit).sum()), len(late), 0.5, alternative="greater").pvalue > RARE:
        return []
    whose = "that of step 1, just masked," if first > source else "the source's on such rows"
    return [
        f"{label}: the training loss of steps 6 to {len(losses)} is {np.median(late):.4f} (the median), {whose} {first:.4f}. "
        "The rate is too high: give a lower --lr, or --warmup-steps"
    ]


def harm_warnings(
    task: Task,
    recipe: Recipe,
    where: str,
    found: Mapping[str, Mapping[str, float]],
    surely: Callable[[str], bool],
) -> list[str]:
    """Do all arms end below the source? `found` are metrics by arm, with `baseline`; `surely(arm)` tells chance apart."""
    base, metric = found["baseline"], task.metric if task.metric in found["baseline"] else "loss"
    sign = 1 if task.higher_is_better and metric == task.metric else -1
    arms = [arm for arm in found if arm != "baseline"]
    if not all(sign * (found[arm][metric] - base[metric]) < 0 and surely(arm) for arm in arms):
        return []
    ends = ", ".join(f"{arm} {found[arm][metric]:.4f}" for arm in arms)
    why = (
        "it is the training that does harm, with a mask or without"
        if "dense" in arms
        else "the training does harm, or the mask"
    )
    given = ("a lower --lr", "fewer epochs", "" if "dense" in arms else "a lower --sparsity", _milder(recipe, task))
    change = [each for each in given if each]
    return [
        f"every arm ends below the source on the {where} (source {metric} {base[metric]:.4f}; {ends}): {why}. "
        f"Try {', '.join(change[:-1])} or {change[-1]}"
    ]


def _milder(recipe: Recipe, task: Task) -> str:
    """What takes the augmentation out, where there is any."""
    if not hasattr(task, "augment") or not hasattr(task, "preprocessing"):
        return ""
    given = ["--set augment.crop=none"] if recipe.augment.crop != "none" else []
    given += ["--set augment.flip=0"] if recipe.augment.flip else []
    return f"less augmentation ({' '.join(given)})" if given else ""


def clearly_worse(mine: Mapping[str, float], base: Mapping[str, float], task: Task, recipe: Recipe, rows: int | None) -> bool:
    """Beyond two standard errors of both shares, as if they were of different rows. Of what is no share of `rows` nothing is
    known of chance here: False.
    """
    metric = task.metric if task.metric in base else "loss"
    one, two = mine[metric], base[metric]
    if rows is None or metric in UNBOUNDED:
        return False
    return two - one > 2 * math.sqrt((one * (1 - one) + two * (1 - two)) / rows)
