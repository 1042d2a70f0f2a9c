"""Open a sharded run: whether it is asked for, what it cannot do yet, and how the model is divided."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, cast

from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from dsd_refine.checkpoint.checkpoint import open_checkpoint, open_unread
from dsd_refine.checkpoint.verify import check_plain_values
from dsd_refine.errors import UsageError
from dsd_refine.search import settings_of

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from dsd_refine.checkpoint.checkpoint import Checkpoint
    from dsd_refine.checkpoint.library import Library
    from dsd_refine.checkpoint.source import Source
    from dsd_refine.masking.layers import Layer
    from dsd_refine.recipe import Phase, Recipe
    from dsd_refine.run.run import Options
    from dsd_refine.run.workspace import Workspace
    from dsd_refine.training.state import Loop

T = TypeVar("T")
# The tasks that call the model once for each batch. A forward is made by all processes together, so they must
# make equally many.
TASKS = ("causal-lm", "image-classification", "masked-lm", "text-classification", "token-classification")
LAUNCH = "torchrun --nproc-per-node N -m dsd_refine … --shard"


def is_asked(options: Options) -> bool:
    """Return whether the model is to be divided: by `--shard`, or by Accelerate's configuration.

    Raises:
        UsageError: Accelerate is configured for another engine than FSDP version 2.
    """
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        raise UsageError(
            "Accelerate is configured for DeepSpeed, whose ZeRO has an optimizer, a clipping and a state of its own, so that "
            f"masks and resumed runs would not be exact. FSDP2 does the same for memory: {LAUNCH}"
        )
    by_accelerate = _is_on("ACCELERATE_USE_FSDP")
    if by_accelerate and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError(
            "Accelerate is configured for FSDP version 1, which joins the parameters of a block in one flat tensor; "
            f"masks and the saved state need parameters. Give `accelerate launch --use_fsdp --fsdp_version 2 …`, or {LAUNCH}"
        )
    if options.cpu_offload and not (options.shard or by_accelerate):
        raise UsageError(f"--cpu-offload keeps the shards of a divided model in the host's memory; give --shard too: {LAUNCH}")
    return options.shard or by_accelerate


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "y", "on")


@contextmanager
def without_accelerates_own() -> Iterator[None]:
    """Hide the setting of FSDP from Accelerate inside a `with` block.

    Accelerate starts the processes, and this package divides the model. On a CPU, Accelerate would
    ignore its setting; so runs on CPUs and on GPUs are one path.
    """
    value = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if value is not None:
            os.environ["ACCELERATE_USE_FSDP"] = value


def refuse_early(recipe: Recipe, options: Options, accelerator: Accelerator, task: str) -> None:
    """Check what a sharded run needs of its processes and its recipe, before the model is opened.

    Raises:
        UsageError: There is one process, or an option or a field of the recipe is not supported.
    """
    if accelerator.num_processes == 1:
        raise UsageError(f"--shard divides the model among several processes, and this is one. Start them: {LAUNCH}")
    fields = {
        "--compile": options.compile,
        "--mixed-precision fp16": accelerator.mixed_precision == "fp16",
        f"the task {task}": task not in TASKS,
    }
    _refuse([name for name, is_set in fields.items() if is_set])
    phases = [(number, phase) for setting in settings_of(recipe) for number, phase in enumerate(setting.recipe.phases)]
    _refuse([f"phases.{number}.{name}" for number, phase in phases for name in _unsupported(phase)])


def _unsupported(phase: Phase) -> list[str]:
    """The fields of a phase that need whole parameters, or that change them behind FSDP2."""
    fields = {
        "distill": phase.distill is not None,
        "sam": phase.sam is not None,
        "threshold: global": phase.threshold == "global",
        "criterion: saliency": phase.criterion == "saliency",
    }
    return [name for name, is_set in fields.items() if is_set]


def refuse_model(checkpoint: Checkpoint, loop: Loop) -> None:
    """Check that masks and the writer work on the divided model, before it is divided.

    Raises:
        UsageError: The model has BatchNorm or recurrent layers.
    """
    parts = {
        "BatchNorm": loop.has_batchnorm,
        "recurrent layers": any(isinstance(module, nn.RNNBase) for module in checkpoint.model.modules()),
    }
    _refuse([f"a model with {name}" for name, is_there in parts.items() if is_there])


def refuse_layers(layers: Sequence[Layer], loop: Loop) -> None:
    """Check that each process has whole experts of the tensors in which the file fuses several.

    Raises:
        UsageError: It has parts of an expert.
    """
    shards = loop.shards
    fused = [layer.name for layer in layers if shards is not None and shards.divides_experts(layer)]
    _refuse([f"{name}, in which the file fuses several experts in another form than the model," for name in fused[:1]])


def start_of(loop: Loop, checkpoint: Checkpoint) -> Mapping[str, torch.Tensor]:
    """Return the rows of the source that this process has, which are read from the files at each use."""
    assert loop.shards is not None
    return loop.shards.source(checkpoint.file_values())


def _refuse(names: list[str]) -> None:
    if names:
        listed = ", ".join(dict.fromkeys(names))
        raise UsageError(f"--shard: {listed} is not supported in a sharded run yet; leave it or --shard out")


def open_source(source: Source, library: Library, recipe: Recipe, options: Options, accelerator: Accelerator) -> Checkpoint:
    """Open the source of a sharded run, if possible without its values in memory. The main process checks the values.

    Raises:
        CheckpointError: As `open_checkpoint`.
    """
    pickles, key = options.allow_pickle, recipe.weights_key
    unread = open_unread(
        source, library, allow_pickle=pickles, weights_key=key, by_one=lambda make: _by_main_process(make, accelerator)
    )
    if unread is None:
        options.say("--shard: the files hold tensors in another form than the model, so each process first opens it whole")
    checkpoint = unread or open_checkpoint(source, library, allow_pickle=pickles, weights_key=key)
    _refuse_other_files(checkpoint, accelerator)
    if accelerator.is_main_process:
        if unread is not None:
            unread.refuse_broken()
        check_plain_values(checkpoint)
    return checkpoint


def _by_main_process(make: Callable[[], T], accelerator: Accelerator) -> T:
    """Let the main process make something, and return it in all."""
    made: list[T | None] = broadcast_object_list([make() if accelerator.is_main_process else None])
    return cast("T", made[0])


def _refuse_other_files(checkpoint: Checkpoint, accelerator: Accelerator) -> None:
    """Compare the headers of the weight files that the processes see, which may be on several machines.

    Raises:
        UsageError: They differ.
    """
    heads = b"".join(file.name.encode() + file.head for file in checkpoint.layout.files)
    seen: list[str] = gather_object([hashlib.sha256(heads).hexdigest()])
    others = [str(number) for number, digest in enumerate(seen) if digest != seen[0]]
    if others:
        raise UsageError(
            f"--shard: {checkpoint.source.folder}: process {', '.join(others)} sees other weight files there than process 0; "
            "give the same files to all machines"
        )


def hashes(checkpoint: Checkpoint, accelerator: Accelerator) -> dict[str, str]:
    """Return the SHA-256 of the source's files, which the main process computes."""
    return _by_main_process(checkpoint.hashes, accelerator)


def divide(loop: Loop, checkpoint: Checkpoint, workspace: Workspace, options: Options) -> None:
    """Divide the model among the processes. From here on, `loop.parameters` are the rows of this process.

    Raises:
        UsageError: FSDP2 cannot divide the model, or the processes do not share a disk.
    """
    # Imported here, because other runs need none of it.
    from dsd_refine.training.shards import Policy, Shards

    policy = Policy(half=loop.accelerator.mixed_precision == "bf16", offload=options.cpu_offload)
    shards = Shards(loop.model, loop.accelerator.device, checkpoint.values, policy)
    loop.shards = workspace.shards = shards
    loop.parameters = shards.parameters
    own = replace(checkpoint, placement=shards.own_placement(checkpoint.placement))
    loop.as_written = lambda _: shards.agreed(own.rounded_state(shards.state()))
    if not all(shards.exchanged((workspace.partial / "pid").is_file())):
        raise UsageError(
            f"{workspace.partial}: not every machine sees this folder; a sharded run needs one disk that all share"
        )
