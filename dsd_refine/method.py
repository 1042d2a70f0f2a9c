"""The method: Dense-Sparse-Dense training (Han et al., ICLR 2017) of a released checkpoint, beside its control.

The source is the finished first Dense phase. `refine` reads top to bottom; what it calls is one step each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn

from dsd_refine import masks as masking
from dsd_refine import moments, space
from dsd_refine.average import Average
from dsd_refine.checkpoint import Checkpoint, Library, Source, open_checkpoint
from dsd_refine.checkpoint.verify import check_plain
from dsd_refine.compare import Comparison, compare, gate_passed, holm, verdict
from dsd_refine.distill import distilled
from dsd_refine.errors import DsdError, Interrupted, UsageError
from dsd_refine.layers import open_layers
from dsd_refine.masks import Layer, Masks
from dsd_refine.preflight import preflight
from dsd_refine.publish import probes, publish
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.report import Report, environment
from dsd_refine.runstate import Workspace, pack_masks, pack_optimizer, unpack_masks, unpack_optimizer
from dsd_refine.settings import check_settings, settings
from dsd_refine.signals import Signals
from dsd_refine.tasks import Scores, Task
from dsd_refine.tasks.open import open_task
from dsd_refine.train import (
    Key,
    Loop,
    Progress,
    evaluate,
    make_optimizer,
    place_of,
    reestimate,
    seed_all,
    train_phase,
    unreached,
    without_variance,
)

PRECISIONS = ("no", "fp16", "bf16")


@dataclass(frozen=True)
class Options:
    """How a run is carried out; nothing here decides its result."""

    output_dir: Path
    resume: bool = False
    overwrite: bool = False
    save_phases: bool = False
    save_every: float = 10.0  # minutes
    device: str = "auto"
    compile: bool = False
    workers: int = 0
    allow_pickle: bool = False
    argv: tuple[str, ...] = ()
    say: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int, int], None] = lambda label, step, total: None
    download: Callable[[str, int], bool] = lambda name, size: False


@dataclass
class Run:
    """An open run: the checkpoint, the data, the loop, and what has been measured so far."""

    checkpoint: Checkpoint
    task: Task
    recipe: Recipe
    options: Options
    loop: Loop
    layers: list[Layer]
    workspace: Workspace
    source_hashes: dict[str, str]
    start: dict[str, torch.Tensor]
    teacher: nn.Module | None = None
    scores: dict[str, Scores] = field(default_factory=dict)
    seeds: dict[str, list[Scores]] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    current: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> dict[str, Any]:
        return self.workspace.state

    @property
    def arms(self) -> tuple[str, ...]:
        return ("refined", *self.recipe.control)

    @property
    def tries(self) -> list[float | None]:
        """The sparsity of each try of an arm: all sparsities with the first seed, then with the next."""
        return list(self.recipe.sparsities) * self.recipe.seeds

    @property
    def margin(self) -> float:
        """What counts as the same: absolute for a fraction, relative to the source for a loss."""
        if self.task.metric != "loss":
            return self.recipe.margin
        return self.recipe.margin * self.task.metrics(self.seeds["baseline"][0])[self.task.metric]

    def selected(self, arm: str) -> dict[str, Any]:
        """What the holdout chose of an arm: file, attempt, epoch, sparsity, seed, and the holdout's metrics."""
        chosen: dict[str, Any] = self.state["best"][arm][str(self.preferred(arm))]
        return chosen

    def preferred(self, arm: str) -> int:
        """The number of the seed whose result the holdout prefers (the first, where there is no holdout)."""
        best = 0
        for seed in range(1, self.recipe.seeds):
            new, old = (self.state["best"][arm][str(n)]["holdout"] for n in (seed, best))
            if new is not None and _preferred(self, new, old):
                best = seed
        return best


def refine(source: Source, library: Library, recipe: Recipe, options: Options) -> Report:
    """Refine a checkpoint: Sparse, then re-Dense, each control beside it; select on the holdout, judge on the evaluation.

    Writes `options.output_dir` as a whole or not at all. The report's `exit_code` is 0, or 3 where the gate is not met.

    Raises:
        UsageError: model, data or options cannot be used; nothing was trained.
        Interrupted, RunError, VerifyError: as `dsd_refine.errors` says.
    """
    with opened(source, library, recipe, options) as run:
        judge(run, "baseline")
        for arm in run.arms:
            for attempt, sparsity in enumerate(run.tries):
                phases = arm_phases(arm, recipe, sparsity)
                for number, phase in enumerate(phases):
                    if passed(run, arm, attempt, number):
                        continue
                    done = enter(run, arm, attempt, number, phase)
                    with settings(run.loop.model, phase, run.checkpoint.filled):
                        one_phase(run, phase, done, last=number == len(phases) - 1)
        for arm in run.arms:
            for seed in range(recipe.seeds):
                load_selected(run, arm, seed)
                judge(run, arm, seed)
        judge_all(run)
        load_selected(run, "refined", run.preferred("refined"))
        return finish(run)


def arm_phases(arm: str, recipe: Recipe, sparsity: float | None) -> tuple[Phase, ...]:
    """The phases of one try of an arm: the recipe's, with the masks taken out (dense) or drawn at random (random).

    With `keep: sparse` they end with the last sparse phase, whose weights are the result.
    """
    phases = recipe.phases_at(sparsity)
    if recipe.keep == "sparse":
        phases = phases[: max(i for i, phase in enumerate(phases) if phase.kind == "sparse") + 1]
    if arm == "dense":
        free = {"kind": "dense", "sparsity": None, "refresh": None, "criterion": "magnitude"}
        return tuple(phase.model_copy(update=free) for phase in phases)
    if arm == "random":
        return tuple(p.model_copy(update={"criterion": "random"}) if p.kind == "sparse" else p for p in phases)
    return phases


def one_phase(run: Run, phase: Phase, done: Progress, last: bool) -> None:
    """Sparse: mask by |w| of the weights now held, then train under the mask. Dense: train all, restored ones from 0."""
    masks = trained(run, phase, done, last)
    settle(run, masks, done, last)
    masking.check_masks(masks, run.loop.parameters)
    look(run, "after S" if masks else "after re-D" if phase.kind == "dense" else None)
    leave(run, phase, done, masks, last)


def trained(run: Run, phase: Phase, done: Progress, last: bool) -> Masks:
    """A phase's mask and its steps, from what `enter` left and within `settings`; returns the mask that held last."""
    loop, parameters, at = run.loop, run.loop.parameters, run.current
    key = phase_key(run)
    average = at["average"] = Average(phase, parameters, at["saved"])

    def make(refresh: int) -> Masks:
        if phase.kind == "dense" or not phase.sparsity:
            return {}
        if refresh and phase.criterion == "random":
            masking.put_back(at["masks"], at["stash"], parameters)
        seed = (at["seed"], at["number"], refresh, "mask")
        masks = masking.make_masks(run.layers, parameters, float(phase.sparsity), phase.criterion, seed)  # type: ignore[arg-type]
        at["stash"] = masking.masked_values(masks, parameters) if phase.refresh and phase.criterion == "random" else {}
        return masks

    begun = at["masks"] is not None
    look(run, "start" if not at["number"] else "unmasked" if phase.kind == "dense" else None, begun)
    masks: Masks = at["masks"] if begun else make(0)
    at["masks"] = masks
    masking.apply_masks(masks, parameters)
    look(run, "pruned" if masks else None, begun)
    optimizer = at["optimizer"] = make_optimizer(loop, phase)
    unpack_optimizer(at["saved"], optimizer)

    def epoch_end(epoch: int) -> None:
        average.epoch_end()
        if last and run.recipe.keep == "best":
            with kept_buffers(loop.model), average.held() as averaged:
                if averaged:
                    reestimate(loop, key)
                consider(run, epoch, masks)

    loop.loss = distilled(run.task, run.teacher, phase.distill) if phase.distill and run.teacher else None
    train_phase(loop, phase, key, at["label"], masks, done, optimizer, remask=make, epoch_end=epoch_end,
                step_end=average.step_end)  # fmt: skip
    return masks


def phase_key(run: Run) -> Key:
    """What the order, augmentation and dropout of the phase that runs are functions of."""
    return Key(run.current["seed"], run.current["number"])


def look(run: Run, moment: str | None, begun: bool = False) -> None:
    """Keep the refined arm's weight histograms at one of the paper's moments, for report.html; not in a phase taken up."""
    at = run.current
    if moment is None or begun or at["arm"] != "refined":
        return
    book = run.state.setdefault("pictures", {}).setdefault(str(at["attempt"]), {})
    moments.take(book, moments.choose(run.layers, run.loop.parameters), run.loop.parameters, moment)


def settle(run: Run, masks: Masks, done: Progress, last: bool) -> None:
    """What follows a phase's last step: the mean takes the weights' place; BatchNorm looks again where nothing trained."""
    run.state["masked_only"] = not done.step and (bool(masks) or run.state.get("masked_only", False))
    reason = "averaged weights" if run.current["average"].settle() else None
    if last and run.state["masked_only"]:
        reason = "masked without training after"
    run.current["statistics"] = reason if reason and reestimate(run.loop, phase_key(run)) else None


@contextmanager
def opened(source: Source, library: Library, recipe: Recipe, options: Options) -> Iterator[Run]:
    """Everything that must be right before the first step, and the clean-up after the last."""
    accelerator = open_accelerator(recipe, options)
    recipe = recipe.model_copy(update={"mixed_precision": accelerator.mixed_precision})  # Accelerate's own, if none was given
    workspace = Workspace(options.output_dir, writes=accelerator.is_main_process, save_every=options.save_every)
    if accelerator.is_main_process:
        workspace.check_target(source.folder, resume=options.resume, overwrite=options.overwrite)
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        stack.enter_context(workspace.locked() if accelerator.is_main_process else nullcontext())
        accelerator.wait_for_everyone()
        try:
            with _unreadable():
                run = _open(source, library, recipe, options, accelerator, workspace, signals)
            signals.wait()
            yield run
        except BaseException as error:
            if full := space.is_full(error):
                raise space.no_room(full, workspace.partial, workspace.need) from None
            raise


@contextmanager
def _unreadable() -> Iterator[None]:
    """Before the first step, a file that cannot be read is the user's to cure: nothing was trained, nothing can be resumed."""
    try:
        yield
    except (PermissionError, FileNotFoundError, IsADirectoryError) as error:
        raise UsageError(f"{error.filename}: {error.strerror}; nothing was trained") from None


def _open(
    source: Source,
    library: Library,
    recipe: Recipe,
    options: Options,
    accelerator: Accelerator,
    workspace: Workspace,
    signals: Signals,
) -> Run:
    seed_all(recipe.seed, accelerator.device)
    checkpoint = open_checkpoint(source, library, allow_pickle=options.allow_pickle)
    model = checkpoint.model
    with accelerator.main_process_first():
        task = open_task(recipe, library.task, library, model, workspace.partial / "cache", options.download)
    loop = open_loop(checkpoint, task, recipe, options, accelerator, workspace, signals)
    lost = first_look(loop)
    if accelerator.is_main_process:
        check_plain(checkpoint, probes(loop, checkpoint))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in lost)
    check_settings(model, recipe, checkpoint.filled)
    layers = open_layers(checkpoint, recipe, lost)
    hashes = checkpoint.hashes()
    workspace.need = space.of_run(checkpoint, layers, recipe, save_phases=options.save_phases)
    if workspace.writes:
        space.check_room(workspace.partial, workspace.need)
    workspace.begin(_identity(recipe, hashes, task, accelerator), options.resume)
    accelerator.wait_for_everyone()
    start = {key: value.detach().to("cpu", copy=True) for key, value in model.state_dict().items()}
    run = Run(checkpoint, task, recipe, options, loop, layers, workspace, hashes, start, teacher=_teacher(recipe, task, model))
    _wrap(run)
    if accelerator.scaler is not None and workspace.state.get("scaler"):
        accelerator.scaler.load_state_dict(workspace.state["scaler"])
    loop.save = lambda: save(run)
    return run


def first_look(loop: Loop) -> list[str]:
    """`unreached`, where model and data meet for the first time: what does not fit shows before anything is trained.

    Raises:
        UsageError: the model cannot compute on these data, or BatchNorm not on batches of one row.
    """
    try:
        lone = without_variance(loop) if loop.recipe.batch_size == 1 and loop.has_batchnorm else []
        if lone:
            raise UsageError(
                f"--batch-size 1: {lone[0]} (BatchNorm) sees one value a channel, which has no variance; give 2 or more "
                "(--gradient-accumulation-steps makes no difference to it)"
            )
        return unreached(loop)
    except DsdError:
        raise
    except Exception as error:  # a model raises whatever inputs that it is not made for make it raise
        if type(error).__name__ == "OutOfMemoryError":
            raise
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"the model cannot compute on these data: {text}. Do config and preprocessing belong to it?") from None


def open_accelerator(recipe: Recipe, options: Options) -> Accelerator:
    """Accelerate's view of devices and processes; where a flag says nothing, its own configuration decides.

    Raises:
        UsageError: a device that is not there, a precision it lacks, or sharded training.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here")
    if options.device == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: torch sees no MPS device here")
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    try:
        accelerator = Accelerator(mixed_precision=recipe.mixed_precision, cpu=options.device == "cpu", kwargs_handlers=[unused])
    except (ValueError, ImportError) as error:
        raise UsageError(f"accelerate refuses this device and precision: {error}") from None
    kinds = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in kinds:
        raise UsageError(f"{accelerator.distributed_type}: sharded training is not supported; use plain data parallelism")
    if accelerator.mixed_precision not in PRECISIONS:
        raise UsageError(
            f"mixed precision {accelerator.mixed_precision} is not supported: --mixed-precision {'|'.join(PRECISIONS)}"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # where Accelerate leaves it out silently
        raise UsageError("--mixed-precision fp16 is for a GPU; the CPU has bf16, or no")
    if accelerator.device.type == "cpu":
        # a few kernels add in an order that depends on timing unless told otherwise
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
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
    """The loop over a model on its device. Convolutional models run channels-last."""
    model = checkpoint.model.to(accelerator.device)
    convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
    if convolutional:
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
        log=workspace.log,
        progress=options.progress if accelerator.is_main_process else lambda label, step, total: None,
        stopping=lambda: signals.asked,
        save=lambda: None,
        save_due=workspace.save_due,
        workers=options.workers,
        has_batchnorm=any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()),
        channels_last=convolutional,
        parameters=dict(model.named_parameters(remove_duplicate=False)),
    )


def _teacher(recipe: Recipe, task: Task, model: nn.Module) -> nn.Module | None:
    """A copy of the source to learn from, where a phase asks for it."""
    if not any(phase.distill for phase in recipe.phases):
        return None
    if not hasattr(task, "logits"):
        raise UsageError(f"phases.*.distill: is not for {task.name}")
    return copy.deepcopy(model).eval().requires_grad_(False)


def _wrap(run: Run) -> None:
    loop = run.loop
    if loop.world > 1:
        loop.forward = loop.accelerator.prepare_model(loop.model)
    if run.options.compile:
        check_compiler(loop.accelerator.device)
        loop.forward = torch.compile(loop.forward)


def check_compiler(device: torch.device) -> None:
    """Compile a trifle: what torch.compile needs (a C++ compiler, Triton) would be missed in the first step otherwise.

    Raises:
        UsageError: it cannot compile here.
    """
    try:
        torch.compile(lambda values: values * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # torch raises whatever its compilers say
        text = str(error).strip().splitlines()[0][:300]
        raise UsageError(
            f"--compile: torch.compile does not work here ({text}); leave --compile out, or install that"
        ) from None


def _identity(recipe: Recipe, hashes: dict[str, str], task: Task, accelerator: Accelerator) -> dict[str, Any]:
    """What must be equal for a resumed run to end in the same bytes."""
    versions = environment(str(accelerator.device), accelerator.num_processes)
    data = {name: part.rows.fingerprint for name, part in _parts(task).items()}
    return _flat({"recipe": recipe.model_dump(mode="json"), "source": hashes, "data": data} | versions)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping of dotted names, so that a difference can be named."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for part, inner in items for key, leaf in _flat(inner, f"{name}.{part}".lstrip(".")).items()}


def _parts(task: Task) -> dict[str, Any]:
    parts = {"train": task.train, "holdout": task.holdout, "eval": task.eval}
    return {name: part for name, part in parts.items() if part is not None}


def passed(run: Run, arm: str, attempt: int, number: int) -> bool:
    """Was this phase finished before the run was taken up again?"""
    at = run.state.get("at")
    place = (run.arms.index(arm), attempt, number)
    return at is not None and place < tuple(at)


def enter(run: Run, arm: str, attempt: int, number: int, phase: Phase) -> Progress:
    """Bring the model to where this phase begins, or to where it was stopped."""
    place = [run.arms.index(arm), attempt, number]
    taken_up = not run.current and run.state.get("at") == place and bool(run.state.get("tensors"))
    saved = run.workspace.read_tensors(run.state["tensors"]) if taken_up else {}
    if saved:
        run.loop.accelerator.wait_for_everyone()  # the main process's next save removes what all have read
        load_state(run.loop.model, {k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")})
    elif number == 0:
        load_state(run.loop.model, run.start)
    progress = Progress(**run.state["progress"]) if saved and run.state.get("progress") else Progress()
    attempts = f" try {attempt + 1}" if len(run.tries) > 1 else ""
    if number == 0:
        run.state["masked_only"] = False
    run.current = {
        "place": place, "arm": arm, "attempt": attempt, "number": number, "progress": progress,
        "label": f"{arm}{attempts}/{number + 1}-{phase.kind}", "saved": saved, "optimizer": None,
        "seed": try_seed(run.recipe, arm, attempt), "repeat": attempt // len(run.recipe.sparsities),
        "stash": {k.removeprefix("stash."): v for k, v in saved.items() if k.startswith("stash.")},
        "masks": unpack_masks(saved, run.loop.parameters) if run.state.get("progress") and saved else None,
        "sparsity": run.tries[attempt] if run.tries[attempt] is not None else _sparsity(run.recipe),
    }  # fmt: skip
    run.state["at"] = place
    return progress


def try_seed(recipe: Recipe, arm: str, attempt: int) -> int:
    """The seed of an arm's try. Arms with the same repeat share it; tries of a control at one repeat differ by it,
    where those of the refined arm differ by their sparsity (rule 15: each control gets as many tries).
    """
    repeat, number = divmod(attempt, len(recipe.sparsities))
    seed = masking.stable_seed(recipe.seed, repeat, "seed") if repeat else recipe.seed
    return seed if arm == "refined" or not number else masking.stable_seed(seed, number, "try")


def _sparsity(recipe: Recipe) -> float | None:
    return next((float(p.sparsity) for p in recipe.phases if isinstance(p.sparsity, float | int)), None)


def leave(run: Run, phase: Phase, done: Progress, masks: Masks, last: bool) -> None:
    """Record what the phase did, offer its end as a candidate where it is one, save."""
    at, sparse = run.current, phase.kind == "sparse"
    zeros = masking.count_zeros(run.layers, run.loop.parameters)
    if last and (run.recipe.keep != "best" or done.step == 0):
        consider(run, math.ceil(done.step / run.loop.steps_per_epoch), masks)
    run.state.setdefault("phases", []).append(
        {
            "arm": at["arm"], "attempt": at["attempt"], "kind": phase.kind,
            "sparsity": float(phase.sparsity) if sparse else None,  # type: ignore[arg-type]
            "measured_sparsity": _share(run, zeros), "epochs": done.step / run.loop.steps_per_epoch,
            "optimizer_steps": done.optimizer_steps, "samples": done.samples,
            "lr_first": done.lr_first, "lr_peak": done.lr_peak, "lr_last": done.lr_last,
            "loss_first": done.loss_first, "loss_last": done.loss_last, "seconds": done.seconds,
            "samples_per_second": done.samples / done.seconds if done.seconds else None,
            "holdout": measure_holdout(run, masks, log=not last), "seed": at["seed"],
            "batchnorm_reestimated": at["statistics"],
        }
    )  # fmt: skip
    if at["arm"] == "refined" and sparse:
        run.state.setdefault("zeros", {}).setdefault(str(at["attempt"]), zeros)
        run.state.setdefault("empty", {}).setdefault(str(at["attempt"]), masking.empty_filters(run.layers, run.loop.parameters))
    if at["arm"] == "refined" and run.options.save_phases and run.workspace.writes:
        folder = run.workspace.partial / "phases" / str(at["attempt"]) / f"{at['number'] + 1}-{phase.kind}"
        folder.mkdir(parents=True, exist_ok=True)
        run.checkpoint.write(run.loop.model, folder)
    at["optimizer"], at["masks"] = None, {}
    run.state["at"] = _next(run, last)
    run.state["progress"] = None
    _save_with_scaler(run, None if last else _model_tensors(run))
    if run.loop.stopping() and run.loop.world == 1:
        raise Interrupted(f"stopped after {at['label']}; go on with --resume")


def _next(run: Run, last: bool) -> list[int]:
    arm, attempt, number = run.current["place"]
    if not last:
        return [arm, attempt, number + 1]
    return [arm, attempt + 1, 0] if attempt + 1 < len(run.tries) else [arm + 1, 0, 0]


def _share(run: Run, zeros: dict[str, int]) -> float:
    maskable = [layer for layer in run.layers if layer.excluded is None]
    return sum(zeros[layer.name] for layer in maskable) / sum(layer.weights for layer in maskable)


def measure_holdout(run: Run, masks: Masks, log: bool = True) -> dict[str, float] | None:
    """The holdout's metrics of the weights now held, logged."""
    if run.task.holdout is None:
        return None
    found = run.task.metrics(evaluate(run.loop, run.task.holdout, masks))
    if log:
        step = run.current["progress"].step
        epoch = step / run.loop.steps_per_epoch
        run.workspace.log(
            {"event": "evaluation", **place_of(run.current["label"]), "step": step, "epoch": epoch, "part": "holdout", **found}
        )
    return found


def consider(run: Run, epoch: int, masks: Masks) -> None:
    """Keep the weights now held as the arm's result if the holdout prefers them (metric, then loss, then the earlier)."""
    at = run.current
    found, repeat = measure_holdout(run, masks), str(at["repeat"])
    best = run.state.setdefault("best", {}).setdefault(at["arm"], {})
    if repeat in best and found is not None and not _preferred(run, found, best[repeat]["holdout"]):
        return
    name = f"best-{at['arm']}-{at['attempt']}-{epoch}.safetensors"
    run.workspace.write_tensors(name, run.loop.model.state_dict())
    chosen = {"attempt": at["attempt"], "epoch": epoch, "sparsity": at["sparsity"], "seed": at["seed"]}
    best[repeat] = {"file": name, **chosen, "holdout": found}


def _preferred(run: Run, new: dict[str, float], old: dict[str, float]) -> bool:
    """By the metric, then the loss; by the loss alone where the metric is too dear for the holdout."""
    sign, metric = 1 if run.task.higher_is_better else -1, run.task.metric
    mine, theirs = ((sign * found[metric] if metric in found else 0.0, -found["loss"]) for found in (new, old))
    return mine > theirs


def save(run: Run) -> None:
    """Save the state in the middle of a phase."""
    tensors = _model_tensors(run)
    tensors |= pack_masks(run.current["masks"]) | pack_optimizer(run.current["optimizer"]) | run.current["average"].pack()
    tensors |= {f"stash.{name}": values for name, values in run.current["stash"].items()}
    run.state["progress"] = asdict(run.current["progress"])
    _save_with_scaler(run, tensors)


def _save_with_scaler(run: Run, tensors: dict[str, torch.Tensor] | None) -> None:
    """Save, with the fp16 loss scale: it has been found by trying, and must not be looked for again."""
    scaler = run.loop.accelerator.scaler
    run.state["scaler"] = scaler.state_dict() if scaler is not None else None
    run.workspace.save(tensors)


def _model_tensors(run: Run) -> dict[str, torch.Tensor]:
    return {f"model.{key}": value for key, value in run.loop.model.state_dict().items()}


@torch.no_grad()
def load_state(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy values in place: parameters keep their storage, which optimizers, wrappers and cuDNN hold on to."""
    for key, value in model.state_dict().items():
        value.copy_(tensors[key])


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Put the buffers back as they were: a look at the averaged weights must not move the statistics of those that train."""
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)


def load_selected(run: Run, arm: str, seed: int) -> None:
    """Give the model the weights that the holdout chose for an arm's seed, by its number."""
    run.loop.accelerator.wait_for_everyone()
    load_state(run.loop.model, run.workspace.read_tensors(run.state["best"][arm][str(seed)]["file"]))


def judge(run: Run, arm: str, seed: int = 0) -> None:
    """Score an arm on the evaluation split, which nothing has been selected by: once, also where the run is taken up again."""
    label = f"{arm} seed {seed + 1}" if arm != "baseline" and run.recipe.seeds > 1 else arm
    name = f"scores-{arm}-{seed}.safetensors"
    kept = run.seeds.setdefault(arm, [])
    if label in run.state.get("judged", []):
        kept.append(Scores.unpack(run.workspace.read_tensors(name)))
        return
    scores = evaluate(run.loop, run.task.eval)
    found = run.task.metrics(scores)
    if arm == "baseline":
        run.state["preflight"] = preflight(run.task, found, run.recipe, run.checkpoint.source.folder)
        for line in run.state["preflight"]:
            run.options.say(f"warning: {line}")
    kept.append(scores)
    run.workspace.write_tensors(name, scores.pack())
    place = {"arm": arm, "phase": None, "step": None, "epoch": None, **({"seed": seed + 1} if label != arm else {})}
    run.workspace.log({"event": "evaluation", **place, "part": "eval", **found})
    run.options.say(f"{label}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in found.items()))
    run.state.setdefault("judged", []).append(label)
    run.workspace.save(None)
    if run.loop.stopping() and run.loop.world == 1:
        raise Interrupted(f"stopped after the evaluation of {label}; go on with --resume")


def judge_all(run: Run) -> None:
    """Each arm's seed that the holdout prefers, against the source and against each control, Holm over all comparisons."""
    run.scores = {"baseline": run.seeds["baseline"][0]}
    run.scores |= {arm: run.seeds[arm][run.preferred(arm)] for arm in run.arms}
    for other in ("baseline", *run.recipe.control):
        mine, theirs = run.scores["refined"], run.scores[other]
        corpus = getattr(run.task, "corpus", None)
        run.comparisons[f"refined_vs_{other}"] = compare(
            mine.compared(corpus), theirs.compared(corpus), mine.count,
            higher_is_better=run.task.higher_is_better, seed=run.recipe.seed, corpus=corpus,
        )  # fmt: skip
    run.comparisons = holm(run.comparisons)


def finish(run: Run) -> Report:
    """Verdict and gate; then write, verify and publish."""
    said = verdict(run.comparisons["refined_vs_baseline"], run.margin)
    passed_gate = gate_passed(run.recipe.gate, run.comparisons, run.margin, run.recipe.control)
    return publish(run, said, passed_gate)
