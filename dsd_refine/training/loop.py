"""The training loop: the batches of each optimizer step, and the step itself."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from dsd_refine.errors import Diverged
from dsd_refine.masking.masks import mask_gradients, without_gradient
from dsd_refine.recipe import Phase
from dsd_refine.seeding import seed_all, stable_seed
from dsd_refine.tasks.base import Batch
from dsd_refine.training.batches import BatchPlan, loader
from dsd_refine.training.blame import computed
from dsd_refine.training.hooks import Step
from dsd_refine.training.optimizer import learning_rate, let_go_of_gradients, set_rate
from dsd_refine.training.settings import train_mode
from dsd_refine.training.sharpness import uphill
from dsd_refine.training.state import Counts, Loop, Pending, PhaseState, on_device

EARLY = 25  # the losses of the first steps are stored, to see whether training damages the model at its beginning
LATE = 4  # steps of a GPU whose losses are not waited for


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
    let_go_of_gradients(state.optimizer)


def train_step(loop: Loop, phase: Phase, state: PhaseState, group: list[Batch]) -> None:
    """Make one optimizer step, then apply the mask (paper, section 3 and algorithm 1).

    The loss is the sum over the step's real targets divided by their number. It does not depend on
    how the targets are divided into micro-batches and processes. `arrived` hands the finished step out.

    Args:
        group: the step's micro-batches of this process.
    """
    step, total = state.progress.step + 1, phase.total_steps(loop.steps_per_epoch)
    rate = set_rate(state.optimizer, learning_rate(phase, step, total))
    counts, weight = _counts(loop, group)
    device, loss_of, losses = loop.accelerator.device, loop.loss or loop.task.loss, []
    for is_uphill in (False, True) if phase.sam else (False,):
        with uphill(loop, state.masks, phase.sam or 0.0) if is_uphill else nullcontext():
            # Not at the end of the step: then the memory would return to the system, and the next step would have to
            # get it again page by page.
            let_go_of_gradients(state.optimizer)
            for number, batch in enumerate(group):
                seed_all(stable_seed(*state.key, step, number, loop.accelerator.process_index, "dropout"), device)
                with _sync_on_last(loop, number == len(group) - 1):
                    with loop.autocast():
                        loss = computed(loop, loop.task.train, loop.forward, on_device(loop, batch), loss_of)
                    _scaled(loop, loss).backward(_as_gradient(loss, weight if batch.count else 0.0))  # type: ignore[no-untyped-call]
                losses += [loss.detach()] if batch.count and not is_uphill else []
    if loop.shards is not None:  # with steps uphill it is refused
        loop.shards.take_gradients()
    # Before a new mask by magnitude, one step is made without the mask: masked weights get a value from their
    # gradient, and the new mask may leave them in.
    is_unmasked = renews_mask(phase, step, total) and phase.criterion != "random"
    _prepare_gradients(loop, phase, state, is_unmasked)
    state.optimizer.step()
    if not is_unmasked:
        state.apply()
    skipped = bool(getattr(state.optimizer, "step_was_skipped", False))
    loss_sum = sum(losses[1:], losses[0]) if losses else torch.zeros((), device=device)
    state.pending.append(Pending(step, total, rate, skipped, *_sent_home(loop, loss_sum, counts)))
    _count(state, step, rate, skipped)


def arrived(loop: Loop, state: PhaseState, wait: bool = False) -> Iterator[tuple[Step, bool]]:
    """Yield the finished steps whose loss is known, in order.

    A CPU knows it at once. Of a GPU, the newest LATE steps stay out, so that nobody waits for the
    device: it works on them while the host prepares the next ones.

    Args:
        wait: wait for all steps that are made.

    Yields:
        the step, and whether one of several processes was asked to stop during it (always False with a
        single process).

    Raises:
        Diverged: a loss is not finite; the message names the step.
    """
    while len(state.pending) > (0 if wait else lag(loop.accelerator.device)):
        made = state.pending.popleft()
        if made.copied is not None:
            made.copied.synchronize()
        loss_sum, stops, saves = made.sums.tolist() if loop.world > 1 else (float(made.sums), 0.0, 0.0)
        targets, samples = (int(number) for number in made.counts)
        mean = loss_sum / max(1, targets)
        if not math.isfinite(mean):
            text = f"the loss of step {made.step} of {made.total} is {mean}; try a lower --lr, or --max-grad-norm"
            raise Diverged(f"{state.place.label}: {text}", made.step, str(mean))
        epoch = made.step / loop.steps_per_epoch
        step = Step(state.place, made.step, made.total, epoch, made.lr, mean, samples, made.skipped)
        _know(state, step)
        state.must_save |= saves > 0
        yield step, stops > 0


def lag(device: torch.device) -> int:
    """Return how many of the newest steps are not waited for."""
    return 0 if device.type == "cpu" else LATE


def renews_mask(phase: Phase, step: int, total: int) -> bool:
    """Is the mask made again after this step (from 1)? Not after the last step: no step would use it."""
    return bool(phase.refresh) and step % int(phase.refresh or 1) == 0 and step < total


def _sync_on_last(loop: Loop, is_last: bool) -> AbstractContextManager[Any]:
    """A context in which processes exchange gradients only for the last micro-batch of a step.

    In a sharded run they exchange them for each, because the sum of whole gradients needs as much memory as the model.
    """
    context: AbstractContextManager[Any] = nullcontext()
    if loop.world > 1 and not is_last and loop.shards is None:
        context = loop.accelerator.no_sync(loop.forward)
    return context


def _prepare_gradients(loop: Loop, phase: Phase, state: PhaseState, is_unmasked: bool) -> None:
    """Mask and clip the gradients, and update the list of layers that had none yet, if there is one."""
    progress, clip = state.progress, loop.recipe.max_grad_norm
    if progress.without_gradient:
        still = without_gradient(loop.layers, loop.parameters, progress.without_gradient)
        progress.without_gradient = still if loop.shards is None else loop.shards.in_all(still)
    if (phase.refresh or clip is not None) and not is_unmasked:
        # The norm for clipping must not count masked weights. Where the mask changes within the phase, a masked
        # weight may come back with its momentum, so its gradients must not enter the momentum. In other phases the
        # momentum of a masked weight is never used.
        mask_gradients(state.masks, loop.parameters)
    if clip is not None:
        loop.accelerator.unscale_gradients(state.optimizer)
        if loop.shards is None:
            nn.utils.clip_grad_norm_(loop.model.parameters(), clip)
        else:
            loop.shards.clip(clip)


def _scaled(loop: Loop, loss: torch.Tensor) -> torch.Tensor:
    """The loss multiplied by the loss scale, if there is one (fp16)."""
    scaler = loop.accelerator.scaler
    scaled: torch.Tensor = loss if scaler is None else scaler.scale(loss)
    return scaled


def _as_gradient(loss: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """The weight of a loss as the gradient that its backward pass begins with: as of loss * weight, with less operations.

    `full` does not make the host wait for a GPU.
    """
    if isinstance(weight, torch.Tensor):
        return weight.to(loss.dtype)
    return torch.full((), weight, dtype=loss.dtype, device=loss.device)


def _counts(loop: Loop, group: list[Batch]) -> tuple[Counts, float | torch.Tensor]:
    """The numbers of real targets and of samples of a step, over all processes, and the weight of a loss in its mean."""
    numbers = (sum(b.count for b in group), sum(len(b.targets) for b in group if b.count))
    if loop.world == 1:
        return numbers, 1.0 / max(1, numbers[0])
    counts = loop.accelerator.reduce(torch.tensor(numbers, device=loop.accelerator.device), "sum")
    return counts, loop.world / counts[0].clamp(min=1)  # processes average their gradients


def _sent_home(loop: Loop, loss_sum: torch.Tensor, counts: Counts) -> tuple[torch.Tensor, Counts, torch.cuda.Event | None]:
    """Add up the step's loss over all processes, and begin to copy it to the host. For the end of `Pending`."""
    sums = loss_sum
    if loop.world > 1:
        saving = loop.shards is not None and loop.hooks.should_save()  # all processes must save together
        asked = torch.tensor([loop.stopping(), saving], dtype=loss_sum.dtype, device=loss_sum.device)
        sums = loop.accelerator.reduce(torch.cat([loss_sum.reshape(1), asked]), "sum")
    if sums.device.type != "cuda":
        return sums, counts, None
    sums, counts = _copied(sums), _copied(counts) if isinstance(counts, torch.Tensor) else counts
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return sums, counts, event


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory of the host. It has the values once the device has reached this point."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _count(state: PhaseState, step: int, lr: float, skipped: bool) -> None:
    """Add a step that is made to the phase's progress. Its time starts when its batches begin to load."""
    progress = state.progress
    if step == 1:
        progress.lr_first = lr
    progress.step, progress.lr_last = step, lr
    progress.lr_peak = max(progress.lr_peak or 0.0, lr)
    progress.optimizer_steps += not skipped
    progress.seconds += time.perf_counter() - state.started


def _know(state: PhaseState, step: Step) -> None:
    """Add what is known of a step once its loss has arrived."""
    progress = state.progress
    if step.step == 1:
        progress.loss_first = step.loss
    progress.loss_last = step.loss
    progress.early += [step.loss] if step.step <= EARLY else []
    progress.samples += step.samples
