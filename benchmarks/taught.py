"""What benchmarks share whose model they teach themselves: the first Dense phase, and the runs that refine what came of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsd_refine.checkpoint.libraries.transformers import TransformersLibrary
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.tasks.registry import look_at_data, prepare_task

ROOT = Path(__file__).parent.parent


def first_dense(folder: Path, data: Path, model: Any, task: str, epochs: int, peak: float, batch: int) -> None:
    """A plain AdamW run on the rows that the refinement trains on too; the model is written over the untrained one."""
    recipe = Recipe(phases=(Phase(kind="dense", steps=1, lr=1.0),), data=str(data))
    library = TransformersLibrary.open(folder)
    given = look_at_data(recipe, task, library, folder.parent / "cache", lambda name, size: False)
    rows = prepare_task(recipe, task, library, model.eval(), given)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    steps = -(-rows.train.units // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=epochs * steps, pct_start=0.1)
    model.train()
    for epoch in range(epochs):
        losses = 0.0
        for units in torch.randperm(rows.train.units).split(batch):
            found = rows.batch(rows.train, [(int(unit), epoch) for unit in units])
            optimizer.zero_grad()
            loss = rows.loss(model, found) / found.count
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses += float(loss.detach())
        print(f"first Dense, epoch {epoch + 1}: loss {losses / steps:.3f}", file=sys.stderr, flush=True)
    model.save_pretrained(folder)


def refine(out: Path, model: str, target: str, options: Sequence[str]) -> None:
    """One run on `out/data`: its command and its summary on stdout."""
    command = [sys.executable, str(ROOT / "cli.py"), str(out / model), "--data", str(out / "data"), "-o", str(out / target)]
    print(f"$ dsd-refine {model} {' '.join(options)}\n", flush=True)
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    print(done.stdout.replace(f"{out}/", "") if done.returncode == 0 else done.stderr, flush=True)
