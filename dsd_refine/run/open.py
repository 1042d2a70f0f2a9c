"""Open a run: check and prepare the model, the data, the device and the output before the first step."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dsd_refine import __version__
from dsd_refine.checkpoint.checkpoint import Checkpoint, open_checkpoint
from dsd_refine.checkpoint.library import Library
from dsd_refine.checkpoint.source import Source
from dsd_refine.checkpoint.verify import check_plain
from dsd_refine.compat import BatchNorm
from dsd_refine.data.decoded import Store
from dsd_refine.errors import DsdError, UsageError, is_full_memory
from dsd_refine.files import is_full, no_room
from dsd_refine.masking.checkpoint_layers import open_layers
from dsd_refine.recipe import Recipe
from dsd_refine.report.data import data_lines
from dsd_refine.report.report import environment
from dsd_refine.run import disk as space
from dsd_refine.run import sharded
from dsd_refine.run.listeners import HistogramRecorder, Housekeeping
from dsd_refine.run.probe import probes
from dsd_refine.run.run import Options, Run
from dsd_refine.run.signals import Signals
from dsd_refine.run.state import RunState
from dsd_refine.run.workspace import Workspace
from dsd_refine.search import settings_of
from dsd_refine.seeding import seed_all
from dsd_refine.system import EnergyMeter, energy_counters, keep_freed_memory, return_freed_memory
from dsd_refine.tasks.base import Item, Task
from dsd_refine.tasks.registry import look_at_data, parts_of, prepare_task
from dsd_refine.training.batchnorm import without_variance
from dsd_refine.training.blame import failing, in_short, rows_of
from dsd_refine.training.evaluate import exact, unreached
from dsd_refine.training.evaluation_batch import evaluation_batch
from dsd_refine.training.hooks import Together
from dsd_refine.training.settings import check_settings
from dsd_refine.training.state import Loop

PRECISIONS = ("no", "fp16", "bf16")
KERNEL_SETTINGS = ("MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "NVIDIA_TF32_OVERRIDE")
STATE = 5  # version of the saved state; a change that cannot read older states raises it
# How long processes wait for each other. The main one may download, write or verify for hours, and
# the default of NCCL is ten minutes.
PATIENCE = timedelta(days=7)


@contextmanager
def opened(source: Source, library: Library, recipe: Recipe, options: Options) -> Iterator[Run]:
    """Open a run for a `with` block, and clean up after it.

    Raises:
        UsageError: The model, the data, the recipe or the options cannot be used.
        RunError: The disk is full.
    """
    is_sharded = sharded.is_asked(options)
    options = replace(options, shard=is_sharded)
    with ExitStack() as stack:
        stack.enter_context(sharded.without_accelerates_own() if is_sharded else nullcontext())
        accelerator = open_accelerator(recipe, options)
        # If the recipe has no precision, Accelerate's own configuration gives it.
        recipe = recipe.model_copy(update={"mixed_precision": accelerator.mixed_precision})
        if is_sharded:
            sharded.refuse_early(recipe, options, accelerator, library.task)
        workspace = Workspace(options.output_dir, writes=accelerator.is_main_process, save_every=options.save_every)
        if accelerator.is_main_process:
            workspace.check_target(source.folder, resume=options.resume, overwrite=options.overwrite)
        signals = stack.enter_context(Signals())
        stack.enter_context(workspace.locked() if accelerator.is_main_process else nullcontext())
        accelerator.wait_for_everyone()
        try:
            with _unreadable(source):
                run = _open(source, library, recipe, options, accelerator, workspace, signals)
            if run.loop.world == 1 and not run.state.judged and not (workspace.partial / "tries").is_dir():
                run.meter = stack.enter_context(EnergyMeter(energy_counters(accelerator.device)))
            signals.wait()
            yield run
        except BaseException as error:
            if disk_error := is_full(error):
                raise no_room(disk_error, workspace.partial, workspace.need) from None
            raise


@contextmanager
def _unreadable(source: Source) -> Iterator[None]:
    """Turn the error for an unreadable file into a UsageError, because the user can correct it.

    This is only right before the first step, when nothing was trained and nothing can be resumed.
    """
    try:
        yield
    except (PermissionError, FileNotFoundError, IsADirectoryError) as error:
        problem = f"{error.filename}: {error.strerror}" if error.filename else f"{source.folder}: {error}"
        raise UsageError(f"{problem}; nothing was trained") from None


def _open(
    source: Source,
    library: Library,
    recipe: Recipe,
    options: Options,
    accelerator: Accelerator,
    workspace: Workspace,
    signals: Signals,
) -> Run:
    # The data come before the weights, so that mistakes in the data show at once.
    with accelerator.main_process_first():
        cache = workspace.partial / "cache"
        store = Store(cache / "decoded", options.cache_bytes, writes=accelerator.is_main_process)
        given = look_at_data(recipe, library.task, library, cache, options.download, store)
    seed_all(recipe.seed, accelerator.device)
    if options.shard:
        checkpoint = sharded.open_source(source, library, recipe, options, accelerator)
    else:
        checkpoint = open_checkpoint(source, library, allow_pickle=options.allow_pickle, weights_key=recipe.weights_key)
    model = checkpoint.model
    with accelerator.main_process_first():
        task = prepare_task(recipe, library.task, library, model, given)
    for line in data_lines(given.entry(parts_of(task))):
        options.say(f"data: {line}")
    if store.budget.full:
        options.say("cache: it holds a part of the rows; the others are decoded whenever they are used (--cache-gb)")
    loop = open_loop(checkpoint, task, recipe, options, accelerator, workspace, signals)
    if options.activation_checkpointing:
        checkpoint_activations(model)
    if options.shard:
        sharded.refuse_model(checkpoint, loop)
        sharded.divide(loop, checkpoint, workspace, options)
    without_gradient = first_look(loop)
    if accelerator.is_main_process and not options.shard:
        check_plain(checkpoint, probes(loop))
    for name, parameter in model.named_parameters() if loop.shards is None else loop.parameters.items():
        parameter.requires_grad_(parameter.requires_grad and name not in without_gradient)
    for setting in settings_of(recipe):
        check_settings(model, setting.recipe, checkpoint.filled)
    layers = open_layers(checkpoint, recipe, without_gradient)
    if options.shard:
        sharded.refuse_layers(layers, loop)
    hashes = sharded.hashes(checkpoint, accelerator) if options.shard else checkpoint.hashes()
    workspace.need = space.of_run(checkpoint, layers, recipe, save_phases=options.save_phases)
    if workspace.writes:
        space.check_room(workspace.partial, workspace.need)
    workspace.begin(_identity(recipe, hashes, task, accelerator, options), options.resume)
    accelerator.wait_for_everyone()
    loop.layers = layers if loop.shards is None else loop.shards.own_layers(layers)
    start: Mapping[str, torch.Tensor]
    if loop.shards is None:
        start = {key: value.detach().to("cpu", copy=True) for key, value in loop.state().items()}
    else:
        start = sharded.start_of(loop, checkpoint)
    teacher = _teacher(recipe, task, model)
    state = RunState.from_json(workspace.state.get("run", {}))
    run = Run(checkpoint, task, recipe, options, loop, layers, workspace, hashes, start, given, teacher=teacher, state=state)
    callers_hooks = options.hooks if accelerator.is_main_process else ()
    loop.hooks = Together([loop.hooks, HistogramRecorder(run), *callers_hooks])
    _wrap(run)
    loop.evaluation_batch = evaluation_batch(loop)
    if accelerator.scaler is not None:
        run.loss_scale = accelerator.scaler.state_dict()
        accelerator.scaler.load_state_dict(state.scaler or run.loss_scale)
    return run


def first_look(loop: Loop) -> list[str]:
    """Run the model on a few training rows, so that errors show before anything is trained.

    Returns:
        The names of the parameters that get no gradient (see `unreached`).

    Raises:
        UsageError: The model cannot compute on these data, or it has BatchNorm and the batch size is
            1.
        CheckpointError: A causal language model sees the token that it has to predict.
    """
    try:
        if (refuse := getattr(loop.task, "refuse_foresight", None)) is not None:
            loop.model.eval()
            with exact():
                refuse(loop.model, loop.accelerator.device)
        batchnorms = without_variance(loop) if loop.recipe.batch_size == 1 and loop.has_batchnorm else []
        if batchnorms:
            raise UsageError(
                f"--batch-size 1: {batchnorms[0]} (BatchNorm) sees one value a channel, which has no variance; give 2 or more "
                "(--gradient-accumulation-steps does not change this)"
            )
        return unreached(loop)
    except DsdError:
        raise
    except Exception as error:  # a model may raise any error for inputs that it was not made for
        if is_full_memory(error):
            raise
        items: list[Item] = [(unit, None) for unit in range(min(8, loop.task.train.units))]
        # A forward of a divided model needs all processes, so no row is tried alone.
        failed = [] if loop.shards is not None else failing(loop, loop.task.train, items, loop.task.loss)
        if 0 < len(failed) < len(items):
            rows = rows_of(loop, loop.task.train, failed)
            raise UsageError(f"the model fails on the {rows}: {in_short(error)}. Take it out of the data") from None
        raise UsageError(
            f"the model cannot compute on these data: {in_short(error)}. "
            "Check that its config and its preprocessing belong to this model"
        ) from None


def open_accelerator(recipe: Recipe, options: Options) -> Accelerator:
    """Return Accelerate's object for the devices and processes of the run.

    Accelerate's own configuration decides what the options leave open.

    Raises:
        UsageError: The device is missing or does not have the precision, or Accelerate is configured
            for sharded training.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here")
    if options.device == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: torch sees no MPS device here")
    timeout = InitProcessGroupKwargs(timeout=PATIENCE)
    try:
        accelerator = Accelerator(
            mixed_precision=recipe.mixed_precision, cpu=options.device == "cpu", kwargs_handlers=[timeout]
        )
    except (ValueError, ImportError) as error:
        raise UsageError(f"accelerate refuses this device and precision: {error}") from None
    kinds = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in kinds:
        raise UsageError(
            f"{accelerator.distributed_type}: is not supported; use several processes, with --shard if memory is short"
        )
    if accelerator.mixed_precision not in PRECISIONS:
        raise UsageError(
            f"mixed precision {accelerator.mixed_precision} is not supported: --mixed-precision {'|'.join(PRECISIONS)}"
        )
    # On a CPU, Accelerate would ignore fp16 without a message.
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("--mixed-precision fp16 needs a GPU; on the CPU give bf16, or no")
    if accelerator.scaler is not None and any(phase.sam for each in settings_of(recipe) for phase in each.recipe.phases):
        raise UsageError("phases.*.sam does not go with --mixed-precision fp16, whose gradients are scaled; give bf16, or no")
    if accelerator.device.type == "cpu":
        # By default a few kernels add numbers in an order that depends on timing.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if options.shard:
        return_freed_memory()
    elif accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def open_loop(
    checkpoint: Checkpoint,
    task: Task,
    recipe: Recipe,
    options: Options,
    accelerator: Accelerator,
    workspace: Workspace,
    signals: Signals,
) -> Loop:
    """Move the model to its device, and return the training loop over it.

    Convolutional models use the channels-last memory format if it is safe (see `channels_last`). A model to divide
    stays where it is: its shards are moved.
    """
    model = checkpoint.model if options.shard else checkpoint.model.to(accelerator.device)
    use_channels_last = channels_last(model, accelerator.device) and not options.shard  # FSDP2 divides plain tensors alone
    if use_channels_last:
        model.to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
    return Loop(
        accelerator=accelerator,
        model=model,
        forward=model,
        task=task,
        recipe=recipe,
        as_written=checkpoint.rounded,
        hooks=Housekeeping(workspace, signals),
        workers=options.workers,
        has_batchnorm=any(isinstance(module, BatchNorm) for module in model.modules()),
        channels_last=use_channels_last,
        parameters=dict(model.named_parameters(remove_duplicate=False)),
    )


def checkpoint_activations(model: nn.Module) -> None:
    """Let the model compute the activations of its blocks again in the backward pass, in place of storing them.

    It is the model's own way of doing so. It restores the random generators, so that dropout is the same both times.

    Raises:
        UsageError: The model has no such way.
    """
    try:
        if getattr(model, "supports_gradient_checkpointing", False):
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        else:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):  # timm's models say no by an assertion
        raise UsageError("--activation-checkpointing: this model cannot compute activations again; leave it out") from None


def channels_last(model: nn.Module, device: torch.device) -> bool:
    """Return whether the model is convolutional and channels-last gradients are right on the device.

    On a CPU, the strided 1x1 convolution of oneDNN has a bug if it has fewer input channels than its
    block size (8 or 16). It writes beyond its workspace, so that gradients are wrong or the process
    crashes (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    narrow = any(
        set(conv.kernel_size) == {1} and set(conv.stride) != {1} and conv.in_channels // conv.groups < 16
        for conv in convolutions
    )
    return bool(convolutions) and not (narrow and device.type == "cpu")


def _teacher(recipe: Recipe, task: Task, model: nn.Module) -> nn.Module | None:
    """Return a copy of the source as the teacher, or None if no phase distills."""
    if not any(phase.distill for setting in settings_of(recipe) for phase in setting.recipe.phases):
        return None
    if not hasattr(task, "logits"):
        raise UsageError(f"phases.*.distill: is not available for {task.name}")
    return copy.deepcopy(model).eval().requires_grad_(False)


def _wrap(run: Run) -> None:
    """Wrap the model for several processes, and compile it if asked."""
    loop = run.loop
    if loop.world > 1 and loop.shards is None:
        loop.forward = parallel(loop.model, loop.accelerator.device)
    if run.options.compile:
        check_compiler(loop.accelerator.device)
        loop.forward = torch.compile(loop.forward)


def parallel(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Return the model wrapped for several processes. The model itself does not change.

    `accelerator.prepare_model` is not used, because it puts autocast into the model's own `forward`.
    Then the check of the output, which needs float32, would compute in bf16 or fp16. Instead, the
    loop uses autocast around each of its calls.

    Buffers are copied before each evaluation (`training.evaluate`), and not at each forward: a task may
    call the model once for each length of its rows, so that processes make different numbers of calls.
    """
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, devices, find_unused_parameters=True, broadcast_buffers=False)


def check_compiler(device: torch.device) -> None:
    """Compile a small function, to check that torch.compile finds a C++ compiler or Triton.

    Without this check, the run would fail only in its first step.

    Raises:
        UsageError: torch.compile does not work here.
    """
    try:
        torch.compile(lambda values: values * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # compilers raise errors of many types
        text = str(error).strip().splitlines()[0][:300]
        raise UsageError(
            f"--compile: torch.compile does not work here ({text}); leave --compile out, or install what is missing"
        ) from None


def _identity(recipe: Recipe, hashes: dict[str, str], task: Task, accelerator: Accelerator, options: Options) -> dict[str, Any]:
    """Return everything that must be equal, so that a resumed run gives the same bytes."""
    versions = environment(str(accelerator.device), accelerator.num_processes, options.shard)
    data = {name: rows.fingerprint for name, rows in parts_of(task).items() if rows is not None}
    versions["dsd-refine"] = __version__
    versions["form of the state"] = STATE
    computed = versions | _kernels(accelerator.device) | {"--compile": options.compile}
    return _flat({"recipe": recipe.model_dump(mode="json"), "source": hashes, "data": data} | computed)


def _kernels(device: torch.device) -> dict[str, Any]:
    """Return what decides the order of additions: threads, processor, and settings of math libraries."""
    on_gpu = device.type == "cuda"
    return {
        "threads (OMP_NUM_THREADS)": torch.get_num_threads(),
        "processor": torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
    } | {name: os.environ.get(name) for name in KERNEL_SETTINGS}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return nested mappings and lists as one mapping with dotted names.

    So a message can name the value that differs.
    """
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for part, inner in items for key, leaf in _flat(inner, f"{name}.{part}".lstrip(".")).items()}
