"""Convert masks and optimizer state to plain tensors for the saved state, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def pack_masks(masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pack each mask into a uint8 vector `mask.NAME`, eight flags per byte, in row-major order."""
    return {
        f"mask.{key}": torch.from_numpy(np.packbits(mask.cpu().contiguous().view(-1).numpy())) for key, mask in masks.items()
    }


def unpack_masks(tensors: dict[str, torch.Tensor], parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Get the masks back from `pack_masks`: bool tensors with the shape, strides and device of their parameters.

    Args:
        tensors: a saved state; names without `mask.` are ignored.
        parameters: name -> parameter, for each mask.
    """
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
    """The optimizer's state as tensors `optimizer.NUMBER.FIELD`, where NUMBER is that of the parameter."""
    tensors = {}
    for number, fields in optimizer.state_dict()["state"].items():
        for field, value in fields.items():
            if value is not None:
                tensors[f"optimizer.{number}.{field}"] = torch.as_tensor(value)
    return tensors


def unpack_optimizer(tensors: dict[str, torch.Tensor], optimizer: Any) -> None:
    """Load the tensors of `pack_optimizer` into the optimizer. Names without `optimizer.` are ignored."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, field = name.split(".", 2)
            # A fused step goes through memory in order: the state of a weight must have the same strides.
            parameter = parameters[int(number)]
            if value.shape == parameter.shape:
                value = torch.empty_like(parameter, device="cpu").copy_(value)
            state.setdefault(int(number), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def load_state(state: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy the tensors into the model's state (`Loop.state`), by name.

    Parameters keep their storage, because optimizers, wrappers and cuDNN have references to it.
    """
    for key, value in state.items():
        value.copy_(tensors[key])
