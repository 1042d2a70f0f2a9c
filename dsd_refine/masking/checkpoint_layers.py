"""The layers of a checkpoint: where its files' tensors, its library's hints and the mask rules meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from dsd_refine.checkpoint.checkpoint import Checkpoint
from dsd_refine.errors import UsageError
from dsd_refine.masking.kinds import first_layer
from dsd_refine.masking.layers import Layer, Spot, find_layers
from dsd_refine.recipe import Recipe
from dsd_refine.task_specs import TASKS

FEW = 1 / 3  # of the weights outside embeddings: below this share of maskable ones a warning says so
SAME = "the same storage"


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
        first=first_layers(checkpoint.model, checkpoint.library.task),
        unreached=lost,
        include=recipe.include,
        exclude=recipe.exclude,
    )
    return _without_frozen(checkpoint, recipe, layers)


def _without_frozen(checkpoint: Checkpoint, recipe: Recipe, layers: list[Layer]) -> list[Layer]:
    """What a sparse phase freezes is not masked in any: it could not come back."""
    patterns = {pattern for phase in recipe.phases if phase.kind == "sparse" for pattern in phase.frozen}
    frozen = frozen_names(checkpoint.model, patterns, checkpoint.filled)
    found = [
        replace(layer, excluded="frozen in a sparse phase")
        if layer.excluded is None and any(spot.key in frozen for spot in layer.spots)
        else layer
        for layer in layers
    ]
    if all(layer.excluded for layer in found):
        raise UsageError("every layer that could be masked is frozen in a sparse phase; see phases.*.frozen")
    return found


def first_layers(model: nn.Module, task: str) -> list[str]:
    """The modules that see pixels or sound: timm's `first_conv`, else the model's first layer; none where tokens go in."""
    if not TASKS[task].sees_signal:
        return []
    modules = dict(model.named_modules())
    # a head may be defined before the rest; what the library calls the base model is not
    base = getattr(model, "base_model", model)
    place = next(name for name, module in modules.items() if module is base)
    hint = getattr(base, "pretrained_cfg", {}).get("first_conv") or []
    hinted = [f"{place}.{name}".lstrip(".") for name in ([hint] if isinstance(hint, str) else hint)]
    named = [name for name in hinted if name in modules]
    inner = first_layer(base)
    return named or ([f"{place}.{inner}".lstrip(".")] if inner else [])


def outside_embeddings(layers: Sequence[Layer]) -> int:
    """How many of the model's weights are in no embedding; what has two names counts once."""
    own = [layer for layer in layers if not (layer.excluded or "").startswith(SAME)]
    return max(1, sum(layer.weights for layer in own if not (layer.excluded or "").startswith("embedding")))


def few_maskable(layers: Sequence[Layer]) -> list[str]:
    """A warning where most of a model is out of a mask's reach, with the reason that holds for most of it."""
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


Filled = Mapping[str, set[str]]  # a file's tensor -> the names in the model that it fills

ITSELF: Filled = {}  # the file's names are the model's


def frozen_names(model: nn.Module, patterns: Iterable[str], filled: Filled = ITSELF) -> set[str]:
    """Names of the model's parameters that the globs match, by these names or by those of the file's tensors.

    Raises:
        UsageError: a glob that matches nothing, or one that matches some of the tensors that one parameter is made of.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found: set[str] = set()
    chosen: set[str] = set()
    for pattern in patterns:
        tensors = {tensor for tensor, keys in filled.items() if fnmatchcase(tensor, pattern) and keys.intersection(names)}
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits and not tensors:
            raise UsageError(f"frozen: {pattern!r} matches no parameter of the model, such as {names[0]}")
        found, chosen = found | hits, chosen | tensors
    by_file = {key for tensor in chosen for key in filled[tensor]}.intersection(names)
    for tensor, keys in filled.items():
        if tensor not in chosen and (torn := keys & (by_file - found)):
            raise UsageError(
                f"frozen: the model holds {tensor} in one parameter with others that are matched ({min(torn)}), "
                "and a parameter is frozen whole: match all of them, or none"
            )
    return found | by_file
