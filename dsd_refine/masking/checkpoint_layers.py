"""The layers of an opened checkpoint, from its files' tensors, its library's hints and the recipe's
patterns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from dsd_refine.checkpoint.checkpoint import Checkpoint
from dsd_refine.errors import UsageError
from dsd_refine.masking.kinds import first_layer
from dsd_refine.masking.layers import Layer, find_layers
from dsd_refine.recipe import Recipe
from dsd_refine.task_specs import TASKS

FEW = 1 / 3  # a smaller share of maskable weights, of those outside embeddings, brings a warning
SAME = "the same storage"


def open_layers(checkpoint: Checkpoint, recipe: Recipe, lost: list[str]) -> list[Layer]:
    """Return the file's tensors as layers, each with the reason if it is not masked.

    Args:
        checkpoint: The opened source.
        recipe: Its `include` and `exclude` patterns and its frozen parameters count.
        lost: Names of the parameters that get no gradient.

    Raises:
        UsageError: A pattern matches no name, or no layer can be masked.
    """
    tensors = {name: (checkpoint.layout.entry(name).shape, slices) for name, slices in checkpoint.placement.items()}
    layers = find_layers(
        checkpoint.model,
        tensors,
        first=first_layers(checkpoint.model, checkpoint.library.task),
        unreached=lost,
        include=recipe.include,
        exclude=recipe.exclude,
    )
    return _without_frozen(checkpoint, recipe, layers)


def _without_frozen(checkpoint: Checkpoint, recipe: Recipe, layers: list[Layer]) -> list[Layer]:
    """Exclude layers that a sparse phase freezes: their masked weights would stay 0."""
    patterns = {pattern for phase in recipe.phases if phase.kind == "sparse" for pattern in phase.frozen}
    frozen = frozen_names(checkpoint.model, patterns, checkpoint.filled)
    checked = [
        replace(layer, excluded="frozen in a sparse phase")
        if layer.excluded is None and any(tensor_slice.key in frozen for tensor_slice in layer.slices)
        else layer
        for layer in layers
    ]
    if all(layer.excluded for layer in checked):
        raise UsageError("every layer that could be masked is frozen in a sparse phase; see phases.*.frozen")
    return checked


def first_layers(model: nn.Module, task: str) -> list[str]:
    """Return the names of the modules that see pixels or sound.

    They are timm's `first_conv`, else the model's first layer. A model that takes tokens has none.
    """
    if not TASKS[task].sees_signal:
        return []
    modules = dict(model.named_modules())
    # A model may define its head first. The library's base model has no head.
    base = getattr(model, "base_model", model)
    place = next(name for name, module in modules.items() if module is base)
    hint = getattr(base, "pretrained_cfg", {}).get("first_conv") or []
    hinted = [f"{place}.{name}".lstrip(".") for name in ([hint] if isinstance(hint, str) else hint)]
    named = [name for name in hinted if name in modules]
    inner = first_layer(base)
    return named or ([f"{place}.{inner}".lstrip(".")] if inner else [])


def outside_embeddings(layers: Sequence[Layer]) -> int:
    """Count the model's weights outside embeddings. A storage with two names counts once."""
    own = [layer for layer in layers if not (layer.excluded or "").startswith(SAME)]
    return max(1, sum(layer.weights for layer in own if not (layer.excluded or "").startswith("embedding")))


def few_maskable(layers: Sequence[Layer]) -> list[str]:
    """Warn if a mask reaches less than a third of the weights, with the most common reason."""
    share = sum(layer.weights for layer in layers if layer.excluded is None) / outside_embeddings(layers)
    if share >= FEW:
        return []
    others: Counter[str] = Counter()
    for layer in layers:
        if layer.excluded and not layer.excluded.startswith(("embedding", SAME)):
            others[layer.excluded] += layer.weights
    return [
        f"a mask reaches only {share:.1%} of the weights outside embeddings "
        f"(most of the others: {others.most_common(1)[0][0]}); "
        "`plan` lists every tensor with its reason, --include adds to what is masked"
    ]


Filled = Mapping[str, set[str]]  # name of a file's tensor -> names of the model's parameters that hold it

SAME_NAMES: Filled = {}  # the file's names are the model's


def frozen_names(model: nn.Module, patterns: Iterable[str], filled: Filled = SAME_NAMES) -> set[str]:
    """Return the names of the model's parameters that the glob patterns match.

    A pattern may match a parameter's name in the model, or the name of its tensor in the file.

    Raises:
        UsageError: A pattern matches nothing, or only some of the tensors that one parameter holds.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    by_name: set[str] = set()
    tensors: set[str] = set()
    for pattern in patterns:
        of_file = {tensor for tensor, keys in filled.items() if fnmatchcase(tensor, pattern) and keys.intersection(names)}
        of_model = {name for name in names if fnmatchcase(name, pattern)}
        if not of_model and not of_file:
            raise UsageError(f"frozen: {pattern!r} matches no parameter of the model, such as {names[0]}")
        by_name, tensors = by_name | of_model, tensors | of_file
    by_file = {key for tensor in tensors for key in filled[tensor]}.intersection(names)
    for tensor, keys in filled.items():
        if tensor not in tensors and (shared := keys & (by_file - by_name)):
            raise UsageError(
                f"frozen: one parameter of the model ({min(shared)}) holds {tensor} together with tensors that are "
                "matched, and a parameter is frozen whole: match all of them, or none"
            )
    return by_name | by_file
