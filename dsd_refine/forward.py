"""Call a model of any library."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from dsd_refine.compat import not_compiled

# Weights of auxiliary losses, by the fields of torchvision's named tuples. GoogLeNet: Szegedy et
# al. 2015, section 5. Inception v3: the value of its authors' training code (TF-slim) and of
# PyTorch's fine-tuning tutorial. torchvision's own reference script trains neither.
AUXILIARY = {"aux_logits1": 0.3, "aux_logits2": 0.3, "aux_logits": 0.4}


def logits_of(forward: Callable[..., Any], inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the model's logits in float32. Of a model without a head: its last hidden states.

    `inputs` is `{"x": …}` for a timm or torchvision model, and keyword arguments for a transformers
    model.
    """
    return weighted_logits(forward, inputs)[0][1]


def weighted_logits(forward: Callable[..., Any], inputs: Mapping[str, torch.Tensor]) -> list[tuple[float, torch.Tensor]]:
    """Return the weight in the loss and the float32 logits of each head.

    The main head is the first. Auxiliary heads exist only in training mode. `inputs` are as in
    `logits_of`. If the model finds spans, its logits are those of the first and of the last token, of
    shape (rows, tokens, 2).
    """
    outputs = forward(inputs["x"]) if set(inputs) == {"x"} else forward(**inputs, **without_cache(forward))
    if hasattr(outputs, "start_logits"):
        return [(1.0, torch.stack([outputs.start_logits, outputs.end_logits], dim=-1).float())]
    without_head = getattr(outputs, "last_hidden_state", outputs)
    logits: torch.Tensor = getattr(outputs, "logits", without_head)
    heads = [(1.0, (logits[0] if isinstance(logits, tuple) else logits).float())]
    auxiliary = {name: AUXILIARY[name] for name in getattr(outputs, "_fields", ()) if name in AUXILIARY}
    return heads + [(weight, getattr(outputs, name).float()) for name, weight in auxiliary.items()]


def without_cache(forward: Callable[..., Any]) -> dict[str, bool]:
    """Return the argument `use_cache=False` if the model's forward has it.

    The cache for the next token costs memory. Some models update it in place in evaluation mode
    (RWKV), which breaks the backward pass.
    """
    inner = inspect.unwrap(forward)
    for _ in range(2):  # the model may be compiled, or spread over processes, or both
        inner = not_compiled(inner)
        inner = inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else inner
    # the class's forward, because Accelerate replaces that of the instance
    return {"use_cache": False} if isinstance(inner, nn.Module) and _takes_cache(type(inner).forward) else {}


@cache
def _takes_cache(forward: Callable[..., Any]) -> bool:
    return "use_cache" in inspect.signature(forward).parameters
