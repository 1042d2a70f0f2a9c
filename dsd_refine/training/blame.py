"""Find the rows that make a model fail, so that an error message can name them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from dsd_refine.errors import DataError, DsdError, RunError, is_full_memory

if TYPE_CHECKING:
    from dsd_refine.tasks.base import Batch, Forward, Item
    from dsd_refine.training.state import Loop

T = TypeVar("T")

Compute = Callable[["Forward", "Batch"], T]

SHOWN = 5  # a message names at most this many rows


def computed(loop: Loop, part: Any, forward: Forward, batch: Batch, compute: Compute[T]) -> T:
    """Return `compute(forward, batch)`. If it fails, name the rows that make it fail.

    Args:
        part: the part of the task that the batch was made of.

    Raises:
        RunError: `compute` fails after training has begun; the message names the rows.
        DataError: the same, before the first step.
        Exception: the error of `compute` itself, if the rows are not its cause.
    """
    was_training = loop.model.training
    try:
        return compute(forward, batch)
    except DsdError:
        raise
    except Exception as error:  # a model may raise any type of error on an unusual row
        message = None if is_of_the_machine(error) else _message(loop, part, batch, compute, error, was_training)
        if message is None:
            raise
        raise (RunError if loop.begun else DataError)(message) from error


def failing(loop: Loop, part: Any, items: Sequence[Item], compute: Compute[Any]) -> list[Item]:
    """The items on which the model fails if it gets them alone. Leaves the model in evaluation mode."""
    loop.model.eval()
    return [item for item in items if _fails(loop, loop.task.batch(part, [item]), compute)]


def _fails(loop: Loop, batch: Batch, compute: Compute[Any]) -> bool:
    try:
        with torch.no_grad(), loop.autocast():
            compute(loop.model, batch.to(loop.accelerator.device))
    except Exception as error:
        if is_of_the_machine(error):
            raise
        return True
    return False


def rows_of(loop: Loop, part: Any, items: Sequence[Item]) -> str:
    """Name the rows of the items for a message, e.g. `training rows 3, 7`."""
    names = list(dict.fromkeys(str(part.rows.name(part.row_of(unit))) for unit, _ in items))
    shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    kinds = {id(loop.task.train): "training", id(loop.task.holdout): "holdout", id(loop.task.eval): "evaluation"}
    return f"{kinds.get(id(part), 'data')} row{'s' * (len(names) > 1)} {shown}"


def in_short(error: BaseException) -> str:
    """The text of an error on one line, at most 300 characters; its type if it has no text."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def is_of_the_machine(error: BaseException) -> bool:
    """Does the error come from memory, a disk or another process of the run, and not from a row?"""
    kind, text = type(error).__name__, str(error)
    is_of_a_process = kind.startswith("Dist") or "gloo" in text or "NCCL" in text
    return isinstance(error, OSError) or is_full_memory(error) or is_of_a_process


def _message(loop: Loop, part: Any, batch: Batch, compute: Compute[Any], error: Exception, was_training: bool) -> str | None:
    """The message for an error of `compute`.

    None if the model can compute on the batch without its wrapper: then the wrapper fails, not a row.
    """
    items, remedy = batch.items, f"{in_short(error)}. Take it out of the data, or cure its content; then start anew"
    if loop.shards is not None:  # a forward needs all processes, so no row can be tried alone
        return f"the model fails on one of the {rows_of(loop, part, items)}: {remedy}"
    if "device-side assert" in str(error) or type(error).__name__ == "AcceleratorError":  # the device cannot be used any more
        return f"the model fails on one of the {rows_of(loop, part, items)}: {remedy} (--device cpu tells which)"
    failing_items = failing(loop, part, items, compute)
    if failing_items:
        return f"the model fails on the {rows_of(loop, part, failing_items)}: {remedy}"
    loop.model.train(was_training)
    if not _fails(loop, batch, compute):
        return None
    return f"the model fails on a batch, though on none of its rows alone, the {rows_of(loop, part, items)}: {remedy}"
