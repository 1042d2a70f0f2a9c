"""Which rows each batch holds. The seed, the phase and the epoch alone decide it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dsd_refine.seeding import stable_seed, stable_seeds
from dsd_refine.tasks.base import Batch, Item, Task, unit_lengths
from dsd_refine.training.state import Key, Loop, micro_batches

T = TypeVar("T")
Order = np.ndarray[Any, Any]

SLOW = 0.002  # seconds that a batch takes to make, from which a thread pays
BLOCK = 50  # batches that are sorted by length together
TIMED = 4  # batches whose making is timed


def shares(micro: Any, size: int, world: int, has_batchnorm: bool) -> list[Any]:
    """Divide a micro-batch between the processes: in order, `size` rows each, and the rest to the last.

    A process may take no row. With BatchNorm no process takes a single row, unless the micro-batch
    has only one.

    Args:
        micro: the rows of the micro-batch over all processes.
        size: rows per process.
        world: number of processes.

    Returns:
        `world` slices of `micro`.
    """
    size = max(size, 2) if has_batchnorm else size
    bounds = [min(rank * size, len(micro)) for rank in range(world)] + [len(micro)]
    if has_batchnorm:
        for rank in range(1, world):
            if bounds[rank + 1] - bounds[rank] == 1:
                # give a single row to the nearest earlier process that has rows
                bounds[1 : rank + 1] = [b + (b == bounds[rank]) for b in bounds[1 : rank + 1]]
    return [micro[a:b] for a, b in pairwise(bounds)]


def epoch_order(key: Key, epoch: int, units: int) -> np.ndarray[Any, Any]:
    """A random order of the units 0..units-1, which depends on (seed, phase, epoch) alone."""
    return np.random.default_rng(stable_seed(key.seed, key.phase, epoch, "order")).permutation(units)


def grouped(order: Order, lengths: Order, size: int, key: Key, epoch: int) -> Order:
    """Put rows of about one length into the same batch, so that little is padding (`group_by_length`).

    Blocks of BLOCK batches are sorted by length. Then whole batches change places, so that lengths do
    not fall or rise during an epoch. What is left after the last whole batch stays at the end.

    Args:
        order: an order of the units, shape (units,).
        lengths: the length of each unit, shape (units,).
        size: the units of a batch, over all processes.
        key: the seeds of the phase.
        epoch: the epoch, from 0.
    """
    whole = len(order) // size * size
    blocks = [order[start : min(start + BLOCK * size, whole)] for start in range(0, whole, BLOCK * size)]
    batches = [block[np.argsort(-lengths[block], kind="stable")].reshape(-1, size) for block in blocks]
    places = np.random.default_rng(stable_seed(key.seed, key.phase, epoch, "groups")).permutation(whole // size)
    return np.concatenate([*(batches[place // BLOCK][place % BLOCK] for place in places), order[whole:]])


class BatchPlan(Sampler[tuple[list[Item], bool]]):
    """The micro-batches that this process loads, from step `first` (counted from 0) to the last of `total` steps.

    All processes must step together. So a process without a row in a micro-batch loads two rows of
    it and gives them the weight 0.
    """

    def __init__(self, loop: Loop, key: Key, first: int, total: int) -> None:
        self.loop, self.key, self.first, self.total = loop, key, first, total

    def groups(self) -> Iterator[list[tuple[np.ndarray[Any, Any], int]]]:
        """Yield for each step its micro-batches, as pairs (rows over all processes, epoch)."""
        loop, recipe, units = self.loop, self.loop.recipe, self.loop.task.train.units
        micro = micro_batches(units, recipe.batch_size * loop.world, loop.joins_single)
        lengths = unit_lengths(loop.task.train) if recipe.group_by_length else None
        size, per_epoch, epoch, order = recipe.gradient_accumulation_steps, loop.steps_per_epoch, -1, np.empty(0)
        for step in range(self.first, self.total):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = epoch_order(self.key, epoch, units)
                if lengths is not None:
                    order = grouped(order, lengths, recipe.batch_size * loop.world, self.key, epoch)
            number = step % per_epoch
            yield [(order[m.start : m.stop], epoch) for m in micro[number * size : (number + 1) * size]]

    def _items_of_process(self, micro: np.ndarray[Any, Any], epoch: int) -> tuple[list[Item], bool]:
        """The items that this process loads of a micro-batch, and whether they count in the loss."""
        loop, rank = self.loop, self.loop.accelerator.process_index
        own_rows = shares(micro, loop.recipe.batch_size, loop.world, loop.has_batchnorm)[rank]
        units = (own_rows if len(own_rows) else micro[:2]).tolist()
        seeds = stable_seeds((*self.key, epoch), units, "augment") if loop.task.draws else [None] * len(units)
        return list(zip(units, seeds, strict=True)), bool(len(own_rows))

    def __iter__(self) -> Iterator[tuple[list[Item], bool]]:
        for group in self.groups():
            yield from (self._items_of_process(rows, epoch) for rows, epoch in group)


class _Batches(Dataset[Batch]):
    """Makes one whole batch per entry of a plan, in this process or in a worker process."""

    def __init__(self, task: Task, part: Any) -> None:
        self.task, self.part = task, part

    def __getitem__(self, entry: Any) -> Batch:
        items, is_counted = entry
        batch = replace(self.task.batch(self.part, items), items=tuple(items))
        return batch if is_counted else replace(batch, count=0)


def loader(loop: Loop, part: Any, plan: Any) -> Iterator[Batch]:
    """Make one `Batch` of `part` for each entry of `plan`, before it is asked for.

    With `loop.workers` other processes make the batches; else a thread of this one.

    Args:
        part: a part of the loop's task.
        plan: an iterable of pairs (items of the batch, whether the batch counts in the loss). A batch
            that does not count has `count` 0.
    """
    batches = _Batches(loop.task, part)
    if not loop.workers:
        return one_ahead(batches[entry] for entry in plan)
    # The DataLoader draws a seed for its workers. With a generator of its own this draw does not
    # advance the generator that training uses.
    own = torch.Generator()
    return iter(DataLoader(batches, batch_size=None, sampler=plan, num_workers=loop.workers, generator=own))


def one_ahead(batches: Iterator[T]) -> Iterator[T]:
    """Yield the batches. While one is used, a thread makes the next, if making one takes longer than SLOW.

    A task draws from generators of its own, so it does not matter when a batch is made. Of the first
    batches the fastest counts: the very first opens files, and another process may delay any of them.
    """
    fastest, began = math.inf, time.perf_counter()
    for number, batch in enumerate(batches):
        fastest = min(fastest, time.perf_counter() - began)
        yield batch
        if number == TIMED - 1 and fastest > SLOW:
            break
        began = time.perf_counter()
    else:
        return
    # In this thread torch uses one core, because training needs the others. `set_num_threads` is also what new threads
    # begin with. The thread that trains keeps its own number, and `process_state` sets the old one at the end of the call.
    with ThreadPoolExecutor(1, "batches", initializer=torch.set_num_threads, initargs=(1,)) as thread:
        waiting = thread.submit(next, batches, None)
        while (ready := waiting.result()) is not None:
            waiting = thread.submit(next, batches, None)
            yield ready
