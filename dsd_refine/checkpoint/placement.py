"""Find where each tensor of the file lives in the model, by tracing the library's own loader.

Most tensors keep their name, shape and values, and need no tracing. Others have old names or
prefixes, or are fused, split or permuted. For these, the library loads the checkpoint once more,
with a unique number in place of each element. The position of a number in the model is the position
of its element. A loader that computes new values cannot be undone exactly. Its numbers are not
among ours, and the checkpoint is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dsd_refine.checkpoint.layout import Layout
from dsd_refine.checkpoint.safetensors_file import Entry, listed
from dsd_refine.compat import BatchNorm
from dsd_refine.errors import CheckpointError

# Initialisers write 0, 1 and small noise. Numbers from here on cannot be confused with those.
FIRST_ID = 1024
EMPTY = torch.empty(0, dtype=torch.int64)

Load = Callable[[dict[str, torch.Tensor], torch.dtype], torch.nn.Module]


@dataclass(frozen=True)
class TensorSlice:
    """Elements of a tensor of the file, and where the model's tensor `key` holds them.

    `source` are indices into the file's tensor and `target` into the model's, both flat, in logical
    order, and equally long. Both are empty where the model's tensor is the whole file's tensor, in
    the same order.
    """

    key: str
    source: torch.Tensor = EMPTY
    target: torch.Tensor = EMPTY

    @property
    def whole(self) -> bool:
        """True if the slice has all elements of both tensors, in the same order."""
        return not len(self.source)


Placement = dict[str, tuple[TensorSlice, ...]]  # name in the file -> its slices in the model


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
        out[tensor_slice.source] = values[tensor_slice.target]
    return out.reshape(start.shape)


def place(
    layout: Layout,
    model: torch.nn.Module,
    load: Load | None,
    same: Callable[[str], bool],
    renamed: Mapping[str, str] | None = None,
) -> Placement:
    """Find the slices of every tensor of the file that the model uses.

    All other tensors are left out.

    Args:
        layout: The source's files.
        model: The model that the library loaded from them.
        load: Repeats the library's loading with given tensors and dtype. None: no tensor is traced.
        same: `same(name)` says whether the model's tensor of that name has the file's values. On
            the meta device, where there are no values, it says yes.
        renamed: Names in the model of tensors that are known to be whole ones of the file: name -> name in the file.

    Raises:
        CheckpointError: A parameter has no tensor in the file, or the loader computes new values.
    """
    state = model.state_dict(keep_vars=True)
    placement: Placement = {}
    for name in layout.names():
        if name in state and tuple(state[name].shape) == layout.entry(name).shape and same(name):
            placement[name] = (TensorSlice(name),)
    moved = {key: name for key, name in (renamed or {}).items() if key not in placement}
    for key, name in moved.items():
        placement.setdefault(name, (TensorSlice(key),))
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
    numbered, starts, next_id = {}, {}, FIRST_ID
    for name in layout.names():
        entry = layout.entry(name)
        if _traceable(entry):
            dtype = torch.float64 if entry.dtype.is_floating_point else torch.int64
            ids = torch.arange(next_id, next_id + entry.numel, dtype=dtype)
            numbered[name], starts[name] = ids.reshape(entry.shape), next_id
            next_id += entry.numel
        else:
            numbered[name] = layout.tensor(name)
    traced = load(numbered, torch.float64).state_dict()
    slices: dict[str, list[TensorSlice]] = {}
    for key in keys:
        for name, tensor_slice in _origins(key, traced[key], starts, next_id):
            if name not in placed:
                whole = traced[key].numel() == layout.entry(name).numel and _in_order(tensor_slice)
                slices.setdefault(name, []).append(TensorSlice(key) if whole else tensor_slice)
    return {name: tuple(of_name) for name, of_name in slices.items()}


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
        yield names[number], TensorSlice(key, whole[target] - starts[names[number]], target)


def _in_order(tensor_slice: TensorSlice) -> bool:
    """True if the slice is all elements of the file's tensor in their order, as after a renaming."""
    source = tensor_slice.source
    return torch.equal(source, tensor_slice.target) and torch.equal(source, torch.arange(len(source)))


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
