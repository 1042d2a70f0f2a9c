"""Metrics of classes from counts: F1, Matthews' correlation, balanced accuracy.

A row's statistics are four numbers for each class, in four blocks: 1 where the class is predicted and
true, 1 where it is predicted, 1 where it is true, and its score (the logit). All functions here take
their sums, of shape (…, 4 x classes), and return metrics of shape (…); but `average_precision` needs all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dsd_refine.tasks.base import RowMetric

Array = np.ndarray[Any, Any]
Metric = Callable[[Array], Array]

MOST_CLASSES = 200  # with more, the statistics of all rows take too much memory


def class_stats(predicted: torch.Tensor, true: torch.Tensor, logits: torch.Tensor) -> Array:
    """Return the statistics of rows, float64 of shape (rows, 4 x classes).

    Args:
        predicted: bool, shape (rows, classes).
        true: bool, shape (rows, classes).
        logits: float, shape (rows, classes).
    """
    blocks = [predicted & true, predicted, true, logits]
    return torch.cat([block.double() for block in blocks], dim=1).cpu().numpy()


def _blocks(sums: Array) -> tuple[Array, Array, Array]:
    """Right, predicted and true counts of each class, each of shape (…, classes)."""
    classes = sums.shape[-1] // 4
    return sums[..., :classes], sums[..., classes : 2 * classes], sums[..., 2 * classes : 3 * classes]


def _divided(part: Array, whole: Array) -> Array:
    """part / whole, and 0 where the whole is 0."""
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1), 0.0)


def f1(sums: Array) -> Array:
    """F1 of class 1 of two classes, as GLUE has it."""
    right, predicted, true = _blocks(sums)
    return _divided(2 * right, predicted + true)[..., 1]


def f1_macro(sums: Array) -> Array:
    """The mean of the classes' F1, over the classes that are predicted or true in some row."""
    right, predicted, true = _blocks(sums)
    occurring = ((predicted + true) > 0).sum(-1)
    return _divided(_divided(2 * right, predicted + true).sum(-1), occurring)


def f1_micro(sums: Array) -> Array:
    """F1 of all classes' counts together."""
    right, predicted, true = (block.sum(-1) for block in _blocks(sums))
    return _divided(2 * right, predicted + true)


def balanced_accuracy(sums: Array) -> Array:
    """The mean of the classes' shares of right rows, over the classes that have rows."""
    right, _, true = _blocks(sums)
    return _divided(_divided(right, true).sum(-1), (true > 0).sum(-1))


def matthews(sums: Array) -> Array:
    """Matthews' correlation, of any number of classes (Gorodkin, 2004). 0 if one class is all that is predicted or true."""
    right, predicted, true = _blocks(sums)
    rows = true.sum(-1)
    covariance = right.sum(-1) * rows - (predicted * true).sum(-1)
    spread = (rows**2 - (predicted**2).sum(-1)) * (rows**2 - (true**2).sum(-1))
    return _divided(covariance, np.sqrt(np.maximum(spread, 0)))


def _average_precisions(stats: Array, times: Array) -> Array:
    """The mean over classes of the area under precision and recall, for samples of rows.

    Classes without a true row in a sample are left out of it. Rows of equal score count together.

    Args:
        stats: The rows' statistics, shape (rows, 4 x classes).
        times: How often each row is in each sample, shape (samples, rows).
    """
    classes = stats.shape[1] // 4
    true, scores = stats[:, 2 * classes : 3 * classes], stats[:, 3 * classes :]
    areas, occurring = np.zeros(len(times)), np.zeros(len(times))
    for k in range(classes):
        order = np.argsort(-scores[:, k], kind="stable")
        ordered = scores[order, k]
        starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))  # the first row of each score
        drawn = times[:, order]
        rows = np.add.reduceat(drawn, starts, axis=1).cumsum(1)
        hits = np.add.reduceat(drawn * true[order, k], starts, axis=1).cumsum(1)
        recall = _divided(hits, hits[:, -1:])
        areas += (np.diff(recall, prepend=0.0, axis=1) * _divided(hits, rows)).sum(1)
        occurring += hits[:, -1] > 0
    return _divided(areas, occurring)


average_precision = RowMetric(_average_precisions)

CLASS_METRICS: dict[str, Metric] = {
    "f1": f1,
    "f1_macro": f1_macro,
    "balanced_accuracy": balanced_accuracy,
    "matthews": matthews,
}
