"""Tries that are lost.

With `--patience` a hopeless try is stopped early, so that a bad rate costs minutes.

From the end of its first phase on, a try is looked at whenever the holdout is evaluated: at the ends
of phases, and at the ends of epochs of its last phase. It is hopeless if, `patience` times in a row,
it lies below the source by more than the holdout's noise although its learning rate is falling. Such
a try is lost: its remaining steps are not made, and the report says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsd_refine.evidence.damage import below_noise
from dsd_refine.tasks.base import Scores

if TYPE_CHECKING:
    from dsd_refine.run.run import Run
    from dsd_refine.training.state import PhaseState

SOURCE_FILE = "scores-source-holdout.safetensors"


def remember_source(run: Run, scores: Scores) -> None:
    """Keep the source's scores on the holdout, also for a resumed run, if the recipe has `patience`."""
    if run.recipe.patience:
        run.source_scores = scores
        run.workspace.write_tensors(SOURCE_FILE, scores.pack())


def give_up_if_hopeless(run: Run, state: PhaseState, scores: Scores | None) -> None:
    """Note that the try is lost if it is hopeless (see `is_hopeless`)."""
    if is_hopeless(run, state, scores):
        times = "once" if run.recipe.patience == 1 else f"{run.recipe.patience} times in a row"
        state.lost = f"below the source on the holdout by more than its noise, {times} (--patience)"
        note_lost(run, state, state.lost)


def note_lost(run: Run, state: PhaseState, reason: str, loss: float | None = None) -> None:
    """Say that a try is lost, and record it for the report. `loss` is that of its last step, if it is a number."""
    place, step = state.place, state.progress.step
    run.state.lost.append(
        {"arm": place.arm, "try": place.attempt, "seed": place.seed, "phase": f"{place.phase}-{place.kind}", "step": step,
         "loss": loss if loss is not None else state.progress.loss_last, "reason": reason}
    )  # fmt: skip
    run.options.say(f"{place.label}: lost at step {step}: {reason}")


def is_hopeless(run: Run, state: PhaseState, scores: Scores | None) -> bool:
    """Return whether a try must be stopped now. Counts the evaluations that show it below the source.

    Args:
        run: The run.
        state: The state of the phase.
        scores: The try's scores on the holdout. None without a holdout.
    """
    if run.recipe.patience is None or scores is None:
        return False
    if run.source_scores is None:
        run.source_scores = Scores.unpack(run.workspace.read_tensors(SOURCE_FILE))
    is_below = rate_falls(run, state) and below_noise(
        scores, run.source_scores, higher_is_better=run.task.higher_is_better, by_loss=hasattr(run.task, "corpus")
    )
    run.state.below = run.state.below + 1 if is_below else 0
    return run.state.below >= run.recipe.patience


def rate_falls(run: Run, state: PhaseState) -> bool:
    """Return whether the learning rate is below the highest one of the try so far."""
    entries = [
        each for each in run.state.phases if (each["arm"], each["attempt"]) == (state.place.arm, state.place.attempt - 1)
    ]
    peaks = [each["lr_peak"] or 0.0 for each in entries] + [state.progress.lr_peak or 0.0]
    return state.progress.lr_last is not None and state.progress.lr_last < max(peaks)
