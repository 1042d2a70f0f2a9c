"""Do the baseline's answers fit another assignment of labels to classes far better than the one that is used?

Where no name says which label is which class, an order is all there is to go by; a wrong one shows here. A weak or a biased
model must not be taken for one that is used wrongly, so the bar is high (`better_assignment`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import binomtest

SURE = 1e-6  # the chance that an assignment no better than the used one is taken for better
GAIN = 0.1  # of accuracy, the least that counts as far better
MOST_CLASSES = 2000  # that occur: with more the fit takes minutes
AGREEING = 0.95  # share of the reassigned labels that the other assignment has to fit at least as well

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Assignment:
    """`classes[k]` is the class that label k (by the assignment in use: class k) fits; accuracies are of the rows given."""

    classes: tuple[int, ...]
    accuracy: float
    used: float


def better_assignment(targets: Array, predictions: Array, classes: int) -> Assignment | None:
    """Another assignment of labels to classes that surely fits much better than target k being class k; else None.

    It must hold on rows that it was not fitted to (each half of every label's rows judges what the other half fits; with
    many classes and few rows anything can be fitted), and for nearly every label that it moves: where a model answers one
    label's rows mostly by the next one's class, and the last label's by its own, it is biased and not misread.
    """
    found = suspected(targets, predictions, classes)
    if found is None:
        return None
    half = _rank_within(targets) % 2 == 0
    gained = lost = 0
    for fit, judge in ((half, ~half), (~half, half)):
        other = _fitted(targets[fit], predictions[fit], classes)[targets[judge]] == predictions[judge]
        same = targets[judge] == predictions[judge]
        gained, lost = gained + int((other & ~same).sum()), lost + int((same & ~other).sum())
    sure = gained and binomtest(gained, gained + lost, 0.5, alternative="greater").pvalue < SURE
    return found if sure else None


def suspected(targets: Array, predictions: Array, classes: int) -> Assignment | None:
    """What `better_assignment` would give, had it rows enough to be sure of it; None where that is not in question."""
    if len(targets) == 0 or len(np.union1d(targets, predictions)) > MOST_CLASSES:
        return None
    fitted = _fitted(targets, predictions, classes)
    accuracy, used = float((fitted[targets] == predictions).mean()), float((targets == predictions).mean())
    moved = np.flatnonzero(fitted != np.arange(classes))
    if accuracy - used < GAIN:
        return None
    right = np.bincount(targets[fitted[targets] == predictions], minlength=classes)
    kept = np.bincount(targets[targets == predictions], minlength=classes)
    agreeing = float((right[moved] >= kept[moved]).mean())
    return Assignment(tuple(map(int, fitted)), accuracy, used) if agreeing >= AGREEING else None


def _rank_within(targets: Array) -> Array:
    """The number of each row among those of its label, from 0."""
    order = np.argsort(targets, kind="stable")
    starts = np.searchsorted(targets[order], targets[order])
    ranks = np.empty(len(targets), dtype=np.int64)
    ranks[order] = np.arange(len(targets)) - starts
    return ranks


def _fitted(targets: Array, predictions: Array, classes: int) -> Array:
    """The assignment with most rows right; among equals the one that leaves most labels as they are."""
    occurring = np.union1d(targets, predictions)  # the others stay: a head may have many more than the rows speak of
    size = len(occurring)
    rows, columns = np.searchsorted(occurring, targets), np.searchsorted(occurring, predictions)
    table = np.bincount(rows * size + columns, minlength=size * size).reshape(size, size) + np.eye(size) / (2 * size)
    fitted = np.arange(classes)
    fitted[occurring] = occurring[linear_sum_assignment(-table)[1]]
    return fitted
