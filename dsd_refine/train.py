"""The only loop: one phase of training, and evaluation. It knows no task, no recipe file, no checkpoint format."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast, gather_object
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, Sampler

from dsd_refine.blame import computed
from dsd_refine.errors import Interrupted, RunError
from dsd_refine.masks import Masks, check_masks, mask_gradients, masker, stable_seed
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.settings import train_mode
from dsd_refine.tasks import Batch, Forward, Item, Score, Scores, Task


@dataclass
class Loop:
    """What training and evaluation share. `forward` is `model` wrapped for several processes or compiled."""

    accelerator: Accelerator
    model: nn.Module
    forward: Callable[..., Any]
    task: Task
    recipe: Recipe
    as_written: Callable[[nn.Module], AbstractContextManager[None]]
    log: Callable[[dict[str, Any]], None]
    progress: Callable[[str, int, int], None]
    stopping: Callable[[], bool]
    save: Callable[[], None]
    save_due: Callable[[], bool]
    workers: int = 0
    has_batchnorm: bool = False
    channels_last: bool = False
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    begun: bool = False  # has a step been trained, or tried?
    loss: Callable[[Forward, Batch], torch.Tensor] | None = None  # in place of the task's own

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the incomplete last group is a step of its own."""
        micro = micro_count(self.task.train.units, self.recipe.batch_size * self.world, self.has_batchnorm)
        return math.ceil(micro / self.recipe.gradient_accumulation_steps)


EARLY = 25  # steps whose losses are kept, to see whether training begins with damage


@dataclass
class Progress:
    """How far a phase is: everything that a stop in its middle must keep, and what its report entry says."""

    step: int = 0
    optimizer_steps: int = 0
    samples: int = 0
    lr_first: float | None = None
    lr_peak: float | None = None
    lr_last: float | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    seconds: float = 0.0
    ended: int = 0  # the step of the last epoch whose end was attended to
    early: list[float] = field(default_factory=list)  # the losses of the first EARLY steps
    without_gradient: list[Any] | None = None  # pieces of masked layers that no step has given a gradient yet


class Key(NamedTuple):
    """What order, augmentation and dropout of a phase are functions of."""

    seed: int
    phase: int


def learning_rate(phase: Phase, step: int, total: int) -> float:
    """Rate of step 1..total: linear warm-up over W steps, then the curve at (t - W - 1) / (T - W), towards 0.

    `step` falls to a tenth at each third of the way.
    """
    if step <= phase.warmup_steps:
        return phase.lr * step / phase.warmup_steps
    x = (step - phase.warmup_steps - 1) / (total - phase.warmup_steps)
    curves = {
        "constant": 1.0,
        "linear": 1 - x,
        "cosine": 0.5 * (1 + math.cos(math.pi * x)),
        "step": 0.1 ** int(3 * x + 1e-9),
    }
    return phase.lr * curves[phase.schedule]


def micro_batches(units: int, size: int, has_batchnorm: bool) -> list[range]:
    """Positions of an epoch's order that each micro-batch (over all processes) takes.

    A last one of a single row joins the one before where there is BatchNorm, which has no statistics of one row.
    """
    found = [range(start, min(start + size, units)) for start in range(0, units, size)]
    if has_batchnorm and len(found) > 1 and len(found[-1]) == 1:
        found[-2:] = [range(found[-2].start, units)]
    return found


def micro_count(units: int, size: int, has_batchnorm: bool) -> int:
    """How many `micro_batches` makes, without making them: this is asked for at every step."""
    joined = has_batchnorm and units > size and units % size == 1
    return math.ceil(units / size) - joined


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


class _Plan(Sampler[tuple[list[Item], bool]]):
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


def _loader(loop: Loop, part: Any, plan: Any) -> DataLoader[Batch]:
    # a generator of its own: drawing the workers' base seed must not move the generator that training uses
    return DataLoader(
        _Loader(loop.task, part), batch_size=None, sampler=plan, num_workers=loop.workers, generator=torch.Generator()
    )


def make_optimizer(loop: Loop, phase: Phase) -> AcceleratedOptimizer:
    """A new optimizer for a phase: SGD (no Nesterov) or AdamW, without decay on 1-D parameters.

    Fused: one pass over the weights in place of four to ten, on a CPU as well; but with a loss scale it would skip steps
    without saying so. Wrapped by hand: `accelerator.prepare` would hold every phase's optimizer, with its state, until the
    end of the run.
    """
    recipe = loop.recipe
    trained = [p for p in loop.model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    scaler = loop.accelerator.scaler
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=phase.lr, fused=scaler is None)
    else:
        optimizer = torch.optim.SGD(groups, lr=phase.lr, momentum=recipe.momentum, fused=scaler is None)
    return AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)


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


def _set_rate(optimizer: AcceleratedOptimizer, rate: float) -> float:
    for parameters in optimizer.param_groups:
        parameters["lr"] = rate
    return rate


def _tell(loop: Loop, label: str, done: Progress, total: int, samples: int, skipped: bool) -> None:
    """The log and whoever watches hear of the step that was counted last."""
    epoch = done.step / loop.steps_per_epoch
    loop.log({"event": "step", **place_of(label), "step": done.step, "epoch": epoch, "lr": done.lr_last,
              "loss": done.loss_last, "samples": samples, "skipped": skipped})  # fmt: skip
    loop.progress(label, done.step, total)


def _end_epoch(loop: Loop, done: Progress, total: int, epoch_end: Callable[[int], None]) -> None:
    """Attend to the end of an epoch or of the phase, if it is reached and has not been: evaluation leaves training mode."""
    if done.step > done.ended and (done.step % loop.steps_per_epoch == 0 or done.step == total):
        epoch_end(math.ceil(done.step / loop.steps_per_epoch))
        done.ended = done.step
        train_mode(loop.model)


def place_of(label: str) -> dict[str, Any]:
    """A label such as `refined try 2/1-sparse` as fields of a log line."""
    arm, _, phase = label.partition("/")
    arm, _, number = arm.partition(" try ")
    return {"arm": arm, "phase": phase, **({"try": int(number)} if number else {})}


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


def _on_device(loop: Loop, batch: Batch) -> Batch:
    batch = batch.to(loop.accelerator.device)
    if loop.channels_last:
        inputs = {n: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for n, v in batch.inputs.items()}
        batch = replace(batch, inputs=inputs)
    return batch


def seed_all(seed: int, device: torch.device) -> None:
    """Re-seed python's, numpy's and torch's generators. `device` is the one that is drawn on.

    `torch.manual_seed` writes down a stack trace for each device that is not in use, at every step.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


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
        for group, batch in zip(groups, _loader(loop, part, plan), strict=True):
            with loop.accelerator.autocast():
                scores = computed(loop, part, loop.model, _on_device(loop, batch), loop.task.score)
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
def reestimate(loop: Loop, key: Key) -> bool:
    """BatchNorm's statistics anew: plain means over the batches of one epoch. False for a model without them.

    Averaged weights, and weights masked without training after, have seen no batch (Izmailov et al. 2018, section 3.2).
    Every process goes over all batches, so that all find the same.
    """
    norms = [m for m in loop.model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return False
    kept = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]  # type: ignore[union-attr]
    was_training = loop.model.training
    loop.model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    order = epoch_order(key, 0, loop.task.train.units)
    micro = [order[np.asarray(m)] for m in micro_batches(loop.task.train.units, loop.recipe.batch_size * loop.world, True)]
    plan = [([(int(u), stable_seed(*key, 0, int(u), "augment")) for u in units], True) for units in micro]
    for batch in _loader(loop, loop.task.train, plan):
        computed(loop, loop.task.train, loop.model, _on_device(loop, batch), loop.task.loss)
    for norm, momentum, tracked in kept:
        norm.momentum = momentum
        norm.num_batches_tracked.copy_(tracked)  # type: ignore[union-attr]
    loop.model.train(was_training)
    return True


@torch.no_grad()
def _same_buffers(loop: Loop) -> None:
    """Every process takes the main one's buffers (BatchNorm statistics differ by the rows that each has seen)."""
    if loop.world > 1:
        for buffer in loop.model.buffers():
            buffer.copy_(broadcast(buffer.clone()))


def without_variance(loop: Loop) -> list[str]:
    """Names of the BatchNorm layers that see a single value of each channel in a row, as after a global pooling."""
    found: list[str] = []

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = [*args, *kwargs.values()][0]
            if values.numel() == values.shape[1]:
                found.append(name)

        return hook

    norms = [(name, module) for name, module in loop.model.named_modules() if isinstance(module, _BatchNorm)]
    hooks = [module.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, module in norms]
    loop.model.eval()
    with torch.no_grad():
        for seed in (None, 0):  # as evaluation sees the row, and as training does, which may be smaller
            loop.task.loss(loop.model, _on_device(loop, loop.task.batch(loop.task.train, [(0, seed)])))
    for hook in hooks:
        hook.remove()
    return found


def unreached(loop: Loop) -> list[str]:
    """Names of the parameters that the loss has no gradient for (or that never train), found on a few rows in evaluation mode.

    Experts are left out: which of them a row reaches is the router's choice.
    """
    loop.model.eval()
    loop.model.training = True  # the root's flag alone: what it computes only in training (auxiliary heads) is reached
    units = range(min(2, loop.task.train.units))
    batch = _on_device(loop, loop.task.batch(loop.task.train, [(unit, None) for unit in units]))
    with torch.backends.cudnn.flags(enabled=False):  # cuDNN's recurrent layers have no backward in evaluation mode
        loop.task.loss(loop.model, batch).backward()  # type: ignore[no-untyped-call]
    named = loop.model.named_parameters(remove_duplicate=False)
    lost = [n for n, p in named if p.grad is None and not (p.requires_grad and "expert" in n)]
    loop.model.zero_grad(set_to_none=True)
    loop.model.eval()
    return lost
