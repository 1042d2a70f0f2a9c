"""Seeds: stable numbers from names, and setting all random generators."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a function of its parts alone, on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def reseed(seed: int) -> None:
    """Re-seed python's, numpy's and torch's generators: what augmentation draws is a function of the seed alone.

    Of torch's the one that augmentation draws from: `torch.manual_seed` writes down a stack trace for each device that is
    not in use, which takes longer than decoding a small picture.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def seed_all(seed: int, device: torch.device) -> None:
    """Re-seed python's, numpy's and torch's generators. `device` is the one that is drawn on.

    `torch.manual_seed` writes down a stack trace for each device that is not in use, at every step.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
