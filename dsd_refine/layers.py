"""The layers of a checkpoint: where its files' tensors, its library's hints and the mask rules meet."""

from __future__ import annotations

from dsd_refine.checkpoint import Checkpoint
from dsd_refine.masks import Layer, Spot, find_layers, first_layer
from dsd_refine.recipe import Recipe


def open_layers(checkpoint: Checkpoint, recipe: Recipe, lost: list[str]) -> list[Layer]:
    """The file's tensors as layers, with the reason of each that is not masked. `lost` are parameters without gradient.

    Raises:
        UsageError: a pattern that matches nothing, or no layer to mask.
    """
    tensors = {
        name: (checkpoint.layout.entry(name).shape, [Spot(part.key, part.source, part.target) for part in parts])
        for name, parts in checkpoint.placement.items()
    }
    return find_layers(
        checkpoint.model,
        tensors,
        first=first_layers(checkpoint),
        unreached=lost,
        include=recipe.include,
        exclude=recipe.exclude,
    )


def first_layers(checkpoint: Checkpoint) -> list[str]:
    """The modules that see pixels: timm's `first_conv`, else the first layer of the model; none where the input is tokens."""
    if checkpoint.library.task != "image-classification":
        return []
    named = getattr(checkpoint.model, "pretrained_cfg", {}).get("first_conv") or []
    modules = dict(checkpoint.model.named_modules())
    found = [name for name in ([named] if isinstance(named, str) else named) if name in modules]
    first = first_layer(checkpoint.model)
    return found or ([first] if first else [])
