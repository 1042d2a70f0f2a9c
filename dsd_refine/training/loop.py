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

EARLY = 25  # steps whose losses are kept, to see whether training begins with damage


def batches_of_steps(loop: Loop, phase: Phase, state: PhaseState) -> Iterator[list[Batch]]:
    """The micro-batches of each step of this process, from where the phase is to its end."""
    plan = BatchPlan(loop, state.key, state.progress.step, phase.total_steps(loop.steps_per_epoch))
    batches = iter(loader(loop, loop.task.train, plan))
    train_mode(loop.model)
    loop.begun = True
    for group in plan.groups():
        state.started = time.perf_counter()
        yield [next(batches) for _ in group]
    state.optimizer.zero_grad()


def train_step(loop: Loop, phase: Phase, state: PhaseState, group: list[Batch]) -> tuple[Step, bool]:
    """One optimizer step, then the mask (paper, section 3 and algorithm 1).

    The loss is the sum over the group's real targets divided by their number, however they were split (rule 12).

    Args:
        group: the step's micro-batches of this process.

    Returns:
        what was done, and whether any of several processes was asked to stop before it ended.

    Raises:
        RunError: the loss is not finite; the message has the step.
    """
    step, total = state.progress.step + 1, phase.total_steps(loop.steps_per_epoch)
    rate = set_rate(state.optimizer, learning_rate(phase, step, total))
    targets, samples = _counts(loop, group)
    # not at the step's end: there the memory would go back to the system, and every step would fetch it page by page
    state.optimizer.zero_grad()
    summed = torch.zeros((), device=loop.accelerator.device)
    for number, batch in enumerate(group):
        seed_all(stable_seed(*state.key, step, number, loop.accelerator.process_index, "dropout"), summed.device)
        with _synced_at_the_last(loop, number == len(group) - 1):
            with loop.accelerator.autocast():
                loss = computed(loop, loop.task.train, loop.forward, on_device(loop, batch), loop.loss or loop.task.loss)
            weight = loop.world / max(1, targets) if batch.count else 0.0  # several processes average their gradients
            loop.accelerator.backward(loss * weight)
        summed += loss.detach() * bool(batch.count)
    # the step before a new mask by magnitude is free: what is masked may come back by its gradient
    free = renews_mask(phase, step, total) and phase.criterion == "magnitude"
    _look_at_gradients(loop, phase, state, free)
    state.optimizer.step()
    if not free:
        state.apply()
    mean, stop = _over_processes(loop, summed, targets)
    if not math.isfinite(mean):
        label = state.place.label
        raise RunError(f"{label}: the loss of step {step} of {total} is {mean}; try a lower --lr, or --max-grad-norm")
    made = Step(
        state.place, step, total, step / loop.steps_per_epoch, rate, mean, samples, bool(state.optimizer.step_was_skipped)
    )
    return made, stop


def renews_mask(phase: Phase, step: int, total: int) -> bool:
    """Is the mask made again after this step? After the last one a new mask would be of no use."""
    return bool(phase.refresh) and step % int(phase.refresh or 1) == 0 and step < total


def _synced_at_the_last(loop: Loop, last: bool) -> AbstractContextManager[Any]:
    """Processes exchange their gradients once a step, with its last micro-batch."""
    found: AbstractContextManager[Any] = nullcontext() if last or loop.world == 1 else loop.accelerator.no_sync(loop.forward)
    return found


def _look_at_gradients(loop: Loop, phase: Phase, state: PhaseState, free: bool) -> None:
    """Note which layers have a gradient, where that is asked for; mask and clip gradients."""
    progress, clip = state.progress, loop.recipe.max_grad_norm
    if progress.without_gradient:
        progress.without_gradient = without_gradient(loop.layers, loop.parameters, progress.without_gradient)
    if (phase.refresh or clip is not None) and not free:
        # A norm must not count what is masked. Where the mask changes within the phase, a masked weight comes back later
        # and its momentum with it: its gradients must not enter that. Elsewhere the momentum of a masked weight is not used.
        mask_gradients(state.masks, loop.parameters)
    if clip is not None:
        loop.accelerator.unscale_gradients(state.optimizer)
        nn.utils.clip_grad_norm_(loop.model.parameters(), clip)


def _counts(loop: Loop, group: list[Batch]) -> tuple[int, int]:
    """Real targets and samples of a step, over all processes."""
    targets, samples = sum(b.count for b in group), sum(len(b.targets) for b in group if b.count)
    if loop.world > 1:
        sums = torch.tensor([targets, samples], device=loop.accelerator.device)
        targets, samples = loop.accelerator.reduce(sums, "sum").tolist()
    return targets, samples


def _over_processes(loop: Loop, summed: torch.Tensor, targets: int) -> tuple[float, bool]:
    """The step's mean loss, and whether any of several processes was asked to stop."""
    if loop.world == 1:
        return float(summed) / max(1, targets), False
    sums = torch.stack([summed, torch.tensor(float(loop.stopping()), device=summed.device)])
    loss_sum, stop = loop.accelerator.reduce(sums, "sum").tolist()
    return loss_sum / max(1, targets), stop > 0


def count(state: PhaseState, made: Step) -> None:
    """Add a step to what is known of the phase; its time runs from when its batches began to load."""
    done = state.progress
    if done.step == 0:
        done.lr_first, done.loss_first = made.lr, made.loss
    done.step, done.lr_last, done.loss_last = made.step, made.lr, made.loss
    done.early += [made.loss] if made.step <= EARLY else []
    done.lr_peak = max(done.lr_peak or 0.0, made.lr)
    done.optimizer_steps += not made.skipped
    done.samples += made.samples
    done.seconds += time.perf_counter() - state.started
