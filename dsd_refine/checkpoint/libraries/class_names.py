"""Names of a checkpoint's classes, from its config or by its head's size."""

from __future__ import annotations

from typing import Any

from dsd_refine.data.names import listed
from dsd_refine.errors import CheckpointError


def checked_names(names: Any, classes: int) -> list[str]:
    """A config's `label_names`, one for each class of the head.

    Raises:
        CheckpointError: no list of texts, another number of names than of classes, a name twice.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise CheckpointError("config.json: `label_names` is not a list of texts, one for each class in order")
    if len(names) != classes:
        raise CheckpointError(
            f"config.json: label_names has {len(names)} names, the head {classes}: {listed(names)}. Correct the list (or take "
            "it out, then the data's own order or `label_map` says which class is which)"
        )
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None) if classes < 1000 else None
    if twice is not None:
        raise CheckpointError(f"config.json: label_names has {twice!r} for two classes; give each class a name of its own")
    return list(names)


def imagenet_names(classes: int) -> list[list[str]] | None:
    """WordNet id and description of each class of a head of ImageNet's size; None for a head of
    another size.
    """
    from dsd_refine.data.imagenet import outputs  # it imports `datasets`, which `verify` has no need of

    known = outputs(classes)
    return None if known is None else [list(dict.fromkeys(names)) for names in known]
