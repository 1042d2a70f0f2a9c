"""A soup: the mean of the weights of an arm's tries (Wortsman et al. 2022, Model soups), if the holdout prefers it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from dsd_refine.errors import Diverged
from dsd_refine.run.phase import use_setting
from dsd_refine.training.average import between
from dsd_refine.training.batchnorm import reestimate
from dsd_refine.training.evaluate import evaluate
from dsd_refine.training.packing import load_state
from dsd_refine.training.state import Key

if TYPE_CHECKING:
    from dsd_refine.run.run import Run
    from dsd_refine.run.state import Selected


def soup(run: Run, arm: str) -> None:
    """Mix the finished tries of an arm, of all its settings and seeds, after the last one.

    The members are the weights of each try that the holdout prefers, the best try first. `uniform` is the mean of all of
    them. `greedy` adds one after the other, where the holdout prefers the mean with it. Of a single seed, the soup
    becomes its result if the holdout prefers it to the best try. Of several, it stands beside the seeds.

    Raises:
        Interrupted: The run was asked to stop. A resumed run mixes this arm again.
    """
    if run.recipe.soup == "none" or arm in run.state.soups:
        return
    members = sorted(run.state.ingredients.get(arm, []), key=lambda each: run.preference(each.holdout or {}), reverse=True)
    found = None
    if len(members) > 1:
        run.loop.accelerator.wait_for_everyone()
        use_setting(run, run.recipe_of(arm, members[0].attempt))
        found = greedy(run, arm, members) if run.recipe.soup == "greedy" else uniform(run, arm, members)
    else:
        run.options.say(f"soup: {arm} has a single try that is not lost, so there is nothing to mix")
    run.state.soups[arm] = found
    run.state.ingredients.pop(arm, None)  # their files may go
    if run.recipe.seeds == 1 and found and run.is_better(found, members[0]):
        run.state.best[arm]["0"] = found
    run.save()


def uniform(run: Run, arm: str, members: Sequence[Selected]) -> Selected:
    """Return the mean of all tries. Its file is written only if the holdout prefers it to the best try."""
    mean = run.workspace.read_weights(members[0].file)
    for number, each in enumerate(members[1:], 2):
        mean = between(mean, run.workspace.read_weights(each.file), 1 / number)
    return measured(run, arm, mean, members, members[0])


def greedy(run: Run, arm: str, members: Sequence[Selected]) -> Selected | None:
    """Return the mean of the best try and those that improve the mean on the holdout. None: no try does."""
    best, chosen = members[0], [members[0]]
    mean = run.workspace.read_weights(best.file)
    for each in members[1:]:
        wider = between(mean, run.workspace.read_weights(each.file), 1 / (len(chosen) + 1))
        found = measured(run, arm, wider, [*chosen, each], best)
        if run.is_better(found, best):
            best, mean, chosen = found, wider, [*chosen, each]
    return best if len(chosen) > 1 else None


def measured(run: Run, arm: str, mean: dict[str, torch.Tensor], members: Sequence[Selected], best: Selected) -> Selected:
    """Score a mean on the holdout, with BatchNorm's statistics computed again. Write it if it is better than `best`."""
    first = members[0]
    load_state(run.loop.state(), mean)
    reestimate(run.loop, Key(first.seed, len(run.recipe.trained_phases)))
    try:
        metrics = run.task.metrics(evaluate(run.loop, run.task.holdout))
    except Diverged:  # tries far from each other may have a mean that computes nothing
        return replace(first, holdout=None, members=[each.attempt for each in members])
    numbers = [each.attempt for each in members]
    place = {"arm": arm, "phase": None, "step": None, "epoch": None, "soup": [number + 1 for number in numbers]}
    run.workspace.log({"event": "evaluation", **place, "part": "holdout", **metrics})
    found = replace(first, file=f"best-{arm}-soup.safetensors", holdout=metrics, members=numbers)
    if run.is_better(found, best):
        run.workspace.write_weights(found.file, run.loop.state())
    return found
