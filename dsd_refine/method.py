"""The method: Dense-Sparse-Dense training (Han et al., ICLR 2017) of a released checkpoint, and of its controls.

The source is the result of the first Dense phase. `refine` shows the whole method from top to bottom;
each function that it calls is one step of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dsd_refine.checkpoint.library import Library
from dsd_refine.checkpoint.source import Source
from dsd_refine.evidence.compare import gate_passed, verdict
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.report.report import Report
from dsd_refine.run import spread
from dsd_refine.run.interpolate import interpolate
from dsd_refine.run.judge import (
    compare_arms,
    load_published,
    load_selected,
    look_at_source,
    score_arm,
    score_soup,
    warn_of_harm,
)
from dsd_refine.run.lost import lost_if_diverged, refuse_all_lost
from dsd_refine.run.open import opened
from dsd_refine.run.phase import enter_phase, finished_before, leave_phase, run_phase, steps_of
from dsd_refine.run.publish import publish
from dsd_refine.run.rates import test_rates
from dsd_refine.run.run import Options, Run
from dsd_refine.run.soup import soup
from dsd_refine.search import resized
from dsd_refine.training.settings import settings
from dsd_refine.training.state import PhaseState


def refine(source: Source, library: Library, recipe: Recipe, options: Options) -> Report:
    """Refine a checkpoint: train the refined arm (Sparse, then re-Dense) and each control.

    The holdout selects the weights of each arm, and the evaluation split judges them. The output
    directory is written as a whole or not at all.

    Args:
        source: The checkpoint to refine.
        library: The adapter of the library that loads it.
        recipe: Everything that decides the result.
        options: How the run is carried out.

    Returns:
        The report. Its `exit_code` is 0, or 3 if the gate is not met.

    Raises:
        UsageError: The model, the data or the options cannot be used. Nothing was trained.
        Interrupted: A signal or a hook stopped the run. The state is saved.
        RunError: The run failed after it had begun.
        VerifyError: The written checkpoint is not the evaluated one. Nothing was published.
    """
    if spread.is_asked(options):
        return refine_side_by_side(source, library, recipe, options)
    with opened(source, library, recipe, options) as run:
        score_arm(run, "baseline")
        look_at_source(run)
        test_rates(run)
        for arm in run.arms:
            for attempt in run.tries:
                if spread.take_over(run, arm, attempt):
                    continue
                phases = try_phases(run, arm, attempt)
                with lost_if_diverged(run, arm, attempt, phases):
                    for phase, state in entered(run, arm, attempt, phases):
                        with settings(run.loop.model, phase, run.checkpoint.filled, run.loop.parameters):
                            run_phase(run, phase, state)
                            leave_phase(run, phase, state)
            refuse_all_lost(run, arm)
            soup(run, arm)
            interpolate(run, arm)
        for arm in run.arms:
            for seed in range(recipe.seeds):
                load_selected(run, arm, seed)
                score_arm(run, arm, seed)
            score_soup(run, arm)
        run.teacher = None  # free its memory, because the check loads the written output
        compare_arms(run)
        warn_of_harm(run)
        load_published(run)
        return finish(run)


def refine_side_by_side(source: Source, library: Library, recipe: Recipe, options: Options) -> Report:
    """Do what `refine` does, with the tries divided among the processes of a launcher. The others return an empty report."""
    if not spread.train_side_by_side(source, library, recipe, options, train_try):
        return Report({}, options.output_dir)
    with spread.alone():
        return refine(source, library, recipe, replace(options, spread=None, resume=True))


def train_try(run: Run, arm: str, attempt: int) -> None:
    """Train one try of an arm as `refine` does, for tries side by side.

    `refine` has these lines itself, so that a reader sees the method whole.
    """
    phases = try_phases(run, arm, attempt)
    with lost_if_diverged(run, arm, attempt, phases):
        for phase, state in entered(run, arm, attempt, phases):
            with settings(run.loop.model, phase, run.checkpoint.filled, run.loop.parameters):
                run_phase(run, phase, state)
                leave_phase(run, phase, state)


def entered(run: Run, arm: str, attempt: int, phases: Sequence[Phase]) -> Iterator[tuple[Phase, PhaseState]]:
    """Enter the phases of a try one after another. Phases that were finished before are left out."""
    for number, phase in enumerate(phases):
        if not finished_before(run, arm, attempt, number):
            yield phase, enter_phase(run, arm, attempt, number, phases)


def try_phases(run: Run, arm: str, attempt: int) -> tuple[Phase, ...]:
    """Return the phases of one try of an arm, as long as its rung of the search wants.

    There are none if the search has too few settings left for this try.
    """
    setting = run.setting(arm, attempt)
    if setting is None:
        return ()
    phases = arm_phases(arm, run.settings[setting].recipe)
    return resized(phases, steps_of(run, attempt), run.loop.steps_per_epoch)


def arm_phases(arm: str, recipe: Recipe) -> tuple[Phase, ...]:
    """Return the phases of an arm.

    They are the recipe's phases. The control "dense" has them without masks, and the control "random"
    with random masks. With `keep: sparse` they end with the last sparse phase, because its weights
    are the result.

    Args:
        arm: "refined", "dense" or "random".
        recipe: The recipe, with the setting of a try.
    """
    phases = recipe.trained_phases
    if arm == "dense":
        without_mask = {
            "kind": "dense", "sparsity": None, "refresh": None, "criterion": "magnitude", "threshold": "layer", "ramp": None
        }  # fmt: skip
        return tuple(phase.model_copy(update=without_mask) for phase in phases)
    if arm == "random":
        return tuple(p.model_copy(update={"criterion": "random"}) if p.kind == "sparse" else p for p in phases)
    return phases


def finish(run: Run) -> Report:
    """Decide the verdict and the gate; then write, verify and publish the result."""
    result = verdict(run.result, run.margin)
    passed_gate = gate_passed(run.recipe.gate, run.comparisons, run.margin, run.recipe.control, run.published)
    return publish(run, result, passed_gate)
