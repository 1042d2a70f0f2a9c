"""One phase of one arm: begin it, train it, select weights on the holdout, record it, save it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from dsd_refine.errors import Interrupted
from dsd_refine.masking import masks as masking
from dsd_refine.masking.masks import Masks
from dsd_refine.recipe import Augment, Phase, Recipe, first_sparsity
from dsd_refine.run.judge import warn_of_rising_losses
from dsd_refine.run.lost import give_up_if_hopeless, next_try, record_try
from dsd_refine.run.run import Run
from dsd_refine.run.state import Metrics, Selected
from dsd_refine.search import rung_of, steps_at
from dsd_refine.seeding import stable_seed
from dsd_refine.tasks.base import Batch, Forward, Scores
from dsd_refine.training import loop as training
from dsd_refine.training.average import between
from dsd_refine.training.batchnorm import reestimate
from dsd_refine.training.distill import distilled
from dsd_refine.training.evaluate import evaluate
from dsd_refine.training.hooks import Place
from dsd_refine.training.optimizer import let_go_of_gradients
from dsd_refine.training.packing import load_state
from dsd_refine.training.saliency import saliency
from dsd_refine.training.settings import train_mode
from dsd_refine.training.state import PhaseState, Progress


def run_phase(run: Run, phase: Phase, state: PhaseState) -> None:
    """Train one phase.

    A sparse phase masks the weights with the smallest absolute values, then trains under the mask. A
    dense phase trains all weights; those that were masked start from 0.

    Args:
        run: The run.
        phase: The phase. Its `settings` must be active.
        state: The result of `enter_phase`.

    Raises:
        RunError: A loss is not finite.
        Interrupted: The run was asked to stop. The state is saved.
    """
    loop, weights = run.loop, run.loop.parameters
    begin(run, phase, state)
    if phase.kind == "sparse" and not state.resumed:
        state.use(masks_of(run, phase, state, 0), weights)  # paper, algorithm 1: the mask of the current weights
        if state.masks:
            loop.hooks.on_masked(state.place)
    end_epoch(run, phase, state)  # the run may have been stopped just before it handled the end of an epoch
    for batches in steps_left(run, phase, state):
        training.train_step(loop, phase, state, batches)  # the step, then the mask
        if training.renews_mask(phase, state.progress.step, phase.total_steps(loop.steps_per_epoch)):
            state.use(masks_of(run, phase, state, state.progress.step // int(phase.refresh or 1)), weights)
        state.average.step_end()
        after_step(run, phase, state)
        end_epoch(run, phase, state)
        if loop.hooks.should_save() if loop.shards is None else state.must_save:
            save(run, state)
    warn_of_rising_losses(run, state)


def steps_left(run: Run, phase: Phase, state: PhaseState) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each step that is left, until the try is lost."""
    for batches in () if state.lost else training.batches_of_steps(run.loop, phase, state):
        yield batches
        if state.lost:
            return


def begin(run: Run, phase: Phase, state: PhaseState) -> None:
    """Prepare the optimizer, the average and the teacher of a phase, also of a resumed one."""
    if not state.resumed:
        run.loop.hooks.on_phase_begin(state.place)
    state.begin(run.loop, phase)
    run.loop.loss = loss_of(run, phase)
    if phase.restore == "source" and not state.resumed and follows_a_mask(phase, state):
        groups = masking.trained_groups(run.layers, run.loop.parameters)
        give_back(run, masking.never_back(run.loop.layers, run.loop.parameters, run.start, groups))
    if state.progress.without_gradient is None:
        masked_before = follows_a_mask(phase, state)
        groups = masking.trained_groups(run.layers, run.loop.parameters) if masked_before else []
        state.progress.without_gradient = groups


def loss_of(run: Run, phase: Phase) -> Callable[[Forward, Batch], torch.Tensor] | None:
    """Return the summed loss of a phase that learns from the source too. None: the task's own."""
    return distilled(run.task, run.teacher, phase.distill) if phase.distill and run.teacher else None


def masks_of(run: Run, phase: Phase, state: PhaseState, refresh: int) -> Masks:
    """Make the masks of a phase from the current weights.

    Args:
        run: The run.
        phase: The phase.
        state: Its state.
        refresh: The number of the mask in this phase, from 0.

    Returns:
        The masks. Empty at sparsity 0.
    """
    parameters = run.loop.parameters
    if not phase.sparsity:
        return {}
    if refresh and phase.criterion == "random":
        masking.put_back(state.masks, state.stash, parameters)
    # A random control has as many masked weights in each layer as the arm that it is compared with.
    ranked_by = run.recipe_of(state.place.arm, state.place.attempt - 1).phases[state.place.phase - 1].criterion
    is_global, sparsity = phase.threshold == "global", phase.sparsity_at(refresh * (phase.refresh or 1), steps_in(run, phase))
    needs_gradient = ranked_by == "saliency" and (is_global or phase.criterion == "saliency")
    values = saliency(run.loop, state.key) if needs_gradient else parameters
    counts = masking.global_counts(run.layers, values, sparsity) if is_global else None
    seed = (*state.key, refresh, "mask")
    criterion = "random" if phase.criterion == "random" else "magnitude"  # of the values
    make_masks = masking.make_masks if run.loop.shards is None else run.loop.shards.make_masks
    masks = make_masks(run.layers, values, sparsity, criterion, seed, counts)
    state.stash = masking.masked_values(masks, parameters) if phase.refresh and phase.criterion == "random" else {}
    return masks


def steps_in(run: Run, phase: Phase) -> int:
    """Return the number of optimizer steps of a phase."""
    return phase.total_steps(run.loop.steps_per_epoch)


def after_step(run: Run, phase: Phase, state: PhaseState) -> None:
    """Report the steps whose losses have arrived, and stop if asked.

    Raises:
        Interrupted: The run was asked to stop. The state is saved.
    """
    loop, step = run.loop, state.progress.step
    report_steps(run, state)
    if state.must_stop or (loop.world == 1 and loop.stopping()):  # several processes must stop at the same step
        save(run, state)
        total = phase.total_steps(loop.steps_per_epoch)
        raise Interrupted(f"stopped at step {step} of {total} of {state.place.label}; go on with --resume")


def report_steps(run: Run, state: PhaseState, wait: bool = False) -> None:
    """Report the steps whose losses have arrived to the hooks, and check the first losses.

    Args:
        run: The run.
        state: The state of the phase. `must_stop` is set if some process was asked to stop.
        wait: Wait for the losses of all steps.
    """
    for step, asked in training.arrived(run.loop, state, wait):
        state.must_stop |= asked
        run.loop.hooks.on_step(step)
        if step.step == training.EARLY:
            warn_of_rising_losses(run, state)  # do not wait for the end of the phase, which may take days


def end_epoch(run: Run, phase: Phase, state: PhaseState) -> None:
    """If an epoch or the phase has just ended, update the average and let the holdout select.

    Else do nothing.
    """
    loop, progress = run.loop, state.progress
    ends = progress.step % loop.steps_per_epoch == 0 or progress.step == phase.total_steps(loop.steps_per_epoch)
    if progress.step == progress.ended or not ends:
        return
    report_steps(run, state, wait=True)
    epoch = math.ceil(progress.step / loop.steps_per_epoch)
    state.average.epoch_end()
    if state.last and run.recipe.keep == "best":
        with restored_buffers(loop.model), state.average.held() as averaged, given_back_within(run, phase, state) as returned:
            if averaged or returned:
                reestimate(loop, state.key)
            scores = score_holdout(run, state)
            state.scores = scores
            keep_if_best(run, state, epoch, returned, scores)
            give_up_if_hopeless(run, state, scores)
    progress.ended = progress.step
    train_mode(loop.model)
    loop.hooks.on_epoch_end(state.place, epoch)


def swap_in_average(run: Run, phase: Phase, state: PhaseState) -> None:
    """Set the final weights of a phase after its last step.

    The average replaces the weights. Masked weights that had no gradient get the source's values
    back (see `give_back`). If the model has not seen a batch with the final weights, BatchNorm's
    statistics are computed again.
    """
    run.state.masked_only = not state.progress.step and (bool(state.masks) or run.state.masked_only)
    reason = "averaged weights" if state.average.settle() else None
    returned = give_back(run, lost_weights(run, phase, state))
    # A new mask sets weights to 0 that an earlier dense phase may have given back.
    run.state.returned = {} if phase.kind == "sparse" else {**run.state.returned, **returned}
    if returned:
        reason = "weights without a gradient given back"
    if state.last and run.state.masked_only:
        reason = "masked without training after"
    state.reestimated = reason if reason and reestimate(run.loop, state.key) else None


def follows_a_mask(phase: Phase, state: PhaseState) -> bool:
    """Return whether this is a dense phase after a masked one."""
    return phase.kind == "dense" and any(earlier.kind == "sparse" and earlier.sparsity for earlier in state.earlier)


def lost_weights(run: Run, phase: Phase, state: PhaseState) -> Masks:
    """Return the masked weights that are still 0 because their layer or expert had no gradient.

    Zeros in a layer with a gradient are left as they are (rule 5: from 0, a step is -lr * g, and g
    may be 0). If the phase has made no step with a learning rate above 0, no weight is lost: the user
    asked for the zeros.

    Returns:
        Parameter name -> bool tensor of its shape, True = lost.
    """
    progress = state.progress
    if not progress.without_gradient or not progress.optimizer_steps or not progress.lr_peak:
        return {}
    return masking.never_back(run.loop.layers, run.loop.parameters, run.start, progress.without_gradient)


@torch.no_grad()
def give_back(run: Run, lost: Masks) -> dict[str, int]:
    """Set the weights to the source's values where `lost` is True.

    Returns:
        Layer name -> number of such weights.
    """
    for key, flags in lost.items():
        parameter = run.loop.parameters[key]
        parameter.copy_(torch.where(flags, run.start[key].to(parameter.device), parameter))
    return run.loop.summed(masking.count_in_layers(run.loop.layers, lost))


@contextmanager
def given_back_within(run: Run, phase: Phase, state: PhaseState) -> Iterator[dict[str, int]]:
    """Give lost weights back inside a `with` block, as at the end of a phase (see `give_back`).

    Afterwards they are 0 again, because later steps may still train them.
    """
    lost = lost_weights(run, phase, state)
    try:
        yield give_back(run, lost)
    finally:
        with torch.no_grad():
            for key, flags in lost.items():
                run.loop.parameters[key].masked_fill_(flags, 0.0)


def finished_before(run: Run, arm: str, attempt: int, number: int) -> bool:
    """Return whether this phase was finished before the run was resumed."""
    return run.state.at is not None and [run.arms.index(arm), attempt, number] < run.state.at


def enter_phase(run: Run, arm: str, attempt: int, number: int, phases: Sequence[Phase]) -> PhaseState:
    """Load the weights with which a phase begins, or those with which it was stopped.

    Args:
        run: The run.
        arm: The name of the arm.
        attempt: The number of the try, from 0.
        number: The number of the phase, from 0.
        phases: All phases of the try.

    Returns:
        The state of the phase.
    """
    position = [run.arms.index(arm), attempt, number]
    saved = run.restored(position)
    if saved:
        # Wait, because the next save of the main process removes the file that all processes read.
        run.loop.accelerator.wait_for_everyone()
        load_state(run.loop.state(), {k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")})
    elif number == 0:
        load_state(run.loop.state(), run.start)
    use_setting(run, run.recipe_of(arm, attempt))
    progress = run.state.progress if saved else None
    if number == 0 and not saved:
        run.state.masked_only, run.state.returned = False, {}
        run.state.below, run.state.try_best, run.state.candidate = 0, None, None
        run.state.rounds, run.state.round_mean = 0, None
        if run.loss_scale is not None:
            # Each try starts with the same loss scale, so that no arm profits from an earlier one.
            run.loop.accelerator.scaler.load_state_dict(run.loss_scale)
    run.state.at = position
    return PhaseState(
        place_of(run, position, phases), progress or Progress(), tuple(phases[:number]), last=number == len(phases) - 1,
        resumed=progress is not None, restored=saved if progress else {},
    )  # fmt: skip


def use_setting(run: Run, recipe: Recipe) -> None:
    """Let the loop and the task work by the recipe of a try."""
    run.loop.recipe = recipe
    if isinstance(getattr(run.task, "augment", None), Augment):
        run.task.augment = recipe.augment  # type: ignore[attr-defined]


def place_of(run: Run, position: Sequence[int], phases: Sequence[Phase]) -> Place:
    """Return where a phase is in the whole run.

    All tries of a rung are equally long, so the number of all steps is known.

    Args:
        run: The run.
        position: The numbers of the arm, the try and the phase, each from 0.
        phases: All phases of the try.
    """
    arm, attempt, number = position
    lengths = [phase.total_steps(run.loop.steps_per_epoch) for phase in phases]
    tries = len(run.tries)
    each = [steps_of(run, other) for other in run.tries]
    before = arm * sum(each) + sum(each[:attempt]) + sum(lengths[:number])
    seed = try_seed(run, run.arms[arm], attempt)
    steps = len(run.arms) * sum(each)
    return Place(run.arms[arm], attempt + 1, tries, seed, number + 1, len(phases), phases[number].kind, before, steps)


def steps_of(run: Run, attempt: int) -> int:
    """Return the optimizer steps of a try."""
    total = sum(phase.total_steps(run.loop.steps_per_epoch) for phase in run.recipe.trained_phases)
    return steps_at(total, run.rungs[rung_of(run.rungs, attempt % run.tries_per_seed)].share)


def try_seed(run: Run, arm: str, attempt: int) -> int:
    """Return the seed of a try of an arm.

    A repeat (option --seeds) has the same seed in all arms. Within a repeat, the tries of the
    refined arm differ in their settings and share the seed. A control gets as many tries (rule 15); those
    with different settings differ in the seed.
    """
    repeat, number, recipe = attempt // run.tries_per_seed, run.setting(arm, attempt), run.recipe
    seed = stable_seed(recipe.seed, repeat, "seed") if repeat else recipe.seed
    return seed if arm == "refined" or not number else stable_seed(seed, number, "try")


def leave_phase(run: Run, phase: Phase, state: PhaseState) -> None:
    """Finish a phase: set its final weights, check the masks, record the phase, and save.

    After the last phase, its weights may become the result of the arm.

    Raises:
        RunError: A masked weight is not 0.
        Interrupted: The run was asked to stop. The state is saved.
    """
    loop, progress, attempt = run.loop, state.progress, state.place.attempt - 1
    swap_in_average(run, phase, state)
    masking.check_masks(state.masks, loop.parameters)
    loop.hooks.on_phase_end(state.place)
    zeros = masking.count_zeros(run.layers, loop.whole(loop.parameters))
    is_kept_here = state.last and (run.recipe.keep != "best" or progress.step == 0)
    # The end of the last epoch has scored these weights, or their average, with the same statistics.
    scores = state.scores
    if scores is None:
        scores = score_holdout(run, state, log=is_kept_here or not state.last)
    if not state.last:
        give_up_if_hopeless(run, state, scores)
    if is_kept_here or (state.lost and not state.last):
        keep_if_best(run, state, math.ceil(progress.step / loop.steps_per_epoch), {}, scores)
    if run.recipe.average == "rounds" and not state.lost:
        add_round(run, state)
    state.last |= state.lost is not None
    holdout = run.task.metrics(scores) if scores else None
    run.state.phases.append(phase_entry(run, phase, state, zeros, holdout))
    if state.last:
        record_try(run, state.place.arm, attempt, state.lost)
    if state.place.arm == "refined":
        if phase.kind == "sparse":
            run.state.zeros.setdefault(str(attempt), zeros)
            if phase.threshold == "global":
                counts = loop.summed(masking.count_in_layers(loop.layers, masked_flags(state)))
                run.state.masked.setdefault(str(attempt), counts)
            run.state.empty.setdefault(str(attempt), masking.empty_filters(run.layers, loop.whole(loop.parameters)))
        if run.options.save_phases:
            folder = run.workspace.partial / "phases" / str(attempt) / f"{state.place.phase}-{phase.kind}"
            if run.workspace.writes:
                folder.mkdir(parents=True, exist_ok=True)
            run.write_checkpoint(folder)
    run.state.at, run.state.progress = next_place(run, state), None
    run.save(None if state.last else model_tensors(run))
    if loop.stopping() and loop.world == 1:
        raise Interrupted(f"stopped after {state.place.label}; go on with --resume")


def add_round(run: Run, state: PhaseState) -> None:
    """Add the current weights to the mean over the rounds of a try, if a round ends with this phase.

    Controls have their rounds at the same phases. The mean waits in a file. After the last phase, the holdout may
    prefer it, with BatchNorm's statistics computed again. The model keeps its own weights.
    """
    saved, place = run.state, state.place
    if place.phase - 1 not in run.recipe.round_ends:
        return
    run.loop.accelerator.wait_for_everyone()
    own = {key: value.detach().to("cpu", copy=True) for key, value in run.loop.state().items()}
    saved.rounds += 1
    mean = between(run.workspace.read_weights(saved.round_mean), own, 1 / saved.rounds) if saved.round_mean else own
    saved.round_mean = f"best-{place.arm}-{place.attempt - 1}-round-{saved.rounds}.safetensors"
    if not state.last:
        run.workspace.write_weights(saved.round_mean, mean)
    elif saved.rounds > 1:
        load_state(run.loop.state(), mean)
        reestimate(run.loop, state.key)
        scores = evaluate(run.loop, run.task.holdout)
        line = {"arm": place.arm, "phase": None, "step": None, "epoch": None, "rounds": saved.rounds, "part": "holdout"}
        run.workspace.log({"event": "evaluation", **line, **run.task.metrics(scores)})
        keep_if_best(run, state, math.ceil(state.progress.step / run.loop.steps_per_epoch), {}, scores, saved.rounds)
        load_state(run.loop.state(), own)


def masked_flags(state: PhaseState) -> Masks:
    """Return the opposite of the masks: parameter name -> bool tensor, True = masked."""
    return {name: ~mask for name, mask in state.masks.items()}


def phase_entry(run: Run, phase: Phase, state: PhaseState, zeros: dict[str, int], holdout: Metrics | None) -> dict[str, object]:
    """Return the entry of a phase in report.json.

    `zeros` is the number of zeros in each layer at the end of the phase. `holdout` has the metrics
    on the holdout, or None without one.
    """
    progress, place = state.progress, state.place
    return {
        "arm": place.arm, "attempt": place.attempt - 1, "kind": phase.kind, "sparsity": phase.sparsity,
        "measured_sparsity": _share(run, zeros), "epochs": progress.step / run.loop.steps_per_epoch,
        "optimizer_steps": progress.optimizer_steps, "samples": progress.samples,
        "lr_first": progress.lr_first, "lr_peak": progress.lr_peak, "lr_last": progress.lr_last,
        "loss_first": progress.loss_first, "loss_last": progress.loss_last, "seconds": progress.seconds,
        "samples_per_second": progress.samples / progress.seconds if progress.seconds else None,
        "holdout": holdout, "seed": place.seed, "batchnorm_reestimated": state.reestimated,
    }  # fmt: skip


def next_place(run: Run, state: PhaseState) -> list[int]:
    """Return the position of the next phase: in the same try, the next try, or the next arm.

    It is the numbers of the arm, the try and the phase, each from 0.
    """
    arm, attempt = run.arms.index(state.place.arm), state.place.attempt - 1
    return next_try(run, arm, attempt) if state.last else [arm, attempt, state.place.phase]


def _share(run: Run, zeros: dict[str, int]) -> float:
    """Return the share of zeros in all layers that can be masked."""
    maskable = [layer for layer in run.layers if layer.excluded is None]
    return sum(zeros[layer.name] for layer in maskable) / sum(layer.weights for layer in maskable)


def score_holdout(run: Run, state: PhaseState, log: bool = True) -> Scores | None:
    """Score the current weights on the holdout, and log the metrics unless `log` is False.

    None: there is no holdout.
    """
    if run.task.holdout is None:
        return None
    let_go_of_gradients(state.optimizer)  # the copy of the weights that are rounded takes the place of the gradients
    scores = evaluate(run.loop, run.task.holdout, state.masks)
    if log:
        step = state.progress.step
        place = {"step": step, "epoch": step / run.loop.steps_per_epoch, "part": "holdout"}
        metrics = run.task.metrics(scores)
        run.workspace.log({"event": "evaluation", **state.place.logged, **place, **metrics})
        run.loop.hooks.on_holdout(state.place, step, metrics)
    return scores


def keep_if_best(
    run: Run, state: PhaseState, epoch: int, returned: dict[str, int], scores: Scores | None, rounds: int = 1
) -> None:
    """Keep the current weights as a candidate for the result of the arm if the holdout prefers them to the best so far.

    The metric decides, then the loss, then the earlier weights win.

    Args:
        run: The run.
        state: The state of the phase.
        epoch: The number of the epoch that has ended.
        returned: Layer name -> number of weights that have the source's values back (see
            `give_back`).
        scores: The scores of the current weights on the holdout. None without a holdout.
        rounds: How many rounds the current weights are the mean of.
    """
    arm, attempt, saved = state.place.arm, state.place.attempt - 1, run.state
    metrics = run.task.metrics(scores) if scores else None
    if metrics is not None and (saved.try_best is None or run.prefers(metrics, saved.try_best)):
        saved.try_best = metrics
    best = saved.candidate
    if best is None and run.recipe.soup == "none":  # for a soup, the weights of every try are kept
        best = saved.best.get(arm, {}).get(str(attempt // run.tries_per_seed))
    if best is not None and metrics is not None and best.holdout is not None and not run.prefers(metrics, best.holdout):
        return
    of_rounds = f"-mean{rounds}" if rounds > 1 else ""
    file_name = f"best-{arm}-{attempt}-{epoch}{of_rounds}.safetensors"
    run.workspace.write_weights(file_name, run.loop.state())
    saved.candidate = Selected(
        file_name, attempt, epoch, first_sparsity(run.recipe_of(arm, attempt)), state.place.seed, metrics,
        {**saved.returned, **returned}, rounds=rounds,
    )  # fmt: skip


def save(run: Run, state: PhaseState) -> None:
    """Save the state in the middle of a phase."""
    report_steps(run, state, wait=True)
    state.must_save = False
    run.state.progress = state.progress
    run.save(model_tensors(run) | state.state_dict())


def model_tensors(run: Run) -> dict[str, torch.Tensor]:
    """Return the tensors of the model under their names in a saved state: "model." and the key."""
    return {f"model.{key}": value for key, value in run.loop.state().items()}


@contextmanager
def restored_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the buffers of the model at the end of a `with` block.

    So an evaluation of the averaged weights does not change the statistics of the training weights.
    """
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)
