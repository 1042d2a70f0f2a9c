"""The training loop: the batches of each optimizer step, and the step itself."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from dsd_refine.errors import RunError
from dsd_refine.masking.masks import mask_gradients, without_gradient
from dsd_refine.recipe import Phase
from dsd_refine.seeding import seed_all, stable_seed
from dsd_refine.tasks.base import Batch
from dsd_refine.training.batches import BatchPlan, loader
from dsd_refine.training.blame import computed
from dsd_refine.training.hooks import Step
from dsd_refine.training.optimizer import learning_rate, set_rate
from dsd_refine.training.settings import train_mode
from dsd_refine.training.state import Loop, PhaseState, on_device

EARLY = 25  # the losses of the first steps are stored, to see whether training damages the model at its beginning


def batches_of_steps(loop: Loop, phase: Phase, state: PhaseState) -> Iterator[list[Batch]]:
    """Yield this process's micro-batches of each step, from the current step to the end of the phase.

    Puts the model into training mode, and sets `loop.begun`.
    """
    plan = BatchPlan(loop, state.key, state.progress.step, phase.total_steps(loop.steps_per_epoch))
    batches = iter(loader(loop, loop.task.train, plan))
    train_mode(loop.model)
    loop.begun = True
    for group in plan.groups():
        state.started = time.perf_counter()
        yield [next(batches) for _ in group]
    state.optimizer.zero_grad()


def train_step(loop: Loop, phase: Phase, state: PhaseState, group: list[Batch]) -> tuple[Step, bool]:
    """Make one optimizer step, then apply the mask (paper, section 3 and algorithm 1).

    The loss is the sum over the step's real targets divided by their number. It does not depend on
    how the targets are divided into micro-batches and processes.

    Args:
        group: the step's micro-batches of this process.

    Returns:
        the finished step, and whether one of several processes was asked to stop during it (always
        False with a single process).

    Raises:
        RunError: the loss is not finite; the message names the step.
    """
    step, total = state.progress.step + 1, phase.total_steps(loop.steps_per_epoch)
    rate = set_rate(state.optimizer, learning_rate(phase, step, total))
    targets, samples = _counts(loop, group)
    # Not at the end of the step: then the memory would return to the system, and the next step would have to
    # get it again page by page.
    state.optimizer.zero_grad()
    loss_sum = torch.zeros((), device=loop.accelerator.device)
    for number, batch in enumerate(group):
        seed_all(stable_seed(*state.key, step, number, loop.accelerator.process_index, "dropout"), loss_sum.device)
        with _sync_on_last(loop, number == len(group) - 1):
            with loop.accelerator.autocast():
                loss = computed(loop, loop.task.train, loop.forward, on_device(loop, batch), loop.loss or loop.task.loss)
            weight = loop.world / max(1, targets) if batch.count else 0.0  # processes average their gradients
            loop.accelerator.backward(loss * weight)
        loss_sum += loss.detach() * bool(batch.count)
    # Before a new mask by magnitude, one step is made without the mask: masked weights get a value from their
    # gradient, and the new mask may leave them in.
    is_unmasked = renews_mask(phase, step, total) and phase.criterion == "magnitude"
    _prepare_gradients(loop, phase, state, is_unmasked)
    state.optimizer.step()
    if not is_unmasked:
        state.apply()
    mean, stop = _over_processes(loop, loss_sum, targets)
    if not math.isfinite(mean):
        label = state.place.label
        raise RunError(f"{label}: the loss of step {step} of {total} is {mean}; try a lower --lr, or --max-grad-norm")
    finished = Step(
        state.place, step, total, step / loop.steps_per_epoch, rate, mean, samples, bool(state.optimizer.step_was_skipped)
    )
    return finished, stop


def renews_mask(phase: Phase, step: int, total: int) -> bool:
    """Is the mask made again after this step (from 1)? Not after the last step: no step would use it."""
    return bool(phase.refresh) and step % int(phase.refresh or 1) == 0 and step < total


def _sync_on_last(loop: Loop, is_last: bool) -> AbstractContextManager[Any]:
    """A context in which processes exchange gradients only for the last micro-batch of a step."""
    context: AbstractContextManager[Any] = nullcontext()
    if loop.world > 1 and not is_last:
        context = loop.accelerator.no_sync(loop.forward)
    return context


def _prepare_gradients(loop: Loop, phase: Phase, state: PhaseState, is_unmasked: bool) -> None:
    """Mask and clip the gradients, and update the list of layers that had none yet, if there is one."""
    progress, clip = state.progress, loop.recipe.max_grad_norm
    if progress.without_gradient:
        progress.without_gradient = without_gradient(loop.layers, loop.parameters, progress.without_gradient)
    if (phase.refresh or clip is not None) and not is_unmasked:
        # The norm for clipping must not count masked weights. Where the mask changes within the phase, a masked
        # weight may come back with its momentum, so its gradients must not enter the momentum. In other phases the
        # momentum of a masked weight is never used.
        mask_gradients(state.masks, loop.parameters)
    if clip is not None:
        loop.accelerator.unscale_gradients(state.optimizer)
        nn.utils.clip_grad_norm_(loop.model.parameters(), clip)


def _counts(loop: Loop, group: list[Batch]) -> tuple[int, int]:
    """The numbers of real targets and of samples of a step, over all processes."""
    targets, samples = sum(b.count for b in group), sum(len(b.targets) for b in group if b.count)
    if loop.world > 1:
        sums = torch.tensor([targets, samples], device=loop.accelerator.device)
        targets, samples = loop.accelerator.reduce(sums, "sum").tolist()
    return targets, samples


def _over_processes(loop: Loop, loss_sum: torch.Tensor, targets: int) -> tuple[float, bool]:
    """The step's mean loss, and whether one of several processes was asked to stop."""
    if loop.world == 1:
        return float(loss_sum) / max(1, targets), False
    sums = torch.stack([loss_sum, torch.tensor(float(loop.stopping()), device=loss_sum.device)])
    total_loss, stops = loop.accelerator.reduce(sums, "sum").tolist()
    return total_loss / max(1, targets), stops > 0


def count(state: PhaseState, step: Step) -> None:
    """Add a finished step to the phase's progress. Its time starts when its batches begin to load."""
    progress = state.progress
    if progress.step == 0:
        progress.lr_first, progress.loss_first = step.lr, step.loss
    progress.step, progress.lr_last, progress.loss_last = step.step, step.lr, step.loss
    progress.early += [step.loss] if step.step <= EARLY else []
    progress.lr_peak = max(progress.lr_peak or 0.0, step.lr)
    progress.optimizer_steps += not step.skipped
    progress.samples += step.samples
    progress.seconds += time.perf_counter() - state.started
