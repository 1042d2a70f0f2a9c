"""Is the baseline what it should be? A wrong preprocessing or label map shows here, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from dsd_refine.claims import Claim, claims
from dsd_refine.confusion import Assignment, better_assignment, suspected
from dsd_refine.data.labels import LabelMap
from dsd_refine.data.names import MOST, map_option
from dsd_refine.errors import UsageError
from dsd_refine.paired import ALPHA
from dsd_refine.recipe import Recipe
from dsd_refine.report.card import evaluated_on
from dsd_refine.tasks import Guess, Score, Scores, Task

FEWEST = 20  # rows or steps from which damage is spoken of
ERRORS = 3.0  # standard errors that it must be beyond
RARE = 0.001  # what is likelier than this may be chance
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
        for guess in task.guesses
        if not _beats(found[guess.metric], guess, margin)
    ][:1]


def _beats(value: float, guess: Guess, margin: float) -> bool:
    """Surely more rows right than a guess has; by more than the margin, where the metric is no count of rows."""
    if guess.rows is not None:
        return bool(binomtest(round(value * guess.rows), guess.rows, guess.value, alternative="greater").pvalue < ALPHA)
    return value > guess.value if guess.higher_is_better else value < guess.value * (1 - margin)


def view_warnings(task: Task, plain: Sequence[Score], seen: Sequence[Score], recipe: Recipe) -> list[str]:
    """Does the source still know its rows as training shows them? `plain` and `seen` are scores of the same training rows.

    Said where it loses more than half of what it is better than guessing by, beyond ERRORS standard errors of the rows'
    differences: augmentation that suits the pictures costs far less.
    """
    guess = next((each for each in task.guesses if each.rows is not None or each.metric == "loss"), None)
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


def _value(score: Score, guess: Guess) -> float:
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
