"""`plan --measure`: a few real steps at the real batch size, for peak memory and the time of a whole run."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dsd_refine.checkpoint import Library, Source
from dsd_refine.masks import Masks
from dsd_refine.method import Options, Run, arm_phases, enter, opened
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.train import Key, evaluate, make_optimizer, train_phase

STEPS = 3  # the first one warms up and is not counted
PART = 4  # micro-batches that are evaluated


def measure(source: Source, library: Library, recipe: Recipe, device: str, allow_pickle: bool) -> dict[str, str]:
    """Train STEPS steps of the first phase and evaluate a few batches, beside any output; nothing of it is kept.

    Raises:
        UsageError: as a run would.
    """
    with tempfile.TemporaryDirectory() as place:
        options = Options(output_dir=Path(place) / "out", device=device, allow_pickle=allow_pickle)
        with opened(source, library, recipe, options) as run:
            step = _step_seconds(run)
            row = _row_seconds(run)
            total = _run_seconds(run, step, row)
            return {
                "measured": f"{step:.3f} s a step of {recipe.batch_size * recipe.gradient_accumulation_steps} rows, "
                f"{row * 1000:.2f} ms a row of evaluation, on {run.loop.accelerator.device}",
                "peak memory": f"{peak_memory(run) / 1e9:.2f} GB ({'device' if _on_gpu(run) else 'process'})",
                "whole run": f"about {_clock(total)} with all arms",
            }


def _step_seconds(run: Run) -> float:
    phase = arm_phases("refined", run.recipe, run.recipe.sparsities[0])[0]
    short = phase.model_copy(update={"epochs": None, "steps": STEPS, "warmup_steps": 0, "lr": 0.0, "refresh": None})
    seconds: list[float] = []
    ended = [time.perf_counter()]

    def step_end() -> None:
        if _on_gpu(run):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - ended[-1])
        ended.append(time.perf_counter())

    done = enter(run, "refined", 0, 0, phase)
    masks = _masks(run, short)
    train_phase(
        run.loop, short, Key(run.recipe.seed, 0), "measure/1", masks, done, make_optimizer(run.loop, short),
        remask=lambda refresh: {}, epoch_end=lambda epoch: None, step_end=step_end,
    )  # fmt: skip
    return median(seconds[1:])


def _masks(run: Run, phase: Phase) -> Masks:
    from dsd_refine.masks import apply_masks, make_masks

    if phase.kind == "dense" or not isinstance(phase.sparsity, float | int):
        return {}
    masks = make_masks(run.layers, run.loop.parameters, float(phase.sparsity))
    apply_masks(masks, run.loop.parameters)
    return masks


def _row_seconds(run: Run) -> float:
    """Seconds a unit of evaluation, over a few batches."""
    part = run.task.eval
    units = min(part.units, PART * run.recipe.batch_size)
    started = time.perf_counter()
    evaluate(run.loop, part, only=units)
    return (time.perf_counter() - started) / units


def _run_seconds(run: Run, step: float, row: float) -> float:
    """All arms, tries and seeds: their steps, an evaluation of the holdout an epoch and phase, and the final evaluations."""
    recipe, tries, arms = run.recipe, len(run.tries), len(run.arms)
    phases = recipe.phases_at(recipe.sparsities[0])
    steps = sum(phase.total_steps(run.loop.steps_per_epoch) for phase in phases)
    holdouts = len(phases) + -(-phases[-1].total_steps(run.loop.steps_per_epoch) // run.loop.steps_per_epoch)
    rows = (run.task.holdout.units if run.task.holdout else 0) * holdouts * tries * arms
    rows += run.task.eval.units * (1 + arms * recipe.seeds)
    return steps * tries * arms * step + rows * row


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
