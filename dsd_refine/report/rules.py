"""Two rules that the run applies and its report repeats: which result is preferred, and which difference is negligible."""

from __future__ import annotations

from collections.abc import Mapping


def preference(metrics: Mapping[str, float], metric: str, *, higher_is_better: bool) -> tuple[float, float]:
    """Return a sort key for results on the holdout: the preferred result has the larger key.

    The metric decides first, then the loss. If the holdout was not scored by the metric (because
    that takes too long), the loss decides alone.

    Args:
        metrics: The values on the holdout, by the name of the metric.
        metric: The name of the task's metric.
        higher_is_better: False for losses and error rates.
    """
    sign = 1.0 if higher_is_better else -1.0
    return (sign * float(metrics[metric]) if metric in metrics else 0.0, -float(metrics.get("loss", 0.0)))


def absolute_margin(margin: float, metric: str, baseline: float) -> float:
    """Return the largest difference that counts as the same, in the unit of the metric.

    Args:
        margin: The margin of the recipe. For a loss or squared error it is a share of the source's;
            for all other metrics it is absolute already.
        metric: The name of the task's metric.
        baseline: The metric of the source on the evaluation split.
    """
    return margin * abs(baseline) if metric in ("loss", "mse") else margin
