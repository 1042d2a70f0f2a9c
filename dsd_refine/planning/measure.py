"""`plan --measure`: train a few real steps to measure peak memory and estimate the time of a whole run."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from dsd_refine.checkpoint.library import Library
from dsd_refine.checkpoint.source import Source
from dsd_refine.method import arm_phases
from dsd_refine.planning.plan import planned_tries, tested_optimizers
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.run.open import opened
from dsd_refine.run.phase import enter_phase, run_phase
from dsd_refine.run.rates import is_worth_a_test, most_steps
from dsd_refine.run.run import Options, Run
from dsd_refine.training.evaluate import evaluate
from dsd_refine.training.hooks import Hooks, Step, Together
from dsd_refine.training.settings import settings

STEPS = 4  # steps of each phase; the first one is a warm-up and is not timed
HOW = ("device", "allow_pickle", "shard", "activation_checkpointing", "cpu_offload")  # options of a run that are measured
PART = 4  # micro-batches that are evaluated


def measure(source: Source, library: Library, recipe: Recipe, options: Options) -> dict[str, str]:
    """Train STEPS steps of each phase and evaluate a few batches, in a temporary folder.

    Of several processes, all must call this.

    Args:
        source: The checkpoint.
        library: The adapter of its library.
        recipe: The recipe.
        options: How the run would be carried out. Nothing is written to its folder.

    Returns:
        The lines for the totals of the plan, by name: "measured", "peak memory" and "whole run".

    Raises:
        UsageError: A run would raise it too.
        Interrupted: A signal came.
    """
    clock = Clock()
    with _folder(options) as folder:
        options = replace(options, output_dir=folder / "out", hooks=(clock,))
        with opened(source, library, recipe, options) as run:
            accelerator = run.loop.accelerator
            if not accelerator.is_main_process:  # the others call no hooks of the caller
                run.loop.hooks = Together([run.loop.hooks, clock])
            phases = arm_phases("refined", run.settings[0].recipe)
            steps = _by_phase(run, clock, phases)
            row = _row_seconds(run)
            each = {f"{s:.3f} s a {phase.kind} step": None for s, phase in zip(steps, phases, strict=True) if s}
            world = accelerator.num_processes
            rows = recipe.batch_size * recipe.gradient_accumulation_steps * world
            processes = f", {world} processes" if world > 1 else ""
            most = f", the most of {world}" if world > 1 else ""
            peak: int = max(gather_object([peak_memory(run)])) if world > 1 else peak_memory(run)
            return {
                "measured": f"{', '.join(each) or 'no step'} ({rows} rows), {row * 1000:.2f} ms a row of evaluation, "
                f"on {accelerator.device.type}{processes}",
                "peak memory": f"{peak / 1e9:.2f} GB ({'device' if _on_gpu(run) else 'process'}{most})",
                "whole run": f"about {_clock(whole_run(run, steps, row))} with all arms",
            }


@contextmanager
def _folder(options: Options) -> Iterator[Path]:
    """A temporary folder. That of several processes is where the output would be, which all machines see."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    state = PartialState(cpu=options.device == "cpu")
    beside = options.output_dir.absolute().parent
    with tempfile.TemporaryDirectory(dir=beside) if state.is_main_process else nullcontext("") as made:
        folders: list[str] = broadcast_object_list([made])
        yield Path(folders[0])
        state.wait_for_everyone()


class Clock(Hooks):
    """Records when each step ended.

    Attributes:
        ended: The times, in seconds of `time.perf_counter`.
    """

    def __init__(self) -> None:
        self.ended: list[float] = []

    def on_step(self, step: Step) -> None:
        """Record the time, after the GPU has finished the step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ended.append(time.perf_counter())


def _by_phase(run: Run, clock: Clock, phases: Sequence[Phase]) -> list[float]:
    """Return the seconds of one step of each phase; 0 for a phase without steps.

    Phases that differ only in length and learning rate are measured once.
    """
    known: dict[str, float] = {}
    seconds = []
    for number, phase in enumerate(phases):
        if not phase.total_steps(run.loop.steps_per_epoch):
            seconds.append(0.0)
            continue
        short = phase.model_copy(update={"epochs": None, "steps": STEPS, "warmup_steps": 0, "schedule": "constant", "lr": 0.0})
        if (name := short.model_dump_json()) not in known:
            known[name] = _step_seconds(run, clock, number, (*phases[:number], short))
        seconds.append(known[name])
    return seconds


def _step_seconds(run: Run, clock: Clock, number: int, phases: Sequence[Phase]) -> float:
    """Train a phase as a run does, and return the median of the seconds of its steps."""
    clock.ended.clear()
    # With last=False, the holdout does not select at the end of an epoch.
    state = replace(enter_phase(run, "refined", 0, number, phases), last=False)
    with settings(run.loop.model, phases[number], run.checkpoint.filled, run.loop.parameters):
        run_phase(run, phases[number], state)
    run.loop.loss = None
    return median(after - before for before, after in pairwise(clock.ended))


def _row_seconds(run: Run) -> float:
    """Evaluate a few batches, and return the seconds for each unit (row)."""
    part = run.task.eval
    units = min(part.units, PART * run.recipe.batch_size)
    started = time.perf_counter()
    evaluate(run.loop, part, only=units)
    return (time.perf_counter() - started) / units


def whole_run(run: Run, steps: Sequence[float], row: float) -> float:
    """Return the estimated seconds of a whole run: all arms, tries and seeds, and all evaluations.

    Args:
        run: The run.
        steps: The seconds of one step of each phase.
        row: The seconds for the evaluation of one row.
    """
    recipe = run.recipe
    tries = [phases for _, phases in planned_tries(recipe, run.loop.steps_per_epoch)]
    rows = run.task.eval.units * (1 + len(run.arms) * recipe.seeds)
    rows += run.task.holdout.units if run.task.holdout else 0  # the source is evaluated on the holdout once
    tested = len(tested_optimizers(recipe)) if is_worth_a_test(recipe, run.loop.steps_per_epoch) else 0
    tests = most_steps() * tested * max(steps, default=0.0)
    return sum(_try_seconds(run, phases, steps, row) for phases in tries) + rows * row + tests


def _try_seconds(run: Run, phases: Sequence[Phase], steps: Sequence[float], row: float) -> float:
    """Return the estimated seconds of one try.

    They are for the steps, for evaluations on the holdout (after each phase and each epoch whose
    weights may be selected), and for passes over the training rows for BatchNorm.
    """
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
    """Return the peak memory in bytes: that of the GPU, or without one that of this process."""
    if _on_gpu(run):
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS gives bytes, Linux kibibytes


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def add_measured(plan: dict[str, Any], measurements: dict[str, str]) -> dict[str, Any]:
    """Return the plan with the result of `measure` added to its totals."""
    return {**plan, "totals": {**plan["totals"], **measurements}}
