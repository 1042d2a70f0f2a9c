"""Masks and optimizer state as plain tensors, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn


def pack_masks(masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Masks as bits, eight to a byte, in logical order."""
    return {
        f"mask.{key}": torch.from_numpy(np.packbits(mask.cpu().contiguous().view(-1).numpy())) for key, mask in masks.items()
    }


def unpack_masks(tensors: dict[str, torch.Tensor], parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The masks of `pack_masks`, with the shapes, strides and device of their parameters."""
    masks = {}
    for name, bits in tensors.items():
        if name.startswith("mask."):
            parameter = parameters[name.removeprefix("mask.")]
            flags = torch.from_numpy(np.unpackbits(bits.numpy(), count=parameter.numel()).astype(bool))
            masks[name.removeprefix("mask.")] = torch.empty_like(parameter, dtype=torch.bool).copy_(
                flags.reshape(parameter.shape)
            )
    return masks


def pack_optimizer(optimizer: Any) -> dict[str, torch.Tensor]:
    """An optimizer's state as flat tensors: `optimizer.NUMBER.FIELD`."""
    found = {}
    for number, fields in optimizer.state_dict()["state"].items():
        for field, value in fields.items():
            if value is not None:
                found[f"optimizer.{number}.{field}"] = torch.as_tensor(value)
    return found


def unpack_optimizer(tensors: dict[str, torch.Tensor], optimizer: Any) -> None:
    """Put `pack_optimizer`'s tensors back, in place."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, field = name.split(".", 2)
            # a fused step goes through memory: what belongs to a weight must lie like it
            like = parameters[int(number)]
            same = value.shape == like.shape
            state.setdefault(int(number), {})[field] = torch.empty_like(like, device="cpu").copy_(value) if same else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def load_state(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy values in place: parameters keep their storage, which optimizers, wrappers and cuDNN hold on to."""
    for key, value in model.state_dict().items():
        value.copy_(tensors[key])
