"""Which weights can be masked, which are, and the mask itself.

A mask is a bool tensor beside the model, keyed by parameter name, True = keep; nothing is attached to the model. Counts and
ties are decided on the file's tensors, which is what the user sees; the mask then goes where the model holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from dsd_refine.errors import RunError
from dsd_refine.masking.layers import Layer, masked_count
from dsd_refine.masking.selection import flat, without_smallest
from dsd_refine.seeding import stable_seed

Masks = dict[str, torch.Tensor]

Piece = tuple[str, int]  # a layer's name, and which of its experts (0 where it fuses none)

BLOCK = 1 << 17  # weights that each thread masks at a time: their flags, widened to integers, stay in its cache
CHECKED = 1 << 20  # weights looked at at a time


def make_masks(
    layers: Sequence[Layer],
    parameters: Mapping[str, torch.Tensor],
    sparsity: float,
    criterion: str = "magnitude",
    seed: Sequence[int | str] = (),
) -> Masks:
    """Masks for the weights as they are now: exactly `masked_count` False in every maskable layer.

    `magnitude` drops the smallest |w| (paper, section 3), ties by lowest flat index in the file's tensor; `random` draws
    as many from `seed` and the layer's name. A parameter without a masked weight gets no mask.
    """
    masks: Masks = {}
    flags: dict[str, torch.Tensor] = {}  # flat, of parameters that several layers share or that hold theirs in another order
    for layer in layers:
        if not layer.masked(sparsity):
            continue
        first = layer.spots[0]
        if criterion == "magnitude" and layer.groups == 1 and not len(first.source):
            masks[first.key] = without_smallest(parameters[first.key], layer.masked(sparsity))
            continue
        keep = torch.cat([_keep(group, sparsity, criterion, (*seed, layer.name, i)) for i, group in _groups(layer, parameters)])
        for spot in layer.spots:
            if not len(spot.source):
                flags[spot.key] = keep
            else:
                ones = torch.ones(parameters[spot.key].numel(), dtype=torch.bool, device=keep.device)
                flags.setdefault(spot.key, ones)[spot.target.to(keep.device)] = keep[spot.source.to(keep.device)]
    return masks | {key: _shaped(found, parameters[key]) for key, found in flags.items()}


def _shaped(found: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A flat mask with the shape and the strides of its parameter."""
    mask = found.reshape(parameter.shape)
    if mask.stride() == parameter.stride():
        return mask
    return torch.empty_like(parameter, dtype=torch.bool).copy_(mask)


def _groups(layer: Layer, parameters: Mapping[str, torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """The layer's values in the file's order, expert by expert."""
    first = layer.spots[0]
    if not len(first.source):
        values = parameters[first.key].detach().reshape(-1)
    else:
        values = parameters[first.key].new_zeros(layer.weights)
        for spot in layer.spots:
            values[spot.source.to(values.device)] = parameters[spot.key].detach().reshape(-1)[spot.target.to(values.device)]
    return enumerate(values.reshape(layer.groups, -1))


def _keep(values: torch.Tensor, sparsity: float, criterion: str, seed: Sequence[int | str]) -> torch.Tensor:
    count = masked_count(len(values), sparsity)
    if count and criterion == "magnitude":
        return without_smallest(values, count)
    keep = torch.ones(len(values), dtype=torch.bool, device=values.device)
    if count:
        generator = torch.Generator().manual_seed(stable_seed(*seed))
        keep[torch.randperm(len(values), generator=generator)[:count].to(values.device)] = False
    return keep


def apply_masks(masks: Masks, parameters: Mapping[str, torch.Tensor]) -> None:
    """Set every masked weight to exactly +0.0, in place, leaving the bits of all others alone.

    The float32 weights are multiplied as integers by 0 or 1: exact for any value, NaN and -0.0 included, and several times
    faster than masked_fill_ on a CPU.
    """
    masker(masks, parameters)()


def masker(masks: Masks, parameters: Mapping[str, torch.Tensor]) -> Callable[[], None]:
    """`apply_masks` for every step: the views of the blocks are made once, for as long as masks and storages stay."""
    return _multiplier([(parameters[key], mask) for key, mask in masks.items()])


def _multiplier(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
    """Multiply float32 bits by masks that are laid out like them, in one call: on a CPU in blocks, elsewhere whole."""
    bits: list[torch.Tensor] = []
    flags: list[torch.Tensor] = []
    for values, mask in pairs:
        size = BLOCK * torch.get_num_threads() if values.device.type == "cpu" else values.numel()
        bits += torch.split(flat(values).view(torch.int32), size)
        flags += torch.split(flat(mask).view(torch.uint8), size)

    def multiply() -> None:
        if bits:
            torch._foreach_mul_(bits, flags)

    return multiply


def mask_gradients(masks: Masks, parameters: Mapping[str, torch.Tensor]) -> None:
    """Zero the gradients of masked weights, so that they do not count in a gradient norm."""
    found = [(parameters[key].grad, mask) for key, mask in masks.items()]
    _multiplier([(gradient, mask) for gradient, mask in found if gradient is not None and gradient.stride() == mask.stride()])()
    for gradient, mask in found:
        if gradient is not None and gradient.stride() != mask.stride():
            gradient.view(torch.int32).mul_(mask)


@torch.no_grad()
def masked_values(masks: Masks, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that the masks will take out, as flat tensors in logical order."""
    return {name: parameters[name].detach()[~mask] for name, mask in masks.items()}


@torch.no_grad()
def put_back(masks: Masks, values: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> None:
    """Undo a mask: what `masked_values` kept stands where it stood."""
    for name, mask in masks.items():
        parameters[name][~mask] = values[name]


def pieces(layers: Sequence[Layer], parameters: Mapping[str, torch.Tensor]) -> list[Piece]:
    """Every maskable layer that trains, a fused one expert by expert."""
    return [
        (layer.name, group)
        for layer in layers
        if layer.excluded is None and any(parameters[spot.key].requires_grad for spot in layer.spots)
        for group in range(layer.groups)
    ]


@torch.no_grad()
def without_gradient(layers: Sequence[Layer], parameters: Mapping[str, torch.Tensor], known: Sequence[Piece]) -> list[Piece]:
    """Those of the `known` pieces whose gradient, as it lies in the parameters now, is absent or 0 everywhere."""
    names = {name for name, _ in known}
    seen: dict[Piece, torch.Tensor] = {}
    for layer in (layer for layer in layers if layer.name in names):
        held = {spot.key: parameters[spot.key].grad for spot in layer.spots}
        if all(gradient is None for gradient in held.values()):
            continue
        filled = {key: torch.zeros_like(parameters[key]) if g is None else g for key, g in held.items()}
        seen |= {(layer.name, group): values.any() for group, values in _groups(layer, filled)}
    reached = torch.stack([*seen.values()]).tolist() if seen else []  # a device is waited for once
    gone = {piece for piece, is_reached in zip(seen, reached, strict=True) if is_reached}
    return [piece for piece in known if tuple(piece) not in gone]


@torch.no_grad()
def never_back(
    layers: Sequence[Layer],
    parameters: Mapping[str, torch.Tensor],
    source: Mapping[str, torch.Tensor],
    lost: Sequence[Piece],
) -> dict[str, torch.Tensor]:
    """Parameter -> True where a weight of a `lost` piece is 0 and was not in the `source`; only with such a weight."""
    chosen: dict[str, torch.Tensor] = {}
    for layer in layers:
        groups = [group for name, group in lost if name == layer.name]
        if not groups:
            continue
        flags = torch.zeros(layer.groups, layer.weights // layer.groups, dtype=torch.bool)
        flags[groups] = True
        for spot in layer.spots:
            flat = chosen.setdefault(spot.key, torch.zeros(parameters[spot.key].numel(), dtype=torch.bool))
            flat[spot.target if len(spot.target) else slice(None)] = flags.reshape(-1)[
                spot.source if len(spot.source) else slice(None)
            ]
    found = {}
    for key, flat in chosen.items():
        zeros = flat.reshape(parameters[key].shape).to(parameters[key].device) & (parameters[key] == 0)
        zeros &= (source[key] != 0).to(zeros.device)
        if zeros.any():
            found[key] = zeros
    return found


def count_in_layers(layers: Sequence[Layer], flags: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Layer name -> how many of its own weights are True in `flags` (by parameter); only layers that have one."""
    found = {}
    for layer in layers:
        parts = [(flags[spot.key].reshape(-1), spot.target) for spot in layer.spots if spot.key in flags]
        count = sum(int((part[where.to(part.device)] if len(where) else part).sum()) for part, where in parts)
        if count and layer.excluded is None:
            found[layer.name] = count
    return found


@torch.no_grad()
def check_masks(masks: Masks, parameters: Mapping[str, torch.Tensor]) -> None:
    """Raise RunError if any masked weight is not exactly 0."""
    for key, mask in masks.items():
        # what is kept becomes 0, so that what is not 0 is masked and wrong
        blocks = zip(torch.split(flat(parameters[key]), CHECKED), torch.split(flat(mask), CHECKED), strict=True)
        wrong = sum(int(torch.count_nonzero((bits.view(torch.int32) * ~flags).view(torch.float32))) for bits, flags in blocks)
        if wrong:
            raise RunError(f"{key}: {wrong} masked weights are not 0; the sparse phase is broken, nothing was published")


@torch.no_grad()
def count_zeros(layers: Sequence[Layer], parameters: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Layer name -> number of weights that are exactly 0 now, counted in the layer's own elements."""
    return {layer.name: sum(int((group == 0).sum()) for _, group in _groups(layer, parameters)) for layer in layers}


@torch.no_grad()
def empty_filters(layers: Sequence[Layer], parameters: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Layer name -> (filters without a weight that is not 0, filters), for maskable filter banks that have such a filter.

    A mask that takes every weight of a filter takes the filter itself: depth-wise convolutions, whose filters have 9 or 25
    weights, lose some by chance under a random mask. `parameters` are as they stand, at a sparse phase's end.
    """
    found = {}
    for layer in layers:
        if layer.excluded is None and layer.groups == 1 and len(layer.shape) > 2:
            values = next(values for _, values in _groups(layer, parameters))
            empty = int((values.reshape(layer.shape[0], -1) == 0).all(1).sum())
            if empty:
                found[layer.name] = (empty, layer.shape[0])
    return found
