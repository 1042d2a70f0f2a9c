"""Weights between the source's and an arm's (Wortsman et al. 2022, WiSE-FT), if the holdout prefers them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dsd_refine.run.phase import use_setting
from dsd_refine.training.average import between
from dsd_refine.training.batchnorm import reestimate
from dsd_refine.training.evaluate import evaluate
from dsd_refine.training.packing import load_state
from dsd_refine.training.state import Key

if TYPE_CHECKING:
    from dsd_refine.run.run import Run
    from dsd_refine.run.state import Selected


def interpolate(run: Run, arm: str) -> None:
    """Try the shares of `interpolate` for each seed of an arm, after its last try.

    Share s gives source + s * (arm - source). BatchNorm's statistics are computed again for it. The
    holdout decides; among equals, the arm's own weights stay.

    Args:
        run: The run.
        arm: The name of the arm.

    Raises:
        Interrupted: The run was asked to stop. A resumed run tries this seed again.
    """
    if not run.recipe.interpolate:
        return
    for seed, selected in run.state.best[arm].items():
        if [arm, seed] not in run.state.interpolated:
            run.state.best[arm][seed] = preferred_between(run, arm, selected)
            run.state.interpolated.append([arm, seed])
            run.save()


def preferred_between(run: Run, arm: str, selected: Selected) -> Selected:
    """Return the weights that the holdout prefers: the selected ones, or some between them and the source."""
    run.loop.accelerator.wait_for_everyone()
    trained, best = run.workspace.read_weights(selected.file), selected
    recipe = run.recipe_of(arm, selected.attempt)
    use_setting(run, recipe)
    for share in run.recipe.interpolate:
        load_state(run.loop.state(), between(run.start, trained, share))
        reestimate(run.loop, Key(selected.seed, len(recipe.trained_phases)))
        metrics = run.task.metrics(evaluate(run.loop, run.task.holdout))
        place = {"arm": arm, "phase": None, "step": None, "epoch": None, "share": share}
        run.workspace.log({"event": "evaluation", **place, "part": "holdout", **metrics})
        if best.holdout is not None and run.prefers(metrics, best.holdout):
            file = f"best-{arm}-{selected.attempt}-{selected.epoch}-{share:g}.safetensors"
            run.workspace.write_weights(file, run.loop.state())
            best = replace(best, file=file, holdout=metrics, share=share)
    return best
