"""The mean of weights: of a phase, or of two models.

SWA (Izmailov et al. 2018) averages the weights at the end of each epoch. EMA is an exponential moving
average over the optimizer steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from dsd_refine.errors import UsageError
from dsd_refine.recipe import Phase


class Average:
    """The mean of a phase's trainable weights. A phase without `average` has no mean.

    A weight that is 0 in all averaged states is exactly 0 in the mean.

    Attributes:
        count: how many states are averaged so far.
        mean: name of a parameter -> its mean, with the parameter's shape, dtype and device.
    """

    def __init__(self, phase: Phase, parameters: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
        self.phase = phase
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.count = int(saved["average.count"]) if "average.count" in saved else 0
        means = {name: saved.get(f"average.mean.{name}") for name in self.parameters} if self.count else {}
        self.mean = {name: value.to(self.parameters[name].device) for name, value in means.items() if value is not None}

    def step_end(self) -> None:
        """Add the weights after an optimizer step to the mean, in a phase with `average: ema`."""
        if self.phase.average == "ema":
            self._add(1 - self.phase.ema_decay if self.count else 1.0)

    def epoch_end(self) -> None:
        """Add the weights at the end of an epoch to the mean, in a phase with `average: swa`."""
        if self.phase.average == "swa":
            self._add(1 / (self.count + 1))

    @torch.no_grad()
    def _add(self, weight: float) -> None:
        for name, parameter in self.parameters.items():
            if name in self.mean:
                self.mean[name].lerp_(parameter, weight)
            else:
                self.mean[name] = parameter.detach().clone()
        self.count += 1

    @torch.no_grad()
    def settle(self) -> bool:
        """Copy the mean into the model's parameters. Returns False if there is no mean."""
        for name, value in self.mean.items():
            self.parameters[name].copy_(value)
        return bool(self.mean)

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Inside the context, the model holds the mean; afterwards it has its own weights again.

        Yields True, or False if there is no mean and the model keeps its own weights.
        """
        own_weights = {name: self.parameters[name].detach().clone() for name in self.mean}
        try:
            yield self.settle()
        finally:
            with torch.no_grad():
                for name, value in own_weights.items():
                    self.parameters[name].copy_(value)

    def pack(self) -> dict[str, torch.Tensor]:
        """The mean and its count as tensors for the saved state; empty if there is no mean."""
        means = {f"average.mean.{name}": value for name, value in self.mean.items()}
        return {**means, "average.count": torch.tensor(self.count)} if means else {}


@torch.no_grad()
def between(source: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """Return source + share * (trained - source), name by name. Integers, such as counts of batches, are the trained ones.

    A value that is equal in both stays exactly as it is.

    Raises:
        UsageError: A tensor has another shape in the other one, or is not there.
    """
    for name, value in trained.items():
        if name not in source or source[name].shape != value.shape:
            shapes = [list(each[name].shape) if name in each else "none" for each in (source, trained)]
            raise UsageError(
                f"{name}: weights of different shapes have no mean ({shapes[0]} and {shapes[1]}); give the same model"
            )
    return {
        name: torch.lerp(source[name].to(value.device), value, share) if value.is_floating_point() else value
        for name, value in trained.items()
    }
