"""Where a model keeps the rates of its dropout: most of them are no nn.Dropout."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from dsd_refine.compat import DropoutLayer

SAYS_SO = re.compile("dropout|pdrop")
# timm's and torchvision's words; in transformers a `drop_rate` is LeViT's stochastic depth
THEIR_WORDS = {"timm": ("drop_rate", "attn_drop_p"), "torchvision": ("drop_rate",)}

Place = tuple[Any, str]  # an object and the name of its attribute


def dropouts(model: nn.Module) -> list[Place]:
    """Every attribute of a module that its forward takes as a rate of dropout.

    `p` of a dropout layer, and each plain number named for it: attention's `attention_dropout`, BART's `activation_dropout`,
    `dropout` of nn.LSTM and nn.MultiheadAttention, timm's `drop_rate`. Stochastic depth (`drop_path`, `drop_prob`, `layerdrop`)
    drops whole branches or layers, patch dropout tokens: neither is one. Where a model was built without, there is nothing.
    """
    return [(module, name) for module in model.modules() for name in vars(module) if _is_rate(module, name)]


def _is_rate(module: nn.Module, name: str) -> bool:
    if isinstance(module, DropoutLayer):
        return name == "p"
    if isinstance(module, nn.RNNBase) and module.num_layers == 1:
        return False  # its dropout lies between layers
    named = SAYS_SO.search(name) or name in THEIR_WORDS.get(type(module).__module__.partition(".")[0], ())
    return bool(named) and _is_share(vars(module)[name])


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _read_while_running(model: nn.Module) -> Iterator[Place]:
    """The rates of the configs that the modules hold on to: Falcon and some others read theirs there at each step."""
    configs = {id(held): held for module in model.modules() if (held := vars(module).get("config")) is not None}
    for config in configs.values():
        yield from ((config, name) for name in getattr(config, "__dict__", ()) if _is_named_share(config, name))


def _is_named_share(config: Any, name: str) -> bool:
    return bool(SAYS_SO.search(name)) and _is_share(vars(config)[name])


@contextmanager
def dropout_of(model: nn.Module, rate: float | None) -> Iterator[None]:
    """Within, every dropout of the model has this rate (None: as it is); after, each its own again."""
    places = [*dropouts(model), *_read_while_running(model)] if rate is not None else []
    before = [getattr(holder, name) for holder, name in places]
    try:
        for holder, name in places:
            setattr(holder, name, rate)
        yield
    finally:
        for (holder, name), value in zip(places, before, strict=True):
            setattr(holder, name, value)
