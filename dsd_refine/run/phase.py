"""One phase of one arm: begin it, train it, let the holdout select, record it, save it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from dsd_refine.errors import Interrupted
from dsd_refine.masking import masks as masking
from dsd_refine.masking.masks import Masks
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.run.judge import warn_of_rising_losses
from dsd_refine.run.run import Run
from dsd_refine.run.state import Metrics, Selected
from dsd_refine.seeding import stable_seed
from dsd_refine.training import loop as training
from dsd_refine.training.batchnorm import reestimate
from dsd_refine.training.distill import distilled
from dsd_refine.training.evaluate import evaluate
from dsd_refine.training.hooks import Place, Step
from dsd_refine.training.packing import load_state
from dsd_refine.training.settings import train_mode
from dsd_refine.training.state import PhaseState, Progress


def run_phase(run: Run, phase: Phase, state: PhaseState) -> None:
    """Sparse: mask by |w| of the weights now held, then train under the mask. Dense: train all, restored ones from 0.

    `state` is what `enter_phase` left; the phase's `settings` hold.

    Raises:
        RunError: a loss that is not finite.
        Interrupted: the run was asked to stop; the state is saved.
    """
    loop, weights = run.loop, run.loop.parameters
    begin(run, phase, state)
    if phase.kind == "sparse" and not state.resumed:
        state.use(masks_of(run, phase, state, 0), weights)  # paper, algorithm 1: the mask of the weights now held
        if state.masks:
            loop.hooks.on_masked(state.place)
    end_epoch(run, phase, state)  # a stop may have come right before its end was attended to
    for batches in training.batches_of_steps(loop, phase, state):
        step, stop = training.train_step(loop, phase, state, batches)  # the step, then the mask
        if training.renews_mask(phase, step.step, step.steps):
            state.use(masks_of(run, phase, state, step.step // int(phase.refresh or 1)), weights)
        state.average.step_end()
        training.count(state, step)
        attend(run, state, step, stop)
        end_epoch(run, phase, state)
        if loop.hooks.should_save():
            save(run, state)
    warn_of_rising_losses(run, state)


def begin(run: Run, phase: Phase, state: PhaseState) -> None:
    """Optimizer, average and teacher of the phase; what it goes on from after a stop."""
    if not state.resumed:
        run.loop.hooks.on_phase_begin(state.place)
    state.begin(run.loop, phase)
    run.loop.loss = distilled(run.task, run.teacher, phase.distill) if phase.distill and run.teacher else None
    if state.progress.without_gradient is None:
        watched = follows_a_mask(phase, state)
        state.progress.without_gradient = masking.trained_groups(run.layers, run.loop.parameters) if watched else []


def masks_of(run: Run, phase: Phase, state: PhaseState, refresh: int) -> Masks:
    """The phase's mask of the weights now held; `refresh` counts from 0. None at sparsity 0."""
    parameters = run.loop.parameters
    if not phase.sparsity:
        return {}
    if refresh and phase.criterion == "random":
        masking.put_back(state.masks, state.stash, parameters)
    seed = (*state.key, refresh, "mask")
    masks = masking.make_masks(run.layers, parameters, phase.sparsity, phase.criterion, seed)
    state.stash = masking.masked_values(masks, parameters) if phase.refresh and phase.criterion == "random" else {}
    return masks


def attend(run: Run, state: PhaseState, step: Step, stop: bool) -> None:
    """Tell of a step; look at the first losses; stop where that was asked for.

    Raises:
        Interrupted: some process was asked to stop; the state is saved.
    """
    run.loop.hooks.on_step(step)
    if step.step == training.EARLY:
        warn_of_rising_losses(run, state)  # and not only at the phase's end, which may be days away
    if stop or (run.loop.world == 1 and run.loop.stopping()):  # several processes must ask together
        save(run, state)
        raise Interrupted(f"stopped at step {step.step} of {step.steps} of {state.place.label}; go on with --resume")


def end_epoch(run: Run, phase: Phase, state: PhaseState) -> None:
    """If an epoch or the phase has just ended: the average takes it in, and the holdout may select it."""
    loop, done = run.loop, state.progress
    ends = done.step % loop.steps_per_epoch == 0 or done.step == phase.total_steps(loop.steps_per_epoch)
    if done.step == done.ended or not ends:
        return
    epoch = math.ceil(done.step / loop.steps_per_epoch)
    state.average.epoch_end()
    if state.last and run.recipe.keep == "best":
        with kept_buffers(loop.model), state.average.held() as averaged, given_back_within(run, phase, state) as returned:
            if averaged or returned:
                reestimate(loop, state.key)
            keep_if_best(run, state, epoch, returned)
    done.ended = done.step
    train_mode(loop.model)
    loop.hooks.on_epoch_end(state.place, epoch)


def swap_in_average(run: Run, phase: Phase, state: PhaseState) -> None:
    """After the last step: the average takes the weights' place; weights that no gradient could bring back are given back.

    BatchNorm's statistics are computed again where these weights have seen no batch.
    """
    run.state.masked_only = not state.progress.step and (bool(state.masks) or run.state.masked_only)
    reason = "averaged weights" if state.average.settle() else None
    returned = give_back(run, lost_weights(run, phase, state))
    # what another mask takes out is no longer what an earlier dense phase has given back
    run.state.returned = {} if phase.kind == "sparse" else {**run.state.returned, **returned}
    if returned:
        reason = "weights without a gradient given back"
    if state.last and run.state.masked_only:
        reason = "masked without training after"
    state.reestimated = reason if reason and reestimate(run.loop, state.key) else None


def follows_a_mask(phase: Phase, state: PhaseState) -> bool:
    """Is it a dense phase with a masked one before it?"""
    return phase.kind == "dense" and any(earlier.kind == "sparse" and earlier.sparsity for earlier in state.earlier)


def lost_weights(run: Run, phase: Phase, state: PhaseState) -> Masks:
    """The masked weights, 0 still, of layers and experts that had no gradient in a dense phase: they could not come back.

    A layer that has a gradient keeps the zeros that are left in it (rule 5: from 0, one step is -lr * g, and g may be 0).
    None before the phase has made a step at some rate: what is 0 then is what the user asked for.
    """
    done = state.progress
    if not done.without_gradient or not done.optimizer_steps or not done.lr_peak:
        return {}
    return masking.never_back(run.layers, run.loop.parameters, run.start, done.without_gradient)


@torch.no_grad()
def give_back(run: Run, lost: Masks) -> dict[str, int]:
    """Put the source's values where `lost` is True; layer name -> number of such weights."""
    for key, flags in lost.items():
        parameter = run.loop.parameters[key]
        parameter.copy_(torch.where(flags, run.start[key].to(parameter.device), parameter))
    return masking.count_in_layers(run.layers, lost)


@contextmanager
def given_back_within(run: Run, phase: Phase, state: PhaseState) -> Iterator[dict[str, int]]:
    """Within, the model holds what it would hold if the phase ended here (see `give_back`); later steps may still reach it."""
    lost = lost_weights(run, phase, state)
    try:
        yield give_back(run, lost)
    finally:
        with torch.no_grad():
            for key, flags in lost.items():
                run.loop.parameters[key].masked_fill_(flags, 0.0)


def finished_before(run: Run, arm: str, attempt: int, number: int) -> bool:
    """Was this phase finished before the run was taken up again?"""
    return run.state.at is not None and [run.arms.index(arm), attempt, number] < run.state.at


def enter_phase(run: Run, arm: str, attempt: int, number: int, phases: Sequence[Phase]) -> PhaseState:
    """Bring the model to where this phase of a try begins, or to where it was stopped."""
    at = [run.arms.index(arm), attempt, number]
    saved = run.restored(at)
    if saved:
        run.loop.accelerator.wait_for_everyone()  # the main process's next save removes what all have read
        load_state(run.loop.model, {k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")})
    elif number == 0:
        load_state(run.loop.model, run.start)
    progress = run.state.progress if saved else None
    if number == 0:
        run.state.masked_only, run.state.returned = False, {}
        if run.loss_scale is not None and not saved:
            run.loop.accelerator.scaler.load_state_dict(run.loss_scale)  # what one arm has found out, the next must as well
    run.state.at = at
    return PhaseState(
        place_of(run, at, phases), progress or Progress(), tuple(phases[:number]), last=number == len(phases) - 1,
        resumed=progress is not None, restored=saved if progress else {},
    )  # fmt: skip


def place_of(run: Run, at: Sequence[int], phases: Sequence[Phase]) -> Place:
    """Where a phase is in the whole run: all tries of all arms have phases of equal lengths."""
    arm, attempt, number = at
    lengths = [phase.total_steps(run.loop.steps_per_epoch) for phase in phases]
    tries = len(run.tries)
    before = (arm * tries + attempt) * sum(lengths) + sum(lengths[:number])
    seed = try_seed(run.recipe, run.arms[arm], attempt)
    steps = len(run.arms) * tries * sum(lengths)
    return Place(run.arms[arm], attempt + 1, tries, seed, number + 1, len(phases), phases[number].kind, before, steps)


def try_seed(recipe: Recipe, arm: str, attempt: int) -> int:
    """The seed of an arm's try. Arms with the same repeat share it; tries of a control at one repeat differ by it,
    where those of the refined arm differ by their sparsity (rule 15: each control gets as many tries).
    """
    repeat, number = divmod(attempt, len(recipe.tried))
    seed = stable_seed(recipe.seed, repeat, "seed") if repeat else recipe.seed
    return seed if arm == "refined" or not number else stable_seed(seed, number, "try")


def leave_phase(run: Run, phase: Phase, state: PhaseState) -> None:
    """Give the phase's weights to what follows: averaged, checked, a candidate where they are one, recorded, saved.

    Raises:
        RunError: a masked weight that is not 0.
        Interrupted: the run was asked to stop; the state is saved.
    """
    loop, done, attempt = run.loop, state.progress, state.place.attempt - 1
    swap_in_average(run, phase, state)
    masking.check_masks(state.masks, loop.parameters)
    loop.hooks.on_phase_end(state.place)
    zeros = masking.count_zeros(run.layers, loop.parameters)
    if state.last and (run.recipe.keep != "best" or done.step == 0):
        keep_if_best(run, state, math.ceil(done.step / loop.steps_per_epoch), {})
    holdout = measure_holdout(run, state, log=not state.last)
    run.state.phases.append(phase_entry(run, phase, state, zeros, holdout))
    if state.place.arm == "refined":
        if phase.kind == "sparse":
            run.state.zeros.setdefault(str(attempt), zeros)
            run.state.empty.setdefault(str(attempt), masking.empty_filters(run.layers, loop.parameters))
        if run.options.save_phases and run.workspace.writes:
            folder = run.workspace.partial / "phases" / str(attempt) / f"{state.place.phase}-{phase.kind}"
            folder.mkdir(parents=True, exist_ok=True)
            run.checkpoint.write(loop.model, folder)
    run.state.at, run.state.progress = next_place(run, state), None
    run.save(None if state.last else model_tensors(run))
    if loop.stopping() and loop.world == 1:
        raise Interrupted(f"stopped after {state.place.label}; go on with --resume")


def phase_entry(run: Run, phase: Phase, state: PhaseState, zeros: dict[str, int], holdout: Metrics | None) -> dict[str, object]:
    """What report.json says of a phase."""
    done, place = state.progress, state.place
    return {
        "arm": place.arm, "attempt": place.attempt - 1, "kind": phase.kind, "sparsity": phase.sparsity,
        "measured_sparsity": _share(run, zeros), "epochs": done.step / run.loop.steps_per_epoch,
        "optimizer_steps": done.optimizer_steps, "samples": done.samples,
        "lr_first": done.lr_first, "lr_peak": done.lr_peak, "lr_last": done.lr_last,
        "loss_first": done.loss_first, "loss_last": done.loss_last, "seconds": done.seconds,
        "samples_per_second": done.samples / done.seconds if done.seconds else None,
        "holdout": holdout, "seed": place.seed, "batchnorm_reestimated": state.reestimated,
    }  # fmt: skip


def next_place(run: Run, state: PhaseState) -> list[int]:
    """The phase after this one: of the same try, of the next try, or of the next arm."""
    arm, attempt, number = run.arms.index(state.place.arm), state.place.attempt, state.place.phase
    if not state.last:
        return [arm, attempt - 1, number]
    return [arm, attempt, 0] if attempt < len(run.tries) else [arm + 1, 0, 0]


def _share(run: Run, zeros: dict[str, int]) -> float:
    maskable = [layer for layer in run.layers if layer.excluded is None]
    return sum(zeros[layer.name] for layer in maskable) / sum(layer.weights for layer in maskable)


def measure_holdout(run: Run, state: PhaseState, log: bool = True) -> Metrics | None:
    """The holdout's metrics of the weights now held, logged."""
    if run.task.holdout is None:
        return None
    metrics = run.task.metrics(evaluate(run.loop, run.task.holdout, state.masks))
    if log:
        step = state.progress.step
        place = {"step": step, "epoch": step / run.loop.steps_per_epoch, "part": "holdout"}
        run.workspace.log({"event": "evaluation", **state.place.logged, **place, **metrics})
    return metrics


def keep_if_best(run: Run, state: PhaseState, epoch: int, returned: dict[str, int]) -> None:
    """Keep the weights now held as the arm's result if the holdout prefers them (metric, then loss, then the earlier).

    `returned` counts the weights that have the source's values back, by layer (see `give_back`).
    """
    arm, attempt = state.place.arm, state.place.attempt - 1
    metrics, repeat = measure_holdout(run, state), str(attempt // len(run.recipe.tried))
    best = run.state.best.setdefault(arm, {})
    held = best[repeat].holdout if repeat in best else None
    if repeat in best and metrics is not None and held is not None and not run.prefers(metrics, held):
        return
    name = f"best-{arm}-{attempt}-{epoch}.safetensors"
    run.workspace.write_tensors(name, run.loop.model.state_dict())
    best[repeat] = Selected(
        name, attempt, epoch, run.sparsity_of(attempt), state.place.seed, metrics, {**run.state.returned, **returned}
    )


def save(run: Run, state: PhaseState) -> None:
    """Save the state in the middle of a phase."""
    run.state.progress = state.progress
    run.save(model_tensors(run) | state.state_dict())


def model_tensors(run: Run) -> dict[str, torch.Tensor]:
    """The model's tensors under the names that a saved state gives them."""
    return {f"model.{key}": value for key, value in run.loop.model.state_dict().items()}


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Put the buffers back as they were: a look at the averaged weights must not move the statistics of those that train."""
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)
