"""Which adapter a source is for."""

from __future__ import annotations

from dsd_refine.checkpoint.library import Library
from dsd_refine.checkpoint.source import Source
from dsd_refine.errors import CheckpointError
from dsd_refine.task_specs import TASKS


def open_library(source: Source, task: str | None = None, trust_remote_code: bool = False) -> Library:
    """The adapter of the library that the source is for: the others are not imported.

    Raises:
        CheckpointError: its config cannot be used, or is for another task than asked.
    """
    offered = [name for name, spec in TASKS.items() if source.library in spec.libraries]
    if task is not None and task not in offered:
        raise CheckpointError(f"{source.model}: a {source.library} model does {', '.join(offered)}, not {task}")
    if source.library == "transformers":
        from dsd_refine.checkpoint.libraries.transformers import TransformersLibrary

        return TransformersLibrary.open(source.folder, task, trust_remote_code)
    if source.library == "torchvision":
        from dsd_refine.checkpoint.libraries.torchvision import TorchvisionLibrary

        return TorchvisionLibrary.open(source.folder, task)
    from dsd_refine.checkpoint.libraries.timm import TimmLibrary

    return TimmLibrary.open(source.folder, task)
