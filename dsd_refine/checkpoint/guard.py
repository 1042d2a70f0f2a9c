"""What a config may make a library build: a config of a few bytes can ask for a model of terabytes, or of a million layers.

Loading is strict, so a model can have no more than its weight files fill. That is looked at while the model is built on the
meta device, module by module, and before that for the counts that libraries turn into lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules import module as registration

from dsd_refine.errors import CheckpointError

COUNT = re.compile(r"layer|label|class|head|expert|block|stage|depth", re.IGNORECASE)
MOST = 10**6  # of anything that a config counts

SPARE_ELEMENTS, SPARE_MODULES = 10**8, 10_000  # what a small file's model may have besides: tables and modules without weights

UNKNOWN_ELEMENTS, UNKNOWN_MODULES = 10**13, 300_000  # where the weights have not been fetched


def refuse_counts(path: Path, config: Any, key: str = "") -> None:
    """Refuse a config that counts more layers, classes and the like than any model has.

    Raises:
        CheckpointError: names the key.
    """
    if isinstance(config, dict):
        for name, value in config.items():
            refuse_counts(path, value, str(name))
    elif isinstance(config, list):
        for value in config:
            refuse_counts(path, value, key)
    elif isinstance(config, int) and abs(config) > MOST and COUNT.search(key):
        shown = f"{config:.1e}" if abs(config) < 10**300 else "beyond 1e300"
        raise CheckpointError(f"{path}: {key} is {shown}, more than any model has; refused")


@contextmanager
def bounded(tensors: int | None, elements: int | None) -> Iterator[None]:
    """Within, no model is built that so many tensors with so many elements could not fill (None: not known).

    Raises:
        CheckpointError: the model grows beyond that.
    """
    most = UNKNOWN_ELEMENTS if elements is None else 4 * elements + SPARE_ELEMENTS
    modules = UNKNOWN_MODULES if tensors is None else 100 * tensors + SPARE_MODULES
    seen = {"modules": 0, "elements": 0}

    def module(*_: Any) -> None:
        seen["modules"] += 1
        if seen["modules"] > modules:
            raise CheckpointError(
                f"its config asks for more than {modules:,} modules, which its weights could not fill; refused"
            )

    def tensor(_: Any, name: str, value: torch.Tensor | None) -> None:
        seen["elements"] += 0 if value is None else value.numel()
        if seen["elements"] > most:
            raise CheckpointError(
                f"its config asks for {seen['elements']:.1e} elements with {name!r}, which its weights could not fill; refused"
            )

    handles = [
        registration.register_module_module_registration_hook(module),
        registration.register_module_parameter_registration_hook(tensor),
        registration.register_module_buffer_registration_hook(tensor),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
