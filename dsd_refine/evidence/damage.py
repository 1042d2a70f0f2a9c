"""Warnings that training makes the model worse than the source."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

from dsd_refine.evidence.baseline_checks import UNBOUNDED
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import ChanceBaseline, Score, Scores, Task

FEWEST_SEEN = 20  # with fewer rows or steps there is no warning
ERRORS = 3.0  # standard errors that a loss of accuracy must exceed
RARE = 0.001  # the level of the sign test
MEMORY = 5.0  # standard errors by which the source must be better on the holdout than on the evaluation rows
NOISE = 2.0  # standard errors that count as the noise of a holdout


def view_warnings(task: Task, plain: Sequence[Score], seen: Sequence[Score], recipe: Recipe) -> list[str]:
    """Warn if the augmentation of training costs the source much of what it knows.

    Suitable augmentation costs little. The warning needs a loss of more than half of what the
    source has above the chance baseline, and of more than ERRORS standard errors.

    Args:
        task: The task.
        plain: Scores of some training rows with the preprocessing of evaluation.
        seen: Scores of the same rows with the preprocessing of training.
        recipe: Names what the user can change.
    """
    guess = next((guess for guess in task.chance_baselines if guess.rows is not None or guess.metric == "loss"), None)
    if guess is None or len(plain) < FEWEST_SEEN:
        return []
    before, after = (np.array([_value(score, guess) for score in scores]) for scores in (plain, seen))
    sign = 1.0 if guess.higher_is_better else -1.0
    ahead, lost = sign * (before.mean() - guess.value), sign * (before - after)
    if ahead <= 0 or lost.mean() <= ahead / 2 or not _surely_above(lost, 0.0):
        return []
    milder = _milder(recipe, task)
    return [
        f"with the preprocessing of training, the source's {guess.metric} on {len(plain):,} training rows is "
        f"{after.mean():.4f}; with that of evaluation it is {before.mean():.4f}. Training may destroy what the source knows; "
        f"{f'try {milder}' if milder else 'is the preprocessing of training right?'}"
    ]


def _value(score: Score, guess: ChanceBaseline) -> float:
    """A row's own value of the guess's metric.

    The last statistic of a caption is its number of targets.
    """
    count = score.count or (score.stats[-1] if score.stats else 1)
    return (score.loss if guess.metric == "loss" else score.score) / max(1, count)


def _surely_above(values: np.ndarray[Any, Any], limit: float) -> bool:
    """True if the mean is above the limit by more than ERRORS standard errors."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return bool(values.mean() - ERRORS * error > limit)


def memory_warnings(task: Task, holdout: Scores, evaluation: Scores) -> list[str]:
    """Warn if the source surely does better on a holdout of training rows than on the evaluation rows.

    Then it was probably trained on these rows. Such a holdout prefers weights that remember them.
    The loss decides, because every task has one.

    Args:
        task: The task.
        holdout: The source's scores on the holdout.
        evaluation: Its scores on the evaluation rows.
    """
    known, unknown = (scores.loss / np.maximum(1, scores.count) for scores in (holdout, evaluation))
    if min(len(known), len(unknown)) < FEWEST_SEEN:
        return []
    error = math.sqrt(known.var(ddof=1) / len(known) + unknown.var(ddof=1) / len(unknown))
    if unknown.mean() - known.mean() <= MEMORY * error:
        return []
    here, there = (task.metrics(scores)[task.metric] for scores in (holdout, evaluation))
    return [
        f"the source's {task.metric} is {here:.4f} on the holdout, which was carved from the training rows, and {there:.4f} on "
        "the evaluation rows: it was probably trained on the rows of the holdout. Then the holdout prefers weights that "
        "remember them, and with `publish: best` the source. Name rows that the source does not know "
        "(--holdout-split), or keep the weights of the last epoch whatever the holdout prefers (--keep last)"
    ]


def rising_warnings(label: str, losses: Sequence[float], source: float, *, masked: bool = False) -> list[str]:
    """Warn if the training loss of an arm has risen far above the source's.

    The loss is far above if it is twice as high, and higher by more than 1. A sign test must show
    that most steps after the fifth are. It counts steps, because a diverging loss can have any
    size.

    Args:
        label: Names the arm and the phase in the warning.
        losses: The training loss of the first steps.
        source: The source's loss on the first rows, with the preprocessing of training.
        masked: The arm has a mask, which raises the loss at once. The losses must then also be far
            above that of the first step.
    """
    first = max(source, losses[0]) if masked and losses else source
    late, limit = np.array(losses[5:]), max(2 * first, first + 1)
    if len(late) < FEWEST_SEEN or binomtest(int((late > limit).sum()), len(late), 0.5, alternative="greater").pvalue > RARE:
        return []
    reference = "that of step 1, just after masking, is" if first > source else "the source's loss on such rows is"
    return [
        f"{label}: the median training loss of steps 6 to {len(losses)} is {np.median(late):.4f}, {reference} {first:.4f}. "
        "The rate is too high: give a lower --lr, or --warmup-steps"
    ]


def harm_warnings(
    task: Task,
    recipe: Recipe,
    where: str,
    metrics: Mapping[str, Mapping[str, float]],
    is_significant: Callable[[str], bool],
) -> list[str]:
    """Warn if all arms end below the source.

    Args:
        task: The task.
        recipe: Names what the user can change.
        where: What the rows are called in the warning.
        metrics: The metrics by arm, `baseline` among them.
        is_significant: Returns whether the difference between an arm and the source is more than
            chance. Takes the name of the arm.
    """
    base, metric = metrics["baseline"], task.metric if task.metric in metrics["baseline"] else "loss"
    sign = 1 if task.higher_is_better and metric == task.metric else -1
    arms = [arm for arm in metrics if arm != "baseline"]
    if not all(sign * (metrics[arm][metric] - base[metric]) < 0 and is_significant(arm) for arm in arms):
        return []
    ends = ", ".join(f"{arm} {metrics[arm][metric]:.4f}" for arm in arms)
    why = "the training does harm, with a mask and without one" if "dense" in arms else "the training or the mask does harm"
    options = ("a lower --lr", "fewer epochs", "" if "dense" in arms else "a lower --sparsity", _milder(recipe, task))
    remedies = [option for option in options if option]
    return [
        f"every arm ends below the source on the {where} (source {metric} {base[metric]:.4f}; {ends}): {why}. "
        f"Try {', '.join(remedies[:-1])} or {remedies[-1]}"
    ]


def _milder(recipe: Recipe, task: Task) -> str:
    """The options that turn off the augmentation; empty if there is none."""
    if not hasattr(task, "augment") or not hasattr(task, "preprocessing"):
        return ""
    options = ["--set augment.crop=none"] if recipe.augment.crop != "none" else []
    options += ["--set augment.flip=0"] if recipe.augment.flip else []
    return f"less augmentation ({' '.join(options)})" if options else ""


def below_noise(arm: Scores, source: Scores, *, higher_is_better: bool, by_loss: bool) -> bool:
    """Return whether an arm lies below the source by more than the noise of the rows.

    The noise is NOISE standard errors of the mean difference of the same rows.

    Args:
        arm: The scores of the arm, of each row.
        source: The scores of the source on the same rows.
        higher_is_better: False for losses and error rates.
        by_loss: Compare the losses, because the metric is no mean of rows (BLEU).
    """
    sign = 1 if higher_is_better else -1
    ahead = source.loss - arm.loss if by_loss else sign * (arm.score - source.score)
    error = float(ahead.std(ddof=1)) * math.sqrt(len(ahead)) if len(ahead) > 1 else math.inf
    return bool(ahead.sum() < -NOISE * error)


def clearly_worse(
    arm_metrics: Mapping[str, float], source_metrics: Mapping[str, float], task: Task, recipe: Recipe, rows: int | None
) -> bool:
    """Return whether an arm is worse than the source by more than NOISE standard errors.

    The standard error is that of a difference of shares of `rows` rows. It is not known for a
    metric that is not a share of rows (`rows` is None, a loss, or a metric such as F1): the result
    is False then.
    """
    metric = task.metric if task.metric in source_metrics else "loss"
    value, source = arm_metrics[metric], source_metrics[metric]
    if rows is None or metric in UNBOUNDED or getattr(task, "corpus", None) is not None:
        return False
    return source - value > NOISE * math.sqrt((value * (1 - value) + source * (1 - source)) / rows)
