"""What masking and training do to the weights: histograms of a few layers at the paper's five moments, and mean |w| of all.

Section 4 of the paper (its figure of weight distributions) shows one layer at the start, when it is pruned, after the sparse
phase, when the mask is taken off, and after the re-Dense phase. Whoever runs the phases calls `take` at each of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from dsd_refine.masking.layers import Layer

MOMENTS = ("start", "pruned", "after S", "unmasked", "after re-D")
MOST = 4  # layers that are looked at
BINS = 64  # even, so that 0 is the edge between two bins
INSIDE = 0.999  # share of the start's weights that the histogram spans; the rest would only make it a needle
BLOCK = 1 << 22  # weights binned at a time: their 64-bit bin numbers take eight bytes each

Picture = dict[str, Any]

Book = MutableMapping[str, list[Picture]]


def choose(layers: Sequence[Layer], parameters: Mapping[str, torch.Tensor]) -> list[Layer]:
    """Up to MOST maskable layers, spread over the depth: the largest of each of that many equal stretches.

    Depth is the order in which the model defines its `parameters`; a file may be sorted by name.
    """
    depth = {name: number for number, name in enumerate(parameters)}
    maskable = sorted((layer for layer in layers if layer.excluded is None), key=lambda layer: depth[layer.spots[0].key])
    count = min(MOST, len(maskable))
    bounds = [round(i * len(maskable) / count) for i in range(count + 1)] if count else []
    stretches = (maskable[a:b] for a, b in itertools.pairwise(bounds))
    return [max(stretch, key=lambda layer: layer.weights) for stretch in stretches]


@torch.no_grad()
def picture(layer: Layer, parameters: Mapping[str, torch.Tensor], moment: str, edges: Sequence[float] | None = None) -> Picture:
    """A layer's weights as they are now, ready for JSON: `{moment, edges, counts, mean_abs, zeros}`.

    `counts` are the weights in BINS equal bins between the two `edges`, those beyond in the outermost, without those that
    are exactly 0: these are `zeros`, so that sum(counts) + zeros is the number of weights. `mean_abs` is the mean of |w|
    over all of them. Edges are symmetric and found here where none are given; a layer keeps those of its start.
    """
    low, high = edges if edges is not None else _edges(layer, parameters)
    counts, zeros, total = torch.zeros(BINS, dtype=torch.int64), 0, 0.0
    for values in _blocks(layer, parameters):
        there = values[values != 0].to(torch.float32)
        bins = ((there - low) * (BINS / (high - low))).to(torch.int64).clamp_(0, BINS - 1)
        counts += torch.bincount(bins, minlength=BINS).cpu()
        zeros += len(values) - len(there)
        total += float(there.abs().sum())
    mean = total / max(1, layer.weights)
    return {"moment": moment, "edges": [low, high], "counts": counts.tolist(), "mean_abs": mean, "zeros": zeros}


def take(book: Book, layers: Sequence[Layer], parameters: Mapping[str, torch.Tensor], moment: str) -> None:
    """Put a picture of each layer into `book` (layer name -> pictures), in place of an earlier one of the same moment.

    So a run that is taken up again may take it again, and of repeated phases (DSDSD) the last stays.
    """
    for layer in layers:
        pictures = book.setdefault(layer.name, [])
        new = picture(layer, parameters, moment, pictures[0]["edges"] if pictures else None)
        pictures[:] = [old for old in pictures if old["moment"] != moment] + [new]


@torch.no_grad()
def mean_abs(layers: Sequence[Layer], parameters: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Layer name -> mean of |w| over the layer's own elements. One transfer from the device for all layers."""
    sums = [torch.stack([part.abs().sum(dtype=torch.float32) for part in _parts(layer, parameters)]).sum() for layer in layers]
    found = torch.stack(sums).tolist() if sums else []
    return {layer.name: total / max(1, layer.weights) for layer, total in zip(layers, found, strict=True)}


def _parts(layer: Layer, parameters: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """The layer's elements, flat, in no promised order."""
    for spot in layer.spots:
        flat = parameters[spot.key].detach().reshape(-1)
        yield flat[spot.target.to(flat.device)] if len(spot.source) else flat


def _blocks(layer: Layer, parameters: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    for part in _parts(layer, parameters):
        for start in range(0, len(part), BLOCK):
            yield part[start : start + BLOCK]


def _edges(layer: Layer, parameters: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    sizes = torch.cat([part.to(torch.float32).abs() for part in _parts(layer, parameters)])
    limit = float(sizes.kthvalue(max(1, round(INSIDE * len(sizes)))).values) if len(sizes) else 0.0
    limit = float(f"{limit:.4g}") or 1.0
    return -limit, limit
