"""Plan a run without weights: from the model on the meta device, the files' headers and the data."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from dsd_refine.checkpoint.checkpoint import Checkpoint, open_shapes
from dsd_refine.checkpoint.library import Library
from dsd_refine.checkpoint.source import Source
from dsd_refine.compat import BatchNorm
from dsd_refine.data.decoded import SHARE
from dsd_refine.data.splits import is_on_hub
from dsd_refine.masking.checkpoint_layers import few_maskable, frozen_names, open_layers
from dsd_refine.masking.layers import Layer, masked_count
from dsd_refine.method import arm_phases
from dsd_refine.recipe import Phase, Recipe, first_sparsity
from dsd_refine.run import disk as space
from dsd_refine.run import rates
from dsd_refine.search import resized, rungs_of, settings_of, steps_at
from dsd_refine.system import host_memory
from dsd_refine.tasks.base import Task
from dsd_refine.tasks.registry import is_held, look_at_data, parts_of, prepare_task
from dsd_refine.training.blocks import divided_parts
from dsd_refine.training.settings import check_settings
from dsd_refine.training.state import micro_batches

USABLE = 0.9  # share of a GPU's memory for what is counted here: the activations need the rest, or more
USUAL_GPU = 80 * 10**9  # bytes, where this machine has no GPU
MOST_GPUS = 4096


def make_plan(
    source: Source, library: Library, recipe: Recipe, *, allow_pickle: bool = False, shard: bool = False
) -> dict[str, Any]:
    """Return what a run would do.

    Args:
        source: The checkpoint. Its weights are not needed.
        library: The adapter of its library.
        recipe: The recipe.
        allow_pickle: Read .bin and .pth weights too.
        shard: The model is to be divided among processes.

    Returns:
        What `dsd-refine plan --json` prints: every layer with its number of masked weights (one for
        each sparsity) or with the reason why it is not masked; totals, steps, memory and disk; and
        the warnings that a run would give.

    Raises:
        UsageError: A run would raise it too, for a reason that can be seen without weights.
    """
    missing_data = _why_no_data(recipe)
    with tempfile.TemporaryDirectory() as cache:
        given = look_at_data(recipe, library.task, library, Path(cache), lambda *_: False) if not missing_data else None
        checkpoint = open_shapes(source, library, allow_pickle=allow_pickle, weights_key=recipe.weights_key)
        for setting in settings_of(recipe):
            check_settings(checkpoint.model, setting.recipe, checkpoint.filled)
        layers = open_layers(checkpoint, recipe, [])
        task = prepare_task(recipe, library.task, library, checkpoint.model, given) if given else None
        data = given.entry(parts_of(task)) if given and task else None
    task_report = dict(task.report()) if task else {"warnings": []}
    warnings = [*checkpoint.warnings, *task_report["warnings"], *(data["unused"] if data else [])]
    shares = list(dict.fromkeys(first_sparsity(setting.recipe) for setting in settings_of(recipe)))
    rows = [
        {
            "name": layer.name, "shape": list(layer.shape), "weights": layer.weights, "excluded": layer.excluded,
            "masked": [] if recipe.threshold == "global" else [layer.masked(share) for share in shares if share is not None],
        }
        for layer in layers
    ]  # fmt: skip
    return {
        "model": source.model, "resolved": source.resolved, "revision": source.revision, "library": source.library,
        "task": library.task, "recipe": recipe.name, "layers": rows,
        "totals": _totals(checkpoint, layers, rows, shares)
        | (_steps(checkpoint, recipe, task) if task else {"steps": f"not known{missing_data}"})
        | _sizes(checkpoint, layers, recipe, shard=shard),
        "labels": task_report.get("labels"), "data": data, "warnings": [*dict.fromkeys([*warnings, *few_maskable(layers)])],
    }  # fmt: skip


def _totals(
    checkpoint: Checkpoint, layers: list[Layer], rows: list[dict[str, Any]], shares: list[float | None]
) -> dict[str, Any]:
    parameters = sum(layer.weights for layer in layers if not (layer.excluded or "").startswith("the same storage"))
    maskable = sum(layer.weights for layer in layers if layer.excluded is None)
    totals: dict[str, Any] = {"parameters": f"{parameters:,}", "maskable": f"{maskable:,} ({maskable / parameters:.1%})"}
    for number, share in enumerate(share for share in shares if share is not None):
        # With `threshold: global` the counts of the layers depend on the weights; that of the model does not.
        counts = [row["masked"][number] for row in rows if row["masked"]]
        masked = sum(counts) if counts else masked_count(maskable, share)
        totals[f"masked at {share:g}"] = f"{masked:,} ({masked / maskable:.1%} of the maskable)"
    return totals


def _why_no_data(recipe: Recipe) -> str:
    """Return why the data cannot be read for a plan; an empty text if they can be read."""
    if recipe.data is None:
        return ": no data given (--data)"
    on_hub = [spec for spec in (recipe.data, recipe.eval_data) if spec and is_on_hub(spec)]
    return f" before {' and '.join(on_hub)} is fetched" if on_hub else ""


def _steps(checkpoint: Checkpoint, recipe: Recipe, task: Task) -> dict[str, str]:
    """Return the lines about rows and optimizer steps, by name."""
    holdout = len(task.holdout.rows) if task.holdout else 0
    lines = {"rows": f"{len(task.train.rows):,} train, {holdout:,} holdout, {len(task.eval.rows):,} evaluation"}
    batchnorm = any(isinstance(module, BatchNorm) for module in checkpoint.model.modules())
    micro = len(micro_batches(task.train.units, recipe.batch_size, batchnorm))
    per_epoch = -(-micro // recipe.gradient_accumulation_steps)
    for number, phase in enumerate(recipe.phases, 1):
        lines[f"{number}-{phase.kind}"] = _phase(phase, per_epoch)
    if tests := tested_optimizers(recipe):
        usual = ", ".join(f"{rates.USUAL[name]:g} for {name}" for name in tests)
        tested = f"tested on the source first, in at most {rates.most_steps() * len(tests)} steps ({', '.join(tests)})"
        lines["rate"] = tested if rates.is_worth_a_test(recipe, per_epoch) else f"{usual}: too few steps for a range test"
    names = ("refined", *recipe.control)
    tries = planned_tries(recipe, per_epoch)
    total = sum(phase.total_steps(per_epoch) for _, phases in tries for phase in phases)
    if recipe.searches:
        rungs = [f"{rung.size} of {rung.share:.3g} of the steps" for rung in rungs_of(recipe)]
        lines["search"] = f"tries of each arm: {', then '.join(rungs)}"
    return lines | {"in all": f"{total:,} steps: {len(tries)} runs of the phases ({', '.join(names)})"}


def tested_optimizers(recipe: Recipe) -> list[str]:
    """Return the optimizers for which a run tests the rate first."""
    tried = [setting.recipe for setting in settings_of(recipe)]
    return sorted({each.optimizer for each in tried if each.asks_for_rates})


def planned_tries(recipe: Recipe, per_epoch: int) -> list[tuple[str, tuple[Phase, ...]]]:
    """Return (arm, phases) for each try of a run. All have the recipe's own setting; the others cost about the same.

    `per_epoch` is the number of optimizer steps of an epoch.
    """
    tries = []
    for arm in ("refined", *recipe.control):
        phases = arm_phases(arm, recipe)
        total = sum(phase.total_steps(per_epoch) for phase in phases)
        for rung in rungs_of(recipe):
            each = (arm, resized(phases, steps_at(total, rung.share), per_epoch))
            tries += [each] * rung.size * recipe.seeds
    return tries


def _phase(phase: Phase, per_epoch: int) -> str:
    return f"{phase.total_steps(per_epoch):,} steps ({per_epoch:,} an epoch), peak rate {phase.lr:g}, {phase.schedule}"


def _sizes(checkpoint: Checkpoint, layers: list[Layer], recipe: Recipe, *, shard: bool) -> dict[str, str]:
    """Return the lines about the memory of the largest phase and about the disk."""
    memory = max(memory_of(checkpoint, layers, recipe, phase, last=phase is recipe.phases[-1]) for phase in recipe.phases)
    disk = space.of_run(checkpoint, layers, recipe)  # a run checks the same number before it begins
    lines = {"memory": f"{memory / 1e9:.2f} GB and the activations", "disk": f"{disk / 1e9:.2f} GB at most while running"}
    lines |= gpu_lines(checkpoint, recipe, memory) | ({} if shard else host_lines(memory))
    if is_held(checkpoint.library.task):
        lines["cache"] = f"decoded rows in at most {SHARE:.0%} of the disk space that is free (--cache-gb)"
    return lines


def gpu_lines(checkpoint: Checkpoint, recipe: Recipe, memory: int) -> dict[str, str]:
    """Return the lines about several GPUs: to divide a model that is too large for one, or to train tries side by side.

    Args:
        checkpoint: The source.
        recipe: The recipe.
        memory: The bytes that training needs in one process, without the activations.
    """
    here, size = torch.cuda.device_count(), gpu_bytes()
    command, name = "torchrun --nproc-per-node", checkpoint.source.model
    if memory > USABLE * size:
        count = gpus_needed(checkpoint, memory, size)
        each = sharded_memory(checkpoint, memory, count)
        text = f"{each / 1e9:.2f} GB a GPU and the activations: {command} {count} -m dsd_refine {name} … --shard"
        return {"sharded": f"needs {count} x {size / 1e9:.0f} GB, {text}"}
    tries = (1 + len(recipe.control)) * recipe.seeds * sum(rung.size for rung in rungs_of(recipe))
    if here > 1 and tries > 1:
        count = min(here, tries)
        return {"side by side": f"{tries} tries on {count} GPUs: {command} {count} -m dsd_refine {name} … --spread tries"}
    return {}


def host_lines(memory: int) -> dict[str, str]:
    """Return the line that says that a machine without a GPU has too little memory for the processes of a launcher.

    Args:
        memory: The bytes that training needs in one process, without the activations.
    """
    count, here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), host_memory()
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if has_gpu or not 0 < here < count * memory:
        return {}
    processes = f"{count} processes" if count > 1 else "one process"
    need = f"{count * memory / 1e9:.2f} GB and the activations for {processes}"
    return {"too large": f"{need}; this machine has {here / 1e9:.1f} GB and no GPU. --shard divides a model among processes"}


def gpu_bytes() -> int:
    """Return the memory of this machine's smallest GPU. Without one, that of a usual large GPU."""
    sizes = [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]
    return min(sizes, default=USUAL_GPU)


def gpus_needed(checkpoint: Checkpoint, memory: int, size: int) -> int:
    """Return how many GPUs of `size` bytes hold a divided model: a power of two."""
    count = 2
    while count < MOST_GPUS and sharded_memory(checkpoint, memory, count) > USABLE * size:
        count *= 2
    return count


def sharded_memory(checkpoint: Checkpoint, memory: int, count: int) -> int:
    """Return the bytes that each of `count` processes needs if the model is divided, without the activations.

    Two blocks, or embeddings, are whole at a time, with their gradients. The source's weights are not held: they are
    read from the files.
    """
    model = checkpoint.model
    weights = sum(parameter.numel() for parameter in model.parameters())
    inside = [sum(parameter.numel() for parameter in block.parameters()) for block in divided_parts(model)]
    largest = max([*inside, weights - sum(inside)])
    return (memory - space.FLOAT * weights) // count + 2 * 2 * space.FLOAT * largest


def memory_of(checkpoint: Checkpoint, layers: list[Layer], recipe: Recipe, phase: Phase, *, last: bool) -> int:
    """Return the bytes that a phase needs, without the activations.

    Everything is float32, except the masks. It is the weights, the source's weights and a teacher;
    gradients and optimizer state of the trained weights; an average; masks, and the values that a
    random mask sets aside. A save needs no more. In the last phase, an evaluation needs copies in
    place of the gradients: of weights that are rounded to the dtypes of the files, and of weights
    that the average replaces.

    Args:
        checkpoint: The source.
        layers: Its layers.
        recipe: The recipe.
        phase: The phase.
        last: Whether it is the last phase.
    """
    own = [layer for layer in layers if not (layer.excluded or "").startswith("the same storage")]
    weights = sum(layer.weights for layer in own)
    frozen_keys = frozen_names(checkpoint.model, phase.frozen, checkpoint.filled)
    frozen = sum(layer.weights for layer in own if all(tensor_slice.key in frozen_keys for tensor_slice in layer.slices))
    floats = (2 + int(any(each.distill for each in recipe.phases))) * weights
    floats += (1 + space.optimizer_tensors(recipe)) * (weights - frozen)
    floats += weights - frozen if phase.average != "none" else 0
    floats += weights - frozen if phase.sam else 0
    if last and recipe.keep == "best":
        halves = {entry.name for _, entry in checkpoint.layout.where.values() if entry.dtype.itemsize < space.FLOAT}
        copies = sum(layer.weights for layer in own if layer.name in halves)
        copies += weights - frozen if phase.average != "none" else 0
        floats += max(0, copies - (weights - frozen))
    maskable = sum(layer.weights for layer in layers if layer.excluded is None) if phase.kind == "sparse" else 0
    random = phase.refresh and (phase.criterion == "random" or "random" in recipe.control)
    floats += round(maskable * max(first_sparsity(setting.recipe) or 0.0 for setting in settings_of(recipe))) if random else 0
    return space.FLOAT * floats + maskable
