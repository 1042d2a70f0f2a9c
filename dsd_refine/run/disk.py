"""Disk space: estimate how much a run needs, and check it before the run starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsd_refine.errors import UsageError
from dsd_refine.files import free_bytes, in_words
from dsd_refine.search import rungs_of, settings_of

if TYPE_CHECKING:
    from dsd_refine.checkpoint.checkpoint import Checkpoint
    from dsd_refine.masking.layers import Layer
    from dsd_refine.recipe import Recipe

FLOAT = 4  # bytes of a float32
SLACK = 1 << 20  # bytes for the log, the scores and the report
UNSAVED = 3  # after so many new tensor files the state is saved, because only a save removes old files


def optimizer_tensors(recipe: Recipe) -> int:
    """Return how many tensors of its size an optimizer keeps for each parameter."""
    return 2 if recipe.optimizer == "adamw" else int(recipe.momentum > 0)


def of_run(checkpoint: Checkpoint, layers: Sequence[Layer], recipe: Recipe, *, save_phases: bool = False) -> int:
    """Return the largest number of bytes that OUT.partial/ will need.

    It holds two saved states, because the old one stays until the new one is complete. It also
    holds the best weights of each arm, those that are to be mixed, up to UNSAVED further ones, and
    the written checkpoints. Masks take one bit for each weight.

    Args:
        checkpoint: The source.
        layers: Its layers.
        recipe: The recipe.
        save_phases: Whether the checkpoint of each phase is written too.
    """
    weights = FLOAT * sum(value.numel() for value in checkpoint.model.state_dict().values())
    tried = [setting.recipe for setting in settings_of(recipe)]
    averages = int(any(phase.average != "none" for each in tried for phase in each.phases))
    maskable = sum(layer.weights for layer in layers if layer.excluded is None)
    state = weights * (1 + max(map(optimizer_tensors, tried)) + averages) + maskable // 8
    bests = (1 + len(recipe.control)) * recipe.seeds + 1 + UNSAVED  # 1: the candidate of the try that runs
    tries = sum(rung.size for rung in rungs_of(recipe)) * recipe.seeds + 1
    bests += tries + len(recipe.control) if recipe.soup != "none" else 0  # the tries of one arm, and the soups
    bests += 1 if recipe.average == "rounds" else 0
    outputs = 1 + (len(recipe.phases) * tries if save_phases else 0)
    total: int = 2 * state + bests * weights + outputs * _output(checkpoint) + SLACK
    return total


def _output(checkpoint: Checkpoint) -> int:
    """Return the bytes of one written checkpoint."""
    tensors = sum(entry.end - entry.begin for file in checkpoint.layout.files for entry in file.entries)
    names = checkpoint.source.side_files(set(checkpoint.weight_files))[0]
    return tensors + sum((checkpoint.source.folder / name).stat().st_size for name in names)


def check_room(place: Path, need: int) -> None:
    """Check that the disk of `place` has room for `need` bytes.

    Files of an earlier run in `place` count as free.

    Raises:
        UsageError: There is not enough room.
    """
    reusable = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    free = free_bytes(place)
    if need > free + reusable:
        raise UsageError(
            f"{place}: the run needs about {in_words(need)} there, {in_words(free)} are free; "
            "make room, or give an --output-dir on a disk with more room"
        )
