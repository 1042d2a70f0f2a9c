"""Masks: how they are made, applied, undone and checked.

A mask is a bool tensor beside the model, keyed by parameter name. True means: keep the weight.
Nothing is attached to the model. Counts and ties are decided in the file's tensors, because these
are what the user sees. The model may hold the same weights in another order or in another tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from dsd_refine.checkpoint.placement import on
from dsd_refine.compat import multiply_in_place
from dsd_refine.errors import RunError
from dsd_refine.masking.layers import Layer, masked_count
from dsd_refine.masking.selection import all_but_smallest, flat
from dsd_refine.seeding import stable_seed

Masks = dict[str, torch.Tensor]

Group = tuple[str, int]  # a layer's name, and the number of one of its experts (0 if it fuses none)

MASKED_PER_THREAD = 1 << 17  # weights in a block: their flags, as integers, fit into a core's cache
CHECKED_AT_ONCE = 1 << 20  # weights in a block: a check needs little memory


def make_masks(
    layers: Sequence[Layer],
    parameters: Mapping[str, torch.Tensor],
    sparsity: float,
    criterion: str = "magnitude",
    seed: Sequence[int | str] = (),
    counts: Mapping[Group, int] | None = None,
) -> Masks:
    """Make masks for the weights as they are now.

    In each maskable layer exactly `layer.masked(sparsity)` flags are False, or as many as `counts` say. A parameter without a
    masked weight gets no mask. A mask has the shape and the strides of its parameter.

    Args:
        layers: The file's tensors.
        parameters: The model's parameters by name.
        sparsity: Share of weights to mask in each layer, 0 <= sparsity < 1.
        criterion: "magnitude" masks the smallest |w| (paper, section 3). Of equal weights, those
            with the lowest flat index in the file's tensor go first. "random" draws the weights.
        seed: What "random" draws from, together with the layer's name.
        counts: How many weights of each expert (number 0 if the layer fuses none) to mask, instead of
            the share `sparsity`. See `global_counts`.
    """
    masks: Masks = {}
    # Flat masks of parameters that hold several layers, or one in another order than the file.
    flat_masks: dict[str, torch.Tensor] = {}
    for layer in layers:
        own = counts_of(layer, sparsity, counts)
        if not any(own):
            continue
        first = layer.slices[0]
        if criterion == "magnitude" and layer.groups == 1 and first.whole:
            masks[first.key] = all_but_smallest(parameters[first.key], own[0])
            continue
        groups = _groups(layer, parameters)
        keep = torch.cat([_keep(group, own[i], criterion, (*seed, layer.name, i)) for i, group in groups])
        for tensor_slice in layer.slices:
            if tensor_slice.whole:
                flat_masks[tensor_slice.key] = keep
            else:
                if tensor_slice.key not in flat_masks:
                    numel = parameters[tensor_slice.key].numel()
                    flat_masks[tensor_slice.key] = torch.ones(numel, dtype=torch.bool, device=keep.device)
                flat_masks[tensor_slice.key][on(tensor_slice.target, keep.device)] = tensor_slice.of_file(keep)
    return masks | {key: _shaped(mask, parameters[key]) for key, mask in flat_masks.items()}


def counts_of(layer: Layer, sparsity: float, counts: Mapping[Group, int] | None = None) -> list[int]:
    """Return how many weights of each expert of a layer are masked (see `make_masks`). Empty: the layer is not masked."""
    if counts is not None:
        return [counts.get((layer.name, number), 0) for number in range(layer.groups)]
    return [masked_count(layer.weights // layer.groups, sparsity)] * layer.groups if layer.excluded is None else []


def _shaped(flat_mask: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Give a flat mask the shape and the strides of its parameter."""
    mask = flat_mask.reshape(parameter.shape)
    if mask.stride() == parameter.stride():
        return mask
    return torch.empty_like(parameter, dtype=torch.bool).copy_(mask)


def _groups(layer: Layer, parameters: Mapping[str, torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the number and the flat values of each expert of the layer, in the file's order."""
    first = layer.slices[0]
    if first.whole:
        values = parameters[first.key].detach().reshape(-1)
    else:
        values = parameters[first.key].new_zeros(layer.weights)
        for tensor_slice in layer.slices:
            own = tensor_slice.of_model(parameters[tensor_slice.key].detach().reshape(-1))
            values[on(tensor_slice.source, values.device)] = own
    return enumerate(values.reshape(layer.groups, len(values) // layer.groups), layer.first_group)


def global_counts(layers: Sequence[Layer], values: Mapping[str, torch.Tensor], sparsity: float) -> dict[Group, int]:
    """Return how many of the smallest |values| of the whole model lie in each expert of each maskable layer.

    Of N weights in all, round(sparsity * N) are counted, but the largest of each expert never. Ties: the
    layers in their order, then the lowest flat index first.

    Args:
        layers: The file's tensors.
        values: The values to rank, by parameter name.
        sparsity: Share of all maskable weights, 0 <= sparsity < 1.
    """
    groups = {
        (layer.name, number): group.detach().to("cpu", torch.float32, copy=True).abs_()
        for layer in layers
        if layer.excluded is None
        for number, group in _groups(layer, values)
    }
    for group in groups.values():
        group[len(group) - 1 - int(group.flip(0).argmax())] = torch.inf
    ranked = torch.cat(list(groups.values()))
    count = max(0, min(round(sparsity * len(ranked)), len(ranked) - len(groups)))
    if not count:
        return {}
    masked = torch.split(~all_but_smallest(ranked, count), [len(group) for group in groups.values()])
    return {name: int(flags.sum()) for name, flags in zip(groups, masked, strict=True)}


def _keep(values: torch.Tensor, count: int, criterion: str, seed: Sequence[int | str]) -> torch.Tensor:
    """The flat mask of one expert, or of a layer that fuses none."""
    if count and criterion == "magnitude":
        return all_but_smallest(values, count)
    keep = torch.ones(len(values), dtype=torch.bool, device=values.device)
    if count:
        generator = torch.Generator().manual_seed(stable_seed(*seed))
        keep[torch.randperm(len(values), generator=generator)[:count].to(values.device)] = False
    return keep


def apply_masks(masks: Masks, parameters: Mapping[str, torch.Tensor]) -> None:
    """Set every masked weight to exactly +0.0, in place.

    The bits of all other weights stay as they are.

    The bits of the float32 weights are multiplied, as integers, by 0 or 1. This is exact for every
    value, also for NaN and -0.0. On a CPU it is several times faster than `masked_fill_`.
    """
    masker(masks, parameters)()


def masker(masks: Masks, parameters: Mapping[str, torch.Tensor]) -> Callable[[], None]:
    """Return a function that does what `apply_masks` does, for use after every step.

    It is faster, because it makes its views of the tensors only once. It is valid as long as the
    masks and the parameters keep their storages.
    """
    return _multiplier([(parameters[key], mask) for key, mask in masks.items()])


def _multiplier(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
    """Return a function that multiplies the bits of float32 tensors by masks with the same strides.

    A CPU works on blocks that fit into the caches, another device on whole tensors.
    """
    bits: list[torch.Tensor] = []
    flags: list[torch.Tensor] = []
    for values, mask in pairs:
        size = MASKED_PER_THREAD * torch.get_num_threads() if values.device.type == "cpu" else values.numel()
        bits += torch.split(flat(values).view(torch.int32), size)
        flags += torch.split(flat(mask).view(torch.uint8), size)

    def multiply() -> None:
        if bits:
            multiply_in_place(bits, flags)

    return multiply


def mask_gradients(masks: Masks, parameters: Mapping[str, torch.Tensor]) -> None:
    """Set the gradients of masked weights to 0, so that they do not count in a gradient norm."""
    pairs = [(parameters[key].grad, mask) for key, mask in masks.items()]
    _multiplier([(gradient, mask) for gradient, mask in pairs if gradient is not None and gradient.stride() == mask.stride()])()
    for gradient, mask in pairs:
        if gradient is not None and gradient.stride() != mask.stride():
            gradient.view(torch.int32).mul_(mask)


@torch.no_grad()
def masked_values(masks: Masks, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights that the masks would set to 0, as flat tensors in logical order."""
    return {name: parameters[name].detach()[~mask] for name, mask in masks.items()}


@torch.no_grad()
def put_back(masks: Masks, values: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> None:
    """Undo a mask, in place: write the `masked_values` from before it back into the parameters."""
    for name, mask in masks.items():
        parameters[name][~mask] = values[name]


def trained_groups(layers: Sequence[Layer], parameters: Mapping[str, torch.Tensor]) -> list[Group]:
    """Return every expert of every maskable layer that trains.

    A layer that fuses none is one group.
    """
    return [
        (layer.name, group)
        for layer in layers
        if layer.excluded is None and any(parameters[tensor_slice.key].requires_grad for tensor_slice in layer.slices)
        for group in range(layer.groups)
    ]


@torch.no_grad()
def without_gradient(layers: Sequence[Layer], parameters: Mapping[str, torch.Tensor], known: Sequence[Group]) -> list[Group]:
    """Return those of the `known` groups whose gradient is now None, or 0 everywhere."""
    names = {name for name, _ in known}
    has_gradient: dict[Group, torch.Tensor] = {}
    for layer in (layer for layer in layers if layer.name in names):
        gradients = {tensor_slice.key: parameters[tensor_slice.key].grad for tensor_slice in layer.slices}
        if all(gradient is None for gradient in gradients.values()):
            continue
        filled = {key: torch.zeros_like(parameters[key]) if g is None else g for key, g in gradients.items()}
        has_gradient |= {(layer.name, group): values.any() for group, values in _groups(layer, filled)}
    # One transfer for all of them, because each makes the device wait.
    flags = torch.stack([*has_gradient.values()]).tolist() if has_gradient else []
    reached = {group for group, flag in zip(has_gradient, flags, strict=True) if flag}
    return [group for group in known if tuple(group) not in reached]


@torch.no_grad()
def never_back(
    layers: Sequence[Layer],
    parameters: Mapping[str, torch.Tensor],
    source: Mapping[str, torch.Tensor],
    lost: Sequence[Group],
) -> dict[str, torch.Tensor]:
    """Find the masked weights that training cannot bring back.

    Args:
        layers: The file's tensors.
        parameters: The model's parameters by name, after a mask.
        source: The same parameters as they are in the source.
        lost: The groups that get no gradient.

    Returns:
        By parameter name, a bool tensor of the parameter's shape. True: the weight is in a `lost`
        group, is 0 now, and is not 0 in the source. Parameters without such a weight are left out.
    """
    in_lost: dict[str, torch.Tensor] = {}  # flat
    for layer in layers:
        first, last = layer.first_group, layer.first_group + layer.groups
        groups = [group - first for name, group in lost if name == layer.name and first <= group < last]
        if not groups:
            continue
        flags = torch.zeros(layer.groups, layer.weights // layer.groups, dtype=torch.bool)
        flags[groups] = True
        for tensor_slice in layer.slices:
            none = torch.zeros(parameters[tensor_slice.key].numel(), dtype=torch.bool)
            of_parameter = in_lost.setdefault(tensor_slice.key, none)
            if tensor_slice.whole:
                of_parameter.copy_(flags.reshape(-1))
            else:
                of_parameter[tensor_slice.target] = tensor_slice.of_file(flags.reshape(-1))
    lost_weights = {}
    for key, flat_flags in in_lost.items():
        zeros = flat_flags.reshape(parameters[key].shape).to(parameters[key].device) & (parameters[key] == 0)
        zeros &= (source[key] != 0).to(zeros.device)
        if zeros.any():
            lost_weights[key] = zeros
    return lost_weights


def count_in_layers(layers: Sequence[Layer], flags: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Count the weights of each maskable layer that are True in `flags` (by parameter name).

    Layers without such a weight are left out.
    """
    counts = {}
    for layer in layers:
        count = 0
        for tensor_slice in layer.slices:
            if tensor_slice.key in flags:
                count += int(tensor_slice.of_model(flags[tensor_slice.key].reshape(-1)).sum())
        if count and layer.excluded is None:
            counts[layer.name] = count
    return counts


@torch.no_grad()
def check_masks(masks: Masks, parameters: Mapping[str, torch.Tensor]) -> None:
    """Check that every masked weight is exactly 0.

    Raises:
        RunError: A masked weight is not 0.
    """
    for key, mask in masks.items():
        weights, flags = torch.split(flat(parameters[key]), CHECKED_AT_ONCE), torch.split(flat(mask), CHECKED_AT_ONCE)
        # Kept weights become 0 here. A weight that is still not 0 is masked and wrong.
        masked = ((block.view(torch.int32) * ~keep).view(torch.float32) for block, keep in zip(weights, flags, strict=True))
        wrong = sum(int(torch.count_nonzero(block)) for block in masked)
        if wrong:
            raise RunError(f"{key}: {wrong} masked weights are not 0; the sparse phase is broken, nothing was published")


@torch.no_grad()
def count_zeros(layers: Sequence[Layer], parameters: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Count the weights of each layer that are exactly 0 now, by the layer's name."""
    return {layer.name: sum(zeros_in(group) for _, group in _groups(layer, parameters)) for layer in layers}


def zeros_in(values: torch.Tensor) -> int:
    """Count the values that are exactly 0."""
    return values.numel() - int(torch.count_nonzero(values))


@torch.no_grad()
def empty_filters(layers: Sequence[Layer], parameters: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Count the filters whose weights are all 0, in each maskable filter bank.

    A mask that covers every weight of a filter removes the filter. The filters of a depth-wise
    convolution have only 9 or 25 weights, so a random mask removes some of them by chance.

    Args:
        layers: The file's tensors.
        parameters: The model's parameters by name, at the end of a sparse phase.

    Returns:
        (empty filters, all filters) by layer name, for layers that have an empty filter.
    """
    counts = {}
    for layer in layers:
        if layer.excluded is None and layer.groups == 1 and len(layer.shape) > 2:
            values = next(values for _, values in _groups(layer, parameters))
            empty = int((values.reshape(layer.shape[0], -1) == 0).all(1).sum())
            if empty:
                counts[layer.name] = (empty, layer.shape[0])
    return counts
