"""Find and set the dropout rates of a model. Most of them are not in an nn.Dropout layer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from dsd_refine.compat import DropoutLayer

DROPOUT_NAME = re.compile("dropout|pdrop")
# other names for it in timm and torchvision; in transformers a `drop_rate` is LeViT's stochastic depth
LIBRARY_NAMES = {"timm": ("drop_rate", "attn_drop_p"), "torchvision": ("drop_rate",)}

Attribute = tuple[Any, str]  # an object and the name of its attribute


def dropouts(model: nn.Module) -> list[Attribute]:
    """Every attribute of a module that its forward uses as a dropout rate: pairs (module, attribute).

    These are `p` of a dropout layer, and each plain number with such a name: `attention_dropout` of
    attention layers, BART's `activation_dropout`, `dropout` of nn.LSTM and nn.MultiheadAttention,
    timm's `drop_rate`. Stochastic depth (`drop_path`, `drop_prob`, `layerdrop`) drops whole branches or
    layers, and patch dropout drops tokens: both are left out. A model that was built without dropout
    has no such attribute.
    """
    return [(module, name) for module in model.modules() for name in vars(module) if _is_rate(module, name)]


def _is_rate(module: nn.Module, name: str) -> bool:
    if isinstance(module, DropoutLayer):
        return name == "p"
    if isinstance(module, nn.RNNBase) and module.num_layers == 1:
        return False  # its dropout is between layers
    is_named = DROPOUT_NAME.search(name) or name in LIBRARY_NAMES.get(type(module).__module__.partition(".")[0], ())
    return bool(is_named) and _is_rate_value(vars(module)[name])


def _is_rate_value(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _read_while_running(model: nn.Module) -> Iterator[Attribute]:
    """The dropout rates in the configs of the modules: Falcon and some others read them at each step."""
    configs = {id(c): c for module in model.modules() if (c := vars(module).get("config")) is not None}
    for config in configs.values():
        yield from ((config, name) for name in getattr(config, "__dict__", ()) if _is_rate_of_config(config, name))


def _is_rate_of_config(config: Any, name: str) -> bool:
    return bool(DROPOUT_NAME.search(name)) and _is_rate_value(vars(config)[name])


@contextmanager
def dropout_of(model: nn.Module, rate: float | None) -> Iterator[None]:
    """Inside the context, every dropout of the model has this rate. Afterwards each has its own again.

    With None as the rate, nothing changes.
    """
    attributes = [*dropouts(model), *_read_while_running(model)] if rate is not None else []
    own_rates = [getattr(holder, name) for holder, name in attributes]
    try:
        for holder, name in attributes:
            setattr(holder, name, rate)
        yield
    finally:
        for (holder, name), value in zip(attributes, own_rates, strict=True):
            setattr(holder, name, value)
