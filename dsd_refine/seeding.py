"""Seeds: stable numbers from names, and re-seeding of all random generators."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable

import numpy as np
import torch


def stable_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends only on its parts, on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def stable_seeds(before: Iterable[int | str], numbers: Iterable[int], last: str) -> list[int]:
    """Return `stable_seed(*before, number, last)` of each number. What stands before the number is hashed once."""
    begun, end = hashlib.sha256(("(" + "".join(f"{part!r}, " for part in before)).encode()), f", {last!r})"
    seeds = []
    for number in numbers:
        hashed = begun.copy()
        hashed.update(f"{number}{end}".encode())
        seeds.append(int.from_bytes(hashed.digest()[:8], "little") >> 1)
    return seeds


CPU = torch.device("cpu")


def seed_all(seed: int, device: torch.device = CPU) -> None:
    """Re-seed the generators of python, numpy and torch.

    `device` is the one that torch will draw on.

    Only the generators of torch that draw are seeded: that of the CPU, and that of the device.
    `torch.manual_seed` also records a stack trace for each kind of device that is unused, which takes
    longer than decoding a small image.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)  # of the current device
    elif device.type != "cpu":
        torch.manual_seed(seed)
