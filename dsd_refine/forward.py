"""Calling a model of any library."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

# fields of torchvision's named tuples. GoogLeNet: Szegedy et al. 2015, section 5. Inception v3: what its authors' released
# training code (TF-slim) and PyTorch's fine-tuning tutorial use; torchvision's own reference script trains neither
AUXILIARY = {"aux_logits1": 0.3, "aux_logits2": 0.3, "aux_logits": 0.4}


def logits_of(forward: Callable[..., Any], inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Float32 logits of a timm or torchvision model (`{"x": …}`, by position) or of a transformers model (keyword inputs)."""
    return weighted_logits(forward, inputs)[0][1]


def weighted_logits(forward: Callable[..., Any], inputs: Mapping[str, torch.Tensor]) -> list[tuple[float, torch.Tensor]]:
    """(weight in the loss, float32 logits) of each head: the main one first, then auxiliary ones, which train only."""
    found = forward(inputs["x"]) if set(inputs) == {"x"} else forward(**inputs, **without_cache(forward))
    logits: torch.Tensor = getattr(found, "logits", found)
    heads = [(1.0, (logits[0] if isinstance(logits, tuple) else logits).float())]
    auxiliary = {name: AUXILIARY[name] for name in getattr(found, "_fields", ()) if name in AUXILIARY}
    return heads + [(weight, getattr(found, name).float()) for name, weight in auxiliary.items()]


def without_cache(forward: Callable[..., Any]) -> dict[str, bool]:
    """`use_cache=False` where a forward takes it: what is kept for the next token costs memory, and in-place updates of it
    break the backward pass of some models in evaluation mode (RWKV).
    """
    inner = inspect.unwrap(forward)
    for _ in range(2):  # compiled, spread over processes, or both
        inner = getattr(inner, "_orig_mod", inner)
        inner = inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else inner
    # of the class: Accelerate lays another forward over the instance's
    takes = isinstance(inner, nn.Module) and "use_cache" in inspect.signature(type(inner).forward).parameters
    return {"use_cache": False} if takes else {}
