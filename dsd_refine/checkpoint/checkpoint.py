"""Open a released checkpoint: its files, its model, and where each tensor of the files is in the
model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch

from dsd_refine.checkpoint.file_values import FileValues
from dsd_refine.checkpoint.guard import bounded
from dsd_refine.checkpoint.layout import SINGLE, Layout, read_layout
from dsd_refine.checkpoint.library import Library
from dsd_refine.checkpoint.parts import Absent
from dsd_refine.checkpoint.placement import Placement, TensorSlice, on, place, storage_of, trace_by_parts
from dsd_refine.checkpoint.safetensors_file import (
    TRAINABLE,
    WeightFile,
    all_finite,
    build_header,
    is_pointer,
    listed,
    read_header,
)
from dsd_refine.checkpoint.source import Source
from dsd_refine.checkpoint.write import write_weights, written_dtypes
from dsd_refine.errors import CheckpointError, Diverged
from dsd_refine.files import copy_file, sha256_file, sha256_files

QUANTISED = {
    torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.float8_e4m3fn, torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """An opened source.

    Attributes:
        source: The folder with its files.
        library: The adapter of the library that the source is for.
        layout: The weight files and their tensors.
        model: The model with the source's values in float32, or on the meta device without values.
        placement: Where the model holds each tensor of the files.
        warnings: For the user.
        values: The model's tensors by name, of a model whose parameters are on the meta device until a sharded run
            has divided it (`open_unread`). Empty: the model has its values.
        moved: Names of tensors of the file that the model holds in another form, if it is such a model.
    """

    source: Source
    library: Library
    layout: Layout
    model: torch.nn.Module
    placement: Placement
    warnings: tuple[str, ...]
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    moved: tuple[str, ...] = ()

    def file_values(self) -> FileValues:
        """Return the model's tensors by name, in the dtypes of the files."""
        return FileValues(self.placement, self.layout.mapped(), self.model.state_dict())

    def refuse_broken(self) -> None:
        """Check the values of a checkpoint that `open_unread` opened, as `open_checkpoint` does.

        Raises:
            CheckpointError: A value is not finite, or a parameter has a dtype that cannot be trained.
        """
        tensors = self.layout.mapped()
        trained = {key for key, _ in self.model.named_parameters(remove_duplicate=False)}
        _refuse_values(self.layout, self.placement, tensors, trained)

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of every file in `counted`, by file name."""
        hashed = sha256_files(self.source.folder / name for name in self.counted)
        return {name: hashed[self.source.folder / name] for name in self.counted}

    @property
    def counted(self) -> list[str]:
        """Names of the source's files that an output must have: weight files first, then side
        files.
        """
        return [*self.weight_files, *self.side_files]

    @property
    def side_files(self) -> list[str]:
        """Names of the files that an output has besides the weights."""
        return self.source.side_files(set(self.weight_files))[0]

    @property
    def weight_files(self) -> list[str]:
        """Names of the source's weight files and of their index."""
        return self.layout.read_from

    @property
    def filled(self) -> dict[str, set[str]]:
        """For each tensor of the file, the names of the model's tensors that hold its elements."""
        return {name: {tensor_slice.key for tensor_slice in slices} for name, slices in self.placement.items()}

    def rounded(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """Round the model's weights to the file's dtypes inside a `with` block, and restore them
        after it.

        So an evaluation uses the weights as they would be written.

        Raises:
            Diverged: A value does not fit into the file's dtype, or is not finite.
        """
        return self.rounded_state(model.state_dict())

    @contextmanager
    def rounded_state(self, state: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Round the tensors of a model's state, in place, as `rounded` does.

        Of a sharded model they are the rows of this process.
        """
        self._refuse_not_finite(state)
        original: dict[str, torch.Tensor] = {}
        try:
            for name, key, elements, dtype in written_dtypes(self.layout, self.placement):
                original.setdefault(key, state[key].clone())
                if elements is None:
                    new = state[key].to(dtype)
                    _refuse_overflow(name, state[key], new)
                    state[key].copy_(new)
                else:
                    flat, index = state[key].reshape(-1), on(elements, state[key].device)
                    new = flat[index].to(dtype)
                    _refuse_overflow(name, flat[index], new)
                    flat[index] = new.to(flat.dtype)
                    if not state[key].is_contiguous():  # then `flat` is a copy
                        state[key].copy_(flat.reshape(state[key].shape))
            yield
        finally:
            for key, value in original.items():
                state[key].copy_(value)

    def _refuse_not_finite(self, state: Mapping[str, torch.Tensor]) -> None:
        """Refuse values of float32 tensors that are not finite.

        Tensors of other dtypes are checked when rounded.
        """
        for name, slices in self.placement.items():
            if self.layout.entry(name).dtype != torch.float32:
                continue
            for tensor_slice in slices:
                value = state[tensor_slice.key]
                value = value if tensor_slice.whole else tensor_slice.of_model(value.reshape(-1))
                _refuse_overflow(name, value, value)

    def write(self, model: torch.nn.Module, folder: Path) -> dict[str, str]:
        """Write the weights of `model` and the side files into an empty folder.

        Returns:
            The SHA-256 of every written file by its name.

        Raises:
            RunError: A value does not fit into the file's dtype.
        """
        return self.write_state(model.state_dict(), folder)

    def write_state(self, state: Mapping[str, torch.Tensor], folder: Path) -> dict[str, str]:
        """Write the tensors of a model's state, as `write` does. They are read one by one, in the order of the files."""
        hashes = write_weights(self.layout, self.placement, state, folder)
        for name in self.side_files:
            copy_file(self.source.folder / name, folder / name)
            hashes[name] = sha256_file(folder / name)
        if self.layout.index is not None:
            hashes[self.layout.index.name] = sha256_file(folder / self.layout.index.name)
        return hashes


def _refuse_overflow(name: str, value: torch.Tensor, rounded: torch.Tensor) -> None:
    if all_finite(rounded):
        return
    raise Diverged(f"{name}: {_too_large(value, rounded.dtype)}; nothing was published")


def _too_large(value: torch.Tensor, dtype: torch.dtype) -> str:
    """Describe values that a dtype cannot hold."""
    if not all_finite(value):
        return "holds values that are not finite after training; a lower rate may help"
    largest, limit = float(value.abs().max()), torch.finfo(dtype).max
    return (
        f"training brought a value to {largest:,.0f}, and {_dtype_name(dtype)}, which the source's file has, "
        f"ends at {limit:,.0f}; a lower rate may keep it within, or give the source in float32"
    )


def open_checkpoint(
    source: Source, library: Library, *, allow_pickle: bool = False, weights_key: str | None = None
) -> Checkpoint:
    """Load a source strictly, in float32, and find where the model holds each tensor of its files.

    Args:
        source: The source. Its weights are fetched if they are not here.
        library: What `open_library` returned for it.
        allow_pickle: Read pickle files, with torch's weights-only loader.
        weights_key: The key of the set of weights to use, in a pickle that holds several.

    Returns:
        The checkpoint, with its model in evaluation mode.

    Raises:
        CheckpointError: A tensor is missing, quantised or not finite, or has another shape. Or the
            library initialises it anew. Or it cannot be written back exactly.
    """
    source.fetch()
    layout = read_layout(source.folder, allow_pickle, weights_key)
    _refuse_quantised(layout)
    tensors = layout.mapped()
    with _size_guard(layout):
        model = _in_own_memory(library.load(tensors, torch.float32), tensors)
    state = model.state_dict()
    placement = place(layout, model, library.load, lambda name: _equal_values(tensors[name], state[name]))
    _refuse_values(layout, placement, tensors, {key for key, _ in model.named_parameters(remove_duplicate=False)})
    warnings = (*library.warnings(model), *_layout_warnings(source, layout, placement))
    return Checkpoint(source, library, layout, model.eval(), placement, warnings)


def open_unread(
    source: Source,
    library: Library,
    *,
    allow_pickle: bool = False,
    weights_key: str | None = None,
    by_one: Callable[[Callable[[], Placement | None]], Placement | None] = lambda make: make(),
) -> Checkpoint | None:
    """Open a source without its values in memory, for a model that is divided afterwards.

    The library loads the model in the dtype of the files. It takes most tensors over as they are, so they stay views of
    the mapped files, and their addresses tell where each one went. Tensors that it puts into another form, such as
    experts that it fuses, are given without values, and traced block by block. The checkpoint's model is another one,
    with its parameters on the meta device and with the values of its buffers.

    Args:
        source: The source.
        library: What `open_library` returned for it.
        allow_pickle: Read pickle files, with torch's weights-only loader.
        weights_key: The key of the set of weights to use, in a pickle that holds several.
        by_one: Lets one of several processes trace, and gives the result to all.

    Returns:
        The checkpoint, with its `values`. None: the library needs values to put tensors into another form, so that only
        `open_checkpoint` can open it.

    Raises:
        CheckpointError: As `open_checkpoint`. The values are not checked (see `refuse_broken`).
    """
    source.fetch()
    layout = read_layout(source.folder, allow_pickle, weights_key)
    _refuse_quantised(layout)
    tensors = layout.mapped()
    with _size_guard(layout):
        model = library.build_meta(buffers=True)
    moved = _other_forms(tensors, model.state_dict())
    with _size_guard(layout):
        loaded = _loaded_unread(library, layout, tensors, moved)
    traced = by_one(partial(_traced, layout, library, moved)) if moved and loaded is not None else {}
    if loaded is None or traced is None:
        return None
    placement = _placed_by_address(layout, loaded, tensors, traced)
    values = FileValues(placement, tensors, loaded.state_dict()) if placement else {}
    covered = {first for name, first in _ties(loaded).items() if name in values}
    if _ties(loaded) != _ties(model) or covered != set(_ties(loaded).values()):
        return None
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(loaded.get_parameter(name).requires_grad)
    warnings = (*library.warnings(loaded), *_layout_warnings(source, layout, placement or {}))
    return Checkpoint(source, library, layout, model.eval(), placement or {}, warnings, values, tuple(moved))


def _other_forms(tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the file's tensors that the library seems to put into another form.

    The list is empty if each tensor of the model may be one of the file under another name.
    """
    moved = [name for name, tensor in tensors.items() if name not in state or state[name].shape != tensor.shape]
    kept = set(tensors).difference(moved)
    left = Counter(tuple(tensor.shape) for name, tensor in state.items() if name not in kept)
    return moved if left - Counter(tuple(tensors[name].shape) for name in moved) else []


def _loaded_unread(
    library: Library, layout: Layout, tensors: Mapping[str, torch.Tensor], moved: Sequence[str]
) -> torch.nn.Module | None:
    """Load a model with the tensors in `moved` without values. None: the library needs them."""
    shown = {name: Absent.like(tensor) if name in moved else tensor for name, tensor in tensors.items()}
    try:
        return library.load(shown, layout.main_dtype)
    except CheckpointError:
        raise
    except Exception:  # whatever a library does with values that are not there
        if not moved:
            raise
        return None


def _traced(layout: Layout, library: Library, moved: Sequence[str]) -> Placement | None:
    """Trace tensors block by block. None: the library needs values."""
    try:
        return trace_by_parts(layout, library.load, moved)
    except Exception:  # as above
        return None


def _placed_by_address(
    layout: Layout, loaded: torch.nn.Module, tensors: dict[str, torch.Tensor], traced: Placement
) -> Placement | None:
    """Return where a model has the tensors of the files. None: it has some in a form that was not traced."""
    state = loaded.state_dict()
    name_at = {storage_of(tensor): name for name, tensor in tensors.items() if tensor.numel()}
    known: Placement = {}
    for key, tensor in state.items():
        if storage_of(tensor) in name_at:
            known.setdefault(name_at[storage_of(tensor)], (TensorSlice(key),))

    def same(name: str) -> bool:
        return storage_of(tensors[name]) == storage_of(state[name]) or _equal_values(tensors[name], state[name])

    try:
        return place(layout, loaded, None, same, known | traced)
    except CheckpointError:  # the usual opening finds the tensors by tracing, or says what is wrong
        return None


def _ties(model: torch.nn.Module) -> dict[str, str]:
    """Return for each name of a parameter the first name of the same parameter."""
    first: dict[tuple[object, ...], str] = {}
    return {name: first.setdefault(storage_of(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


def _layout_warnings(source: Source, layout: Layout, placement: Placement) -> list[str]:
    """Warn of weights from a pickle, of tensors that the model does not use, and of files that are
    not copied.
    """
    warnings = []
    if layout.from_pickle:
        warnings.append(f"the source's weights are a pickle; the output's are {SINGLE}")
    unused = [name for name in layout.names() if name not in placement]
    if unused:
        warnings.append(f"the model does not use these tensors, which are kept as they are: {listed(unused)}")
    return [*warnings, *layout.notes, *_file_warnings(source, layout)]


def _file_warnings(source: Source, layout: Layout) -> list[str]:
    """Warn of files that an output will not have, and of copied files that no longer fit to its
    weights.
    """
    copied, left, links = source.side_files(set(layout.read_from))
    lines = []
    if left:
        lines.append(f"not copied (other copies of the weights, a trainer's state, or ours to write): {listed(left, 20)}")
    if links:
        lines.append(
            f"not copied, links that lead out of the source's folder, to folders or to nothing: {listed(links, 20)}; "
            "put the files themselves there if the output is to have them"
        )
    pointers = [name for name in copied if is_pointer(source.folder / name)]
    if pointers:
        lines.append(f"copied as they are, git-lfs pointers instead of files: {listed(pointers, 20)}")
    stale = [name for name in copied if fnmatchcase(name, "adapter.*") and _may_be_held(source.folder / name, layout)]
    if stale:
        lines.append(
            f"copied as they are, adapters that the weights hold too: {listed(stale)}; a loader that is given `target_lang` "
            "lays them over what was trained here"
        )
    return lines


def _may_be_held(path: Path, layout: Layout) -> bool:
    """True if all tensors of an adapter are among the weights, with the same values, or if it is a
    pickle.
    """
    if path.suffix != ".safetensors":
        return path.suffix in (".bin", ".pt", ".pth")
    try:
        tensors = read_header(path).mapped()
    except CheckpointError:
        return False
    return all(
        name in layout.where and torch.equal(layout.tensor(name).float(), tensor.float()) for name, tensor in tensors.items()
    )


def open_shapes(
    source: Source,
    library: Library,
    *,
    allow_pickle: bool = False,
    weights_key: str | None = None,
    fetched: bool = False,
) -> Checkpoint:
    """Open a source on the meta device: with shapes and without values.

    The headers of the weight files are read if these are here. Otherwise the shapes are those of
    the model that the config describes.

    Args:
        source: The source.
        library: What `open_library` returned for it.
        allow_pickle: Read pickle files, with torch's weights-only loader.
        weights_key: The key of the set of weights to use, in a pickle that holds several.
        fetched: The weight files must be here.

    Raises:
        CheckpointError: The config, or the headers of files that are here, cannot be used.
    """
    source.fetch()
    here = True
    try:
        layout = read_layout(source.folder, allow_pickle, weights_key)
        _refuse_quantised(layout)
        with _size_guard(layout):
            model = library.build_meta()
    except CheckpointError:
        if source.revision is None or fetched:
            raise
        here = False
        with bounded(None, None):
            model = library.build_meta()
        head, entries = build_header(dict(model.state_dict()), {"format": "pt"})
        file = WeightFile(SINGLE, source.folder / SINGLE, head, None, entries)
        layout = Layout(source.folder, (file,), None, {e.name: (file, e) for e in entries})
    placement = place(layout, model, library.load, lambda name: True)
    warnings = [*library.warnings(model), *(_layout_warnings(source, layout, placement) if here else [])]
    return Checkpoint(source, library, layout, model, placement, tuple(warnings))


def _in_own_memory(model: torch.nn.Module, mapped: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Convert the model to float32, and copy tensors that the library took over from the mapped
    files.
    """
    of_files = {tensor.untyped_storage().data_ptr() for tensor in mapped.values()}
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dtype in TRAINABLE:
                tensor.data = tensor.data.to(torch.float32)
            if tensor.untyped_storage().data_ptr() in of_files:
                tensor.data = tensor.data.clone()
    return model


def _size_guard(layout: Layout) -> AbstractContextManager[None]:
    """Refuse, inside a `with` block, to build a model that is much larger than the files."""
    return bounded(len(layout.where), sum(entry.numel for _, entry in layout.where.values()))


def _equal_values(in_file: torch.Tensor, in_model: torch.Tensor) -> bool:
    """True if the model has the file's values.

    NaN equals nothing; `_refuse_values` refuses it with its own message.
    """
    return torch.equal(in_file.to(in_model.dtype), in_model) or bool(in_file.isnan().any())


def _refuse_quantised(layout: Layout) -> None:
    """Refuse weight matrices of integers or fp8, which a library may load without their scales."""
    for name in layout.names():
        entry = layout.entry(name)
        if entry.dtype in QUANTISED and len(entry.shape) > 1 and "weight" in name.rsplit(".", 1)[-1]:
            raise CheckpointError(
                f"{layout.folder}: quantised weights ({_dtype_name(entry.dtype)} in tensor {name}) cannot be refined; "
                "give the checkpoint that they were made from"
            )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse_values(layout: Layout, placement: Placement, tensors: dict[str, torch.Tensor], trained: set[str]) -> None:
    """Refuse parameters of dtypes that cannot be trained, and values that are not finite."""
    for name, slices in placement.items():
        tensor = tensors[name]
        if not tensor.is_floating_point() and any(tensor_slice.key in trained for tensor_slice in slices):
            raise CheckpointError(f"{layout.folder}: quantised weights ({_dtype_name(tensor.dtype)} in tensor {name})")
        if tensor.is_floating_point() and tensor.dtype not in TRAINABLE:
            raise CheckpointError(f"{name}: is {tensor.dtype}; only float32, float16 and bfloat16 weights can be refined")
        if tensor.is_floating_point() and not all_finite(tensor):
            raise CheckpointError(f"{layout.folder}: {name} holds values that are not finite; the checkpoint is broken")
