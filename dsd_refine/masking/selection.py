"""Select the smallest weights of a tensor: an exact count, with ties decided, without a full sort.

The bits of a float without its sign, read as an integer, have the same order as |w|. On a CPU numpy
partitions integers several times faster than torch selects floats, and needs one copy of the
weights.
"""

from __future__ import annotations

import numpy as np
import torch

MAGNITUDE = 0x7FFFFFFF  # everything but the sign of a float32
COMPARED_AT_ONCE = 1 << 16  # weights in a block: it fits into the cache


@torch.no_grad()
def all_but_smallest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Mark all but the `count` smallest |values|.

    Args:
        values: A dense tensor of any shape. It is compared in float32.
        count: How many values to leave out, at least 1. Of equal values, those with the lowest
            index in logical order are left out first.

    Returns:
        A bool tensor with the shape and strides of `values`: False for exactly `count` of them.
    """
    bits = values.detach().to(torch.float32).view(torch.int32)
    threshold, ties = _threshold(flat(bits), count)
    keep = torch.empty_like(bits, dtype=torch.bool)
    _greater(flat(bits), threshold if ties is None else threshold - 1, flat(keep))
    if ties is not None:
        _drop_ties(bits, keep, threshold, ties)
    return keep


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a dense tensor in the order in which they lie in memory, without a
    copy.
    """
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _threshold(bits: torch.Tensor, count: int) -> tuple[int, int | None]:
    """Find the magnitude of rank `count`, and how many values equal to it are among the `count`
    smallest.

    The second number is None if all of them are. The search for ties can be left out then.
    """
    if bits.device.type != "cpu":
        return threshold_by_counters(bits, count)
    magnitudes = bits.numpy() & MAGNITUDE
    magnitudes.partition(count - 1)  # in place
    threshold = int(magnitudes[count - 1])
    tied = bool((magnitudes[count:] == threshold).any())
    return threshold, int((magnitudes[:count] == threshold).sum()) if tied else None


def threshold_by_counters(bits: torch.Tensor, count: int) -> tuple[int, int]:
    """Find the magnitude of rank `count` by counting: first the upper half of the bits, then the lower half.

    A GPU counts with all its cores. `kthvalue` looks through one row with a single block of threads.

    Args:
        bits: The bits of float32 values, int32 of shape (values,).
        count: The rank, from 1.

    Returns:
        the magnitude, and how many values equal to it are among the `count` smallest.
    """
    magnitudes = bits & MAGNITUDE
    upper, before = _place(torch.bincount(magnitudes >> 16), count)
    lower, also_before = _place(torch.bincount(magnitudes[magnitudes >> 16 == upper] & 0xFFFF), count - before)
    return upper << 16 | lower, count - before - also_before


def _place(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The number of the counter that the value of this rank (from 1) is in, and how many values are in those before it."""
    sums = counts.cumsum(0)
    place = int((sums < rank).sum())
    return place, int(sums[place - 1]) if place else 0


def _greater(bits: torch.Tensor, threshold: int, out: torch.Tensor) -> None:
    """Write into `out` whether each magnitude is greater than `threshold`."""
    if bits.device.type != "cpu":
        torch.gt(bits & MAGNITUDE, threshold, out=out)
        return
    values, flags = bits.numpy(), out.numpy()
    for start in range(0, len(values), COMPARED_AT_ONCE):
        block = slice(start, start + COMPARED_AT_ONCE)
        np.greater(values[block] & MAGNITUDE, threshold, out=flags[block])


def _drop_ties(bits: torch.Tensor, keep: torch.Tensor, threshold: int, ties: int) -> None:
    """Set `keep` to False at the first `ties` values of magnitude `threshold`, in logical order."""
    rows = max(1, COMPARED_AT_ONCE * len(bits) // bits.numel())
    for block, flags in zip(torch.split(bits, rows), torch.split(keep, rows), strict=True):
        tied = (block & MAGNITUDE) == threshold
        count = int(tied.sum())
        if count > ties:  # only the first of them are dropped
            places = tied.reshape(-1).nonzero().reshape(-1)[:ties]
            tied = torch.zeros_like(tied.reshape(-1)).index_fill_(0, places, True).reshape(tied.shape)
        flags.logical_and_(~tied)
        ties -= count
        if ties <= 0:
            return
