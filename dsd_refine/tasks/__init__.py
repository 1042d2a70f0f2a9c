"""What a task is: rows to batches, batches to a loss or to per-row scores, scores to metrics.

Three functions of a batch and nothing else reach the loop, which knows no task; a task knows no loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from dsd_refine.tasks.data import Rows

Item = tuple[int, int | None]  # unit of a part, and the seed of its augmentation (None: as in evaluation)
Forward = Callable[..., Any]


@dataclass(frozen=True)
class Batch:
    """Collated examples. `inputs` go to the model by name (`x`: by position); `count` is the number of real targets."""

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor
    count: int

    def to(self, device: torch.device) -> Batch:
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return Batch(inputs, self.targets.to(device, non_blocking=True), self.count)


@dataclass(frozen=True)
class Score:
    """Of one unit of evaluation: `score` over `count` is the metric's share of it, `loss` its summed training loss."""

    score: float
    count: int
    loss: float
    prediction: int | None = None


@dataclass(frozen=True)
class Scores:
    """Per row of a part, in its order: float64 arrays; `prediction` is -1 where the task predicts no class."""

    score: np.ndarray[Any, Any]
    count: np.ndarray[Any, Any]
    loss: np.ndarray[Any, Any]
    prediction: np.ndarray[Any, Any]


class Part(Protocol):
    """One part of the data, as a task prepared it: `units` examples, each belonging to a row of `rows`."""

    @property
    def rows(self) -> Rows: ...

    @property
    def units(self) -> int: ...

    def row_of(self, unit: int) -> int: ...


class Task(Protocol):
    """One kind of model and data. `metric` is the name in the report; all metrics are fractions or sums over counts."""

    name: str
    metric: str
    higher_is_better: bool

    @property
    def train(self) -> Part: ...

    @property
    def holdout(self) -> Part | None: ...

    @property
    def eval(self) -> Part: ...

    def batch(self, part: Any, items: Sequence[Item]) -> Batch:
        """Load, transform and collate; runs in worker processes."""
        ...

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The summed loss over the batch's real targets, a float32 scalar."""
        ...

    def score(self, forward: Forward, batch: Batch) -> list[Score]:
        """One score a unit, in the batch's order."""
        ...

    def metrics(self, scores: Scores) -> dict[str, float]:
        """The task's metrics over rows, `metric` first."""
        ...

    def target(self, part: Any, row: int) -> str | None:
        """What row is labelled, for the predictions file."""
        ...

    def shown(self, prediction: int) -> str | None:
        """A prediction's name, for the predictions file."""
        ...

    def report(self) -> Mapping[str, Any]:
        """Task-specific report entries: `labels`, `preprocessing`, and `warnings`."""
        ...


def ratio(total: np.ndarray[Any, Any], count: np.ndarray[Any, Any]) -> float:
    """Sum over sum: the same whatever the batch size."""
    return float(total.sum() / max(1, count.sum()))
