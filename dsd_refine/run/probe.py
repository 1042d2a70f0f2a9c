"""Compute the model's outputs for a few inputs. `verify` computes them again and compares."""

from __future__ import annotations

from dataclasses import replace

import torch

from dsd_refine.forward import logits_of
from dsd_refine.tasks.base import Batch, Forward
from dsd_refine.training.blame import computed
from dsd_refine.training.evaluate import exact
from dsd_refine.training.state import Loop

PROBES = 2  # evaluation examples that are saved for `verify`


def probes(loop: Loop) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Return the inputs and the outputs of PROBES evaluation examples.

    Each example is a batch of its own, so that the outputs do not depend on padding. The outputs are
    float32 logits, computed with the weights as they are written (rounded to the files' dtypes).
    """
    loop.model.eval()
    task, device = loop.task, loop.accelerator.device
    units = range(min(PROBES, task.eval.units))
    with exact(), loop.as_written(loop.model):
        batches = [replace(task.batch(task.eval, [(unit, None)]), items=((unit, None),)) for unit in units]
        return [(b.inputs, computed(loop, task.eval, loop.model, b.to(device), _outputs)) for b in batches]


def _outputs(forward: Forward, batch: Batch) -> torch.Tensor:
    return logits_of(forward, batch.inputs)
