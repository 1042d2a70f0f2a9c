"""Find the blocks that a model repeats, such as its transformer layers, and what stands before and after them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model repeats, such as its transformer layers. They are divided one by one.

    They are the modules of the classes that transformers names in `_no_split_modules`. Of a model without
    such names (timm), they are the members of lists of modules of one class. Blocks inside other blocks
    are left out.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    named = [module for module in model.modules() if type(module).__name__ in names]
    counts = Counter(type(module) for module in named)
    blocks = [module for module in named if counts[type(module)] > 1]
    return _outermost(blocks) or _outermost([member for module in model.modules() for member in _members(module)])


def divided_parts(model: nn.Module) -> list[nn.Module]:
    """Return the modules that are divided one by one: the repeated blocks, and embeddings outside of them.

    Without repeated blocks there are none. Of the embeddings (tokens to vectors, vectors to logits) these
    are the ones that share no parameter with another layer. They are large where a vocabulary is, and a
    forward needs each for a moment only.
    """
    blocks = repeated_blocks(model)
    inside = {id(module) for block in blocks for module in block.modules()}
    holders = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    outside = [layer for layer in _embeddings(model) if id(layer) not in inside] if blocks else []
    return blocks + [layer for layer in outside if all(holders[id(parameter)] == 1 for parameter in layer.parameters())]


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """The layers for tokens and for logits, as transformers names them."""
    layers = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layers.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):  # timm, and models without such a layer
            continue
    return [module for module in layers if isinstance(module, nn.Embedding | nn.Linear)]


def _members(module: nn.Module) -> list[nn.Module]:
    """The members of a list of at least two modules of one class that have parameters."""
    members = list(module) if isinstance(module, nn.ModuleList | nn.Sequential) else []
    is_repeated = len(members) > 1 and len({type(member) for member in members}) == 1
    return members if is_repeated and all(any(True for _ in member.parameters()) for member in members) else []


def _outermost(modules: Sequence[nn.Module]) -> list[nn.Module]:
    inner = {id(inside) for module in modules for inside in module.modules() if inside is not module}
    return [module for module in modules if id(module) not in inner]
