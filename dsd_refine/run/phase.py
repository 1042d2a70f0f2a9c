"""One phase of one arm: enter, train, select by the holdout, record, save."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import nn

from dsd_refine.errors import Interrupted
from dsd_refine.masking import histograms
from dsd_refine.masking import masks as masking
from dsd_refine.masking.masks import Masks
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.run.judge import look_at_losses
from dsd_refine.run.packing import load_state, pack_masks, pack_optimizer, unpack_masks, unpack_optimizer
from dsd_refine.run.run import Run
from dsd_refine.seeding import stable_seed
from dsd_refine.training.average import Average
from dsd_refine.training.batchnorm import reestimate
from dsd_refine.training.distill import distilled
from dsd_refine.training.evaluate import evaluate
from dsd_refine.training.hooks import Place
from dsd_refine.training.loop import EARLY, train_phase
from dsd_refine.training.optimizer import make_optimizer
from dsd_refine.training.state import Key, Progress, place_of


def one_phase(run: Run, phase: Phase, done: Progress, last: bool) -> None:
    """Sparse: mask by |w| of the weights now held, then train under the mask. Dense: train all, restored ones from 0."""
    masks = trained(run, phase, done, last)
    settle(run, phase, masks, done, last)
    masking.check_masks(masks, run.loop.parameters)
    look(run, "after S" if masks else "after re-D" if phase.kind == "dense" else None)
    leave(run, phase, done, masks, last)


def trained(run: Run, phase: Phase, done: Progress, last: bool) -> Masks:
    """A phase's mask and its steps, from what `enter` left and within `settings`; returns the mask that held last."""
    loop, parameters, at = run.loop, run.loop.parameters, run.current
    key = phase_key(run)
    average = at["average"] = Average(phase, parameters, at["saved"])

    def make(refresh: int) -> Masks:
        if phase.kind == "dense" or not phase.sparsity:
            return {}
        if refresh and phase.criterion == "random":
            masking.put_back(at["masks"], at["stash"], parameters)
        seed = (at["seed"], at["number"], refresh, "mask")
        masks = masking.make_masks(run.layers, parameters, float(phase.sparsity), phase.criterion, seed)  # type: ignore[arg-type]
        at["stash"] = masking.masked_values(masks, parameters) if phase.refresh and phase.criterion == "random" else {}
        return masks

    begun = at["masks"] is not None
    look(run, "start" if not at["number"] else "unmasked" if phase.kind == "dense" else None, begun)
    masks: Masks = at["masks"] if begun else make(0)
    at["masks"] = masks
    masking.apply_masks(masks, parameters)
    look(run, "pruned" if masks else None, begun)
    optimizer = at["optimizer"] = make_optimizer(loop, phase)
    unpack_optimizer(at["saved"], optimizer)

    def step_end() -> None:
        average.step_end()
        if done.step == EARLY:
            look_at_losses(run, done.early)  # and not only at the phase's end, which may be days away

    def epoch_end(epoch: int) -> None:
        average.epoch_end()
        if last and run.recipe.keep == "best":
            with kept_buffers(loop.model), average.held() as averaged, held_back(run, phase, done) as returned:
                if averaged or returned:
                    reestimate(loop, key)
                consider(run, epoch, masks, returned)

    def backward_end() -> None:
        if done.without_gradient:
            done.without_gradient = masking.without_gradient(run.layers, parameters, done.without_gradient)

    if done.without_gradient is None:
        done.without_gradient = masking.trained_groups(run.layers, parameters) if after_mask(run, phase) else []
    loop.loss = distilled(run.task, run.teacher, phase.distill) if phase.distill and run.teacher else None
    train_phase(loop, phase, key, at["label"], masks, done, optimizer, remask=make, epoch_end=epoch_end,
                step_end=step_end, backward_end=backward_end)  # fmt: skip
    look_at_losses(run, done.early)
    return masks


def phase_key(run: Run) -> Key:
    """What the order, augmentation and dropout of the phase that runs are functions of."""
    return Key(run.current["seed"], run.current["number"])


def look(run: Run, moment: str | None, begun: bool = False) -> None:
    """Keep the refined arm's weight histograms at one of the paper's moments, for report.html; not in a phase taken up."""
    at = run.current
    if moment is None or begun or at["arm"] != "refined":
        return
    recorded = run.state.setdefault("pictures", {}).setdefault(str(at["attempt"]), {})
    histograms.record(recorded, histograms.choose_layers(run.layers, run.loop.parameters), run.loop.parameters, moment)


def settle(run: Run, phase: Phase, masks: Masks, done: Progress, last: bool) -> None:
    """What follows a phase's last step: the mean takes the weights' place; what no gradient has brought back is given back;
    BatchNorm looks again where nothing trained.
    """
    run.state["masked_only"] = not done.step and (bool(masks) or run.state.get("masked_only", False))
    reason = "averaged weights" if run.current["average"].settle() else None
    returned = give_back(run, lost_weights(run, phase, done))
    # what another mask takes out is no longer what an earlier dense phase has given back
    run.state["returned"] = {} if phase.kind == "sparse" else {**run.state["returned"], **returned}
    if returned:
        reason = "weights without a gradient given back"
    if last and run.state["masked_only"]:
        reason = "masked without training after"
    run.current["statistics"] = reason if reason and reestimate(run.loop, phase_key(run)) else None


def after_mask(run: Run, phase: Phase) -> bool:
    """Is it a dense phase with a masked one before it?"""
    return phase.kind == "dense" and any(earlier.kind == "sparse" and earlier.sparsity for earlier in run.current["earlier"])


def lost_weights(run: Run, phase: Phase, done: Progress) -> Masks:
    """The masked weights, 0 still, of layers and experts that had no gradient in a dense phase: they could not come back.

    A layer that has a gradient keeps the zeros that are left in it (rule 5: from 0, one step is -lr * g, and g may be 0).
    None before the phase has made a step at some rate: what is 0 then is what the user asked for.
    """
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
def held_back(run: Run, phase: Phase, done: Progress) -> Iterator[dict[str, int]]:
    """Within, the model holds what it would hold if the phase ended here (see `give_back`); later steps may still reach it."""
    lost = lost_weights(run, phase, done)
    try:
        yield give_back(run, lost)
    finally:
        with torch.no_grad():
            for key, flags in lost.items():
                run.loop.parameters[key].masked_fill_(flags, 0.0)


def passed(run: Run, arm: str, attempt: int, number: int) -> bool:
    """Was this phase finished before the run was taken up again?"""
    at = run.state.get("at")
    place = (run.arms.index(arm), attempt, number)
    return at is not None and place < tuple(at)


def enter(run: Run, arm: str, attempt: int, number: int, phases: Sequence[Phase]) -> Progress:
    """Bring the model to where this phase begins, or to where it was stopped."""
    place = [run.arms.index(arm), attempt, number]
    taken_up = not run.current and run.state.get("at") == place and bool(run.state.get("tensors"))
    saved = run.workspace.read_tensors(run.state["tensors"]) if taken_up else {}
    if saved:
        run.loop.accelerator.wait_for_everyone()  # the main process's next save removes what all have read
        load_state(run.loop.model, {k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")})
    elif number == 0:
        load_state(run.loop.model, run.start)
    progress = Progress(**run.state["progress"]) if saved and run.state.get("progress") else Progress()
    attempts = f" try {attempt + 1}" if len(run.tries) > 1 else ""
    if number == 0:
        run.state["masked_only"], run.state["returned"] = False, {}
        if run.loss_scale is not None and not saved:
            run.loop.accelerator.scaler.load_state_dict(run.loss_scale)  # what one arm has found out, the next must as well
    run.current = {
        "place": place, "arm": arm, "attempt": attempt, "number": number, "progress": progress,
        "earlier": phases[:number],
        "label": f"{arm}{attempts}/{number + 1}-{phases[number].kind}", "saved": saved, "optimizer": None,
        "seed": try_seed(run.recipe, arm, attempt), "repeat": attempt // len(run.recipe.sparsities),
        "stash": {k.removeprefix("stash."): v for k, v in saved.items() if k.startswith("stash.")},
        "masks": unpack_masks(saved, run.loop.parameters) if run.state.get("progress") and saved else None,
        "sparsity": run.tries[attempt] if run.tries[attempt] is not None else _sparsity(run.recipe),
    }  # fmt: skip
    run.loop.place = _place(run, place, phases)
    run.state["at"] = place
    return progress


def _place(run: Run, place: Sequence[int], phases: Sequence[Phase]) -> Place:
    """Where the phase is in the whole run: all tries of all arms have phases of equal lengths."""
    arm, attempt, number = place
    lengths = [phase.total_steps(run.loop.steps_per_epoch) for phase in phases]
    tries = len(run.tries)
    before = (arm * tries + attempt) * sum(lengths) + sum(lengths[:number])
    return Place(
        run.arms[arm], attempt + 1, tries, run.current["seed"], number + 1, len(phases), phases[number].kind,
        before, len(run.arms) * tries * sum(lengths),
    )  # fmt: skip


def try_seed(recipe: Recipe, arm: str, attempt: int) -> int:
    """The seed of an arm's try. Arms with the same repeat share it; tries of a control at one repeat differ by it,
    where those of the refined arm differ by their sparsity (rule 15: each control gets as many tries).
    """
    repeat, number = divmod(attempt, len(recipe.sparsities))
    seed = stable_seed(recipe.seed, repeat, "seed") if repeat else recipe.seed
    return seed if arm == "refined" or not number else stable_seed(seed, number, "try")


def _sparsity(recipe: Recipe) -> float | None:
    return next((float(p.sparsity) for p in recipe.phases if isinstance(p.sparsity, float | int)), None)


def leave(run: Run, phase: Phase, done: Progress, masks: Masks, last: bool) -> None:
    """Record what the phase did, offer its end as a candidate where it is one, save."""
    at, sparse = run.current, phase.kind == "sparse"
    zeros = masking.count_zeros(run.layers, run.loop.parameters)
    if last and (run.recipe.keep != "best" or done.step == 0):
        consider(run, math.ceil(done.step / run.loop.steps_per_epoch), masks, {})
    run.state.setdefault("phases", []).append(
        {
            "arm": at["arm"], "attempt": at["attempt"], "kind": phase.kind,
            "sparsity": float(phase.sparsity) if sparse else None,  # type: ignore[arg-type]
            "measured_sparsity": _share(run, zeros), "epochs": done.step / run.loop.steps_per_epoch,
            "optimizer_steps": done.optimizer_steps, "samples": done.samples,
            "lr_first": done.lr_first, "lr_peak": done.lr_peak, "lr_last": done.lr_last,
            "loss_first": done.loss_first, "loss_last": done.loss_last, "seconds": done.seconds,
            "samples_per_second": done.samples / done.seconds if done.seconds else None,
            "holdout": measure_holdout(run, masks, log=not last), "seed": at["seed"],
            "batchnorm_reestimated": at["statistics"],
        }
    )  # fmt: skip
    if at["arm"] == "refined" and sparse:
        run.state.setdefault("zeros", {}).setdefault(str(at["attempt"]), zeros)
        run.state.setdefault("empty", {}).setdefault(str(at["attempt"]), masking.empty_filters(run.layers, run.loop.parameters))
    if at["arm"] == "refined" and run.options.save_phases and run.workspace.writes:
        folder = run.workspace.partial / "phases" / str(at["attempt"]) / f"{at['number'] + 1}-{phase.kind}"
        folder.mkdir(parents=True, exist_ok=True)
        run.checkpoint.write(run.loop.model, folder)
    at["optimizer"], at["masks"] = None, {}
    run.state["at"] = _next(run, last)
    run.state["progress"] = None
    _save_with_scaler(run, None if last else _model_tensors(run))
    if run.loop.stopping() and run.loop.world == 1:
        raise Interrupted(f"stopped after {at['label']}; go on with --resume")


def _next(run: Run, last: bool) -> list[int]:
    arm, attempt, number = run.current["place"]
    if not last:
        return [arm, attempt, number + 1]
    return [arm, attempt + 1, 0] if attempt + 1 < len(run.tries) else [arm + 1, 0, 0]


def _share(run: Run, zeros: dict[str, int]) -> float:
    maskable = [layer for layer in run.layers if layer.excluded is None]
    return sum(zeros[layer.name] for layer in maskable) / sum(layer.weights for layer in maskable)


def measure_holdout(run: Run, masks: Masks, log: bool = True) -> dict[str, float] | None:
    """The holdout's metrics of the weights now held, logged."""
    if run.task.holdout is None:
        return None
    found = run.task.metrics(evaluate(run.loop, run.task.holdout, masks))
    if log:
        step = run.current["progress"].step
        epoch = step / run.loop.steps_per_epoch
        run.workspace.log(
            {"event": "evaluation", **place_of(run.current["label"]), "step": step, "epoch": epoch, "part": "holdout", **found}
        )
    return found


def consider(run: Run, epoch: int, masks: Masks, returned: dict[str, int]) -> None:
    """Keep the weights now held as the arm's result if the holdout prefers them (metric, then loss, then the earlier).

    `returned` counts the weights that have the source's values back, by layer (see `give_back`).
    """
    at = run.current
    found, repeat = measure_holdout(run, masks), str(at["repeat"])
    best = run.state.setdefault("best", {}).setdefault(at["arm"], {})
    if repeat in best and found is not None and not run.prefers(found, best[repeat]["holdout"]):
        return
    name = f"best-{at['arm']}-{at['attempt']}-{epoch}.safetensors"
    run.workspace.write_tensors(name, run.loop.model.state_dict())
    chosen = {"attempt": at["attempt"], "epoch": epoch, "sparsity": at["sparsity"], "seed": at["seed"]}
    best[repeat] = {"file": name, **chosen, "holdout": found, "returned": {**run.state["returned"], **returned}}


def save(run: Run) -> None:
    """Save the state in the middle of a phase."""
    tensors = _model_tensors(run)
    tensors |= pack_masks(run.current["masks"]) | pack_optimizer(run.current["optimizer"]) | run.current["average"].pack()
    tensors |= {f"stash.{name}": values for name, values in run.current["stash"].items()}
    run.state["progress"] = asdict(run.current["progress"])
    _save_with_scaler(run, tensors)


def _save_with_scaler(run: Run, tensors: dict[str, torch.Tensor] | None) -> None:
    """Save, with the fp16 loss scale: it has been found by trying, and must not be looked for again."""
    scaler = run.loop.accelerator.scaler
    run.state["scaler"] = scaler.state_dict() if scaler is not None else None
    run.workspace.save(tensors)


def _model_tensors(run: Run) -> dict[str, torch.Tensor]:
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
