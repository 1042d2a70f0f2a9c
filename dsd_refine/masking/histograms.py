"""Weight histograms of a few layers at five moments of a run, and the mean |w| of all layers.

Section 4 of the paper shows the weights of one layer at five moments: at the start, when the layer
is pruned, after the sparse phase, when the mask is removed, and after the re-Dense phase. The code
that runs the phases calls `record` at each of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from dsd_refine.masking.layers import Layer

MOMENTS = ("start", "pruned", "after S", "unmasked", "after re-D")
MOST_LAYERS = 4  # that have histograms
BINS = 64  # an even number, so that 0 is the edge between two bins
# The share of the start's weights between the outermost edges. A few outliers would squeeze the
# rest into one narrow bar.
INSIDE = 0.999
BINNED_AT_ONCE = 1 << 22  # weights in a block: their bin numbers take 8 bytes each

Histogram = dict[str, Any]

Histograms = MutableMapping[str, list[Histogram]]  # by layer name


def choose_layers(layers: Sequence[Layer], parameters: Mapping[str, torch.Tensor]) -> list[Layer]:
    """Choose up to MOST_LAYERS maskable layers over the whole depth of the model.

    The layers are divided by depth into equal parts, and the largest of each part is chosen. Depth
    is the order of `parameters`, in which the model defines them. A file may be sorted by name.
    """
    depth = {name: number for number, name in enumerate(parameters)}
    maskable = sorted((layer for layer in layers if layer.excluded is None), key=lambda layer: depth[layer.slices[0].key])
    count = min(MOST_LAYERS, len(maskable))
    bounds = [round(i * len(maskable) / count) for i in range(count + 1)] if count else []
    ranges = (maskable[a:b] for a, b in itertools.pairwise(bounds))
    return [max(layers_of_range, key=lambda layer: layer.weights) for layers_of_range in ranges]


@torch.no_grad()
def weight_histogram(
    layer: Layer, parameters: Mapping[str, torch.Tensor], moment: str, edges: Sequence[float] | None = None
) -> Histogram:
    """Make the histogram of a layer's weights as they are now.

    Args:
        layer: The layer.
        parameters: The model's parameters by name.
        moment: One of MOMENTS.
        edges: The lowest and the highest edge. None: chosen from the weights, symmetric about 0.

    Returns:
        `{moment, edges, counts, mean_abs, zeros}`, ready for JSON. `counts` has BINS equal bins,
        and weights beyond the edges are in the outermost bins. Weights that are exactly 0 are
        counted in `zeros` only: sum(counts) + zeros is the number of weights. `mean_abs` is the
        mean |w| of all.
    """
    low, high = edges if edges is not None else _edges(layer, parameters)
    counts, zeros, total = torch.zeros(BINS, dtype=torch.int64), 0, 0.0
    for values in _blocks(layer, parameters):
        nonzero = values[values != 0].to(torch.float32)
        bins = ((nonzero - low) * (BINS / (high - low))).to(torch.int64).clamp_(0, BINS - 1)
        counts += torch.bincount(bins, minlength=BINS).cpu()
        zeros += len(values) - len(nonzero)
        total += float(nonzero.abs().sum())
    mean = total / max(1, layer.weights)
    return {"moment": moment, "edges": [low, high], "counts": counts.tolist(), "mean_abs": mean, "zeros": zeros}


def record(histograms: Histograms, layers: Sequence[Layer], parameters: Mapping[str, torch.Tensor], moment: str) -> None:
    """Add the histogram of each layer to `histograms`, with the edges of the layer's first one.

    It replaces an earlier one of the same moment. So a resumed run may record a moment again, and
    of repeated phases (DSDSD) the last one stays.
    """
    for layer in layers:
        earlier = histograms.setdefault(layer.name, [])
        new = weight_histogram(layer, parameters, moment, earlier[0]["edges"] if earlier else None)
        earlier[:] = [old for old in earlier if old["moment"] != moment] + [new]


@torch.no_grad()
def mean_abs(layers: Sequence[Layer], parameters: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the mean |w| of each layer by its name."""
    sums = [torch.stack([v.abs().sum(dtype=torch.float32) for v in _values(layer, parameters)]).sum() for layer in layers]
    totals = torch.stack(sums).tolist() if sums else []  # one transfer from the device for all layers
    return {layer.name: total / max(1, layer.weights) for layer, total in zip(layers, totals, strict=True)}


def _values(layer: Layer, parameters: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the layer's weights, flat, slice by slice. Their order may differ from the file's."""
    for tensor_slice in layer.slices:
        yield tensor_slice.of_model(parameters[tensor_slice.key].detach().reshape(-1))


def _blocks(layer: Layer, parameters: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    for values in _values(layer, parameters):
        for start in range(0, len(values), BINNED_AT_ONCE):
            yield values[start : start + BINNED_AT_ONCE]


def _edges(layer: Layer, parameters: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """The edges, symmetric about 0, between which INSIDE of the weights lie."""
    sizes = torch.cat([values.to(torch.float32).abs() for values in _values(layer, parameters)])
    limit = float(sizes.kthvalue(max(1, round(INSIDE * len(sizes)))).values) if len(sizes) else 0.0
    limit = float(f"{limit:.4g}") or 1.0
    return -limit, limit
