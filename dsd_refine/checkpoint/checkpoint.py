"""A released checkpoint: its files, the model in them, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from dsd_refine.checkpoint.guard import bounded
from dsd_refine.checkpoint.layout import SINGLE, Layout, read_layout
from dsd_refine.checkpoint.library import Library
from dsd_refine.checkpoint.placement import Placement, place
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
from dsd_refine.errors import CheckpointError, RunError
from dsd_refine.files import copy_file, sha256_file, sha256_files

QUANTISED = {
    torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.float8_e4m3fn, torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """An opened source: `model` holds its values in float32, `placement` says where each tensor of the file lives in it."""

    source: Source
    library: Library
    layout: Layout
    model: torch.nn.Module
    placement: Placement
    warnings: tuple[str, ...]

    def hashes(self) -> dict[str, str]:
        """File name -> SHA-256 of every source file that counts, weights first."""
        hashed = sha256_files(self.source.folder / name for name in self.counted)
        return {name: hashed[self.source.folder / name] for name in self.counted}

    @property
    def counted(self) -> list[str]:
        """The source's files that count, by name: those of the weights first."""
        return [*self.weight_files, *self.side_files]

    @property
    def side_files(self) -> list[str]:
        """What an output has besides the weights, by name."""
        return self.source.side_files(set(self.weight_files))[0]

    @property
    def weight_files(self) -> list[str]:
        """The source's weight files and index, by name."""
        return self.layout.read_from

    @property
    def filled(self) -> dict[str, set[str]]:
        """Tensor of the file -> the names of the model's tensors that it fills, wholly or in part."""
        return {name: {part.key for part in parts} for name, parts in self.placement.items()}

    @contextmanager
    def rounded(self, model: torch.nn.Module) -> Iterator[None]:
        """Within, the model computes with the weights as they would be written: rounded to the file's dtypes.

        Raises:
            RunError: a value that the file's dtype cannot hold.
        """
        state = model.state_dict()
        self._refuse_unfinite(state)
        kept: dict[str, torch.Tensor] = {}
        try:
            for name, key, elements, dtype in written_dtypes(self.layout, self.placement):
                kept.setdefault(key, state[key].clone())
                if elements is None:
                    new = state[key].to(dtype)
                    _refuse_overflow(name, state[key], new)
                    state[key].copy_(new)
                else:
                    old = state[key].reshape(-1)[elements.to(state[key].device)]
                    new = old.to(dtype)
                    _refuse_overflow(name, old, new)
                    flat = state[key].reshape(-1).index_put((elements.to(state[key].device),), new.to(state[key].dtype))
                    state[key].copy_(flat.reshape(state[key].shape))
            yield
        finally:
            for key, value in kept.items():
                state[key].copy_(value)

    def _refuse_unfinite(self, state: dict[str, torch.Tensor]) -> None:
        """Raise RunError where a float32 tensor of the file holds a value that is not finite: others are seen when rounded."""
        for name, parts in self.placement.items():
            if self.layout.entry(name).dtype != torch.float32:
                continue
            for part in parts:
                value = state[part.key]
                value = value if part.whole else value.reshape(-1)[part.target.to(value.device)]
                _refuse_overflow(name, value, value)

    def write(self, model: torch.nn.Module, folder: Path) -> dict[str, str]:
        """Write weights and side files into an empty folder; returns file name -> SHA-256 of the weights as written.

        Raises:
            RunError: a value that the file's dtype cannot hold.
        """
        hashes = write_weights(self.layout, self.placement, model.state_dict(), folder)
        for name in self.side_files:
            copy_file(self.source.folder / name, folder / name)
            hashes[name] = sha256_file(folder / name)
        if self.layout.index is not None:
            hashes[self.layout.index.name] = sha256_file(folder / self.layout.index.name)
        return hashes


def _refuse_overflow(name: str, value: torch.Tensor, rounded: torch.Tensor) -> None:
    if all_finite(rounded):
        return
    raise RunError(f"{name}: {_too_large(value, rounded.dtype)}; nothing was published")


def _too_large(value: torch.Tensor, dtype: torch.dtype) -> str:
    """What is wrong with values that a dtype cannot hold."""
    if not all_finite(value):
        return "holds values that are not finite after training; a lower rate may help"
    largest, limit = float(value.abs().max()), torch.finfo(dtype).max
    return (
        f"training brought a value to {largest:,.0f}, and {_plain(dtype)}, which the source's file has, ends at {limit:,.0f}; "
        "a lower rate may keep it within, or give the source in float32"
    )


def open_checkpoint(
    source: Source, library: Library, *, allow_pickle: bool = False, weights_key: str | None = None
) -> Checkpoint:
    """Load a source strictly, in float32, and find where each tensor of its files lives in the model.

    `weights_key` says which of a pickle's sets of weights is meant.

    Raises:
        CheckpointError: anything missing, misshapen, re-initialised, quantised, not finite, or not writable back.
    """
    source.fetch()
    layout = read_layout(source.folder, allow_pickle, weights_key)
    _refuse_quantised(layout)
    tensors = {name: tensor for file in layout.files for name, tensor in file.mapped().items()}
    with _bounded(layout):
        model = _owned(library.load(tensors, torch.float32), tensors)
    state = model.state_dict()
    placement = place(layout, model, library.load, lambda name: _same(tensors[name], state[name]))
    _refuse_values(layout, placement, tensors, {key for key, _ in model.named_parameters(remove_duplicate=False)})
    warnings = (*library.warnings(model), *_layout_warnings(source, layout, placement))
    return Checkpoint(source, library, layout, model.eval(), placement, warnings)


def _layout_warnings(source: Source, layout: Layout, placement: Placement) -> list[str]:
    """How the weights were read, which of them the model does not use, and `_file_warnings`."""
    warnings = []
    if layout.from_pickle:
        warnings.append(f"the source's weights are a pickle; the output's are {SINGLE}")
    unused = [name for name in layout.names() if name not in placement]
    if unused:
        warnings.append(f"the model does not use these tensors, which are kept as they are: {listed(unused)}")
    return [*warnings, *layout.notes, *_file_warnings(source, layout)]


def _file_warnings(source: Source, layout: Layout) -> list[str]:
    """What an output does not have of the source's files, and what it has that will no longer fit."""
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
    """Are all of an adapter's tensors among the weights, with the same values? Of a pickle that is not known."""
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
    """The same on the meta device: no values; headers where the weights are here (`fetched`: they must be).

    `warnings` are those of the headers and files, and of a model without values.
    """
    source.fetch()
    here = True
    try:
        layout = read_layout(source.folder, allow_pickle, weights_key)
        _refuse_quantised(layout)
        with _bounded(layout):
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


def _owned(model: torch.nn.Module, mapped: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The model in float32 and in memory of its own: a library may have put what it was given into it."""
    theirs = {tensor.untyped_storage().data_ptr() for tensor in mapped.values()}
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dtype in TRAINABLE:
                tensor.data = tensor.data.to(torch.float32)
            if tensor.untyped_storage().data_ptr() in theirs:
                tensor.data = tensor.data.clone()
    return model


def _bounded(layout: Layout) -> AbstractContextManager[None]:
    return bounded(len(layout.where), sum(entry.numel for _, entry in layout.where.values()))


def _same(filed: torch.Tensor, held: torch.Tensor) -> bool:
    return torch.equal(filed.to(held.dtype), held) or bool(filed.isnan().any())


def _refuse_quantised(layout: Layout) -> None:
    """Refuse weight matrices of whole numbers or fp8: a library may load them as they are, without their scales.

    Raises:
        CheckpointError: names the first and its dtype, which stands in the header.
    """
    for name in layout.names():
        entry = layout.entry(name)
        if entry.dtype in QUANTISED and len(entry.shape) > 1 and "weight" in name.rsplit(".", 1)[-1]:
            raise CheckpointError(
                f"{layout.folder}: quantised weights ({_plain(entry.dtype)} in tensor {name}) cannot be refined; "
                "give the checkpoint that they were made from"
            )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse_values(layout: Layout, placement: Placement, tensors: dict[str, torch.Tensor], trained: set[str]) -> None:
    for name, parts in placement.items():
        tensor = tensors[name]
        if not tensor.is_floating_point() and any(part.key in trained for part in parts):
            raise CheckpointError(f"{layout.folder}: quantised weights ({_plain(tensor.dtype)} in tensor {name})")
        if tensor.is_floating_point() and tensor.dtype not in TRAINABLE:
            raise CheckpointError(f"{name}: is {tensor.dtype}; only float32, float16 and bfloat16 weights can be refined")
        if tensor.is_floating_point() and not all_finite(tensor):
            raise CheckpointError(f"{layout.folder}: {name} holds values that are not finite; the checkpoint is broken")
