"""The method: Dense-Sparse-Dense training (Han et al., ICLR 2017) of a released checkpoint, beside its control.

The source is the finished first Dense phase. `refine` reads top to bottom; what it calls is one step each.
"""

from __future__ import annotations

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
from dsd_refine.checkpoint import Checkpoint, Library, Source, open_checkpoint
from dsd_refine.compare import Comparison, compare, gate_passed, holm, verdict
from dsd_refine.errors import Interrupted, UsageError
from dsd_refine.layers import open_layers
from dsd_refine.masks import Layer, Masks
from dsd_refine.publish import publish
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.report import Report, environment
from dsd_refine.runstate import Signals, Workspace, pack_masks, pack_optimizer, unpack_masks, unpack_optimizer
from dsd_refine.tasks import Scores, Task
from dsd_refine.tasks.open import open_task
from dsd_refine.train import Key, Loop, Progress, evaluate, make_optimizer, seed_all, train_phase, unreached


@dataclass(frozen=True)
class Options:
    """How a run is carried out; nothing here decides its result."""

    output_dir: Path
    resume: bool = False
    overwrite: bool = False
    save_phases: bool = False
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
    scores: dict[str, Scores] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    current: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> dict[str, Any]:
        return self.workspace.state

    @property
    def arms(self) -> tuple[str, ...]:
        return ("refined", *self.recipe.control)


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
            for attempt, sparsity in enumerate(recipe.sparsities):
                phases = arm_phases(arm, recipe, sparsity)
                for number, phase in enumerate(phases):
                    if passed(run, arm, attempt, number):
                        continue
                    done = enter(run, arm, attempt, number, phase)
                    one_phase(run, phase, done, last=number == len(phases) - 1)
        for arm in run.arms:
            load_selected(run, arm)
            judge(run, arm)
        metric = run.task.higher_is_better
        for other in ("baseline", *recipe.control):
            mine, theirs = run.scores["refined"], run.scores[other]
            run.comparisons[f"refined_vs_{other}"] = compare(
                mine.score, theirs.score, mine.count, higher_is_better=metric, seed=recipe.seed
            )
        run.comparisons = holm(run.comparisons)
        load_selected(run, "refined")
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
    loop, parameters, at = run.loop, run.loop.parameters, run.current
    key = Key(at["seed"], at["number"])

    def make(refresh: int) -> Masks:
        if phase.kind == "dense" or not phase.sparsity:
            return {}
        seed = (at["seed"], at["number"], refresh, "mask")
        return masking.make_masks(run.layers, parameters, float(phase.sparsity), phase.criterion, seed)  # type: ignore[arg-type]

    masks = at["masks"] = at["masks"] if at["masks"] is not None else make(0)
    masking.apply_masks(masks, parameters)
    optimizer = at["optimizer"] = make_optimizer(loop, phase)
    unpack_optimizer(at["saved"], optimizer)

    def epoch_end(epoch: int) -> None:
        if last and run.recipe.keep == "best":
            consider(run, epoch, masks)

    train_phase(loop, phase, key, at["label"], masks, done, optimizer, remask=make, epoch_end=epoch_end)
    masking.check_masks(masks, parameters)
    leave(run, phase, done, masks, last)


@contextmanager
def opened(source: Source, library: Library, recipe: Recipe, options: Options) -> Iterator[Run]:
    """Everything that must be right before the first step, and the clean-up after the last."""
    accelerator = open_accelerator(recipe, options)
    workspace = Workspace(options.output_dir, writes=accelerator.is_main_process)
    if accelerator.is_main_process:
        workspace.check_target(source.folder, resume=options.resume, overwrite=options.overwrite)
    with ExitStack() as stack:
        stack.enter_context(workspace.locked() if accelerator.is_main_process else nullcontext())
        accelerator.wait_for_everyone()
        signals = stack.enter_context(Signals())
        try:
            yield _open(source, library, recipe, options, accelerator, workspace, signals)
        except UsageError:
            if accelerator.is_main_process:
                workspace.abandon()
            raise


def _open(
    source: Source,
    library: Library,
    recipe: Recipe,
    options: Options,
    accelerator: Accelerator,
    workspace: Workspace,
    signals: Signals,
) -> Run:
    seed_all(recipe.seed)
    checkpoint = open_checkpoint(source, library, allow_pickle=options.allow_pickle)
    model = checkpoint.model
    with accelerator.main_process_first():
        task = open_task(recipe, library.task, library, model, workspace.partial / "cache", options.download)
    loop = open_loop(checkpoint, task, recipe, options, accelerator, workspace, signals)
    lost = unreached(loop)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in lost)
    layers = open_layers(checkpoint, recipe, lost)
    hashes = checkpoint.hashes()
    workspace.begin(_identity(recipe, hashes, task, accelerator), options.resume)
    accelerator.wait_for_everyone()
    start = {key: value.detach().to("cpu", copy=True) for key, value in model.state_dict().items()}
    run = Run(checkpoint, task, recipe, options, loop, layers, workspace, hashes, start)
    _wrap(run)
    if accelerator.scaler is not None and workspace.state.get("scaler"):
        accelerator.scaler.load_state_dict(workspace.state["scaler"])
    loop.save = lambda: save(run)
    return run


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


def _wrap(run: Run) -> None:
    loop = run.loop
    if loop.world > 1:
        loop.forward = loop.accelerator.prepare_model(loop.model)
    if run.options.compile:
        loop.forward = torch.compile(loop.forward)


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
    attempts = f" try {attempt + 1}" if len(run.recipe.sparsities) > 1 else ""
    run.current = {
        "place": place, "arm": arm, "attempt": attempt, "number": number, "progress": progress,
        "label": f"{arm}{attempts}/{number + 1}-{phase.kind}", "saved": saved, "optimizer": None,
        # tries of a control differ by their seed; the refined arm's differ by their sparsity
        "seed": run.recipe.seed if arm == "refined" or attempt == 0 else masking.stable_seed(run.recipe.seed, attempt, "try"),
        "masks": unpack_masks(saved, run.loop.parameters) if run.state.get("progress") and saved else None,
        "sparsity": run.recipe.sparsities[attempt] if run.recipe.sparsities[attempt] is not None else _sparsity(run.recipe),
    }  # fmt: skip
    run.state["at"] = place
    return progress


def _sparsity(recipe: Recipe) -> float | None:
    return next((float(p.sparsity) for p in recipe.phases if isinstance(p.sparsity, float | int)), None)


def leave(run: Run, phase: Phase, done: Progress, masks: Masks, last: bool) -> None:
    """Record what the phase did, offer its end as a candidate where it is one, save."""
    at, sparse = run.current, phase.kind == "sparse"
    zeros = masking.count_zeros(run.layers, run.loop.parameters)
    if last and (run.recipe.keep != "best" or done.step == 0):
        consider(run, 0, masks)
    run.state.setdefault("phases", []).append(
        {
            "arm": at["arm"], "attempt": at["attempt"], "kind": phase.kind,
            "sparsity": float(phase.sparsity) if sparse else None,  # type: ignore[arg-type]
            "measured_sparsity": _share(run, zeros), "epochs": done.step / run.loop.steps_per_epoch,
            "optimizer_steps": done.optimizer_steps, "samples": done.samples,
            "lr_first": done.lr_first, "lr_peak": done.lr_peak, "lr_last": done.lr_last,
            "loss_first": done.loss_first, "loss_last": done.loss_last, "seconds": done.seconds,
            "samples_per_second": done.samples / done.seconds if done.seconds else None,
            "holdout": measure_holdout(run, masks, log=not last),
        }
    )  # fmt: skip
    if at["arm"] == "refined" and sparse:
        run.state.setdefault("zeros", {}).setdefault(str(at["attempt"]), zeros)
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
    return [arm, attempt + 1, 0] if attempt + 1 < len(run.recipe.sparsities) else [arm + 1, 0, 0]


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
        arm, _, phase = run.current["label"].partition("/")
        epoch = step / run.loop.steps_per_epoch
        run.workspace.log(
            {"event": "evaluation", "arm": arm, "phase": phase, "step": step, "epoch": epoch, "part": "holdout", **found}
        )
    return found


def consider(run: Run, epoch: int, masks: Masks) -> None:
    """Keep the weights now held as the arm's result if the holdout prefers them (metric, then loss, then the earlier)."""
    at = run.current
    found = measure_holdout(run, masks)
    best = run.state.setdefault("best", {})
    if at["arm"] in best and found is not None and not _preferred(run, found, best[at["arm"]]["holdout"]):
        return
    name = f"best-{at['arm']}-{at['attempt']}-{epoch}.safetensors"
    run.workspace.write_tensors(name, run.loop.model.state_dict())
    best[at["arm"]] = {"file": name, "attempt": at["attempt"], "epoch": epoch, "sparsity": at["sparsity"], "holdout": found}


def _preferred(run: Run, new: dict[str, float], old: dict[str, float]) -> bool:
    sign = 1 if run.task.higher_is_better else -1
    return (sign * new[run.task.metric], -new["loss"]) > (sign * old[run.task.metric], -old["loss"])


def save(run: Run) -> None:
    """Save the state in the middle of a phase."""
    tensors = _model_tensors(run)
    tensors |= pack_masks(run.current["masks"]) | pack_optimizer(run.current["optimizer"])
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


def load_selected(run: Run, arm: str) -> None:
    """Give the model the weights that the holdout chose for an arm."""
    run.loop.accelerator.wait_for_everyone()
    load_state(run.loop.model, run.workspace.read_tensors(run.state["best"][arm]["file"]))


def judge(run: Run, arm: str) -> None:
    """Score an arm on the evaluation split, which nothing has been selected by: once, also where the run is taken up again."""
    name = f"scores-{arm}.safetensors"
    if arm in run.state.get("judged", []):
        run.scores[arm] = Scores(**{field: value.numpy() for field, value in run.workspace.read_tensors(name).items()})
        return
    run.scores[arm] = evaluate(run.loop, run.task.eval)
    run.workspace.write_tensors(name, {field: torch.from_numpy(value) for field, value in vars(run.scores[arm]).items()})
    found = run.task.metrics(run.scores[arm])
    run.workspace.log({"event": "evaluation", "arm": arm, "phase": None, "step": None, "epoch": None, "part": "eval", **found})
    run.options.say(f"{arm}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in found.items()))
    run.state.setdefault("judged", []).append(arm)
    run.workspace.save(None)
    if run.loop.stopping() and run.loop.world == 1:
        raise Interrupted(f"stopped after the evaluation of {arm}; go on with --resume")


def finish(run: Run) -> Report:
    """Verdict and gate; then write, verify and publish."""
    recipe, baseline = run.recipe, run.task.metrics(run.scores["baseline"])
    # the margin is absolute for a fraction, and relative to the source for a loss
    margin = recipe.margin if run.task.higher_is_better else recipe.margin * baseline[run.task.metric]
    said = verdict(run.comparisons["refined_vs_baseline"], margin)
    passed_gate = gate_passed(recipe.gate, run.comparisons, margin, recipe.control)
    return publish(run, said, passed_gate)
