"""Find where each tensor of the file lives in the model, by tracing the library's own loader.

Most tensors keep their name, shape and values, and need no tracing. Others have old names or
prefixes, or are fused, split or permuted. For these, the library loads the checkpoint once more,
with a unique number in place of each element. The position of a number in the model is the position
of its element. A loader that computes new values cannot be undone exactly. Its numbers are not
among ours, and the checkpoint is refused.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from dsd_refine.checkpoint.layout import Layout
from dsd_refine.checkpoint.parts import loaded_by_parts
from dsd_refine.checkpoint.safetensors_file import Entry, listed
from dsd_refine.compat import BatchNorm
from dsd_refine.errors import CheckpointError

# Initialisers write 0, 1 and small noise. Numbers from here on cannot be confused with those.
FIRST_ID = 1024
AT_ONCE = 1 << 22  # numbers that are compared at once
EMPTY = torch.empty(0, dtype=torch.int64)
# Flat indices into a tensor, in logical order: a slice where they follow one another, which takes no memory.
Elements = slice | torch.Tensor

Load = Callable[[dict[str, torch.Tensor], torch.dtype], torch.nn.Module]


@dataclass(frozen=True)
class TensorSlice:
    """Elements of a tensor of the file, and where the model's tensor `key` holds them.

    `source` are indices into the file's tensor and `target` into the model's, both flat, in logical
    order, and equally long. Both are empty where the model's tensor is the whole file's tensor, in
    the same order.
    """

    key: str
    source: Elements = EMPTY
    target: Elements = EMPTY

    @property
    def whole(self) -> bool:
        """True if the slice has all elements of both tensors, in the same order."""
        return not count(self.source)

    def of_model(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the elements of the slice in the model's tensor, which is given flat."""
        return flat if self.whole else flat[on(self.target, flat.device)]

    def of_file(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the elements of the slice in the file's tensor, which is given flat."""
        return flat if self.whole else flat[on(self.source, flat.device)]


Placement = dict[str, tuple[TensorSlice, ...]]  # name in the file -> its slices in the model


def count(elements: Elements) -> int:
    """Return the number of elements."""
    return elements.stop - elements.start if isinstance(elements, slice) else len(elements)


def on(elements: Elements, device: torch.device) -> Elements:
    """Return the elements as an index for a tensor on this device."""
    return elements if isinstance(elements, slice) else elements.to(device)


def first_of(elements: Elements) -> int | None:
    """Return the first of the elements. None: there is none."""
    if isinstance(elements, slice):
        return int(elements.start)
    return int(elements[0]) if len(elements) else None


def within(elements: Elements, start: int, stop: int) -> Elements | None:
    """Return the elements from `start` to before `stop`, counted from `start`. None: there is none."""
    if isinstance(elements, slice):
        first, last = max(elements.start, start), min(elements.stop, stop)
        return slice(first - start, last - start) if first < last else None
    here = elements[(elements >= start) & (elements < stop)] - start
    return here if len(here) else None


def compact(indices: torch.Tensor) -> Elements:
    """Return indices as a slice, if they follow one another."""
    first = int(indices[0])
    if int(indices[-1]) - first + 1 == len(indices) and bool((indices.diff() == 1).all()):
        return slice(first, first + len(indices))
    return indices


def storage_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return a key that is equal for two names of one storage: same device, address, shape,
    strides. A tensor that is divided among processes has no address of its own.
    """
    if tensor.is_meta or hasattr(tensor, "to_local"):
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def gather(slices: tuple[TensorSlice, ...], start: torch.Tensor, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Rebuild the file's tensor from the model.

    Elements in no slice keep their value of `start`, the file's own.
    """
    if slices[0].whole:
        return state[slices[0].key].detach().reshape(start.shape)
    out = start.to(torch.float32).reshape(-1).clone()
    for tensor_slice in slices:
        values = state[tensor_slice.key].detach().to("cpu", torch.float32).reshape(-1)
        out[tensor_slice.source] = tensor_slice.of_model(values)
    return out.reshape(start.shape)


def place(
    layout: Layout,
    model: torch.nn.Module,
    load: Load | None,
    same: Callable[[str], bool],
    known: Placement | None = None,
) -> Placement:
    """Find the slices of every tensor of the file that the model uses.

    All other tensors are left out.

    Args:
        layout: The source's files.
        model: The model that the library loaded from them.
        load: Repeats the library's loading with given tensors and dtype. None: no tensor is traced.
        same: `same(name)` says whether the model's tensor of that name has the file's values. On
            the meta device, where there are no values, it says yes.
        known: The slices of tensors that are known already.

    Raises:
        CheckpointError: A parameter has no tensor in the file, or the loader computes new values.
    """
    state = model.state_dict(keep_vars=True)
    placement: Placement = {}
    for name in layout.names():
        if name in state and tuple(state[name].shape) == layout.entry(name).shape and same(name):
            placement[name] = (TensorSlice(name),)
    for name, slices in (known or {}).items():
        if slices[0].key not in placement:
            placement.setdefault(name, slices)
    # The rest may not belong to the model, or have another name in it, or be a second copy of a
    # tied tensor.
    unplaced = [n for n in layout.names() if n not in placement and _traceable(layout.entry(n))]
    if unplaced and load is not None:
        placement.update(_trace(layout, load, [key for key in state if key not in placement], placement))
    _refuse_uncovered(layout, model, placement, state)
    return placement


def _traceable(entry: Entry) -> bool:
    """True for weights, statistics and single counters (`num_batches_tracked`).

    Other integers are constant tables.
    """
    return entry.dtype.is_floating_point or (entry.dtype == torch.int64 and entry.numel == 1)


def _trace(layout: Layout, load: Load, keys: Iterable[str], placed: Placement) -> Placement:
    """Load the checkpoint with a unique number in each element, and see which tensors of the model
    (`keys`) got which.
    """
    numbered, bounds = _numbered(layout, [name for name in layout.names() if _traceable(layout.entry(name))])
    others = {name: layout.tensor(name) for name in layout.names() if name not in numbered}
    traced = load({**numbered, **others}, torch.float64).state_dict()
    found = _slices(layout, {key: traced[key] for key in keys}, bounds)
    return {name: slices for name, slices in found.items() if name not in placed}


def trace_by_parts(layout: Layout, load: Load, names: Iterable[str]) -> Placement:
    """Find the slices of some tensors of the file as `place` does, with no more than a block of the model in memory.

    Args:
        layout: The source's files.
        load: Repeats the library's loading with given tensors and dtype.
        names: The tensors.
    """
    placement: Placement = {}
    bounds: dict[str, int] = {}

    def values(part: list[str]) -> dict[str, torch.Tensor]:
        numbered, of_part = _numbered(layout, part)
        bounds.clear()
        bounds.update(of_part)
        return numbered

    shapes = {name: tensor for file in layout.files for name, tensor in file.mapped().items()}
    wanted = [name for name in names if _traceable(layout.entry(name))]
    for state in loaded_by_parts(lambda given: load(given, torch.float64), shapes, wanted, values):
        placement |= _slices(layout, state, bounds)
    return placement


def _numbered(layout: Layout, names: Iterable[str]) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Tensors in which each element has a number of its own, and the first number of each."""
    numbered, starts, next_id = {}, {}, FIRST_ID
    for name in names:
        entry = layout.entry(name)
        dtype = torch.float64 if entry.dtype.is_floating_point else torch.int64
        ids = torch.arange(next_id, next_id + entry.numel, dtype=dtype)
        numbered[name], starts[name] = ids.reshape(entry.shape), next_id
        next_id += entry.numel
    return numbered, starts


def _slices(layout: Layout, traced: Mapping[str, torch.Tensor], starts: dict[str, int]) -> Placement:
    """The slices of the tensors whose numbers are in tensors of the model."""
    slices: dict[str, list[TensorSlice]] = {}
    ends = {name: start + layout.entry(name).numel for name, start in starts.items()}
    for key, values in traced.items():
        for name, tensor_slice in _runs(key, values, starts, ends) or _origins(key, values, starts, max(ends.values())):
            whole = values.numel() == layout.entry(name).numel and _in_order(tensor_slice)
            slices.setdefault(name, []).append(TensorSlice(key) if whole else tensor_slice)
    return {name: tuple(of_name) for name, of_name in slices.items()}


def _runs(
    key: str, values: torch.Tensor, starts: Mapping[str, int], ends: Mapping[str, int]
) -> list[tuple[str, TensorSlice]] | None:
    """The origins of a tensor of the model in which numbers follow one another, as where a loader stacks or splits tensors.

    None: they do not. `_origins` takes several times the memory of the tensor, and this next to none.
    """
    ids, names, firsts = values.reshape(-1), list(starts), list(starts.values())
    found: list[tuple[str, TensorSlice]] = []
    at, seen = 0, list[tuple[int, int]]()
    while at < len(ids):
        number = ids[at].item()
        owner = names[max(0, bisect_right(firsts, number) - 1)] if names else ""
        if not names or not starts[owner] <= number < ends[owner] or number != int(number):
            return None
        first, length = int(number), min(ends[owner] - int(number), len(ids) - at)
        if not _follow(ids[at : at + length], first):
            return None
        found.append((owner, TensorSlice(key, _slice(first - starts[owner], length), _slice(at, length))))
        seen.append((first, first + length))
        at += length
    seen.sort()
    twice = any(after[0] < before[1] for before, after in pairwise(seen))
    return None if twice else found


def _follow(ids: torch.Tensor, first: int) -> bool:
    """Whether numbers follow one another from `first` on."""
    return all(
        torch.equal(block, torch.arange(first + number * AT_ONCE, first + number * AT_ONCE + len(block), dtype=ids.dtype))
        for number, block in enumerate(torch.split(ids, AT_ONCE))
    )


def _slice(first: int, length: int) -> slice:
    return slice(first, first + length)


def _origins(key: str, values: torch.Tensor, starts: dict[str, int], end: int) -> Iterable[tuple[str, TensorSlice]]:
    """The tensors of the file that a traced tensor of the model comes from, each with its slice."""
    ids = values.reshape(-1)
    whole = ids.round().to(torch.int64)
    moved = bool(((whole == ids) & (whole >= FIRST_ID) & (whole < end)).all())
    if not moved or len(torch.unique(whole)) != len(whole):
        return  # The library initialised or computed these values. place() refuses them in a parameter.
    names = list(starts)
    bounds = torch.tensor([*starts.values()])
    owner = torch.bucketize(whole, bounds, right=True) - 1
    for number in torch.unique(owner).tolist():
        target = (owner == number).nonzero().reshape(-1)
        yield names[number], TensorSlice(key, compact(whole[target] - starts[names[number]]), compact(target))


def _in_order(tensor_slice: TensorSlice) -> bool:
    """True if the slice is all elements of the file's tensor in their order, as after a renaming."""
    source = tensor_slice.source
    return isinstance(source, slice) and source == tensor_slice.target and source.start == 0


def _refuse_other_sizes(layout: Layout, missing: list[str], state: dict[str, torch.Tensor]) -> None:
    """Refuse tensors that the library resized on loading, such as position tables for another image
    size.
    """
    for name in missing:
        if name in layout.where and layout.entry(name).shape != tuple(state[name].shape):
            raise CheckpointError(f"{layout.folder}: {other_size(name, layout.entry(name).shape, state[name].shape)}")


def other_size(name: str, filed: Sequence[int], wanted: Sequence[int]) -> str:
    """Describe a tensor whose shape in the file differs from the shape that the config gives it."""
    ours, theirs = ("x".join(map(str, shape)) for shape in (filed, wanted))
    hint = " (the image size: timm's `img_size` in model_args, transformers' `image_size`)" if "pos" in name else ""
    return f"{name} is {ours} in the file, but {theirs} in the model that config.json asks for; correct config.json{hint}"


def _refuse_uncovered(layout: Layout, model: torch.nn.Module, placement: Placement, state: dict[str, torch.Tensor]) -> None:
    """Refuse a model with parameters or BatchNorm statistics that come from no tensor of the file."""
    covered = {storage_of(state[tensor_slice.key]) for slices in placement.values() for tensor_slice in slices}
    # The model itself computes a parameter that never trains and is in no file (sinusoidal
    # positions).
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.numel() and storage_of(p) not in covered]
    _refuse_other_sizes(layout, missing, state)
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm) and module.running_mean is not None:
            statistics = {f"{name}.running_mean", f"{name}.running_var"} & set(state)
            missing += sorted(key for key in statistics if storage_of(state[key]) not in covered)
    if missing:
        raise CheckpointError(
            f"these parameters are not in the file as they are in the model: {listed(missing)}. Either they are missing, "
            "or the library computes them on loading, which cannot be written back exactly"
        )
