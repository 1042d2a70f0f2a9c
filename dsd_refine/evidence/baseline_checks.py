"""Is the baseline what it should be? A wrong preprocessing or label map shows here, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from dsd_refine.data.labels import LabelMap
from dsd_refine.data.names import MOST, map_option
from dsd_refine.errors import UsageError
from dsd_refine.evidence.card_results import Claim, claims
from dsd_refine.evidence.confusion import Assignment, better_assignment, suspected
from dsd_refine.evidence.paired import ALPHA
from dsd_refine.recipe import Recipe
from dsd_refine.report.card import evaluated_on
from dsd_refine.tasks.base import ChanceBaseline, Scores, Task

UNBOUNDED = ("loss", "perplexity")  # every other metric is a fraction


def preflight(
    task: Task,
    found: Mapping[str, float],
    recipe: Recipe,
    source: Path,
    scores: Scores | None = None,
    score: Callable[[Any], Scores] | None = None,
) -> list[str]:
    """Compare the baseline's metrics with what the user expects, what the source's card says, and guessing; the warnings.

    `scores` are the evaluation rows', `score` those of another part: answers that fit other classes than they are taken for.

    Raises:
        UsageError: an expected figure is not reproduced within the margin, or is of a metric that the task does not have;
            labels that were assigned to classes by order alone, and surely otherwise than the source's answers say.
    """
    assigned = _assignment_warnings(task, scores, score) if scores is not None else []
    for metric, expected in recipe.expect.items():
        if metric not in found:
            raise UsageError(f"--expect {metric}: {task.name} measures {', '.join(found)}")
        if not near(found[metric], expected, task, metric, recipe.margin):
            raise UsageError(
                f"--expect {metric}={expected:g}: the source reaches {found[metric]:.4f} on these "
                f"{len(task.eval.rows):,} rows, not within the margin of {recipe.margin:g}. Probably the preprocessing or "
                "the labels differ from those that it was measured with, or the rows do; nothing was trained"
            )
    return [*assigned, *_card_warnings(task, found, recipe, source), *_chance_warnings(task, found, recipe.margin)]


def near(value: float, expected: float, task: Task, metric: str, margin: float) -> bool:
    """Within the margin: absolute for a fraction, relative for a loss."""
    fraction = metric not in UNBOUNDED
    return abs(value - expected) <= (margin if fraction else margin * abs(expected)) + 1e-12


def _assignment_warnings(task: Task, scores: Scores, score: Callable[[Any], Scores] | None) -> list[str]:
    """Do the answers fit another assignment of labels to classes far better? Refused where the used one was a guess."""
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
    line = _both(labels, better, len(targets))
    if labels.guessed:
        raise UsageError(f"{line}; nothing was trained")
    return [line]


def _ids(part: Any) -> Any:
    return np.asarray(part.ids, dtype=np.int64)


def _both(labels: LabelMap, better: Assignment, rows: int) -> str:
    """The assignment in use and the one that fits, each with its accuracy and, for a remedy, its option."""
    texts = {labels.ids[label]: label for label in labels.data}
    moved = [k for k, fits in enumerate(better.classes) if fits != k and k in texts]

    def pairs(classes: Mapping[int, int]) -> str:
        return ", ".join(f"{texts[k]} → {_class(labels, classes[k])}" for k in moved[:MOST]) + (", …" if moved[MOST:] else "")

    used, fits = {k: k for k in texts}, {k: better.classes[k] for k in texts}
    text = (
        f"the labels are probably not the classes that they are taken for. Used ({labels.rule}): {pairs(used)}; "
        f"{better.used:.1%} of {rows:,} rows are right. Another assignment fits the source's answers far better: "
        f"{pairs(fits)}; {better.accuracy:.1%} are right"
    )
    spoken = texts if labels.guessed else moved  # with names the others stay as they are
    other, same = ({texts[k]: _class(labels, classes[k]) for k in spoken} for classes in (fits, used))
    return f"{text}. Use that one by {map_option(other)}, " + (
        f"or keep the first by {map_option(same)}" if labels.guessed else "if it is the right one"
    )


def _class(labels: LabelMap, number: int) -> str:
    """A class as `label_map` takes it: its number, where the names are only the data's."""
    return str(number) if labels.guessed else labels.model[number]


def _card_warnings(task: Task, found: Mapping[str, float], recipe: Recipe, source: Path) -> list[str]:
    lines = []
    data = evaluated_on(recipe.model_dump())
    for claim in claims(source):
        metric = _metric(claim, task, found)
        if metric is None or not claim.is_of(data):
            continue
        value = claim.value / 100 if metric not in UNBOUNDED and claim.value > 1 else claim.value
        if not near(found[metric], value, task, metric, recipe.margin):
            lines.append(
                f"the source's card says {metric} {value:.4f} on {claim.shown}, measured here is {found[metric]:.4f}: "
                "do preprocessing, labels and rows agree?"
            )
    return list(dict.fromkeys(lines))  # a card of ours says it twice, in its two places


def _metric(claim: Claim, task: Task, found: Mapping[str, float]) -> str | None:
    """Which of our metrics a claim is of, if any. One without a name is of the task's where that is a fraction."""
    if claim.metric is not None:
        return claim.metric if claim.metric in found else None
    said = claim.notes.split(" ", 1)[0]  # as our own card has it
    return said if said in found else task.metric if task.metric not in UNBOUNDED else None


def _chance_warnings(task: Task, found: Mapping[str, float], margin: float) -> list[str]:
    """One for the first guess that the source does not beat."""
    return [
        f"the source's {guess.metric} of {found[guess.metric]:.4f} cannot be told from {guess.how} ({guess.value:.4f}): "
        "are these the data, the labels and the preprocessing that it was trained with?"
        for guess in task.chance_baselines
        if not _beats(found[guess.metric], guess, margin)
    ][:1]


def _beats(value: float, guess: ChanceBaseline, margin: float) -> bool:
    """Surely more rows right than a guess has; by more than the margin, where the metric is no count of rows."""
    if guess.rows is not None:
        return bool(binomtest(round(value * guess.rows), guess.rows, guess.value, alternative="greater").pvalue < ALPHA)
    return value > guess.value if guess.higher_is_better else value < guess.value * (1 - margin)
