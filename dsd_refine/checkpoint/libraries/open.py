"""Which adapter a source is for."""

from __future__ import annotations

from dsd_refine.checkpoint.library import Library
from dsd_refine.checkpoint.source import Source
from dsd_refine.errors import CheckpointError
from dsd_refine.extras import require
from dsd_refine.task_specs import TASKS, TaskSpec


def open_library(source: Source, task: str | None = None, trust_remote_code: bool = False) -> Library:
    """The adapter of the library that the source is for: the others are not imported.

    Raises:
        CheckpointError: its config cannot be used, or is for another task than asked.
        UsageError: packages that it needs are not installed.
    """
    offered = [name for name, spec in TASKS.items() if source.library in spec.libraries]
    if task is not None and task not in offered:
        raise CheckpointError(f"{source.model}: a {source.library} model does {', '.join(offered)}, not {task}")
    if source.library == "transformers":
        from dsd_refine.checkpoint.libraries.transformers import TransformersLibrary

        library = TransformersLibrary.open(source.folder, task, trust_remote_code)
        _require_of_images(TASKS[library.task])
        return library
    require(f"{source.model}: a model of {source.library}", source.library, "timm", "torchvision")
    if source.library == "torchvision":
        from dsd_refine.checkpoint.libraries.torchvision import TorchvisionLibrary

        return TorchvisionLibrary.open(source.folder, task)
    from dsd_refine.checkpoint.libraries.timm import TimmLibrary

    return TimmLibrary.open(source.folder, task)


def _require_of_images(spec: TaskSpec) -> None:
    """Raises UsageError if the packages for pictures are not installed, and the task of a transformers model sees pictures."""
    if "caption" in spec.columns:
        require(spec.name, "captions", "torchvision")
    elif "image" in spec.columns:
        require(spec.name, "torchvision", "timm", "torchvision")  # timm knows ImageNet's class names
