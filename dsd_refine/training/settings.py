"""The settings of the model that a phase changes: which parameters train, and the dropout rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import nn

from dsd_refine.compat import BatchNorm
from dsd_refine.errors import UsageError
from dsd_refine.masking.checkpoint_layers import Filled, frozen_names
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.training.dropout import dropout_of, dropouts


def check_settings(model: nn.Module, recipe: Recipe, filled: Filled) -> None:
    """Check that the model can have the settings of every phase.

    Raises:
        UsageError: a phase sets the dropout of a model without dropout, scales the rate of a parameter
            that is not there, or freezes all parameters.
            The message names the field.
    """
    for number, phase in enumerate(recipe.phases):
        if phase.dropout is not None and not dropouts(model):
            raise UsageError(f"phases.{number}.dropout: the model has no dropout to set (stochastic depth is none)")
        names = [name for name, _ in model.named_parameters()]
        for pattern in phase.lr_scale:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UsageError(f"phases.{number}.lr_scale: {pattern!r} matches no parameter, such as {names[0]}")
        frozen = frozen_names(model, phase.frozen, filled)
        if phase.total_steps(1) and all(name in frozen or not p.requires_grad for name, p in model.named_parameters()):
            raise UsageError(f"phases.{number}.frozen: leaves nothing to train")


@contextmanager
def settings(
    model: nn.Module, phase: Phase, filled: Filled, parameters: Mapping[str, torch.Tensor] | None = None
) -> Iterator[None]:
    """Inside the context, the phase's `frozen` parameters do not train and the model has its `dropout`.

    Afterwards both are as before.

    Args:
        model: The model.
        phase: The phase.
        filled: For each tensor of the file, the names of the model's tensors that hold its elements.
        parameters: What the optimizer trains, by name: in a sharded run the rows of this process. None: the model's own.
    """
    trained = dict(model.named_parameters(remove_duplicate=False)) if parameters is None else parameters
    frozen = frozen_names(model, phase.frozen, filled)
    trainable = [parameter for name, parameter in trained.items() if name in frozen and parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with dropout_of(model, phase.dropout):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def train_mode(model: nn.Module) -> None:
    """Put the model into training mode, except BatchNorm layers whose parameters are all frozen.

    The running statistics of such a layer must not change either.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, BatchNorm):
            own = list(module.parameters(recurse=False))
            if own and not any(p.requires_grad for p in own):
                module.eval()
