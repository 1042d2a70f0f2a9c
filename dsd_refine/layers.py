"""The layers of a checkpoint: where its files' tensors, its library's hints and the mask rules meet."""

from __future__ import annotations

from dataclasses import replace

from dsd_refine.checkpoint import Checkpoint
from dsd_refine.errors import UsageError
from dsd_refine.masks import Layer, Spot, find_layers, first_layer
from dsd_refine.recipe import Recipe
from dsd_refine.settings import frozen_names


def open_layers(checkpoint: Checkpoint, recipe: Recipe, lost: list[str]) -> list[Layer]:
    """The file's tensors as layers, with the reason of each that is not masked. `lost` are parameters without gradient.

    Raises:
        UsageError: a pattern that matches nothing, or no layer to mask.
    """
    tensors = {
        name: (checkpoint.layout.entry(name).shape, [Spot(part.key, part.source, part.target) for part in parts])
        for name, parts in checkpoint.placement.items()
    }
    layers = find_layers(
        checkpoint.model,
        tensors,
        first=first_layers(checkpoint),
        unreached=lost,
        include=recipe.include,
        exclude=recipe.exclude,
    )
    return _without_frozen(checkpoint, recipe, layers)


def _without_frozen(checkpoint: Checkpoint, recipe: Recipe, layers: list[Layer]) -> list[Layer]:
    """What a sparse phase freezes is not masked in any: it could not come back."""
    patterns = {pattern for phase in recipe.phases if phase.kind == "sparse" for pattern in phase.frozen}
    frozen = frozen_names(checkpoint.model, patterns)
    found = [
        replace(layer, excluded="frozen in a sparse phase")
        if layer.excluded is None and any(spot.key in frozen for spot in layer.spots)
        else layer
        for layer in layers
    ]
    if all(layer.excluded for layer in found):
        raise UsageError("every layer that could be masked is frozen in a sparse phase; see phases.*.frozen")
    return found


def first_layers(checkpoint: Checkpoint) -> list[str]:
    """The modules that see pixels or sound: timm's `first_conv`, else the model's first layer; none where tokens go in."""
    if checkpoint.library.task in ("ctc-speech", "image-captioning"):
        # a head may be defined before the rest; what the library calls the base model is not
        base = getattr(checkpoint.model, "base_model", checkpoint.model)
        place = next(name for name, module in checkpoint.model.named_modules() if module is base)
        inner = first_layer(base)
        return [f"{place}.{inner}".lstrip(".")] if inner else []
    if checkpoint.library.task != "image-classification":
        return []
    named = getattr(checkpoint.model, "pretrained_cfg", {}).get("first_conv") or []
    modules = dict(checkpoint.model.named_modules())
    found = [name for name in ([named] if isinstance(named, str) else named) if name in modules]
    first = first_layer(checkpoint.model)
    return found or ([first] if first else [])
