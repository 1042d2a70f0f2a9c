"""What this program asks of a library of models. `checkpoint/libraries/` has an adapter for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from dsd_refine.checkpoint.preprocessing import Preprocessing

Tensors = dict[str, torch.Tensor]


class Library(Protocol):
    """An adapter: one checkpoint folder as its library reads it.

    `name` is the library's, `task` a key of `TASKS`. `config` is the library's own config object,
    for what prepares a model's inputs (None: the library has none), and `trust_remote_code` whether
    code of the folder may be run for that.
    """

    @property
    def name(self) -> str:
        """Return the name of the library, e.g. `timm`."""
        ...

    @property
    def folder(self) -> Path:
        """Return the folder of the checkpoint."""
        ...

    @property
    def task(self) -> str:
        """Return the key of `TASKS` for the task that the model is opened for."""
        ...

    @property
    def config(self) -> Any:
        """Return the library's own config object, or None if the library has none."""
        ...

    @property
    def trust_remote_code(self) -> bool:
        """Return whether Python code from the folder may be run."""
        ...

    @property
    def names(self) -> list[str]:
        """The model's names, which the `models` globs of a recipe are matched with."""
        ...

    def build_meta(self, *, buffers: bool = False) -> torch.nn.Module:
        """The model on the meta device: shapes without memory. With `buffers`, its buffers have their values in float32.

        Raises:
            CheckpointError: the library cannot build what the config says.
        """
        ...

    def load(self, tensors: Tensors, dtype: torch.dtype) -> torch.nn.Module:
        """The model through the library's own loading, with these tensors of the file; those that
        it does not use pass.

        The model is built on the meta device first, where a bound on its size (`guard.bounded`)
        costs no memory.

        Raises:
            CheckpointError: a missing, misshapen or re-initialised parameter, by name.
        """
        ...

    def load_plain(self, folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """The model of a folder, loaded as a user of the library loads it.

        Raises:
            CheckpointError: the library cannot load it.
        """
        ...

    def label_names(self) -> tuple[Sequence[Sequence[str]] | None, int]:
        """(the names of each class, of which any may be meant; the number of classes). None: the
        classes have no names.

        Raises:
            CheckpointError: names in the config that cannot be those of its classes.
        """
        ...

    def preprocessing(self, model: torch.nn.Module) -> Preprocessing:
        """How the checkpoint's images are prepared. `model` is built or loaded.

        Raises:
            CheckpointError: the checkpoint has no usable preprocessing of images.
        """
        ...

    def snippet(self) -> str:
        """Python that loads an output of this source, for its model card."""
        ...

    def warnings(self, model: torch.nn.Module) -> list[str]:
        """What a user should know of this model."""
        ...
