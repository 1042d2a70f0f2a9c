"""Masks for a training loop of one's own: made once, applied after every optimizer step, released for the dense phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from dsd_refine.api import apply_masks, make_masks
from dsd_refine.errors import UsageError


class Masker:
    """The masks of a sparse phase, in any training loop.

    ```python
    masker = Masker(model, sparsity=0.3).attach(optimizer)   # the sparse phase begins
    ...                                                      # train
    masker.release()                                         # the dense phase begins: use a new optimizer
    ```

    Args:
        model: The module that trains. Make the masker after its weights are loaded.
        sparsity: The share of zeros in each layer, at least 0 and less than 1.
        include: As in `make_masks`, like the options below.
        exclude: Globs of parameter names not to mask.
        first: The names of the modules whose input is pixels or sound. They are not masked.
        criterion: "magnitude" or "random".
        seed: The seed of a random mask.

    Raises:
        UsageError: `make_masks` raises it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        first: Sequence[str] = (),
        criterion: str = "magnitude",
        seed: int = 0,
    ) -> None:
        self.model = model
        self.masks: dict[str, torch.Tensor] = make_masks(
            model, sparsity=sparsity, include=include, exclude=exclude, first=first, criterion=criterion, seed=seed
        )
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.apply()

    def apply(self) -> None:
        """Set the masked weights to 0. Call it after each optimizer step, unless `attach` does."""
        apply_masks(self.model, self.masks)

    def attach(self, optimizer: torch.optim.Optimizer) -> Masker:
        """Apply the masks after every step of an optimizer.

        Args:
            optimizer: The optimizer of the model.

        Returns:
            This masker.
        """
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self.apply()))
        return self

    def release(self) -> None:
        """End the sparse phase: there are no masks any more, and the masked weights train from 0."""
        self.masks = {}
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the masks for a checkpoint: parameter name -> bool tensor, True = keep."""
        return dict(self.masks)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take saved masks, and apply them.

        Args:
            state: What `state_dict` returned.

        Raises:
            UsageError: The masks do not fit the model. The masks stay as they were.
        """
        if not all(isinstance(mask, torch.Tensor) for mask in state.values()):
            raise UsageError("masks: expected tensors by the names of parameters")
        apply_masks(self.model, state)
        self.masks = dict(state)
