"""Room on disk: how much a run needs beside its output, looked at before it starts, and said where it runs out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsd_refine.errors import UsageError
from dsd_refine.files import free_bytes, in_words

if TYPE_CHECKING:
    from dsd_refine.checkpoint.checkpoint import Checkpoint
    from dsd_refine.masking.layers import Layer
    from dsd_refine.recipe import Recipe

FLOAT = 4  # bytes of a float32
SLACK = 1 << 20  # log, scores, report
UNSAVED = 3  # tensor files written since the last save that make a new one due, since only a save lets old ones go


def of_run(checkpoint: Checkpoint, layers: Sequence[Layer], recipe: Recipe, *, save_phases: bool = False) -> int:
    """Bytes that OUT.partial/ holds at most: two saved states (the last one stays until the next is whole), the best weights
    of each arm and a few that wait to take a place, and what is written out. Masks are saved as bits.
    """
    weights = FLOAT * sum(value.numel() for value in checkpoint.model.state_dict().values())
    moments = 2 if recipe.optimizer == "adamw" else int(recipe.momentum > 0)
    averages = int(any(phase.average != "none" for phase in recipe.phases))
    state = weights * (1 + moments + averages) + sum(layer.weights for layer in layers if layer.excluded is None) // 8
    bests = (1 + len(recipe.control)) * recipe.seeds + UNSAVED
    tries = len(recipe.sparsities) * recipe.seeds + 1
    outputs = 1 + (len(recipe.phases) * tries if save_phases else 0)
    total: int = 2 * state + bests * weights + outputs * _output(checkpoint) + SLACK
    return total


def _output(checkpoint: Checkpoint) -> int:
    """Bytes of one written checkpoint."""
    tensors = sum(entry.end - entry.begin for file in checkpoint.layout.files for entry in file.entries)
    names = checkpoint.source.side_files(set(checkpoint.weight_files))[0]
    return tensors + sum((checkpoint.source.folder / name).stat().st_size for name in names)


def check_room(place: Path, need: int) -> None:
    """Refuse a run that cannot end for lack of room. What an earlier start left in `place` counts as room.

    Raises:
        UsageError: names what is needed, what is free, and where.
    """
    held = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    free = free_bytes(place)
    if need > free + held:
        raise UsageError(
            f"{place}: a run needs about {in_words(need)} there while it goes, {in_words(free)} are free; "
            "make room, or give an --output-dir where there is more"
        )
