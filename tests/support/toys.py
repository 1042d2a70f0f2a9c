"""A tiny task in memory, a tiny model, and a loop that trains it: for tests of the loop alone."""

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from dsd_refine.masking.layers import find_layers
from dsd_refine.masking.masks import apply_masks, make_masks
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.tasks.base import Batch, Score
from dsd_refine.training.hooks import Hooks, Place
from dsd_refine.training.loop import arrived, batches_of_steps, renews_mask, train_step
from dsd_refine.training.state import Loop, PhaseState, Progress


class Rows:
    def __init__(self, x, y):
        self.x, self.y, self.rows, self.units = x, y, range(len(x)), len(x)

    def row_of(self, unit):
        return unit


class Numbers:
    """Rows of floats with a class each, in memory."""

    name, metric, higher_is_better, draws = "numbers", "accuracy", True, False

    def __init__(self, rows=20, width=6, shape=None):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(rows, *(shape or (width,)), generator=generator)
        y = torch.randint(0, 3, (rows,), generator=generator)
        self.train = self.holdout = self.eval = Rows(x, y)

    def batch(self, part, items):
        units = [unit for unit, _ in items]
        return Batch({"x": part.x[units]}, part.y[units], len(units))

    def loss(self, forward, batch):
        return F.cross_entropy(forward(batch.inputs["x"]), batch.targets, reduction="sum")

    def score(self, forward, batch):
        logits = forward(batch.inputs["x"])
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        return [
            Score(float(p == t), 1, float(n), int(p)) for p, t, n in zip(logits.argmax(1), batch.targets, losses, strict=True)
        ]


def mlp(*middle):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), *(middle or [nn.ReLU()]), nn.Linear(16, 3))


def loop_of(model, task=None, log=None, accelerator=None, **recipe):
    """A loop around a model, on the CPU or where the accelerator says; `log` gets a line for each step, as log.jsonl has it."""
    given = {"phases": [{"kind": "dense", "epochs": 1, "lr": 0.1}], "batch_size": 4, "momentum": 0.0, **recipe}
    batchnorm = any(isinstance(m, nn.BatchNorm1d) for m in model.modules())
    loop = Loop(
        accelerator or Accelerator(cpu=True), model, model, task or Numbers(), Recipe.model_validate(given), lambda m: nullcontext(),
        has_batchnorm=batchnorm, parameters=dict(model.named_parameters()),
    )  # fmt: skip
    loop.hooks = Logged(log)
    return loop


class Logged(Hooks):
    def __init__(self, log):
        self.log = log

    def on_step(self, step):
        if self.log:
            self.log({"step": step.step, "lr": step.lr, "loss": step.loss, "samples": step.samples, "skipped": step.skipped})


def masks_of(model, sparsity):
    masks = make_masks(find_layers(model), dict(model.named_parameters()), sparsity)
    apply_masks(masks, dict(model.named_parameters()))
    return masks


def run(loop, masks=None, done=None, remask=None, **phase):
    """Train a phase of 5 steps from `done` on: step, then mask, then what `remask` gives where the phase renews its mask."""
    kind = "sparse" if masks else "dense"
    given = {"kind": kind, "steps": 5, "lr": 0.1, "schedule": "constant", **({"sparsity": 0.5} if masks else {}), **phase}
    phase = Phase.model_validate(given)
    state = PhaseState(Place("refined", 1, 1, 0, 1, 1, "x", 0, 5), done or Progress())
    state.begin(loop, phase)
    state.use(masks or {}, loop.parameters)
    for batches in batches_of_steps(loop, phase, state):
        train_step(loop, phase, state, batches)
        if renews_mask(phase, state.progress.step, phase.steps):
            masks.update(remask(state.progress.step // phase.refresh))
            state.use(masks, loop.parameters)
        for step, _ in arrived(loop, state):
            loop.hooks.on_step(step)
    return state.progress


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}
