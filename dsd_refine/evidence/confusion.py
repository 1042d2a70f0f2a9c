"""Test whether the baseline's answers fit another assignment of labels to classes far better.

Without class names, labels can only be assigned in order, and the order may be wrong. A weak or
biased model must not raise a false alarm, so the conditions are strict (see `better_assignment`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import binomtest

SURE = 1e-6  # accepted chance of a false alarm
GAIN = 0.1  # the least gain of accuracy that counts as far better
MOST_CLASSES = 2000  # classes that occur; with more, the fit takes minutes
AGREEING = 0.95  # the least share of moved labels that the other assignment must fit at least as well

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Assignment:
    """Another assignment of labels to classes.

    Attributes:
        classes: `classes[k]` is the class for the label that is now class k.
        accuracy: The accuracy of the given rows with this assignment, 0 to 1.
        used: Their accuracy with the assignment in use, 0 to 1.
    """

    classes: tuple[int, ...]
    accuracy: float
    used: float


def better_assignment(targets: Array, predictions: Array, classes: int) -> Assignment | None:
    """Return another assignment if it certainly fits much better than target k being class k, else
    None.

    With many classes and few rows, some assignment always fits. So the rows of each label are cut
    into halves, and an assignment that was fitted to one half is tested on the other. It must also
    hold for nearly every label that it moves. Otherwise the model is biased: it answers the rows of
    one label with the class of another, and that label's own rows correctly.

    Args:
        targets: The class of each row by the assignment in use, shape (rows,).
        predictions: The class that the model answered, shape (rows,).
        classes: The number of the model's classes.
    """
    suspect = suspected(targets, predictions, classes)
    if suspect is None:
        return None
    half = _rank_within(targets) % 2 == 0
    gained = lost = 0
    for fit, test in ((half, ~half), (~half, half)):
        other = _fitted(targets[fit], predictions[fit], classes)[targets[test]] == predictions[test]
        used = targets[test] == predictions[test]
        gained, lost = gained + int((other & ~used).sum()), lost + int((used & ~other).sum())
    sure = gained and binomtest(gained, gained + lost, 0.5, alternative="greater").pvalue < SURE
    return suspect if sure else None


def suspected(targets: Array, predictions: Array, classes: int) -> Assignment | None:
    """Return an assignment that fits much better, without the proof that it is no chance; else
    None.

    If there is one, more rows may prove it.
    """
    if len(targets) == 0 or len(np.union1d(targets, predictions)) > MOST_CLASSES:
        return None
    fitted = _fitted(targets, predictions, classes)
    accuracy, used = float((fitted[targets] == predictions).mean()), float((targets == predictions).mean())
    moved = np.flatnonzero(fitted != np.arange(classes))
    if accuracy - used < GAIN:
        return None
    fitted_right = np.bincount(targets[fitted[targets] == predictions], minlength=classes)
    used_right = np.bincount(targets[targets == predictions], minlength=classes)
    agreeing = float((fitted_right[moved] >= used_right[moved]).mean())
    return Assignment(tuple(map(int, fitted)), accuracy, used) if agreeing >= AGREEING else None


def _rank_within(targets: Array) -> Array:
    """The position of each row among the rows of its label, from 0."""
    order = np.argsort(targets, kind="stable")
    starts = np.searchsorted(targets[order], targets[order])
    ranks = np.empty(len(targets), dtype=np.int64)
    ranks[order] = np.arange(len(targets)) - starts
    return ranks


def _fitted(targets: Array, predictions: Array, classes: int) -> Array:
    """The assignment with most rows right. Among equals, the one that moves the fewest labels."""
    occurring = np.union1d(targets, predictions)  # other classes stay, because a head may have many classes that no row has
    size = len(occurring)
    rows, columns = np.searchsorted(occurring, targets), np.searchsorted(occurring, predictions)
    table = np.bincount(rows * size + columns, minlength=size * size).reshape(size, size) + np.eye(size) / (2 * size)
    fitted = np.arange(classes)
    fitted[occurring] = occurring[linear_sum_assignment(-table)[1]]
    return fitted
