"""Tries that are lost.

If a seed of an arm has several tries, one that diverges is lost. With `--patience` a hopeless try is
stopped early, so that a bad rate costs minutes.

From the end of its first phase on, a try is looked at whenever the holdout is evaluated: at the ends
of phases, and at the ends of epochs of its last phase. It is hopeless if, `patience` times in a row,
it lies below the source by more than the holdout's noise although its learning rate is falling. Such
a try is lost: its remaining steps are not made, and the report says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dsd_refine.errors import Diverged, RunError
from dsd_refine.evidence.damage import below_noise
from dsd_refine.recipe import Phase
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
        place = state.place
        where = {"phase": f"{place.phase}-{place.kind}", "step": state.progress.step, "loss": state.progress.loss_last}
        note_lost(run, place.arm, place.attempt - 1, where, state.lost)


def note_lost(run: Run, arm: str, attempt: int, where: Mapping[str, Any], reason: str) -> None:
    """Say that a try is lost, and record it for the report.

    Args:
        run: The run.
        arm: The name of the arm.
        attempt: The number of the try, from 0.
        where: Its last `phase`, `step` and `loss`. A loss that is not finite is a text, such as "nan".
        reason: Why it is lost.
    """
    seed = attempt // run.tries_per_seed + 1
    run.state.lost.append({"arm": arm, "try": attempt + 1, "seed": seed, **where, "reason": reason})
    run.options.say(f"{arm} try {attempt + 1} is lost in phase {where['phase']}, step {where['step']}: {reason}")


def next_try(run: Run, arm: int, attempt: int) -> list[int]:
    """Return the place of the next try: the numbers of its arm, of itself and of its first phase, each from 0."""
    return [arm, attempt + 1, 0] if attempt + 1 < len(run.tries) else [arm + 1, 0, 0]


def record_try(run: Run, arm: str, attempt: int, lost: str | None = None) -> None:
    """Record a finished try: a search goes on from its result, and its weights may be those of the arm.

    Args:
        run: The run.
        arm: The name of the arm.
        attempt: The number of the try, from 0.
        lost: Why the try is lost, if it is.
    """
    state, seed = run.state, attempt // run.tries_per_seed
    steps = sum(each["optimizer_steps"] for each in state.phases if (each["arm"], each["attempt"]) == (arm, attempt))
    state.tries.append(
        {"arm": arm, "attempt": attempt, "setting": run.setting(arm, attempt), "seed": seed + 1, "steps": steps,
         "holdout": state.try_best, "lost": lost}
    )  # fmt: skip
    new, best = state.candidate, state.best.setdefault(arm, {})
    if new is not None and run.recipe.soup != "none":
        state.ingredients.setdefault(arm, []).append(new)
    if new is not None and (str(seed) not in best or run.is_better(new, best[str(seed)])):
        best[str(seed)] = new
    state.candidate = None


@contextmanager
def lost_if_diverged(run: Run, arm: str, attempt: int, phases: Sequence[Phase]) -> Iterator[None]:
    """Count a try as lost if it diverges inside a `with` block; the run goes on with the next one.

    Raises:
        Diverged: Each seed has only one try, so the run fails.
    """
    try:
        yield
    except Diverged as error:
        state = run.state
        if run.tries_per_seed == 1 or state.at is None:
            raise
        number = state.at[2]
        where = {"phase": f"{number + 1}-{phases[number].kind}", "step": error.step, "loss": error.loss}
        note_lost(run, arm, attempt, where, str(error))
        state.candidate = state.try_best = None
        record_try(run, arm, attempt, str(error))
        state.at, state.progress = next_try(run, run.arms.index(arm), attempt), None
        run.save()


def refuse_all_lost(run: Run, arm: str) -> None:
    """Check that an arm has a result, after its last try.

    Raises:
        RunError: All tries of one of its seeds diverged. The message has the range of their rates.
    """
    if len(run.state.best.get(arm, {})) == run.recipe.seeds:
        return
    tried = [run.settings[each["setting"]].recipe for each in run.state.tries if each["arm"] == arm]
    rates = sorted(phase.lr for recipe in tried for phase in recipe.trained_phases if phase.lr)
    raise RunError(
        f"{arm}: all tries diverged, with rates from {rates[0]:g} to {rates[-1]:g}. Give lower ones: --lr, or search.space"
    )


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
