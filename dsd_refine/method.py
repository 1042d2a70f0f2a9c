"""The method: Dense-Sparse-Dense training (Han et al., ICLR 2017) of a released checkpoint, beside its control.

The source is the finished first Dense phase. `refine` reads top to bottom; what it calls is one step each.
"""

from __future__ import annotations

from dsd_refine.checkpoint.library import Library
from dsd_refine.checkpoint.source import Source
from dsd_refine.evidence.compare import gate_passed, verdict
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.report.report import Report
from dsd_refine.run.judge import compare_arms, load_selected, look_at_source, score_arm, warn_of_harm
from dsd_refine.run.open import opened
from dsd_refine.run.phase import enter_phase, finished_before, leave_phase, run_phase
from dsd_refine.run.publish import publish
from dsd_refine.run.run import Options, Run
from dsd_refine.training.settings import settings


def refine(source: Source, library: Library, recipe: Recipe, options: Options) -> Report:
    """Refine a checkpoint: Sparse, then re-Dense, each control beside it; select on the holdout, judge on the evaluation.

    Writes `options.output_dir` as a whole or not at all. The report's `exit_code` is 0, or 3 where the gate is not met.

    Raises:
        UsageError: model, data or options cannot be used; nothing was trained.
        Interrupted, RunError, VerifyError: as `dsd_refine.errors` says.
    """
    with opened(source, library, recipe, options) as run:
        score_arm(run, "baseline")
        look_at_source(run)
        for arm in run.arms:
            for attempt, sparsity in enumerate(run.tries):
                phases = arm_phases(arm, recipe, sparsity)
                for number, phase in enumerate(phases):
                    if finished_before(run, arm, attempt, number):
                        continue
                    state = enter_phase(run, arm, attempt, number, phases)
                    with settings(run.loop.model, phase, run.checkpoint.filled):
                        run_phase(run, phase, state)
                        leave_phase(run, phase, state)
        for arm in run.arms:
            for seed in range(recipe.seeds):
                load_selected(run, arm, seed)
                score_arm(run, arm, seed)
        run.teacher = None  # what loads the output, to prove it, needs the room
        compare_arms(run)
        warn_of_harm(run)
        load_selected(run, "refined", run.preferred("refined"))
        return finish(run)


def arm_phases(arm: str, recipe: Recipe, sparsity: float | None) -> tuple[Phase, ...]:
    """The phases of one try of an arm: the recipe's, with the masks taken out (dense) or drawn at random (random).

    With `keep: sparse` they end with the last sparse phase, whose weights are the result.
    """
    phases = recipe.phases_at(sparsity)
    if recipe.keep == "sparse":
        phases = phases[: max(i for i, phase in enumerate(phases) if phase.kind == "sparse") + 1]
    if arm == "dense":
        free = {"kind": "dense", "sparsity": None, "refresh": None, "criterion": "magnitude"}
        return tuple(phase.model_copy(update=free) for phase in phases)
    if arm == "random":
        return tuple(p.model_copy(update={"criterion": "random"}) if p.kind == "sparse" else p for p in phases)
    return phases


def finish(run: Run) -> Report:
    """Verdict and gate; then write, verify and publish."""
    said = verdict(run.comparisons["refined_vs_baseline"], run.margin)
    passed_gate = gate_passed(run.recipe.gate, run.comparisons, run.margin, run.recipe.control)
    return publish(run, said, passed_gate)
