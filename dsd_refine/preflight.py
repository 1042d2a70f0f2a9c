"""Is the baseline what it should be? A wrong preprocessing or label map shows here, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from scipy.stats import binomtest

from dsd_refine.claims import Claim, claims
from dsd_refine.errors import UsageError
from dsd_refine.paired import ALPHA
from dsd_refine.recipe import Recipe
from dsd_refine.report.card import evaluated_on
from dsd_refine.tasks import Guess, Task

UNBOUNDED = ("loss", "perplexity")  # every other metric is a fraction


def preflight(task: Task, found: Mapping[str, float], recipe: Recipe, source: Path) -> list[str]:
    """Compare the baseline's metrics with what the user expects, what the source's card says, and guessing; the warnings.

    Raises:
        UsageError: an expected figure is not reproduced within the margin, or is of a metric that the task does not have.
    """
    for metric, expected in recipe.expect.items():
        if metric not in found:
            raise UsageError(f"--expect {metric}: {task.name} measures {', '.join(found)}")
        if not near(found[metric], expected, task, metric, recipe.margin):
            raise UsageError(
                f"--expect {metric}={expected:g}: the source reaches {found[metric]:.4f} on these "
                f"{len(task.eval.rows):,} rows, not within the margin of {recipe.margin:g}. Probably the preprocessing or "
                "the labels differ from those that it was measured with, or the rows do; nothing was trained"
            )
    return [*_card_warnings(task, found, recipe, source), *_chance_warnings(task, found, recipe.margin)]


def near(value: float, expected: float, task: Task, metric: str, margin: float) -> bool:
    """Within the margin: absolute for a fraction, relative for a loss."""
    fraction = metric not in UNBOUNDED
    return abs(value - expected) <= (margin if fraction else margin * abs(expected)) + 1e-12


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
