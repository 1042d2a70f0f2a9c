"""The Python API: the command's verbs as functions, with its options as keywords.

After a call the process is as it was before (`process_state.as_found`). A call raises only errors of
this package. It prints nothing, unless it runs in a terminal or in a notebook.
"""

from __future__ import annotations

import difflib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from dsd_refine.checkpoint.checkpoint import open_checkpoint, open_shapes
from dsd_refine.checkpoint.libraries.open import open_library
from dsd_refine.checkpoint.safetensors_file import read_json
from dsd_refine.checkpoint.source import Source, find_source
from dsd_refine.checkpoint.verify import verify as problems_of
from dsd_refine.choice import choose_recipe
from dsd_refine.errors import UsageError
from dsd_refine.evidence.compare import Comparison, groups_of, holm
from dsd_refine.evidence.compare import compare as compare_scores
from dsd_refine.masking import masks as masking
from dsd_refine.masking.layers import find_layers
from dsd_refine.method import refine as run_method
from dsd_refine.planning.measure import HOW, add_measured, measure
from dsd_refine.planning.plan import make_plan
from dsd_refine.planning.text import plan_text
from dsd_refine.process_state import as_found
from dsd_refine.quiet import quiet_libraries
from dsd_refine.recipe import Names, Recipe, Strict, validated
from dsd_refine.report.report import Report
from dsd_refine.run.progress import Display, in_notebook
from dsd_refine.run.run import PASSED_ON, Options, default_workers
from dsd_refine.run.tracking import Tracking, check_trackers, settings_of
from dsd_refine.task_specs import TASKS, unknown_task
from dsd_refine.training.hooks import Hooks

if TYPE_CHECKING:
    import pandas as pd


class NonRecipeOptions(Strict):
    """The options of the command that are not fields of a recipe. They say how a run is done."""

    resume: bool | None = None
    overwrite: bool | None = None
    save_phases: bool | None = None
    save_every: Annotated[float, Field(ge=0)] | None = None  # minutes
    cache_gb: Annotated[float, Field(ge=0)] | None = None
    report_images: Annotated[int, Field(ge=0, le=100)] | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] | None = None
    compile: bool | None = None
    shard: bool | None = None
    activation_checkpointing: bool | None = None
    cpu_offload: bool | None = None
    spread: Literal["tries"] | None = None
    allow_pickle: bool | None = None
    trust_remote_code: bool | None = None
    workers: Annotated[int, Field(ge=0)] | None = None
    yes: bool | None = None
    sets: Names = ()
    report_to: Names = ()


# Options that set fields of the phases of a recipe.
PHASE_OPTIONS = (
    "sparsity",
    "sparse_epochs",
    "dense_epochs",
    "sparse_steps",
    "dense_steps",
    "lr",
    "dense_lr",
    "schedule",
    "warmup_steps",
)
# Fields that are lists of names. A caller may give one name without a list.
NAMES = ("models", "include", "exclude", "control", "report_to")

Model = str | Path


def refine(
    model: Model | nn.Module,
    *,
    data: Any = None,
    eval_data: Any = None,
    output_dir: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    folder: str | Path | None = None,
    callbacks: Sequence[object] = (),
    quiet: bool | None = None,
    **options: Any,
) -> Report:
    """Refine a checkpoint by Dense-Sparse-Dense training, and write it with its report.

    Control arms of the same budget are trained too, so that the report can say what made the
    difference. The output directory is written as a whole or not at all.

    Args:
        model: The source, as the command takes MODEL: a timm name, a Hub repository or a folder. Or
            an open module; then give its `folder` too. The values of the module are refined then.
            Its tensors must have the same names as those of the model in the folder.
        data: The data to train on, as the command takes --data: a Hub data set, a folder or a file.
            Or a `datasets.Dataset` or `DatasetDict`.
        eval_data: Data for the evaluation only, in the same forms.
        output_dir: The output directory. None: `NAME-dsd` in the working directory.
        recipe: The name of a shipped recipe, the path of a recipe file, or a `Recipe`. None: the
            shipped recipe that matches the model.
        folder: The checkpoint that the open module was loaded from. Its files give the layout and
            the dtypes of the output. Only for an open module.
        callbacks: Objects with some of the methods of `Hooks` (`on_step`, `should_stop`, ...).
        quiet: True: print nothing. False: print news and progress to stderr. None: print only in a
            terminal or a notebook.
        **options: Every field of a recipe and every option of the command, by its name:
            `sparsity=0.3`, `sparse_epochs=2`, `lr=0.01`, `control="random"`, `gate="better"`,
            `device="cpu"`, `resume=True`, ...

    Returns:
        The report of the run. If the gate is not met, nothing is raised: the report's `exit_code`
        is 3, and the weights are in the folder `rejected/` of the output directory. With
        `resume=True` and a finished run in `output_dir`, the report of that run.

    Raises:
        UsageError: The model, the data or the options cannot be used. Nothing was trained. Its
            subclasses are `RecipeError`, `CheckpointError` and `DataError`.
        Interrupted: A callback or a signal stopped the run. `resume=True` continues it.
        RunError: The run failed after it had begun: a loss that is not finite, a full disk, ...
        VerifyError: The written checkpoint did not pass its check. Nothing was published.
    """
    _refuse_unknown(options)
    hooks = _callbacks(callbacks)
    if not isinstance(output_dir, str | Path | None):
        raise UsageError(f"output_dir: expected a path, not {type(output_dir).__name__}")
    with _call(quiet) as display, ExitStack() as stack:
        given = _given(stack, data, eval_data, recipe, options)
        source = _source(stack, model, folder, given)
        if isinstance(model, nn.Module):
            # It chose one of the sets of weights in the folder. The copy that was written has only one.
            given.pop("weights_key", None)
        library = open_library(source, given["task"], given["trust_remote_code"])
        out = Path(output_dir or f"{Path(source.resolved).name}-dsd")
        if given.get("resume") and (out / "dsd/report.json").is_file() and not _unfinished(out):
            return Report.load(out)
        chosen, trackers = choose_recipe(library, given, display.say), check_trackers(given.get("report_to", ()))
        tracking = stack.enter_context(
            Tracking(trackers, out.name, settings_of(source.model, chosen.model_dump(), out), display.say)
        )
        run_options = Options(
            output_dir=out,
            argv=(f"dsd_refine.refine({str(model) if isinstance(model, str | Path) else type(model).__name__!r}, ...)",),
            say=display.say,
            hooks=(display, *([tracking] if trackers else []), *hooks),
            download=lambda name, size: bool(given["yes"]),
            workers=default_workers(given.get("workers")),
            **{key: given[key] for key in PASSED_ON if key in given},
        )
        stack.enter_context(display)
        return run_method(source, library, chosen, run_options)


@dataclass(frozen=True, repr=False)
class Plan(Mapping[str, Any]):
    """What a run would do, as a mapping. Its text form is what `dsd-refine plan` prints.

    Attributes:
        data: What `dsd-refine plan --json` prints.
    """

    data: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.data[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return plan_text(self.data)


def plan(
    model: Model,
    *,
    data: Any = None,
    eval_data: Any = None,
    recipe: str | Path | Recipe | None = None,
    measured: bool = False,
    **options: Any,
) -> Plan:
    """Return what `refine` would do with these arguments: layers, steps, memory and disk.

    Unless `measured` is True, no weights are downloaded and nothing is trained.

    Args:
        model: As in `refine`, but not an open module: give its folder instead.
        data: As in `refine`.
        eval_data: As in `refine`.
        recipe: As in `refine`.
        measured: Also train a few real steps, to measure memory and time. This needs the weights
            and the data.
        **options: As in `refine`.

    Returns:
        The plan. `print(plan)` shows it as text.

    Raises:
        UsageError: `refine` would raise it too. Without `measured`, only what can be seen without
            weights is checked. Its subclasses are `RecipeError`, `CheckpointError` and `DataError`.
        Interrupted: A signal stopped a measured step. Nothing was saved.
        RunError: A measured step failed, for example because the loss is not finite.
    """
    _refuse_unknown(options)
    if isinstance(model, nn.Module):
        raise UsageError("plan: give the folder that the module was loaded from; a plan does not use the weights")
    with _call(quiet=True) as display, ExitStack() as stack:
        given = _given(stack, data, eval_data, recipe, options)
        pickles = bool(given.get("allow_pickle"))
        source = find_source(str(model), weights=measured, allow_pickle=pickles)
        library = open_library(source, given["task"], given["trust_remote_code"])
        chosen = choose_recipe(library, given, display.say)
        planned = make_plan(source, library, chosen, allow_pickle=pickles, shard=bool(given.get("shard")))
        if measured:
            how = {name: given[name] for name in HOW if name in given}
            output = Path(given.get("output_dir") or "measured")
            planned = add_measured(planned, measure(source, library, chosen, Options(output_dir=output, **how)))
        return Plan(planned)


def verify(
    source: Model,
    output: str | Path,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    weights_key: str | None = None,
) -> list[str]:
    """Check that an output has the same shape as its source, and that its files match its report.

    It compares the names, shapes, dtypes and side files of both checkpoints, and the hashes in the
    report with the files. It then loads the output and computes the saved examples again.

    Args:
        source: The model that was refined: a timm name, a Hub repository or a folder.
        output: The output directory.
        trust_remote_code: Run code that comes with the model.
        allow_pickle: Also read .bin and .pth weights. They are still read as weights only, so that
            no code in them runs.
        weights_key: The set of weights to use, if a pickle has several. None: the one that the
            report names.

    Returns:
        The problems, one text for each. Empty if everything is right.

    Raises:
        UsageError: `output` is not an output of dsd-refine, or the source cannot be read. Its
            subclass `CheckpointError` says what is wrong with the source.
    """
    if not Path(output, "dsd/report.json").is_file():
        raise UsageError(f"{output}: is not an output of dsd-refine: it has no dsd/report.json")
    with as_found():
        quiet_libraries()
        report = read_json(Path(output, "dsd/report.json"))
        task, reported = report.get("task"), report.get("source")
        key = reported.get("weights_key") if isinstance(reported, dict) else None
        opened = find_source(str(source), allow_pickle=allow_pickle)
        library = open_library(opened, task if isinstance(task, str) and task in TASKS else None, trust_remote_code)
        checkpoint = open_shapes(
            opened, library, allow_pickle=allow_pickle, fetched=True,
            weights_key=weights_key or (key if isinstance(key, str) else None),
        )  # fmt: skip
        return problems_of(checkpoint, Path(output))


@dataclass(frozen=True)
class Comparisons:
    """The results of `compare`: several runs on one baseline.

    Attributes:
        comparison: "first vs second" -> the comparison of both. If its delta is greater than 0, the
            first is better.
    """

    comparison: Mapping[str, Comparison]

    def to_pandas(self) -> pd.DataFrame:
        """Return a table with one row for each comparison.

        Returns:
            The columns are the fields of `Comparison`: delta, ci95, p_value, p_adjusted, gained,
            lost, test, and others. The index is the names of `comparison`.
        """
        import pandas

        return pandas.DataFrame({name: asdict(result) for name, result in self.comparison.items()}).T


def compare(outputs: Sequence[str | Path]) -> Comparisons:
    """Compare the refined arms of several finished runs with their common source and with each other.

    The tests are the same as in a report, on the rows of predictions.parquet. The p values are
    corrected over all these comparisons (Holm).

    Args:
        outputs: The output directories, at least two. Their runs must have the same source, the same
            evaluation rows and the same metric.

    Returns:
        The comparisons of each run with the source, named "OUTPUT vs baseline", and of each pair of
        runs, named "OUTPUT vs OUTPUT".

    Raises:
        UsageError: There are fewer than two directories, or one is not an output of dsd-refine. Or
            the runs differ in source, evaluation rows or metric. Or the results in a report cannot
            be computed again from its predictions.parquet.
    """
    if not isinstance(outputs, list | tuple) or len(outputs) < 2:
        raise UsageError("compare: give a list of at least two output directories")
    reports = {str(output): Report.load(output) for output in outputs}
    if len(reports) < len(outputs):
        raise UsageError("compare: an output directory is named twice")
    first = reports[str(outputs[0])]
    for report in reports.values():
        _refuse_other_runs(first, report)
    tables = {name: report.to_pandas() for name, report in reports.items()}
    for name, table in tables.items():
        _refuse_other_baseline(tables[str(outputs[0])], table, f"{outputs[0]} and {name}")
    groups = _equal_rows(reports, tables)
    refined = {name: (table, "refined") for name, table in tables.items()}
    pairs = {f"{name} vs baseline": (arm, (arm[0], "baseline")) for name, arm in refined.items()}
    pairs |= {f"{name} vs {other}": (refined[name], refined[other]) for name, other in combinations(refined, 2)}
    return Comparisons(holm({name: _tested(first, *pair, groups) for name, pair in pairs.items()}))


Arm = tuple[Any, str]  # the rows of a run's predictions.parquet, and the name of one of its arms


def _tested(report: Report, mine: Arm, theirs: Arm, groups: np.ndarray[Any, Any] | None) -> Comparison:
    """Compare two arms in the way in which `report` compares its own."""
    corpus = _corpus(report)
    first, second = (_scores(table, arm, corpus) for table, arm in (mine, theirs))
    count = mine[0][f"count_{mine[1]}"].to_numpy(float)
    better, seed = bool(report.data["metric"]["higher_is_better"]), int(report.data["seed"])
    return compare_scores(first, second, count, higher_is_better=better, seed=seed, corpus=corpus, groups=groups)


def _equal_rows(reports: Mapping[str, Report], tables: Mapping[str, pd.DataFrame]) -> np.ndarray[Any, Any] | None:
    """Return the group of each evaluation row, shape (rows,). Rows of equal content count as one.

    None: all rows differ.

    predictions.parquet does not have the contents of the rows. But rows of equal content have equal
    targets, and equal losses in every arm, so they can be found by these. The groups are right if
    they give the result of each report again.

    Raises:
        UsageError: The result of a report can be computed again neither with these groups nor
            without groups.
    """
    columns = [table[f"loss_{arm}"] for table in tables.values() for arm in ("baseline", "refined")]
    targets = next(iter(tables.values()))["target"]
    alike = groups_of(
        "|".join([repr(target), *(f"{loss:.5g}" for loss in losses)]).encode()
        for target, *losses in zip(targets, *columns, strict=True)
    )
    for groups in (None, alike):
        if all(_comes_out_again(report, tables[name], groups) for name, report in reports.items()):
            return groups
    raise UsageError(
        f"compare: the results of {' and '.join(reports)} do not come out again from their predictions.parquet. Either the "
        "files were changed, or evaluation rows of equal content cannot be recognized in them"
    )


def _comes_out_again(report: Report, table: pd.DataFrame, groups: np.ndarray[Any, Any] | None) -> bool:
    """Return whether the predictions give the difference from the source that the report names.

    Delta and the ends of the interval may be off by a twentieth of the interval, because another
    release of numpy may draw other samples.
    """
    reported = report.comparison["baseline"]
    computed = _tested(report, (table, "refined"), (table, "baseline"), groups)
    tolerance = (reported.ci95[1] - reported.ci95[0]) / 20 + 1e-9
    pairs = zip((reported.delta, *reported.ci95), (computed.delta, *computed.ci95), strict=True)
    return all(abs(old - new) <= tolerance for old, new in pairs)


def _refuse_other_runs(first: Report, other: Report) -> None:
    """Raise UsageError if two runs differ in source, evaluation rows or metric."""
    must_be_equal: dict[str, Any] = {
        "source files": lambda data: sorted((file["name"], file["sha256"]) for file in data["source"]["files"]),
        "evaluation rows": lambda data: data["data"]["eval"]["fingerprint"],
        "metric": lambda data: data["metric"]["name"],
    }
    for name, read in must_be_equal.items():
        if read(first.data) != read(other.data):
            raise UsageError(f"compare: {first.folder} and {other.folder} differ in {name}: they have no common baseline")


def _refuse_other_baseline(first: pd.DataFrame, other: pd.DataFrame, names: str) -> None:
    """Raise UsageError if the targets of two runs differ, or the losses of their source.

    They differ if the runs read other label columns, or cut texts to other lengths.
    """
    losses, other_losses = (table["loss_baseline"].to_numpy(float) for table in (first, other))
    if not first["target"].equals(other["target"]):
        raise UsageError(f"compare: {names} have different targets: they have no common baseline")
    if not np.allclose(losses, other_losses, rtol=1e-2, atol=1e-3, equal_nan=True):
        raise UsageError(f"compare: the source has different losses on the same rows in {names}: they have no common baseline")


def _corpus(report: Report) -> Any:
    """Return the function that computes the metric from summed statistics.

    None: the metric is a ratio of sums.
    """
    from dsd_refine.tasks.registry import corpus_of

    return corpus_of(report.data["task"], report.data["metric"]["name"])


def _scores(table: pd.DataFrame, arm: str, corpus: Any) -> np.ndarray[Any, Any]:
    """Return the scores of an arm's rows, or the statistics of the rows if the metric has a `corpus`."""
    return table[f"score_{arm}"].to_numpy(float) if corpus is None else np.stack(table[f"stats_{arm}"].to_list())


def make_masks(
    model: nn.Module,
    *,
    sparsity: float,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    first: Sequence[str] = (),
    criterion: str = "magnitude",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Make masks for the weights of a model by the rules of a run, for your own training loop.

    Args:
        model: Any module. The weights of linear, convolution, recurrent and attention layers are
            masked. Biases, norms, embeddings and the other exceptions in docs/layers.md are not.
        sparsity: The share of zeros in each layer, at least 0 and less than 1. Of n weights,
            round(sparsity * n) are masked.
        include: Globs of parameter names to mask too.
        exclude: Globs of parameter names not to mask. They win over `include`.
        first: The names of the modules whose input is pixels or sound. They are not masked.
        criterion: "magnitude" masks the smallest absolute values; of equal values, those with the
            lowest flat index. "random" draws the masked weights by chance.
        seed: The seed of a random mask.

    Returns:
        Parameter name -> bool tensor of the parameter's shape, True = keep. Tied parameters have
        one mask together.

    Raises:
        UsageError: The sparsity is out of range, the criterion is unknown, a glob matches nothing,
            or no layer can be masked.
    """
    if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise UsageError(f"sparsity {sparsity!r}: must be a number, at least 0 and less than 1")
    include, exclude, first = ([names] if isinstance(names, str) else names for names in (include, exclude, first))
    if criterion not in ("magnitude", "random"):
        raise UsageError(f"criterion {criterion!r}: must be magnitude or random")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    layers = find_layers(model, first=list(first), include=tuple(include), exclude=tuple(exclude))
    # float32 and contiguous, because the module may have other dtypes, or views into larger tensors.
    values = {name: parameter.detach().to(torch.float32).contiguous() for name, parameter in parameters.items()}
    return masking.make_masks(layers, values, sparsity, criterion, (seed, "mask"))


def apply_masks(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Set the masked weights to 0, in place. Call it after each optimizer step.

    Args:
        model: The module that the masks were made for.
        masks: The result of `make_masks`: parameter name -> bool tensor, True = keep.

    Raises:
        UsageError: A mask has the name of no parameter, or another shape than its parameter, or it
            is not bool. Then no weight was changed.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise UsageError(f"{name}: the model has no parameter of this name and shape {tuple(mask.shape)}")
        if mask.dtype != torch.bool:
            raise UsageError(f"{name}: a mask is bool (True = keep), not {mask.dtype}")
    # A run multiplies bits instead, which is faster. But that is right only for float32 weights, and
    # for masks with the strides of the weights.
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)


@contextmanager
def _call(quiet: bool | None) -> Iterator[Display]:
    """Silence the libraries and yield a display. At the end, restore the state of the process."""
    silent = not (sys.stderr is not None and sys.stderr.isatty()) and not in_notebook() if quiet is None else quiet
    with as_found():
        quiet_libraries()
        yield Display(quiet=silent)


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    """Raise UsageError for a keyword that is not an option. The message names the nearest one."""
    known = (set(Recipe.model_fields) - {"name"}) | {*PHASE_OPTIONS, *NonRecipeOptions.model_fields}
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UsageError(f"{name}: there is no option of this name{hint}")


def _callbacks(callbacks: Sequence[object]) -> tuple[Any, ...]:
    """Return the callbacks. Raise UsageError if one has no method of `Hooks`."""
    if not isinstance(callbacks, list | tuple):
        raise UsageError(f"callbacks: expected a list of objects, not {type(callbacks).__name__}")
    names = [name for name in vars(Hooks) if not name.startswith("_")]
    for callback in callbacks:
        if not any(callable(getattr(type(callback), name, None)) for name in names):
            raise UsageError(f"callbacks: the class {type(callback).__name__} has none of the methods {', '.join(names)}")
    return tuple(callbacks)


def _given(stack: ExitStack, data: Any, eval_data: Any, recipe: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options in the form that the command has them: without None, and checked."""
    if not isinstance(recipe, str | Path | Recipe | None):
        raise UsageError(f"recipe: expected a name, a file or a Recipe, not {type(recipe).__name__}")
    values = {
        name: [value] if name in (*NAMES, "sets") and isinstance(value, str) else value for name, value in options.items()
    }
    values = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
    run_values = {name: value for name, value in values.items() if name in NonRecipeOptions.model_fields and value is not None}
    run_values = validated(NonRecipeOptions, run_values, "options").model_dump(exclude_none=True)
    given: dict[str, Any] = {"task": None, "trust_remote_code": False, "yes": False, **values, **run_values, "recipe": recipe}
    # For the command, () is an option that was not given. An empty list is a value.
    for name, value in given.items():
        given[name] = list(value) if isinstance(value, tuple) and name != "sets" else value
    given = {name: value for name, value in given.items() if value is not None or name == "task"} | {"recipe": recipe}
    if given["task"] not in (None, *TASKS):
        raise UsageError(f"task {given['task']!r}: {unknown_task(given['task'])}")
    return given | {"data": _as_path(stack, data), "eval_data": _as_path(stack, eval_data)}


def _as_path(stack: ExitStack, rows: Any) -> str | None:
    """Return data as --data names them.

    An open data set is saved to a folder that exists until the call ends.
    """
    if rows is None or isinstance(rows, str | Path):
        return None if rows is None else str(rows)
    if not hasattr(rows, "save_to_disk"):
        raise UsageError(f"data: expected a path, a name, a Dataset or a DatasetDict, not {type(rows).__name__}")
    kind = f"datasets.{type(rows).__name__}"  # the report shows the name of the folder as the name of the data
    path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dsd-refine-"))) / kind
    rows.save_to_disk(path)
    return str(path)


def _source(stack: ExitStack, model: Any, folder: str | Path | None, given: Mapping[str, Any]) -> Source:
    """Return the source of the weights.

    The values of an open module are first written into a copy of its checkpoint.
    """
    pickles = bool(given.get("allow_pickle"))
    if not isinstance(model, nn.Module):
        if folder is not None:
            raise UsageError("folder: is only for an open module; leave it out if you give the name or path of a model")
        return find_source(str(model), allow_pickle=pickles)
    if folder is None:
        raise UsageError(
            "model: also give `folder`, the checkpoint that the module was loaded from: its files give the layout of the output"
        )
    source = find_source(str(folder), allow_pickle=pickles)
    library = open_library(source, given["task"], given["trust_remote_code"])
    checkpoint = open_checkpoint(source, library, allow_pickle=pickles, weights_key=given.get("weights_key"))
    try:
        checkpoint.model.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise UsageError(f"model: is not the model of {folder}: {' '.join(str(error).split())[:300]}") from None
    copy = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dsd-refine-"))) / Path(source.resolved).name
    copy.mkdir()
    checkpoint.write(checkpoint.model, copy)
    # The report names the user's folder, because the copy is removed at the end of the call.
    return replace(find_source(str(copy)), model=f"{folder} (an open module)")


def _unfinished(out: Path) -> bool:
    """Return whether an unfinished run has left its folder beside OUT."""
    return out.with_name(out.name + ".partial").is_dir()
