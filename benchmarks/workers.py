"""Loading processes and threads: `python benchmarks/workers.py [--quick]`.

Samples a second of a phase of training for each number of `--workers` and of torch's threads (OMP_NUM_THREADS): ResNet-18
at 128 px on JPEG files of 512 px, which are decoded for each use (`--cache-gb 0`) and once a run, and a BERT of 6 layers on a
CSV. Each in a process of its own, in turn. Without `--workers` a thread is one batch ahead. The clock starts with the end of
the first steps: loading processes take seconds to start, and their first batches are there before they are needed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import CLOCK, Round, apart, arguments, each_in_a_place, ratio, table
from made import bert_folder, pictures, text_table, timm_folder
from throughput import BATCH, BERT, CROP, LENGTH, SIZE, run_of

from dsd_refine.run import open as opening
from dsd_refine.run.phase import enter_phase, run_phase
from dsd_refine.training.hooks import Hooks, Step

WAYS = [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1)]  # loading processes, threads
FIRST = 5  # steps that are not counted: each loading process has two batches ready


@contextmanager
def with_threads(workers: int, threads: int, cached: bool, *args: Any, **recipe: Any) -> Iterator[Round]:
    """Our training with so many loading processes and threads of torch."""
    torch.set_num_threads(threads)
    if not cached:
        store = opening.Store
        opening.Store = lambda folder, limit, writes: store(folder, 0, writes)  # type: ignore[assignment,misc]
    with run_of(*args, workers, **recipe) as run:
        run.loop.hooks = times = Times()
        phases = run.recipe.phases

        def seconds() -> float:
            times.clear()
            run_phase(run, phases[0], replace(enter_phase(run, "refined", 0, 0, phases), last=False))
            return times[-1] - times[FIRST - 1]

        yield seconds


class Times(Hooks, list[float]):
    """When each step ended."""

    def on_step(self, step: Step) -> None:
        self.append(CLOCK[-1]())


def shown(title: str, given: Any, rows: int, make: Any) -> None:
    ways = {f"{workers} workers, {threads} threads": make(workers, threads) for workers, threads in WAYS}
    seconds = apart(ways, given.rounds, warm=0)  # the first steps are not counted anyway
    first = next(iter(ways))
    lines = [[name, f"{rows / median(each):.1f}", ratio(seconds, first, name)] for name, each in seconds.items()]
    table(title, ["", "samples/s", f"speed / {first}"], lines)


def images(given: Any, folder: Path) -> None:
    """ResNet-18 on JPEG files."""
    steps = FIRST + (3 if given.quick else 8)
    pictures(folder / "data/train", (steps + 2) * BATCH * 10 // 9, 512)
    pictures(folder / "data/test", 40, 160, seed=1)
    model = timm_folder(folder / "model", "resnet18", 10, SIZE)
    for cached in (False, True):

        def make(workers: int, threads: int, cached: bool = cached) -> Any:
            out = folder / f"out-{cached}-{workers}-{threads}"
            return partial(with_threads, workers, threads, cached, model, folder / "data", out, steps, augment=CROP)

        how = "decoded once a run" if cached else "decoded for each use"
        shown(f"resnet18, {SIZE} px, batch {BATCH}, JPEG files of 512 px, {how}", given, (steps - FIRST) * BATCH, make)


def texts(given: Any, folder: Path) -> None:
    """A BERT on a CSV."""
    steps = FIRST + (3 if given.quick else 8)
    data = text_table(folder / "train.csv", (steps + 3) * BATCH * 100 // 70, LENGTH)
    model = bert_folder(folder / "model", LENGTH, **BERT)

    def make(workers: int, threads: int) -> Any:
        out = folder / f"out-{workers}-{threads}"
        return partial(with_threads, workers, threads, True, model, data, out, steps, optimizer="adamw")

    shown(f"BERT 6 x 384, {LENGTH} tokens, batch {BATCH}, CSV", given, (steps - FIRST) * BATCH, make)


def main() -> None:
    given = arguments(__doc__, 7)
    each_in_a_place(given, images, texts)


if __name__ == "__main__":
    sys.exit(main())
