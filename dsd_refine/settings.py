"""What a phase changes of the model besides its weights: which parameters train, and its dropout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from dsd_refine.errors import UsageError
from dsd_refine.recipe import Phase, Recipe


def frozen_names(model: nn.Module, patterns: Iterable[str]) -> set[str]:
    """Names of the model's parameters that the globs match.

    Raises:
        UsageError: a glob that matches nothing.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            raise UsageError(f"frozen: {pattern!r} matches no parameter of the model, such as {names[0]}")
        found |= hits
    return found


def dropouts(model: nn.Module) -> list[_DropoutNd]:
    """The modules that `dropout` sets."""
    return [module for module in model.modules() if isinstance(module, _DropoutNd)]


def check_settings(model: nn.Module, recipe: Recipe) -> None:
    """Refuse what a phase asks for and the model does not have.

    Raises:
        UsageError: names the field and what is missing.
    """
    for number, phase in enumerate(recipe.phases):
        if phase.dropout is not None and not dropouts(model):
            raise UsageError(f"phases.{number}.dropout: the model has no dropout layer to set")
        frozen = frozen_names(model, phase.frozen)
        if phase.total_steps(1) and all(name in frozen or not p.requires_grad for name, p in model.named_parameters()):
            raise UsageError(f"phases.{number}.frozen: leaves nothing to train")


@contextmanager
def settings(model: nn.Module, phase: Phase) -> Iterator[None]:
    """Within, the phase's `frozen` parameters do not train and its `dropout` holds."""
    frozen = frozen_names(model, phase.frozen)
    kept = [p for name, p in model.named_parameters(remove_duplicate=False) if name in frozen and p.requires_grad]
    rates = [(module, module.p) for module in dropouts(model)] if phase.dropout is not None else []
    try:
        for parameter in kept:
            parameter.requires_grad_(False)
        for module, _ in rates:
            module.p = float(phase.dropout or 0.0)
        yield
    finally:
        for parameter in kept:
            parameter.requires_grad_(True)
        for module, rate in rates:
            module.p = rate


def train_mode(model: nn.Module) -> None:
    """Training mode, but for BatchNorm whose parameters are all frozen: its statistics are part of what is frozen."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            own = list(module.parameters(recurse=False))
            if own and not any(p.requires_grad for p in own):
                module.eval()
