"""Which weights are the smallest: exactly so many, ties by lowest index, with little memory and no sort.

|w| orders like the bits of w without the sign, read as an integer. On a CPU numpy partitions and compares integers several
times faster than torch selects floats; beside the weights it needs one copy of them.
"""

from __future__ import annotations

import numpy as np
import torch

MAGNITUDE = 0x7FFFFFFF  # everything but the sign of a float32
BLOCK = 1 << 16  # weights compared at a time: they stay in the cache


@torch.no_grad()
def without_smallest(values: torch.Tensor, count: int) -> torch.Tensor:
    """A bool tensor, shaped and laid out like `values` (float32, dense): False for exactly the `count` smallest |values|.

    Ties go by lowest index in logical order. `count` is at least 1.
    """
    bits = values.detach().to(torch.float32).view(torch.int32)
    threshold, ties = _threshold(flat(bits), count)
    keep = torch.empty_like(bits, dtype=torch.bool)
    _greater(flat(bits), threshold if ties is None else threshold - 1, flat(keep))
    if ties is not None:
        _drop_ties(bits, keep, threshold, ties)
    return keep


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements as they lie in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _threshold(bits: torch.Tensor, count: int) -> tuple[int, int | None]:
    """The count-th smallest magnitude, and how many of those equal to it are among the count smallest (None: all of them)."""
    if bits.device.type != "cpu":
        ranked = bits & MAGNITUDE
        threshold = int(torch.kthvalue(ranked, count).values)
        return threshold, count - int((ranked < threshold).sum())
    magnitudes = bits.numpy() & MAGNITUDE
    magnitudes.partition(count - 1)  # in place
    threshold = int(magnitudes[count - 1])
    more = bool((magnitudes[count:] == threshold).any())
    return threshold, int((magnitudes[:count] == threshold).sum()) if more else None


def _greater(bits: torch.Tensor, threshold: int, out: torch.Tensor) -> None:
    """Write into `out` where the magnitude is greater than `threshold`."""
    if bits.device.type != "cpu":
        torch.gt(bits & MAGNITUDE, threshold, out=out)
        return
    values, found = bits.numpy(), out.numpy()
    for start in range(0, len(values), BLOCK):
        part = slice(start, start + BLOCK)
        np.greater(values[part] & MAGNITUDE, threshold, out=found[part])


def _drop_ties(bits: torch.Tensor, keep: torch.Tensor, threshold: int, ties: int) -> None:
    """Turn `keep` off at the first `ties` values of magnitude `threshold`, in logical order: slices along the first axis."""
    rows = max(1, BLOCK * len(bits) // bits.numel())
    for some, flags in zip(torch.split(bits, rows), torch.split(keep, rows), strict=True):
        tied = (some & MAGNITUDE) == threshold
        found = int(tied.sum())
        if found > ties:  # the rest of them stay
            places = tied.reshape(-1).nonzero().reshape(-1)[:ties]
            tied = torch.zeros_like(tied.reshape(-1)).index_fill_(0, places, True).reshape(tied.shape)
        flags.logical_and_(~tied)
        ties -= found
        if ties <= 0:
            return
