"""Does padding change what a model computes for a row?"""

from __future__ import annotations

import torch

NOISE = 1e-4  # what rounding may do to logits, as a share of the largest one and in itself


def same_but_for_rounding(padded: torch.Tensor, alone: torch.Tensor) -> bool:
    """Are these the same logits, computed beside longer rows and alone?"""
    return bool((padded - alone).abs().max() <= NOISE * alone.abs().max() + NOISE)
