"""Evaluation: a score for each row, with the weights as they would be written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast, gather_object

from dsd_refine.errors import Interrupted, RunError
from dsd_refine.masking.masks import Masks, check_masks
from dsd_refine.seeding import stable_seed
from dsd_refine.tasks.base import Item, Score, Scores
from dsd_refine.training.batches import epoch_order, loader
from dsd_refine.training.blame import computed
from dsd_refine.training.state import Key, Loop, on_device


@contextmanager
def exact() -> Iterator[None]:
    """No gradients, and float32 that is float32: convolutions do not fall back to TF32 on a GPU."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def evaluate(loop: Loop, part: Any, masks: Masks | None = None, only: int | None = None) -> Scores:
    """Per-row scores of the model, in evaluation mode, with the weights as they would be written. Changes nothing.

    `only` the first so many units, to measure with: rows beyond them score 0.

    Raises:
        RunError: a masked weight that is not 0, or scores that are not finite.
        Interrupted: a signal came; the state that was saved last leads back here.
    """
    check_masks(masks or {}, loop.parameters)
    units = part.units if only is None else only
    return _by_row(part, scored(loop, part, [(unit, None) for unit in range(units)]), units)


def scored(loop: Loop, part: Any, items: Sequence[Item]) -> list[tuple[int, Score]]:
    """(number of the item, its score) of a part's items, over all processes and in no order; see `evaluate`.

    An item with a seed is scored as training sees it; the model is in evaluation mode all the same.
    """
    _same_buffers(loop)
    was_training = loop.model.training
    loop.model.eval()
    rank, size = loop.accelerator.process_index, loop.recipe.batch_size
    mine = range(rank, len(items), loop.world)
    groups = [mine[i : i + size] for i in range(0, len(mine), size)]
    plan = [([items[number] for number in group], True) for group in groups]
    found: list[tuple[int, Score]] = []
    with exact(), loop.as_written(loop.model):
        for group, batch in zip(groups, loader(loop, part, plan), strict=True):
            with loop.accelerator.autocast():
                scores = computed(loop, part, loop.model, on_device(loop, batch), loop.task.score)
            found += zip(group, scores, strict=True)
            _stop_if_asked(loop)
        for _ in range(len(plan), -(-len(range(0, len(items), loop.world)) // size)):
            _stop_if_asked(loop)  # this process has a batch less than the first, and all must ask together
    loop.model.train(was_training)
    gathered: list[tuple[int, Score]] = gather_object(found) if loop.world > 1 else found
    return gathered


def first_items(loop: Loop, key: Key, most: int) -> list[Item]:
    """The rows that a phase takes first, each with the seed that its augmentation has there."""
    units = loop.task.train.units
    return [(int(u), stable_seed(*key, 0, int(u), "augment")) for u in epoch_order(key, 0, units)[:most]]


def _stop_if_asked(loop: Loop) -> None:
    """Between batches: a signal that any process got stops them all."""
    asked = loop.stopping()
    if loop.world > 1:
        asked = bool(loop.accelerator.reduce(torch.tensor(float(asked), device=loop.accelerator.device), "sum") > 0)
    if asked:
        raise Interrupted("stopped between two batches; go on with --resume")


def _by_row(part: Any, found: list[tuple[int, Any]], wanted: int) -> Scores:
    units = sorted(unit for unit, _ in found)
    if units != list(range(wanted)):
        raise RunError(f"evaluation scored {len(units)} units of {wanted}; nothing was published")
    ordered = sorted(found, key=lambda pair: pair[0])
    scores = Scores.of(((part.row_of(unit), one) for unit, one in ordered), len(part.rows))
    if not (np.isfinite(scores.score).all() and np.isfinite(scores.loss).all()):
        raise RunError("evaluation gives values that are not finite")
    return scores


@torch.no_grad()
def _same_buffers(loop: Loop) -> None:
    """Every process takes the main one's buffers (BatchNorm statistics differ by the rows that each has seen)."""
    if loop.world > 1:
        for buffer in loop.model.buffers():
            buffer.copy_(broadcast(buffer.clone()))


def unreached(loop: Loop) -> list[str]:
    """Names of the parameters that the loss has no gradient for (or that never train), found on a few rows in evaluation mode.

    Experts are left out: which of them a row reaches is the router's choice.
    """
    loop.model.eval()
    loop.model.training = True  # the root's flag alone: what it computes only in training (auxiliary heads) is reached
    units = range(min(2, loop.task.train.units))
    batch = on_device(loop, loop.task.batch(loop.task.train, [(unit, None) for unit in units]))
    with torch.backends.cudnn.flags(enabled=False):  # cuDNN's recurrent layers have no backward in evaluation mode
        loop.task.loss(loop.model, batch).backward()  # type: ignore[no-untyped-call]
    named = loop.model.named_parameters(remove_duplicate=False)
    lost = [n for n, p in named if p.grad is None and not (p.requires_grad and "expert" in n)]
    loop.model.zero_grad(set_to_none=True)
    loop.model.eval()
    return lost
