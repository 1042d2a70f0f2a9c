"""Find a learning rate by a range test on the source (Smith 2017), before the first phase.

The source is trained for some steps, with a rate that rises from step to step. The loss of each step is compared with
the source's own loss on the same rows, so that it does not matter which rows are hard. Where the loss begins to rise,
the rate is too high. That alone is not enough: a source that knows its rows by heart has small gradients, and a rate that is
harmless for some steps ruins it over an epoch. So the rate is lowered until a step moves the weights by no more than
about MOST_MOVED of their size. The source's weights are restored afterwards: nothing but the rate is taken from the test.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import mean
from typing import TYPE_CHECKING

import torch

from dsd_refine.errors import Diverged, Interrupted, RunError
from dsd_refine.recipe import AutoRate, Phase, Recipe
from dsd_refine.run.phase import loss_of, restored_buffers, use_setting
from dsd_refine.run.state import RangeTest
from dsd_refine.training import loop as training
from dsd_refine.training.hooks import Place
from dsd_refine.training.packing import load_state
from dsd_refine.training.settings import settings
from dsd_refine.training.state import PhaseState

if TYPE_CHECKING:
    from dsd_refine.run.run import Run

LOWEST, HIGHEST, STEPS = 1e-6, 10.0, 100  # the rates that are tried: each is 17.5 % above the one before
SMOOTH = 0.9  # share of the earlier steps in the smoothed rise of the loss
RISEN = 0.5  # the loss has risen if it is so much above the source's, as a share of it
SHORTEST_RUN = 100  # a run of fewer steps is not worth a test
USUAL = {"sgd": 0.01, "adamw": 2e-5}  # the rates of such a run: low ones, as released weights are trained on with
BELOW_EDGE = 1 / 4  # the first rate to measure, as a share of the highest one before the loss rises
MOST_MOVED = 5e-4  # of a layer's norm in a step: docs/decisions.md says from which trials
MEASURED, ATTEMPTS = 20, 4  # steps with one rate, of which the second half counts; how often it is lowered
NEAR = 1.25  # a move of up to NEAR times MOST_MOVED is accepted without another measure


def test_rates(run: Run) -> None:
    """Find the rate that `auto` means, once for each optimizer of the settings. Nothing is done if no phase asks for it.

    A run of fewer than SHORTEST_RUN steps has no test. Its rate is the usual one of the optimizer.

    Raises:
        RunError: The loss rises at every rate.
        Interrupted: The run was asked to stop. A resumed run makes the test again.
    """
    recipes = {each.recipe.optimizer: each.recipe for each in reversed(run.given_settings) if each.recipe.asks_for_rates}
    for name in sorted(recipes.keys() - run.state.rates.keys()):
        if not is_worth_a_test(recipes[name], run.loop.steps_per_epoch):
            run.state.rates[name] = RangeTest(USUAL[name], None, [], [], [], [], 0, 0.0)
            run.options.say(f"rate: {USUAL[name]:g} for {name} (a run of fewer than {SHORTEST_RUN} steps has no range test)")
            continue
        found = range_test(run, recipes[name])
        run.state.rates[name] = found
        edge = f"the loss rises above {found.edge:.3g}" if found.edge else f"the loss does not rise up to {HIGHEST:g}"
        run.options.say(f"rate: {found.rate:.3g} for {name} ({edge})")
        run.workspace.log({"event": "rate", "optimizer": name, "rate": found.rate, "edge": found.edge})
        run.save()


def most_steps() -> int:
    """Return how many steps a test takes at most."""
    return 2 * STEPS + ATTEMPTS * MEASURED


def is_worth_a_test(recipe: Recipe, steps_per_epoch: int) -> bool:
    """Return whether a try has at least SHORTEST_RUN steps."""
    return sum(phase.total_steps(steps_per_epoch) for phase in recipe.trained_phases) >= SHORTEST_RUN


def range_test(run: Run, recipe: Recipe) -> RangeTest:
    """Make the range test with the first phase of a recipe whose rate is `auto`, without its mask.

    Its optimizer, batches, augmentation, dropout and frozen parameters are those of the phase.
    """
    began, before = time.perf_counter(), run.recipe
    phase = next(phase for phase in recipe.phases if isinstance(phase.lr, AutoRate))
    use_setting(run, recipe)
    source_losses, samples = sweep(run, phase, [0.0] * STEPS)
    rates = [LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1)) for step in range(STEPS)]
    losses, more = sweep(run, phase, rates, source_losses)
    edge, tried = edge_of(rates, losses, source_losses), len(losses)
    if edge == 0:
        raise RunError(f"the range test: the loss rises at every rate from {LOWEST:g} on; give a rate: --lr")
    rate, moves, still_more = lowered(run, phase, BELOW_EDGE * (edge or HIGHEST))
    use_setting(run, before)
    seconds, samples = time.perf_counter() - began, samples + more + still_more
    return RangeTest(float(f"{rate:.2g}"), edge, rates[:tried], losses, source_losses[:tried], moves, samples, seconds)


def lowered(run: Run, phase: Phase, rate: float) -> tuple[float, list[tuple[float, float]], int]:
    """Lower a rate until a step moves the weights by about MOST_MOVED of their norm, or less.

    What a step moves is in proportion to the rate, as long as the loss does not rise. So a few measures are enough.

    Returns:
        The rate, what was measured (rate, move), and the number of examples.
    """
    measured, samples = list[tuple[float, float]](), 0
    for _ in range(ATTEMPTS):
        moves = list[float]()
        samples += sweep(run, phase, [rate] * MEASURED, moves=moves)[1]
        move = mean(moves[len(moves) // 2 :])
        measured.append((rate, move))
        if math.isfinite(move) and move <= NEAR * MOST_MOVED:
            break
        rate *= MOST_MOVED / move if math.isfinite(move) else 0.1
    return rate, measured, samples


def sweep(
    run: Run, phase: Phase, rates: Sequence[float], source_losses: Sequence[float] = (), moves: list[float] | None = None
) -> tuple[list[float], int]:
    """Train the source for one step at each rate, and restore it.

    Args:
        run: The run.
        phase: The phase whose settings count.
        rates: The rate of each step.
        source_losses: The source's losses in these steps. The sweep ends where the loss has risen above them.
        moves: A list that gets what each step moved (see `moved`); then weights are copied before each step.

    Returns:
        The losses of the steps, and the number of examples. The losses end before one that is not finite.
    """
    loop, losses, samples = run.loop, list[float](), 0
    plain = {"kind": "dense", "sparsity": None, "refresh": None, "average": "none", "schedule": "constant", "warmup_steps": 0}
    whole = phase.model_copy(update={**plain, "epochs": None, "steps": len(rates), "lr": 0.0})
    load_state(loop.state(), run.start)
    state = PhaseState(Place("source", 1, 1, run.recipe.seed, 1, 1, "dense", 0, len(rates)))
    with settings(loop.model, phase, run.checkpoint.filled, loop.parameters), restored_buffers(loop.model):
        state.begin(loop, whole)
        loop.loss = loss_of(run, phase)
        for rate, group in zip(rates, training.batches_of_steps(loop, whole, state), strict=True):
            weights = copies(run) if moves is not None else {}
            training.train_step(loop, whole.model_copy(update={"lr": rate}), state, group)
            if moves is not None:
                moves.append(moved(run, weights))
            try:
                [(step, asked)] = training.arrived(loop, state, wait=True)
            except Diverged:
                break
            if asked or (loop.world == 1 and loop.stopping()):
                raise Interrupted("stopped in the range test of the rate; --resume makes it again")
            losses.append(step.loss)
            samples += step.samples
            if source_losses and has_risen(losses, source_losses):
                break
        state.optimizer.zero_grad()
    load_state(loop.state(), run.start)
    return losses, samples


def copies(run: Run) -> dict[str, torch.Tensor]:
    """Return copies of the parameters that can be masked and that are trained, by name in the model."""
    keys = dict.fromkeys(part.key for layer in run.layers if layer.excluded is None for part in layer.slices)
    return {key: run.loop.parameters[key].detach().clone() for key in keys if run.loop.parameters[key].requires_grad}


def moved(run: Run, before: Mapping[str, torch.Tensor]) -> float:
    """Return how far the layers moved from `before`, as a share of their norm: of the layers, the median."""
    norms = [torch.stack([(run.loop.parameters[key].detach() - old).norm(), old.norm()]) for key, old in before.items()]
    if not norms:
        return 0.0
    whole = torch.stack(norms) if run.loop.shards is None else run.loop.shards.norms(torch.stack(norms))
    return float((whole[:, 0] / whole[:, 1]).nanmedian())


def rises(losses: Sequence[float], source_losses: Sequence[float]) -> list[float]:
    """Return how far the loss of each step is above the source's, smoothed, as a share of the source's mean loss."""
    level = max(sum(source_losses) / len(source_losses), sys.float_info.min)  # a loss may be 0
    above = [loss - own for loss, own in zip(losses, source_losses, strict=False)]
    means = accumulate(above, lambda mean, value: SMOOTH * mean + (1 - SMOOTH) * value, initial=0.0)
    return [mean / (1 - SMOOTH**step) / level for step, mean in enumerate(means) if step]


def has_risen(losses: Sequence[float], source_losses: Sequence[float]) -> bool:
    """Return whether the smoothed loss of the last step is above the source's by more than RISEN."""
    return rises(losses, source_losses)[-1] > RISEN


def edge_of(rates: Sequence[float], losses: Sequence[float], source_losses: Sequence[float]) -> float | None:
    """Return the highest rate before the loss rises for good.

    Args:
        rates: All rates, in order.
        losses: The loss at each of the first rates.
        source_losses: The loss of the source in the same steps.

    Returns:
        The rate; 0 if the loss rises at the first one; None if it rises at none.
    """
    if len(losses) == len(rates) and not has_risen(losses, source_losses):
        return None
    last = len(losses) - 1 - (bool(losses) and has_risen(losses, source_losses))
    return rates[last] if last >= 0 else 0.0
