"""Which rows each batch holds: a function of seed, phase and epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dsd_refine.seeding import stable_seed
from dsd_refine.tasks.base import Batch, Item, Task
from dsd_refine.training.state import Key, Loop, micro_batches


def shares(micro: Any, size: int, world: int, has_batchnorm: bool) -> list[Any]:
    """The rows of a micro-batch that each process takes: in order, `size` each, the last what is left (perhaps none)."""
    size = max(size, 2) if has_batchnorm else size
    bounds = [min(rank * size, len(micro)) for rank in range(world)] + [len(micro)]
    if has_batchnorm:
        for rank in range(1, world):
            if bounds[rank + 1] - bounds[rank] == 1:
                # a lone row goes to the last process before that has rows
                bounds[1 : rank + 1] = [b + (b == bounds[rank]) for b in bounds[1 : rank + 1]]
    return [micro[a:b] for a, b in pairwise(bounds)]


def epoch_order(key: Key, epoch: int, units: int) -> np.ndarray[Any, Any]:
    """The order of an epoch: a function of (seed, phase, epoch) alone."""
    return np.random.default_rng(stable_seed(key.seed, key.phase, epoch, "order")).permutation(units)


class BatchPlan(Sampler[tuple[list[Item], bool]]):
    """What this process loads, micro-batch by micro-batch, from `first` to the end of the phase.

    A process without a row in a micro-batch loads two anyway and gives them no weight, since all must step together.
    """

    def __init__(self, loop: Loop, key: Key, first: int, total: int) -> None:
        self.loop, self.key, self.first, self.total = loop, key, first, total

    def groups(self) -> Iterator[list[tuple[np.ndarray[Any, Any], int]]]:
        """Of each step its micro-batches over all processes: (rows, epoch)."""
        loop, recipe, units = self.loop, self.loop.recipe, self.loop.task.train.units
        micro = micro_batches(units, recipe.batch_size * loop.world, loop.has_batchnorm)
        size, per_epoch, epoch, order = recipe.gradient_accumulation_steps, loop.steps_per_epoch, -1, np.empty(0)
        for step in range(self.first, self.total):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = epoch_order(self.key, epoch, units)
            place = step % per_epoch
            yield [(order[np.asarray(m)], epoch) for m in micro[place * size : (place + 1) * size]]

    def _mine(self, micro: np.ndarray[Any, Any], epoch: int) -> tuple[list[Item], bool]:
        loop, rank = self.loop, self.loop.accelerator.process_index
        mine = shares(micro, loop.recipe.batch_size, loop.world, loop.has_batchnorm)[rank]
        chosen = mine if len(mine) else micro[:2]
        return [(int(u), stable_seed(*self.key, epoch, int(u), "augment")) for u in chosen], bool(len(mine))

    def __iter__(self) -> Iterator[tuple[list[Item], bool]]:
        for group in self.groups():
            yield from (self._mine(rows, epoch) for rows, epoch in group)


class _Loader(Dataset[Batch]):
    """Makes whole batches, in this process or in a worker."""

    def __init__(self, task: Task, part: Any) -> None:
        self.task, self.part = task, part

    def __getitem__(self, wanted: Any) -> Batch:
        items, real = wanted
        batch = replace(self.task.batch(self.part, items), items=tuple(items))
        return batch if real else replace(batch, count=0)


def loader(loop: Loop, part: Any, plan: Any) -> DataLoader[Batch]:
    # a generator of its own: drawing the workers' base seed must not move the generator that training uses
    return DataLoader(
        _Loader(loop.task, part), batch_size=None, sampler=plan, num_workers=loop.workers, generator=torch.Generator()
    )
