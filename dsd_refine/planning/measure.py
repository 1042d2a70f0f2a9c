"""`plan --measure`: a few real steps at the real batch size, for peak memory and the time of a whole run."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dsd_refine.checkpoint.library import Library
from dsd_refine.checkpoint.source import Source
from dsd_refine.method import arm_phases
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.run.open import opened
from dsd_refine.run.phase import enter_phase, run_phase
from dsd_refine.run.run import Options, Run
from dsd_refine.training.evaluate import evaluate
from dsd_refine.training.hooks import Hooks, Step
from dsd_refine.training.settings import settings

STEPS = 4  # of each phase; the first one warms up and is not counted
PART = 4  # micro-batches that are evaluated


def measure(source: Source, library: Library, recipe: Recipe, device: str, allow_pickle: bool) -> dict[str, str]:
    """Train STEPS steps of each phase and evaluate a few batches, beside any output; nothing of it is kept.

    Raises:
        UsageError: as a run would.
    """
    with tempfile.TemporaryDirectory() as place:
        clock = Clock()
        options = Options(output_dir=Path(place) / "out", device=device, allow_pickle=allow_pickle, hooks=(clock,))
        with opened(source, library, recipe, options) as run:
            phases = arm_phases("refined", recipe, recipe.tried[0])
            steps = _by_phase(run, clock, phases)
            row = _row_seconds(run)
            each = {f"{s:.3f} s a {phase.kind} step": None for s, phase in zip(steps, phases, strict=True) if s}
            rows = recipe.batch_size * recipe.gradient_accumulation_steps
            return {
                "measured": f"{', '.join(each) or 'no step'} ({rows} rows), {row * 1000:.2f} ms a row of evaluation, "
                f"on {run.loop.accelerator.device}",
                "peak memory": f"{peak_memory(run) / 1e9:.2f} GB ({'device' if _on_gpu(run) else 'process'})",
                "whole run": f"about {_clock(whole_run(run, steps, row))} with all arms",
            }


class Clock(Hooks):
    """Notes when each step has ended, in seconds of `time.perf_counter`."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def on_step(self, step: Step) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ended.append(time.perf_counter())


def _by_phase(run: Run, clock: Clock, phases: Sequence[Phase]) -> list[float]:
    """Seconds a step of each phase; 0 for one without steps. Phases that cost the same are measured once."""
    known: dict[Phase, float] = {}
    found = []
    for number, phase in enumerate(phases):
        if not phase.total_steps(run.loop.steps_per_epoch):
            found.append(0.0)
            continue
        short = phase.model_copy(update={"epochs": None, "steps": STEPS, "warmup_steps": 0, "schedule": "constant", "lr": 0.0})
        if short not in known:
            known[short] = _step_seconds(run, clock, number, (*phases[:number], short))
        found.append(known[short])
    return found


def _step_seconds(run: Run, clock: Clock, number: int, phases: Sequence[Phase]) -> float:
    """Median seconds of the phase's steps, which are made as in a run."""
    clock.ended.clear()
    state = replace(enter_phase(run, "refined", 0, number, phases), last=False)  # no end of an epoch is a candidate
    with settings(run.loop.model, phases[number], run.checkpoint.filled):
        run_phase(run, phases[number], state)
    run.loop.loss = None
    return median(after - before for before, after in pairwise(clock.ended))


def _row_seconds(run: Run) -> float:
    """Seconds a unit of evaluation, over a few batches."""
    part = run.task.eval
    units = min(part.units, PART * run.recipe.batch_size)
    started = time.perf_counter()
    evaluate(run.loop, part, only=units)
    return (time.perf_counter() - started) / units


def whole_run(run: Run, steps: Sequence[float], row: float) -> float:
    """Seconds of all arms, tries and seeds, and the final evaluations: `steps` a step of each phase, `row` a row evaluated."""
    recipe = run.recipe
    tries = [arm_phases(arm, recipe, sparsity) for arm in run.arms for sparsity in run.tries]
    rows = run.task.eval.units * (1 + len(run.arms) * recipe.seeds)
    rows += run.task.holdout.units if run.task.holdout else 0  # the source's, once
    return sum(_try_seconds(run, phases, steps, row) for phases in tries) + rows * row


def _try_seconds(run: Run, phases: Sequence[Phase], steps: Sequence[float], row: float) -> float:
    """The steps of a try; the holdout after each phase and at each end that is a candidate; BatchNorm's looks at the rows."""
    loop, best = run.loop, run.recipe.keep == "best"
    lengths = [phase.total_steps(loop.steps_per_epoch) for phase in phases]
    ends = max(1, -(-lengths[-1] // loop.steps_per_epoch)) if best else 1
    averages = sum(phase.average != "none" for phase in phases) + (ends if best and phases[-1].average != "none" else 0)
    units = (len(phases) + ends) * run.task.holdout.units if run.task.holdout else 0
    units += averages * run.task.train.units if loop.has_batchnorm else 0
    return sum(length * seconds for length, seconds in zip(lengths, steps, strict=True)) + units * row


def _on_gpu(run: Run) -> bool:
    return bool(run.loop.accelerator.device.type == "cuda")


def peak_memory(run: Run) -> int:
    """Bytes: of the device where there is one, else the most that this process has held."""
    if _on_gpu(run):
        return int(torch.cuda.max_memory_allocated())
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def add_measured(plan: dict[str, Any], found: dict[str, str]) -> dict[str, Any]:
    """The plan with what was measured among its totals."""
    return {**plan, "totals": {**plan["totals"], **found}}
