"""The only loop: one phase of training, and evaluation. It knows no task, no recipe file, no checkpoint format."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from dsd_refine.errors import Interrupted, RunError
from dsd_refine.masking.masks import Masks, mask_gradients, masker
from dsd_refine.recipe import Phase
from dsd_refine.seeding import seed_all, stable_seed
from dsd_refine.tasks.base import Batch
from dsd_refine.training.batches import _loader, _Plan
from dsd_refine.training.blame import computed
from dsd_refine.training.hooks import Step
from dsd_refine.training.optimizer import _set_rate, learning_rate
from dsd_refine.training.settings import train_mode
from dsd_refine.training.state import Key, Loop, Progress, _on_device, place_of

EARLY = 25  # steps whose losses are kept, to see whether training begins with damage


def _nothing() -> None:
    pass


def train_phase(
    loop: Loop,
    phase: Phase,
    key: Key,
    label: str,
    masks: Masks,
    done: Progress,
    optimizer: AcceleratedOptimizer,
    *,
    remask: Callable[[int], Masks],
    epoch_end: Callable[[int], None],
    step_end: Callable[[], None] = _nothing,
    backward_end: Callable[[], None] = _nothing,
) -> None:
    """Run a phase from `done.step` to its end: step, then mask (paper, section 3 and algorithm 1).

    `masks` is empty for a dense phase and is refilled in place where the phase says `refresh`. `backward_end()` is called
    while a step's gradients are there, `step_end()` after each step, `epoch_end(epoch)` after the last step of each whole
    epoch and of the phase.

    Raises:
        RunError: a loss that is not finite, with its step. Interrupted: a signal came; the state is saved.
    """
    total = phase.total_steps(loop.steps_per_epoch)
    plan = _Plan(loop, key, done.step, total)
    batches = iter(_loader(loop, loop.task.train, plan))
    _end_epoch(loop, done, total, epoch_end)  # which a stop may have come before
    train_mode(loop.model)
    loop.begun = True
    mask = masker(masks, loop.parameters)
    for group in plan.groups():
        started, step = time.perf_counter(), done.step + 1
        rate = _set_rate(optimizer, learning_rate(phase, step, total))
        anew = bool(phase.refresh) and step % int(phase.refresh or 1) == 0 and step < total
        free = anew and phase.criterion == "magnitude"  # what is masked may come back by its gradient
        loss, samples, stop = _step(
            loop, [next(batches) for _ in group], key, step, optimizer, {} if free else masks, _nothing if free else mask,
            bool(phase.refresh), backward_end,
        )  # fmt: skip
        if not math.isfinite(loss):
            raise RunError(f"{label}: the loss of step {step} of {total} is {loss}; try a lower --lr, or --max-grad-norm")
        if anew:
            masks.update(remask(step // int(phase.refresh or 1)))
            mask = masker(masks, loop.parameters)
            mask()
        skipped = bool(optimizer.step_was_skipped)
        step_end()
        _count(done, step, rate, loss, samples, skipped, time.perf_counter() - started)
        _tell(loop, label, done, total, samples, skipped)
        if stop:
            loop.save()
            raise Interrupted(f"stopped at step {step} of {total} of {label}; go on with --resume")
        _end_epoch(loop, done, total, epoch_end)
        if loop.save_due():
            loop.save()
    optimizer.zero_grad()


def _tell(loop: Loop, label: str, done: Progress, total: int, samples: int, skipped: bool) -> None:
    """The log and whoever watches hear of the step that was counted last."""
    epoch = done.step / loop.steps_per_epoch
    loop.log({"event": "step", **place_of(label), "step": done.step, "epoch": epoch, "lr": done.lr_last,
              "loss": done.loss_last, "samples": samples, "skipped": skipped})  # fmt: skip
    if loop.place is not None:
        made = Step(loop.place, done.step, total, epoch, done.lr_last or 0.0, done.loss_last or 0.0, samples, skipped)
        for hook in loop.hooks:
            hook.on_step(made)


def _end_epoch(loop: Loop, done: Progress, total: int, epoch_end: Callable[[int], None]) -> None:
    """Attend to the end of an epoch or of the phase, if it is reached and has not been: evaluation leaves training mode."""
    if done.step > done.ended and (done.step % loop.steps_per_epoch == 0 or done.step == total):
        epoch_end(math.ceil(done.step / loop.steps_per_epoch))
        done.ended = done.step
        train_mode(loop.model)


def _count(done: Progress, step: int, rate: float, loss: float, samples: int, skipped: bool, seconds: float) -> None:
    if done.step == 0:
        done.lr_first, done.loss_first = rate, loss
    done.step, done.lr_last, done.loss_last = step, rate, loss
    done.early += [loss] if step <= EARLY else []
    done.lr_peak = max(done.lr_peak or 0.0, rate)
    done.optimizer_steps += not skipped
    done.samples += samples
    done.seconds += seconds


def _step(
    loop: Loop,
    group: list[Batch],
    key: Key,
    step: int,
    optimizer: Any,
    masks: Masks,
    mask: Callable[[], None],
    changing: bool,
    backward_end: Callable[[], None] = _nothing,
) -> tuple[float, int, bool]:
    """One optimizer step over a group of micro-batches: (mean loss, samples, should the run stop), over all processes.

    The loss is the sum over the group's real targets divided by their number, however they were split (rule 12).
    `changing`: the mask is made anew in this phase. What is masked now comes back later, and its momentum with it, so its
    gradients must not enter that; a weight that stays masked to the phase's end has no use for its momentum.
    """
    device, rank = loop.accelerator.device, loop.accelerator.process_index
    targets, samples = sum(b.count for b in group), sum(len(b.targets) for b in group if b.count)
    if loop.world > 1:
        targets, samples = loop.accelerator.reduce(torch.tensor([targets, samples], device=device), "sum").tolist()
    # not at the step's end: there the memory would go back to the system, and every step would fetch it page by page
    optimizer.zero_grad()
    total = torch.zeros((), device=device)
    for number, batch in enumerate(group):
        last = number == len(group) - 1
        seed_all(stable_seed(*key, step, number, rank, "dropout"), device)
        with nullcontext() if last or loop.world == 1 else loop.accelerator.no_sync(loop.forward):
            with loop.accelerator.autocast():
                loss = computed(loop, loop.task.train, loop.forward, _on_device(loop, batch), loop.loss or loop.task.loss)
            weight = loop.world / max(1, targets) if batch.count else 0.0  # several processes average their gradients
            loop.accelerator.backward(loss * weight)
        total += loss.detach() * bool(batch.count)
    backward_end()
    if changing or loop.recipe.max_grad_norm is not None:
        mask_gradients(masks, loop.parameters)
    if loop.recipe.max_grad_norm is not None:
        loop.accelerator.unscale_gradients(optimizer)
        nn.utils.clip_grad_norm_(loop.model.parameters(), loop.recipe.max_grad_norm)
    optimizer.step()
    mask()
    if loop.world == 1:
        return float(total) / max(1, targets), samples, loop.stopping()
    sums = torch.stack([total, torch.tensor(float(loop.stopping()), device=device)])
    loss_sum, stop = loop.accelerator.reduce(sums, "sum").tolist()
    return loss_sum / max(1, targets), samples, stop > 0
