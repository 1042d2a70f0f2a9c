"""The mean of a phase's weights: of its epochs' ends (SWA, Izmailov et al. 2018), or a moving one of its steps (EMA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from dsd_refine.recipe import Phase


class Average:
    """Nothing for a phase without `average`. A weight that is 0 in everything averaged is exactly 0 in the mean."""

    def __init__(self, phase: Phase, parameters: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
        self.phase = phase
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.count = int(saved["average.count"]) if "average.count" in saved else 0
        found = {name: saved.get(f"average.mean.{name}") for name in self.parameters} if self.count else {}
        self.mean = {name: value.to(self.parameters[name].device) for name, value in found.items() if value is not None}

    def step_end(self) -> None:
        if self.phase.average == "ema":
            self._add(1 - self.phase.ema_decay if self.count else 1.0)

    def epoch_end(self) -> None:
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
        """Give the model the mean, for good. False if there is none."""
        for name, value in self.mean.items():
            self.parameters[name].copy_(value)
        return bool(self.mean)

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Within, the model holds the mean (True), or what it held (False, where there is none)."""
        before = {name: self.parameters[name].detach().clone() for name in self.mean}
        try:
            yield self.settle()
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    self.parameters[name].copy_(value)

    def pack(self) -> dict[str, torch.Tensor]:
        """For the saved state; empty where nothing is averaged."""
        means = {f"average.mean.{name}": value for name, value in self.mean.items()}
        return {**means, "average.count": torch.tensor(self.count)} if means else {}
