"""An open run: its options, the objects that it works with, and the results so far."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dsd_refine.checkpoint.checkpoint import Checkpoint
from dsd_refine.checkpoint.write import keys_in_order
from dsd_refine.data.given import Given
from dsd_refine.evidence.compare import Comparison, groups_of, with_source
from dsd_refine.masking.layers import Layer
from dsd_refine.recipe import Recipe
from dsd_refine.report.rules import absolute_margin, preference
from dsd_refine.run.state import RunState, Selected
from dsd_refine.run.workspace import Workspace
from dsd_refine.search import Rung, Setting, rung_of, rungs_of, setting_of, settings_of
from dsd_refine.system import EnergyMeter
from dsd_refine.tasks.base import Scores, Task
from dsd_refine.training.hooks import Hooks
from dsd_refine.training.state import Loop


@dataclass(frozen=True)
class Options:
    """How a run is carried out. No option here changes its result.

    Attributes:
        output_dir: The folder OUT, which the run writes as a whole or not at all.
        resume: Continue from the state of a stopped run.
        overwrite: Replace the output of an earlier run.
        save_phases: Also write the checkpoint at the end of each phase of the refined arm.
        save_every: Minutes between two saves of the state.
        cache_gb: The most gigabytes of decoded pictures or sounds that the run holds on the disk of
            OUT. None: a quarter of what is free there. 0: none; each row is decoded whenever it is
            used.
        report_images: How many rows gained, and how many rows lost, report.html shows with their
            content.
        device: "auto", "cpu", "cuda" or "mps".
        compile: Use `torch.compile` for the training forward.
        shard: Divide the model among the processes (FSDP2).
        activation_checkpointing: Compute the activations of each block again in the backward pass, in place of storing them.
        cpu_offload: Keep the shards and the optimizer's state in the memory of the host. It needs `shard`.
        spread: "tries": each process of a launcher trains whole tries.
        workers: The number of processes that load data.
        allow_pickle: Read .bin and .pth weights too.
        argv: The command line, for the report.
        say: Called with each line of news.
        hooks: The caller's hooks. Only the main process calls them.
        download: Called with the name and the bytes of a large download; returns whether to go on.
    """

    output_dir: Path
    resume: bool = False
    overwrite: bool = False
    save_phases: bool = False
    save_every: float = 10.0
    cache_gb: float | None = None
    report_images: int = 0
    device: str = "auto"
    compile: bool = False
    shard: bool = False
    activation_checkpointing: bool = False
    cpu_offload: bool = False
    spread: str | None = None
    workers: int = 0
    allow_pickle: bool = False
    argv: tuple[str, ...] = ()
    say: Callable[[str], None] = lambda text: None
    hooks: tuple[Hooks, ...] = ()
    download: Callable[[str, int], bool] = lambda name, size: False

    @property
    def cache_bytes(self) -> int | None:
        """The most bytes of decoded rows; None: to be found out."""
        return None if self.cache_gb is None else int(1e9 * self.cache_gb)


# The options that the command and the Python API pass on as they are, under the same names.
PASSED_ON = (
    "resume",
    "overwrite",
    "save_phases",
    "save_every",
    "cache_gb",
    "report_images",
    "device",
    "compile",
    "shard",
    "activation_checkpointing",
    "cpu_offload",
    "spread",
    "allow_pickle",
)


def default_workers(asked: int | None) -> int:
    """Return the number of processes that load data.

    It is `asked` if given. Else it is a few with a GPU, and none on a CPU, because training needs
    the same cores.
    """
    if asked is not None:
        return asked
    return min(4, (os.cpu_count() or 1) // 2) if torch.cuda.is_available() else 0


@dataclass
class Run:
    """An open run: the checkpoint, the data, the loop, and what has been measured so far.

    Attributes:
        checkpoint: The source, with its model.
        task: The task with the train, holdout and evaluation rows.
        recipe: The recipe, with the mixed precision that Accelerate uses.
        options: How the run is carried out.
        loop: The training loop.
        layers: All layers, masked or not.
        workspace: The files of the run.
        source_hashes: File name -> SHA-256 of the source's files.
        start: The state dict of the source, on the CPU. In a sharded run the rows that this process has, which are read
            from the files at each use.
        given: The data as they were read, before the split.
        teacher: A copy of the source, if a phase distills.
        meter: Measures energy. None with several processes, and in a resumed run, because nothing
            measured its first part.
        loss_scale: The state of the fp16 loss scaler at the beginning of each try.
        scores: Arm -> scores on the evaluation split, of the seed that the holdout prefers.
        seeds: Arm -> scores of each seed.
        comparisons: Name, such as "refined_vs_baseline" -> result.
        state: What is saved.
        entered: Whether a phase has begun in this process.
        source_scores: The source's scores on the holdout, if `patience` needs them.
    """

    checkpoint: Checkpoint
    task: Task
    recipe: Recipe
    options: Options
    loop: Loop
    layers: list[Layer]
    workspace: Workspace
    source_hashes: dict[str, str]
    start: Mapping[str, torch.Tensor]
    given: Given
    teacher: nn.Module | None = None
    meter: EnergyMeter | None = None
    loss_scale: dict[str, Any] | None = None
    scores: dict[str, Scores] = field(default_factory=dict)
    seeds: dict[str, list[Scores]] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    state: RunState = field(default_factory=RunState)
    entered: bool = False
    source_scores: Scores | None = None

    def save(self, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Save the state, with the fp16 loss scale, which took many steps to find.

        Args:
            tensors: The tensors of the current phase. None between phases.
        """
        scaler = self.loop.accelerator.scaler
        self.state.scaler = scaler.state_dict() if scaler is not None else None
        self.workspace.save(tensors, self.state.to_json())
        self.loop.hooks.save()

    def write_checkpoint(self, folder: Path) -> dict[str, str]:
        """Write the model's weights and the side files into an empty folder. Only the main process writes.

        In a sharded run all processes must call this. The tensors are gathered one at a time.

        Returns:
            The SHA-256 of every written file by its name; empty in the other processes.

        Raises:
            RunError: A value does not fit into the file's dtype.
        """
        state = self.loop.whole(self.loop.state(), to=0)
        if self.workspace.writes:
            return self.checkpoint.write_state(state, folder)
        if self.loop.shards is not None:
            for key in keys_in_order(self.checkpoint.layout, self.checkpoint.placement):
                state[key]  # this process gives its rows
        return {}

    def restored(self, position: list[int]) -> dict[str, torch.Tensor]:
        """Return the saved tensors of the phase that this process resumes.

        For a later phase and in a new run there are none.

        Args:
            position: The numbers of the arm, the try and the phase, each from 0.
        """
        first, self.entered = not self.entered, True
        file_name = self.workspace.state.get("tensors")
        return self.workspace.read_weights(file_name) if first and file_name and self.state.at == position else {}

    @cached_property
    def given_settings(self) -> list[Setting]:
        """The settings that every arm tries: those of the search, else one for each sparsity. Rates may be `auto`."""
        return settings_of(self.recipe)

    @property
    def settings(self) -> list[Setting]:
        """The `given_settings`, with numbers in place of the rates that have been tested."""
        if not self.state.rates:
            return self.given_settings
        rates = {name: found.rate for name, found in self.state.rates.items()}
        return [replace(each, recipe=each.recipe.at_rates(rates)) for each in self.given_settings]

    @cached_property
    def rungs(self) -> list[Rung]:
        """The rungs of one seed of an arm. Without a search it is one."""
        return rungs_of(self.recipe)

    @property
    def tries_per_seed(self) -> int:
        """The number of tries of one seed of an arm."""
        return sum(rung.size for rung in self.rungs)

    @property
    def tries(self) -> range:
        """The numbers of the tries of an arm, from 0: all with the first seed, then all with the next."""
        return range(self.tries_per_seed * self.recipe.seeds)

    def setting(self, arm: str, attempt: int) -> int | None:
        """Return which of the `settings` a try has. None: too few are left, so it is not made.

        It depends on the results of the rung before.
        """
        repeat, number = divmod(attempt, self.tries_per_seed)
        finished = [
            each for each in self.state.tries if each["arm"] == arm and each["attempt"] // self.tries_per_seed == repeat
        ]
        return setting_of(self.rungs, number, [self._ranked(finished, rung) for rung in range(len(self.rungs))])

    def _ranked(self, finished: Sequence[Mapping[str, Any]], rung: int) -> list[int]:
        """Return the settings of a rung that are not lost, the best on the holdout first, then the earlier."""
        of_rung = [each for each in finished if rung_of(self.rungs, each["attempt"] % self.tries_per_seed) == rung]
        kept = [each for each in of_rung if each["lost"] is None and each["holdout"] is not None]
        return [each["setting"] for each in sorted(kept, key=lambda each: self.preference(each["holdout"]), reverse=True)]

    def recipe_of(self, arm: str, attempt: int) -> Recipe:
        """Return the recipe with the setting of a try that is made."""
        return self.settings[self.setting(arm, attempt) or 0].recipe

    @cached_property
    def groups(self) -> np.ndarray[Any, Any] | None:
        """The group of each evaluation row, int array of shape (rows,).

        Rows of equal content have one group, because they count as one observation. None if all
        rows differ.
        """
        digests = self.task.eval.rows.digests
        return groups_of(digests) if len(set(digests)) < len(digests) else None

    @property
    def arms(self) -> tuple[str, ...]:
        """The names of the trained arms: "refined", then the controls."""
        return ("refined", *self.recipe.control)

    @property
    def margin(self) -> float:
        """The largest difference that counts as the same, in the unit of the metric."""
        metric, metrics = self.task.metric, self.task.metrics(self.seeds["baseline"][0])
        return absolute_margin(self.recipe.margin, metric, metrics[metric])

    def selected(self, arm: str) -> Selected:
        """Return the weights that the holdout chose for an arm: of a seed, or the soup of all seeds."""
        best, soup = self.state.best[arm][str(self.preferred(arm))], self.state.soups.get(arm)
        return soup if soup and self.recipe.seeds > 1 and self.is_better(soup, best) else best

    def is_better(self, new: Selected, old: Selected) -> bool:
        """Return whether the holdout prefers new weights to old ones. Without a holdout it prefers none."""
        return new.holdout is not None and old.holdout is not None and self.prefers(new.holdout, old.holdout)

    def preferred(self, arm: str) -> int:
        """Return the number of the seed whose result the holdout prefers, from 0.

        Without a holdout it is the first seed.
        """
        best = 0
        for seed in range(1, self.recipe.seeds):
            new, old = (self.state.best[arm][str(n)].holdout for n in (seed, best))
            if new is not None and old is not None and self.prefers(new, old):
                best = seed
        return best

    @cached_property
    def published(self) -> str:
        """The arm whose weights are published; "baseline" if it is the source. All tries must be finished.

        With `publish: best` it is the one that the holdout prefers. Among equals it is the source, then
        the refined arm.
        """
        arm, metrics = "baseline", self.state.source_holdout
        if self.recipe.publish == "refined" or metrics is None:
            return "refined"
        for other in self.arms:
            new = self.selected(other).holdout
            if new is not None and self.prefers(new, metrics):
                arm, metrics = other, new
        return arm

    @property
    def result(self) -> Comparison:
        """The comparison of the published arm with the source."""
        return with_source(self.comparisons, self.published)

    def prefers(self, new: Mapping[str, float], old: Mapping[str, float]) -> bool:
        """Return whether `new` is better than `old`. Both are metrics on the holdout."""
        return self.preference(new) > self.preference(old)

    def preference(self, metrics: Mapping[str, float]) -> tuple[float, float]:
        """Return the sort key of metrics on the holdout. The preferred ones have the larger key."""
        return preference(metrics, self.task.metric, higher_is_better=self.task.higher_is_better)
