"""What a step costs besides the model: `python benchmarks/overhead.py [--quick] [--rounds N]`.

Milliseconds a step of our loop beside a bare one, where the model is small: an MLP, a small ResNet at 32 px and a GPT-2 of 2
layers, at batch 1, 8 and 64. Both take the same rows, held in memory, in an order of their own, and train with the same fused
SGD under a mask. Ours is what `run_phase` does in a step: seeds, rates, the mask, the checks, a line of log.jsonl in a real
file, and the questions whether to stop or to save. The bare loop is what one writes by hand: index, zero, forward, backward,
step, multiply by the mask. Interleaved, in one process; the bare loop against itself shows what these do not tell apart.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import numpy as np
import torch
from common import arguments, interleaved, machine, middle, ratio, table, verdict
from made import layers_of, loop_of, phase_of, recipe_of
from torch import nn
from torch.nn import functional as F

from dsd_refine.masking.masks import make_masks
from dsd_refine.recipe import Phase
from dsd_refine.run.listeners import Housekeeping
from dsd_refine.run.signals import Signals
from dsd_refine.run.workspace import Workspace
from dsd_refine.tasks.base import Batch, Item
from dsd_refine.training.hooks import Place, Together
from dsd_refine.training.loop import arrived, batches_of_steps, renews_mask, train_step
from dsd_refine.training.state import Loop, PhaseState

ROWS, BATCHES, SPARSITY = 4096, (1, 8, 64), 0.3
MOST_EXTRA, LEAST_SHARE = 0.2, 0.99  # milliseconds a step; our steps a second over the bare loop's, at batch 64


@dataclass
class InMemory:
    """A task whose rows are in memory already."""

    x: torch.Tensor
    y: torch.Tensor
    name: str = "in-memory"
    metric: str = "loss"
    higher_is_better: bool = False
    draws: ClassVar[bool] = False
    holdout = None

    @property
    def units(self) -> int:
        return len(self.x)

    @property
    def train(self) -> InMemory:
        return self

    def batch(self, part: Any, items: list[Item]) -> Batch:
        units = torch.from_numpy(np.fromiter((unit for unit, _ in items), np.int64, len(items)))
        targets = self.y[units]
        return Batch({"x": self.x[units]}, targets, targets.numel())

    def loss(self, forward: Callable[..., Any], batch: Batch) -> torch.Tensor:
        return F.cross_entropy(forward(batch.inputs["x"]), batch.targets.flatten(), reduction="sum")


class Tokens(nn.Module):
    """A language model that gives the logits of each position in a row."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.flatten(0, 1)


def mlp() -> tuple[nn.Module, InMemory]:
    """64 inputs, 64 hidden, 10 classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return model, InMemory(torch.randn(ROWS, 64), torch.randint(0, 10, (ROWS,)))


def small_resnet() -> tuple[nn.Module, InMemory]:
    """timm's test_resnet, at 32 px."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10).to(memory_format=torch.channels_last)
    return model, InMemory(torch.randn(ROWS, 3, 32, 32), torch.randint(0, 10, (ROWS,)))


def small_gpt2() -> tuple[nn.Module, InMemory]:
    """2 layers of 128, 32 tokens a row."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=128, n_head=4, vocab_size=1000, n_positions=64, bos_token_id=0, eos_token_id=0)
    ids = torch.randint(0, 1000, (ROWS, 33))
    return Tokens(GPT2LMHeadModel(config)), InMemory(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


# How each is made, the steps of a round at batch 64, and the smallest batch, since BatchNorm needs two values a channel.
MODELS = {
    "MLP 64-64-10": (mlp, 400, 1),
    "test_resnet, 32 px": (small_resnet, 40, 2),
    "GPT-2 2 x 128, 32 tokens": (small_gpt2, 20, 1),
}


def ours(loop: Loop, phase: Phase, masks: dict[str, torch.Tensor]) -> None:
    """The steps of a phase, as `run_phase` makes them."""
    steps = phase.total_steps(1)
    state = PhaseState(Place("refined", 1, 1, 0, 1, 1, "sparse", 0, steps))
    state.begin(loop, phase)
    state.progress.without_gradient = []
    state.use(masks, loop.parameters)
    for batches in batches_of_steps(loop, phase, state):
        train_step(loop, phase, state, batches)
        renews_mask(phase, state.progress.step, steps)
        state.average.step_end()
        for step, _ in arrived(loop, state):
            loop.hooks.on_step(step)
        loop.hooks.should_stop()
        loop.hooks.should_save()


def bare(model: nn.Module, task: InMemory, size: int, steps: int, masks: dict[str, torch.Tensor]) -> None:
    """The same steps as one writes them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)
    pairs = [(parameter, masks[name]) for name, parameter in model.named_parameters() if name in masks]
    last = any(isinstance(module, nn.Conv2d) for module in model.modules())
    model.train()
    for rows in batches_by_hand(task.units, size, steps):
        x, y = task.x[rows], task.y[rows]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last) if last else x), y.flatten())
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for parameter, mask in pairs:
                parameter.mul_(mask)
        loss.item()


def batches_by_hand(rows: int, size: int, steps: int) -> Iterator[torch.Tensor]:
    """Rows of each step, in a new order each epoch."""
    made = 0
    while made < steps:
        for chosen in torch.randperm(rows).split(size):
            if made < steps and len(chosen) == size:
                made += 1
                yield chosen


@contextmanager
def opened(model: nn.Module, task: InMemory, size: int) -> Iterator[Loop]:
    """Our loop with the run's own hooks, which write to a file."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workspace, signals = Workspace(place / "out"), stack.enter_context(Signals())
        stack.enter_context(workspace.locked())
        workspace.begin({}, resume=False)
        loop = loop_of(model, task, recipe_of(size, 1, momentum=0.9))
        loop.hooks = Together([Housekeeping(workspace, signals)])
        yield loop


def measured(build: Callable[[], tuple[nn.Module, InMemory]], size: int, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of `steps` steps, round by round, of our loop, of the bare one, and of the bare one once more."""
    model, task = build()
    masks = make_masks(layers_of(model), dict(model.named_parameters()), SPARSITY)
    with opened(model, task, size) as loop:
        ways = {
            "ours": lambda: ours(loop, phase_of(steps), masks),
            "bare": lambda: bare(model, task, size, steps, masks),
            "bare again": lambda: bare(model, task, size, steps, masks),
        }
        return interleaved(ways, rounds)


def main() -> None:
    given = arguments(__doc__, 9)
    print(machine())
    for name, (build, steps, least) in MODELS.items():
        rows, extras, seconds = [], [], {}
        for size in (max(least, size) for size in BATCHES):
            count = max(10, steps // (10 if given.quick else 1) * 8 // max(8, size))
            seconds = measured(build, size, count, given.rounds)
            each = {way: [1000 * value / count for value in values] for way, values in seconds.items()}
            extras.append(median(mine - other for mine, other in zip(each["ours"], each["bare"], strict=True)))
            shown = [f"{median(each[way]):.3f}" for way in ("ours", "bare")]
            rows.append(
                [str(size), *shown, f"{extras[-1]:+.3f}", *(ratio(seconds, "bare", way) for way in ("ours", "bare again"))]
            )
        table(name, ["batch", "ours, ms", "bare, ms", "more, ms", "bare / ours", "bare / itself"], rows)
        verdict("milliseconds a step more, the most of them", max(extras), MOST_EXTRA)
        verdict(f"speed at batch {BATCHES[-1]}, ours / bare", middle(seconds, "bare", "ours"), LEAST_SHARE, at_least=True)


if __name__ == "__main__":
    main()
