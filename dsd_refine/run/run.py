"""A run: how it is carried out, and what is open while it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dsd_refine.checkpoint.checkpoint import Checkpoint
from dsd_refine.data.given import Given
from dsd_refine.evidence.compare import Comparison, groups_of
from dsd_refine.masking.layers import Layer
from dsd_refine.recipe import Recipe
from dsd_refine.run.state import RunState, Selected
from dsd_refine.run.workspace import Workspace
from dsd_refine.system import EnergyMeter
from dsd_refine.tasks.base import Scores, Task
from dsd_refine.training.hooks import Hooks
from dsd_refine.training.state import Loop


@dataclass(frozen=True)
class Options:
    """How a run is carried out; nothing here decides its result."""

    output_dir: Path
    resume: bool = False
    overwrite: bool = False
    save_phases: bool = False
    save_every: float = 10.0  # minutes
    report_images: int = 0  # rows gained, and rows lost, whose content report.html shows
    device: str = "auto"
    compile: bool = False
    workers: int = 0
    allow_pickle: bool = False
    argv: tuple[str, ...] = ()
    say: Callable[[str], None] = lambda text: None
    hooks: tuple[Hooks, ...] = ()
    download: Callable[[str, int], bool] = lambda name, size: False


def default_workers(asked: int | None) -> int:
    """Loading processes: as asked, else a few beside a GPU, none on a CPU (which they would only share)."""
    if asked is not None:
        return asked
    return min(4, (os.cpu_count() or 1) // 2) if torch.cuda.is_available() else 0


@dataclass
class Run:
    """An open run: the checkpoint, the data, the loop, and what has been measured so far."""

    checkpoint: Checkpoint
    task: Task
    recipe: Recipe
    options: Options
    loop: Loop
    layers: list[Layer]
    workspace: Workspace
    source_hashes: dict[str, str]
    start: dict[str, torch.Tensor]
    given: Given
    teacher: nn.Module | None = None
    meter: EnergyMeter | None = None  # None: several processes, or a run taken up again, whose first part nothing measured
    loss_scale: dict[str, Any] | None = None  # fp16's, as each try begins with it
    scores: dict[str, Scores] = field(default_factory=dict)
    seeds: dict[str, list[Scores]] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    state: RunState = field(default_factory=RunState)
    entered: bool = False  # has a phase begun in this process?

    def save(self, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Save the state, with the fp16 loss scale: it was found by trying, and must not be looked for again.

        `tensors` belong to a phase (None: between phases).
        """
        scaler = self.loop.accelerator.scaler
        self.state.scaler = scaler.state_dict() if scaler is not None else None
        self.workspace.save(tensors, self.state.to_json())
        self.loop.hooks.save()

    def restored(self, at: list[int]) -> dict[str, torch.Tensor]:
        """The saved tensors of the phase that this process goes on from; none for a later or a new one."""
        first, self.entered = not self.entered, True
        saved = self.workspace.state.get("tensors")
        return self.workspace.read_tensors(saved) if first and saved and self.state.at == at else {}

    def sparsity_of(self, attempt: int) -> float | None:
        """The sparsity of a try: the listed one, else that of the first sparse phase."""
        sparse = (phase.sparsity for phase in self.recipe.phases_at(self.tries[attempt]) if phase.kind == "sparse")
        return next(sparse, None)

    @cached_property
    def groups(self) -> np.ndarray[Any, Any] | None:
        """The group of each evaluation row, where some have equal content and so count as one."""
        digests = self.task.eval.rows.digests
        return groups_of(digests) if len(set(digests)) < len(digests) else None

    @property
    def arms(self) -> tuple[str, ...]:
        return ("refined", *self.recipe.control)

    @property
    def tries(self) -> list[float | None]:
        """The sparsity of each try of an arm: all sparsities with the first seed, then with the next."""
        return list(self.recipe.tried) * self.recipe.seeds

    @property
    def margin(self) -> float:
        """What counts as the same: absolute for a fraction, relative to the source for a loss."""
        if self.task.metric != "loss":
            return self.recipe.margin
        return self.recipe.margin * self.task.metrics(self.seeds["baseline"][0])[self.task.metric]

    def selected(self, arm: str) -> Selected:
        """What the holdout chose of an arm."""
        return self.state.best[arm][str(self.preferred(arm))]

    def preferred(self, arm: str) -> int:
        """The number of the seed whose result the holdout prefers (the first, where there is no holdout)."""
        best = 0
        for seed in range(1, self.recipe.seeds):
            new, old = (self.state.best[arm][str(n)].holdout for n in (seed, best))
            if new is not None and old is not None and self.prefers(new, old):
                best = seed
        return best

    def prefers(self, new: Mapping[str, float], old: Mapping[str, float]) -> bool:
        """By the metric, then the loss; by the loss alone where the metric is too dear for the holdout."""
        sign, metric = 1 if self.task.higher_is_better else -1, self.task.metric
        mine, theirs = ((sign * found[metric] if metric in found else 0.0, -found["loss"]) for found in (new, old))
        return mine > theirs
