"""Calling a model of any library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

# fields of torchvision's named tuples. GoogLeNet: Szegedy et al. 2015, section 5. Inception v3: what its authors' released
# training code (TF-slim) and PyTorch's fine-tuning tutorial use; torchvision's own reference script trains neither
AUXILIARY = {"aux_logits1": 0.3, "aux_logits2": 0.3, "aux_logits": 0.4}


def logits_of(forward: Callable[..., Any], inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Float32 logits of a timm or torchvision model (`{"x": …}`, by position) or of a transformers model (keyword inputs)."""
    return weighted_logits(forward, inputs)[0][1]


def weighted_logits(forward: Callable[..., Any], inputs: Mapping[str, torch.Tensor]) -> list[tuple[float, torch.Tensor]]:
    """(weight in the loss, float32 logits) of each head: the main one first, then auxiliary ones, which train only."""
    found = forward(inputs["x"]) if set(inputs) == {"x"} else forward(**inputs)
    logits: torch.Tensor = getattr(found, "logits", found)
    heads = [(1.0, (logits[0] if isinstance(logits, tuple) else logits).float())]
    auxiliary = {name: AUXILIARY[name] for name in getattr(found, "_fields", ()) if name in AUXILIARY}
    return heads + [(weight, getattr(found, name).float()) for name, weight in auxiliary.items()]
