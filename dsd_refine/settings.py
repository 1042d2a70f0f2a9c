"""What a phase changes of the model besides its weights: which parameters train, and its dropout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn

from dsd_refine.dropout import dropout_of, dropouts
from dsd_refine.errors import UsageError
from dsd_refine.recipe import Phase, Recipe

Filled = Mapping[str, set[str]]  # a file's tensor -> the names in the model that it fills
ITSELF: Filled = {}  # the file's names are the model's


def frozen_names(model: nn.Module, patterns: Iterable[str], filled: Filled = ITSELF) -> set[str]:
    """Names of the model's parameters that the globs match, by these names or by those of the file's tensors.

    Raises:
        UsageError: a glob that matches nothing, or one that matches some of the tensors that one parameter is made of.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found: set[str] = set()
    chosen: set[str] = set()
    for pattern in patterns:
        tensors = {tensor for tensor, keys in filled.items() if fnmatchcase(tensor, pattern) and keys.intersection(names)}
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits and not tensors:
            raise UsageError(f"frozen: {pattern!r} matches no parameter of the model, such as {names[0]}")
        found, chosen = found | hits, chosen | tensors
    by_file = {key for tensor in chosen for key in filled[tensor]}.intersection(names)
    for tensor, keys in filled.items():
        if tensor not in chosen and (torn := keys & (by_file - found)):
            raise UsageError(
                f"frozen: the model holds {tensor} in one parameter with others that are matched ({min(torn)}), "
                "and a parameter is frozen whole: match all of them, or none"
            )
    return found | by_file


def check_settings(model: nn.Module, recipe: Recipe, filled: Filled) -> None:
    """Refuse what a phase asks for and the model does not have.

    Raises:
        UsageError: names the field and what is missing.
    """
    for number, phase in enumerate(recipe.phases):
        if phase.dropout is not None and not dropouts(model):
            raise UsageError(f"phases.{number}.dropout: the model has no dropout to set (stochastic depth is none)")
        frozen = frozen_names(model, phase.frozen, filled)
        if phase.total_steps(1) and all(name in frozen or not p.requires_grad for name, p in model.named_parameters()):
            raise UsageError(f"phases.{number}.frozen: leaves nothing to train")


@contextmanager
def settings(model: nn.Module, phase: Phase, filled: Filled) -> Iterator[None]:
    """Within, the phase's `frozen` parameters do not train and its `dropout` holds."""
    frozen = frozen_names(model, phase.frozen, filled)
    kept = [p for name, p in model.named_parameters(remove_duplicate=False) if name in frozen and p.requires_grad]
    try:
        for parameter in kept:
            parameter.requires_grad_(False)
        with dropout_of(model, phase.dropout):
            yield
    finally:
        for parameter in kept:
            parameter.requires_grad_(True)


def train_mode(model: nn.Module) -> None:
    """Training mode, but for BatchNorm whose parameters are all frozen: its statistics are part of what is frozen."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            own = list(module.parameters(recurse=False))
            if own and not any(p.requires_grad for p in own):
                module.eval()
