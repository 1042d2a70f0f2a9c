"""Evaluation: a score for each row, with the weights rounded as in the written checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast, gather_object

from dsd_refine.errors import Diverged, Interrupted, RunError
from dsd_refine.masking.masks import Masks, check_masks
from dsd_refine.seeding import stable_seeds
from dsd_refine.tasks.base import Item, Score, Scores, unit_lengths
from dsd_refine.training.batches import epoch_order, loader
from dsd_refine.training.blame import computed
from dsd_refine.training.state import Key, Loop, on_device


@contextmanager
def exact() -> Iterator[None]:
    """Inside the context, no gradients are computed, and convolutions on a GPU use float32, not TF32."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def evaluate(loop: Loop, part: Any, masks: Masks | None = None, only: int | None = None) -> Scores:
    """Score every row of a part with the model in evaluation mode. The model stays unchanged.

    The weights are rounded as in the written checkpoint.

    Args:
        part: a part of the loop's task.
        masks: masks that must hold: their weights must be 0.
        only: score only the first `only` units, to measure the time; later rows have the score 0.

    Raises:
        RunError: a masked weight is not 0, or a score is not finite.
        Interrupted: the run was asked to stop; a resumed run evaluates again.
    """
    check_masks(masks or {}, loop.parameters)
    order = evaluation_order(part, part.units if only is None else only)
    scores = scored(loop, part, [(unit, None) for unit in order])
    return _by_row(part, [(order[number], score) for number, score in scores], len(order))


def evaluation_order(part: Any, units: int) -> list[int]:
    """Order the first `units` units of a part for evaluation: the longest first, so that batches have little padding.

    A batch that needs too much memory is then one of the first.
    """
    lengths = unit_lengths(part)
    return list(range(units)) if lengths is None else np.argsort(-lengths[:units], kind="stable").tolist()


def scored(loop: Loop, part: Any, items: Sequence[Item]) -> list[tuple[int, Score]]:
    """Score items of a part, divided between all processes; otherwise as `evaluate`.

    An item with a seed gets the augmentation of training, but the model is in evaluation mode.

    Returns:
        pairs (index in `items`, score) in any order, of all processes.
    """
    _same_buffers(loop)
    was_training = loop.model.training
    loop.model.eval()
    rank, size = loop.accelerator.process_index, loop.evaluation_batch or loop.recipe.batch_size
    numbers = range(rank, len(items), loop.world)
    groups = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    most = -(-len(range(0, len(items), loop.world)) // size)  # batches of the first process
    if loop.shards is not None and len(groups) < most:
        groups.append(range(0))  # a forward needs all processes: this one computes a batch that does not count
    plan = [([items[number] for number in group] or [items[0]], True) for group in groups]
    own_scores: list[tuple[int, Score]] = []
    with exact(), loop.as_written(loop.model):
        for group, batch in zip(groups, loader(loop, part, plan), strict=True):
            with loop.autocast():
                scores = computed(loop, part, loop.model, on_device(loop, batch), loop.task.score)
            own_scores += zip(group, scores[: len(group)], strict=True)
            _stop_if_asked(loop)
        for _ in range(len(plan), most):
            _stop_if_asked(loop)  # the first process has one more batch, and all must exchange the signal together
    loop.model.train(was_training)
    all_scores: list[tuple[int, Score]] = gather_object(own_scores) if loop.world > 1 else own_scores
    together = getattr(loop.task, "together", None)  # scores that need the outputs for all items
    if together is None:
        return all_scores
    ordered = [score for _, score in sorted(all_scores, key=lambda pair: pair[0])]
    return list(enumerate(together(part, [unit for unit, _ in items], ordered)))


def first_items(loop: Loop, key: Key, most: int) -> list[Item]:
    """The first `most` items that a phase trains on, each with the seed of its augmentation."""
    units = loop.task.train.units
    first = epoch_order(key, 0, units)[:most].tolist()
    return list(zip(first, stable_seeds((*key, 0), first, "augment"), strict=True))


def _stop_if_asked(loop: Loop) -> None:
    """Stop all processes between two batches if any of them was asked to stop."""
    must_stop = loop.stopping()
    if loop.world > 1:
        must_stop = bool(loop.accelerator.reduce(torch.tensor(float(must_stop), device=loop.accelerator.device), "sum") > 0)
    if must_stop:
        raise Interrupted("stopped between two batches; go on with --resume")


def _by_row(part: Any, unit_scores: list[tuple[int, Any]], expected: int) -> Scores:
    """Add up the scores of units 0..expected-1 to the scores of their rows; RunError if one is missing or not finite."""
    units = sorted(unit for unit, _ in unit_scores)
    if units != list(range(expected)):
        raise RunError(f"evaluation scored {len(units)} units of {expected}; nothing was published")
    ordered = sorted(unit_scores, key=lambda pair: pair[0])
    scores = Scores.of(((part.row_of(unit), score) for unit, score in ordered), len(part.rows))
    if not (np.isfinite(scores.score).all() and np.isfinite(scores.loss).all()):
        raise Diverged("evaluation gives values that are not finite")
    return scores


@torch.no_grad()
def _same_buffers(loop: Loop) -> None:
    """Copy the main process's buffers to every process: each has BatchNorm statistics of its own rows."""
    if loop.world > 1:
        for buffer in loop.model.buffers():
            buffer.copy_(broadcast(buffer.clone()))


def unreached(loop: Loop) -> list[str]:
    """Names of the parameters that get no gradient from the loss, tested on at most two rows.

    Parameters that do not train are among them. Trainable experts are left out: the router decides
    which of them a row reaches. The model is in evaluation mode during the test and stays in it.
    """
    loop.model.eval()
    # only the flag of the root module: so the heads that the model computes only in training get a gradient too
    loop.model.training = True
    units = range(min(2, loop.task.train.units))
    batch = on_device(loop, loop.task.batch(loop.task.train, [(unit, None) for unit in units]))
    with torch.backends.cudnn.flags(enabled=False):  # cuDNN's recurrent layers have no backward in evaluation mode
        loop.task.loss(loop.model, batch).backward()  # type: ignore[no-untyped-call]
    named = loop.model.named_parameters(remove_duplicate=False)
    without_gradient = [n for n, p in named if p.grad is None and not (p.requires_grad and "expert" in n)]
    loop.model.zero_grad(set_to_none=True)
    loop.model.eval()
    return without_gradient
