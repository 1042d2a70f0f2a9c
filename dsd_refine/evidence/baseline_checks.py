"""Checks of the baseline's metrics before training.

They find a wrong preprocessing or label map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from dsd_refine.data.labels import LabelMap
from dsd_refine.data.names import MOST, map_option
from dsd_refine.errors import UsageError
from dsd_refine.evidence.card_results import CardResult, read_card_results
from dsd_refine.evidence.confusion import Assignment, better_assignment, suspected
from dsd_refine.evidence.paired import ALPHA
from dsd_refine.recipe import Recipe
from dsd_refine.report.card import evaluated_on
from dsd_refine.report.words import AT_CHANCE
from dsd_refine.tasks.base import ChanceBaseline, Scores, Task

UNBOUNDED = ("loss", "perplexity", "mse")  # every other metric is a fraction


def check_baseline(
    task: Task,
    metrics: Mapping[str, float],
    recipe: Recipe,
    source: Path,
    scores: Scores | None = None,
    score: Callable[[Any], Scores] | None = None,
) -> list[str]:
    """Check the source's metrics against the user's expectation, its model card and a chance
    baseline.

    Args:
        task: The task with its rows.
        metrics: The source's metrics on the evaluation rows.
        recipe: Its `expect` and `margin` count.
        source: The source's folder, with its card.
        scores: The source's scores on the evaluation rows. They show labels assigned to wrong
            classes.
        score: Computes the scores on further rows, if the evaluation rows are too few for that.

    Returns:
        The warnings.

    Raises:
        UsageError: An expected metric is not reproduced within the margin, or the task does not
            have it. Or labels were assigned to classes by their order alone, and the source's
            answers prove another assignment.
    """
    assigned = _assignment_warnings(task, scores, score) if scores is not None else []
    for metric, expected in recipe.expect.items():
        if metric not in metrics:
            raise UsageError(f"--expect {metric}: {task.name} measures {', '.join(metrics)}")
        if not near(metrics[metric], expected, task, metric, recipe.margin):
            raise UsageError(
                f"--expect {metric}={expected:g}: the source reaches {metrics[metric]:.4f} on these "
                f"{len(task.eval.rows):,} rows, not within the margin of {recipe.margin:g}. The preprocessing, the labels or "
                "the rows are probably other ones than in that measurement; nothing was trained"
            )
    return [*assigned, *_card_warnings(task, metrics, recipe, source), *_chance_warnings(task, metrics, recipe.margin)]


def near(value: float, expected: float, task: Task, metric: str, margin: float) -> bool:
    """Return whether a value is within the margin: absolute for a fraction, relative for a loss."""
    fraction = metric not in UNBOUNDED
    return abs(value - expected) <= (margin if fraction else margin * abs(expected)) + 1e-12


def _assignment_warnings(task: Task, scores: Scores, score: Callable[[Any], Scores] | None) -> list[str]:
    """Warn if the answers fit another assignment of labels to classes far better.

    Refuse if the used one was a guess.
    """
    labels = getattr(task, "labels", None)
    if not isinstance(labels, LabelMap):
        return []
    classes, targets, answers = len(labels.model), _ids(task.eval), scores.prediction
    better = better_assignment(targets, answers, classes)
    if better is None and labels.guessed and score is not None and suspected(targets, answers, classes):
        more = [part for part in (task.holdout, task.train) if part is not None]
        targets = np.concatenate([targets, *map(_ids, more)])
        answers = np.concatenate([answers, *(score(part).prediction for part in more)])
        better = better_assignment(targets, answers, classes)
    if better is None:
        return []
    message = _assignment_message(labels, better, len(targets))
    if labels.guessed:
        raise UsageError(f"{message}; nothing was trained")
    return [message]


def _ids(part: Any) -> Any:
    return np.asarray(part.ids, dtype=np.int64)


def _assignment_message(labels: LabelMap, better: Assignment, rows: int) -> str:
    """Describe the assignment in use and the one that fits, each with its accuracy and the option
    that selects it.
    """
    texts = {labels.ids[label]: label for label in labels.data}
    moved = [k for k, fits in enumerate(better.classes) if fits != k and k in texts]

    def pairs(classes: Mapping[int, int]) -> str:
        return ", ".join(f"{texts[k]} → {_class(labels, classes[k])}" for k in moved[:MOST]) + (", …" if moved[MOST:] else "")

    used, fits = {k: k for k in texts}, {k: better.classes[k] for k in texts}
    text = (
        f"the labels are probably assigned to wrong classes. Used ({labels.rule}): {pairs(used)}; "
        f"{better.used:.1%} of {rows:,} rows are right. Another assignment fits the source's answers far better: "
        f"{pairs(fits)}; {better.accuracy:.1%} are right"
    )
    listed = texts if labels.guessed else moved  # with class names, labels that are not moved need no entry
    other, same = ({texts[k]: _class(labels, classes[k]) for k in listed} for classes in (fits, used))
    return f"{text}. Use that one by {map_option(other)}, " + (
        f"or keep the first by {map_option(same)}" if labels.guessed else "if it is the right one"
    )


def _class(labels: LabelMap, number: int) -> str:
    """A class as `label_map` takes it: its name, or its number if the model has no names."""
    return str(number) if labels.guessed else labels.model[number]


def _card_warnings(task: Task, metrics: Mapping[str, float], recipe: Recipe, source: Path) -> list[str]:
    """Warn of results in the source's card, on the same data, that are not reproduced."""
    warnings = []
    data = evaluated_on(recipe.model_dump())
    for result in read_card_results(source):
        metric = _metric_of(result, task, metrics)
        if metric is None or not result.is_of(data):
            continue
        value = result.value / 100 if metric not in UNBOUNDED and result.value > 1 else result.value
        if not near(metrics[metric], value, task, metric, recipe.margin):
            warnings.append(
                f"the source's card says {metric} {value:.4f} on {result.shown}, measured here is {metrics[metric]:.4f}: "
                "do preprocessing, labels and rows agree?"
            )
    return list(dict.fromkeys(warnings))  # our own cards have each result twice


def _metric_of(result: CardResult, task: Task, metrics: Mapping[str, float]) -> str | None:
    """The name of our metric that a result of a card is of; None if it is another one.

    A result without a name is taken to be of the task's metric if that is a fraction.
    """
    if result.metric is not None:
        return result.metric if result.metric in metrics else None
    first_word = result.notes.split(" ", 1)[0]  # the metric's name in our own cards
    return first_word if first_word in metrics else task.metric if task.metric not in UNBOUNDED else None


def _chance_warnings(task: Task, metrics: Mapping[str, float], margin: float) -> list[str]:
    """Warn of the first trivial predictor that the source does not beat."""
    return [
        f"the source's {guess.metric} of {metrics[guess.metric]:.4f} {AT_CHANCE} {guess.how} ({guess.value:.4f}): "
        "are these the data, the labels and the preprocessing that it was trained with?"
        for guess in task.chance_baselines
        if not _beats(metrics[guess.metric], guess, margin)
    ][:1]


def _beats(value: float, guess: ChanceBaseline, margin: float) -> bool:
    """True if the source is better: significantly more rows right or, for other metrics, by more
    than the margin.
    """
    if guess.rows is not None:
        return bool(binomtest(round(value * guess.rows), guess.rows, guess.value, alternative="greater").pvalue < ALPHA)
    return value > guess.value if guess.higher_is_better else value < guess.value * (1 - margin)
