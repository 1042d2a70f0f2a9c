"""Calling a model of either library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


def logits_of(forward: Callable[..., Any], inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Float32 logits of a timm model (`{"x": …}`, by position) or of a transformers model (its keyword inputs)."""
    found = forward(inputs["x"]) if set(inputs) == {"x"} else forward(**inputs)
    logits: torch.Tensor = getattr(found, "logits", found)
    return (logits[0] if isinstance(logits, tuple) else logits).float()
