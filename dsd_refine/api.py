"""The Python API: the command's verbs as functions, with its options as keywords.

A call leaves the process as it found it (`process_state.as_found`), raises errors of this package only, and is quiet off a
terminal and outside a notebook.
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
from dsd_refine.planning.measure import add_measured, measure
from dsd_refine.planning.plan import make_plan
from dsd_refine.planning.text import plan_text
from dsd_refine.process_state import as_found
from dsd_refine.quiet import quiet_libraries
from dsd_refine.recipe import Names, Recipe, Strict, validated
from dsd_refine.report.report import Report
from dsd_refine.run.progress import Display, in_notebook
from dsd_refine.run.run import Options, default_workers
from dsd_refine.task_specs import TASKS
from dsd_refine.training.hooks import Hooks

if TYPE_CHECKING:
    import pandas as pd


class Carried(Strict):
    """The options of the command that are no fields of a recipe: they say how a run is carried out."""

    resume: bool | None = None
    overwrite: bool | None = None
    save_phases: bool | None = None
    save_every: Annotated[float, Field(ge=0)] | None = None  # minutes
    report_images: Annotated[int, Field(ge=0, le=100)] | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] | None = None
    compile: bool | None = None
    allow_pickle: bool | None = None
    trust_remote_code: bool | None = None
    workers: Annotated[int, Field(ge=0)] | None = None
    yes: bool | None = None
    sets: Names = ()


# what an `option` may be, besides the fields of a recipe
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
RUN_OPTIONS = ("resume", "overwrite", "save_phases", "save_every", "report_images", "device", "compile", "allow_pickle")
NAMES = ("models", "include", "exclude", "control")  # fields that are lists of names: one name may stand alone

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
    """Refine a checkpoint: Sparse, then re-Dense, beside controls of the same budget; write it with its report.

    Args:
        model: what the command takes as MODEL (a timm name, a Hub repository, a folder), or an open
            module with the `folder` it was loaded from. The module's values are refined then, in
            the files' layout and dtypes; its tensors must have the names that the folder's model has.
        data: what the command takes as --data, or a `datasets.Dataset` or `DatasetDict`.
        eval_data: the same for evaluation only.
        output_dir: where the result goes; None: `NAME-dsd` in the working directory.
        recipe: a shipped name, a file, or a `Recipe`; None: the one that matches the model.
        folder: of an open module, its checkpoint.
        callbacks: objects with some of the methods of `Hooks` (`on_step`, `should_stop`, ...).
        quiet: no progress and no news; None: quiet off a terminal and outside a notebook.
        options: every field of a recipe and every option of the command, by its name:
            `sparsity=0.3`, `sparse_epochs=2`, `lr=0.01`, `control="random"`, `gate="better"`,
            `device="cpu"`, `resume=True`, ...

    Returns:
        The report. Where the gate is not met its `exit_code` is 3, and the weights are in
        `rejected/` of the output; nothing is raised.

    Raises:
        UsageError: model, data, recipe or options cannot be used; nothing was trained.
        Interrupted: a callback or a signal stopped the run; `resume=True` goes on.
        RunError, VerifyError: the run failed, or its output did not pass its check.
    """
    _refuse_unknown(options)
    hooks = _callbacks(callbacks)
    if not isinstance(output_dir, str | Path | None):
        raise UsageError(f"output_dir: expected a path, not {type(output_dir).__name__}")
    with _call(quiet) as display, ExitStack() as stack:
        given = _given(stack, data, eval_data, recipe, options)
        source = _source(stack, model, folder, given)
        if isinstance(model, nn.Module):
            given.pop("weights_key", None)  # it chose among the folder's sets of weights; what was written has one
        library = open_library(source, given["task"], given["trust_remote_code"])
        out = Path(output_dir or f"{Path(source.resolved).name}-dsd")
        if given.get("resume") and (out / "dsd/report.json").is_file() and not _unfinished(out):
            return Report.load(out)
        run_options = Options(
            output_dir=out,
            argv=(f"dsd_refine.refine({str(model) if isinstance(model, str | Path) else type(model).__name__!r}, ...)",),
            say=display.say,
            hooks=(display, *hooks),
            download=lambda name, size: bool(given["yes"]),
            workers=default_workers(given.get("workers")),
            **{key: given[key] for key in RUN_OPTIONS if key in given},
        )
        stack.enter_context(display)
        return run_method(source, library, choose_recipe(library, given, display.say), run_options)


@dataclass(frozen=True, repr=False)
class Plan(Mapping[str, Any]):
    """What a run would do: `data` is what `dsd-refine plan --json` prints."""

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
    """What `refine` with these arguments would do: layers, steps, memory, disk. No weights are fetched, nothing is trained.

    Args:
        model: as `refine` takes it; of an open module give its folder.
        data: as `refine` takes it.
        eval_data: as `refine` takes it.
        recipe: as `refine` takes it.
        measured: train a few real steps for memory and time, with the weights and the data.
        options: as `refine` takes them.

    Raises:
        UsageError: as `refine` would, for what can be seen without weights.
    """
    _refuse_unknown(options)
    if isinstance(model, nn.Module):
        raise UsageError("plan: give the folder that the module was loaded from; a plan looks at no weights")
    with _call(quiet=True) as display, ExitStack() as stack:
        given = _given(stack, data, eval_data, recipe, options)
        pickles = bool(given.get("allow_pickle"))
        source = find_source(str(model), weights=measured, allow_pickle=pickles)
        library = open_library(source, given["task"], given["trust_remote_code"])
        chosen = choose_recipe(library, given, display.say)
        planned = make_plan(source, library, chosen, allow_pickle=pickles)
        if measured:
            found = measure(source, library, chosen, given.get("device", "auto"), pickles)
            planned = add_measured(planned, found)
        return Plan(planned)


def verify(
    source: Model,
    output: str | Path,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    weights_key: str | None = None,
) -> list[str]:
    """The same-shape proof: hold an output against its source, and its report's hashes against its files.

    Args:
        source: the model that was refined, as `refine` takes it.
        output: the output directory.
        trust_remote_code: run code that the model brings along.
        allow_pickle: read .bin and .pth weights, weights-only even so.
        weights_key: which of a pickle's sets of weights; None: the one that the report names.

    Returns:
        What is wrong, a line each. Empty where all holds.

    Raises:
        UsageError: the output is none of ours, or the source cannot be read.
    """
    if not Path(output, "dsd/report.json").is_file():
        raise UsageError(f"{output}: is no output of dsd-refine: it has no dsd/report.json")
    with as_found():
        quiet_libraries()
        report = read_json(Path(output, "dsd/report.json"))
        task, said = report.get("task"), report.get("source")
        key = said.get("weights_key") if isinstance(said, dict) else None
        opened = find_source(str(source), allow_pickle=allow_pickle)
        library = open_library(opened, task if isinstance(task, str) and task in TASKS else None, trust_remote_code)
        checkpoint = open_shapes(
            opened, library, allow_pickle=allow_pickle, fetched=True,
            weights_key=weights_key or (key if isinstance(key, str) else None),
        )  # fmt: skip
        return problems_of(checkpoint, Path(output))


@dataclass(frozen=True)
class Comparisons:
    """Several runs on one baseline. `comparison`: "first vs second" -> how the first differs (delta > 0: it is better)."""

    comparison: Mapping[str, Comparison]

    def to_pandas(self) -> pd.DataFrame:
        """A row for each comparison: delta, ci95, p_value, p_adjusted, gained, lost, test."""
        import pandas

        return pandas.DataFrame({name: asdict(found) for name, found in self.comparison.items()}).T


def compare(outputs: Sequence[str | Path]) -> Comparisons:
    """Compare the refined arms of several finished runs with their common source, and with each other.

    The tests are the report's own, on the rows of predictions.parquet; p values are corrected over all comparisons (Holm).

    Args:
        outputs: output directories of runs with the same source and the same evaluation rows.

    Raises:
        UsageError: fewer than two runs, no output of ours, another source, other evaluation rows, or
            predictions that do not give the report's own results.
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
    pairs |= {f"{one} vs {other}": (refined[one], refined[other]) for one, other in combinations(refined, 2)}
    return Comparisons(holm({name: _tested(first, *pair, groups) for name, pair in pairs.items()}))


Arm = tuple[Any, str]  # the rows of a run's predictions.parquet, and the name of one of its arms


def _tested(report: Report, mine: Arm, theirs: Arm, groups: np.ndarray[Any, Any] | None) -> Comparison:
    """Two arms compared as `report` compares its own."""
    corpus = _corpus(report)
    first, second = (_scores(table, arm, corpus) for table, arm in (mine, theirs))
    count = mine[0][f"count_{mine[1]}"].to_numpy(float)
    better, seed = bool(report.data["metric"]["higher_is_better"]), int(report.data["seed"])
    return compare_scores(first, second, count, higher_is_better=better, seed=seed, corpus=corpus, groups=groups)


def _equal_rows(reports: Mapping[str, Report], tables: Mapping[str, pd.DataFrame]) -> np.ndarray[Any, Any] | None:
    """The group of each evaluation row, where some have equal content and count as one; None where none have.

    predictions.parquet has no contents. Rows of equal content have equal targets and losses in every arm. Whether the groups
    that follow from that are the run's own shows where each report's result comes out again.

    Raises:
        UsageError: a report's result comes out neither with these groups nor without groups.
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
        f"compare: the results of {' and '.join(reports)} do not come out again from their predictions.parquet; were the files "
        "changed, or do evaluation rows of equal content not show there?"
    )


def _comes_out_again(report: Report, table: pd.DataFrame, groups: np.ndarray[Any, Any] | None) -> bool:
    """Do the predictions give the report's own difference from the source, and its interval to a twentieth?"""
    known, found = report.comparison["baseline"], _tested(report, (table, "refined"), (table, "baseline"), groups)
    near = (known.ci95[1] - known.ci95[0]) / 20  # other releases of numpy may draw other samples
    ends = zip((known.delta, *known.ci95), (found.delta, *found.ci95), strict=True)
    return all(abs(one - other) <= near + 1e-9 for one, other in ends)


def _refuse_other_runs(first: Report, other: Report) -> None:
    """Raise UsageError where two runs have another source, other evaluation rows or another metric."""
    same: dict[str, Any] = {
        "source files": lambda data: sorted((file["name"], file["sha256"]) for file in data["source"]["files"]),
        "evaluation rows": lambda data: data["data"]["eval"]["fingerprint"],
        "metric": lambda data: data["metric"]["name"],
    }
    for what, of in same.items():
        if of(first.data) != of(other.data):
            raise UsageError(f"compare: {first.folder} and {other.folder} have other {what}: they have no common baseline")


def _refuse_other_baseline(first: pd.DataFrame, other: pd.DataFrame, names: str) -> None:
    """Raise UsageError where the source itself has other targets or losses: other labels, columns or lengths of texts."""
    one, two = (table["loss_baseline"].to_numpy(float) for table in (first, other))
    if not first["target"].equals(other["target"]):
        raise UsageError(f"compare: {names} have other targets: they have no common baseline")
    if not np.allclose(one, two, rtol=1e-2, atol=1e-3, equal_nan=True):
        raise UsageError(f"compare: the source of {names} has other losses on the same rows: they have no common baseline")


def _corpus(report: Report) -> Any:
    """The function of summed statistics that makes the metric, where it is no ratio of sums (BLEU)."""
    if report.data["metric"]["name"] != "bleu4":
        return None
    from dsd_refine.tasks.image_captioning import bleu

    return bleu


def _scores(table: pd.DataFrame, arm: str, corpus: Any) -> np.ndarray[Any, Any]:
    """The scores of an arm's rows, or the statistics that `corpus` sums."""
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
    """Masks of a model's weights by the rules of a run, for a training loop of one's own.

    Args:
        model: any module. Linear, convolution, recurrent and attention weights are masked; biases,
            norms, embeddings and what else the rules name are not.
        sparsity: share of zeros per layer, at least 0 and less than 1: round(sparsity * n) weights.
        include: globs of parameter names to mask besides.
        exclude: globs of parameter names not to mask; they win.
        first: names of modules that see pixels or sound, which are not masked; empty: none is known.
        criterion: `magnitude` (the smallest, ties by the lowest flat index) or `random`.
        seed: of a random mask.

    Returns:
        Parameter name -> bool tensor of its shape, True = keep. A tied parameter has one mask.

    Raises:
        UsageError: a sparsity out of range, a glob that matches nothing, or no layer to mask.
    """
    if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise UsageError(f"sparsity {sparsity!r}: is a number, at least 0 and less than 1")
    include, exclude, first = ([names] if isinstance(names, str) else names for names in (include, exclude, first))
    if criterion not in ("magnitude", "random"):
        raise UsageError(f"criterion {criterion!r}: is magnitude or random")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    layers = find_layers(model, first=list(first), include=tuple(include), exclude=tuple(exclude))
    # in float32 and contiguous: the module may hold other dtypes, or views into larger tensors
    values = {name: parameter.detach().to(torch.float32).contiguous() for name, parameter in parameters.items()}
    return masking.make_masks(layers, values, sparsity, criterion, (seed, "mask"))


def apply_masks(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Set the masked weights to 0, in place: after each optimizer step.

    Args:
        model: the module that the masks are of.
        masks: what `make_masks` gave.

    Raises:
        UsageError: a mask of no parameter of the model, of another shape, or not bool. No weight is
            changed then.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise UsageError(f"{name}: the model has no parameter of this name and shape {tuple(mask.shape)}")
        if mask.dtype != torch.bool:
            raise UsageError(f"{name}: a mask is bool (True = keep), not {mask.dtype}")
    # a run multiplies bits, which is faster, but only right for float32 and for masks with its strides
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)


@contextmanager
def _call(quiet: bool | None) -> Iterator[Display]:
    """Around a call: quiet libraries, a display, and the process as it was found afterwards."""
    silent = not (sys.stderr is not None and sys.stderr.isatty()) and not in_notebook() if quiet is None else quiet
    with as_found():
        quiet_libraries()
        yield Display(quiet=silent)


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    """Raise UsageError for a keyword that is no option, with the nearest one."""
    known = (set(Recipe.model_fields) - {"name"}) | {*PHASE_OPTIONS, *Carried.model_fields}
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise UsageError(f"{name}: no option of this name{f'; did you mean {close[0]!r}?' if close else ''}")


def _callbacks(callbacks: Sequence[object]) -> tuple[Any, ...]:
    """The callbacks; raise UsageError for one that nothing would ever call."""
    if not isinstance(callbacks, list | tuple):
        raise UsageError(f"callbacks: expected a list of objects, not {type(callbacks).__name__}")
    names = [name for name in vars(Hooks) if not name.startswith("_")]
    for callback in callbacks:
        if not any(callable(getattr(type(callback), name, None)) for name in names):
            raise UsageError(f"callbacks: the class {type(callback).__name__} has none of the methods {', '.join(names)}")
    return tuple(callbacks)


def _given(stack: ExitStack, data: Any, eval_data: Any, recipe: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as the command has them."""
    if not isinstance(recipe, str | Path | Recipe | None):
        raise UsageError(f"recipe: expected a name, a file or a Recipe, not {type(recipe).__name__}")
    said = {name: [value] if name in (*NAMES, "sets") and isinstance(value, str) else value for name, value in options.items()}
    said = {name: value.item() if isinstance(value, np.generic) else value for name, value in said.items()}
    carried = {name: value for name, value in said.items() if name in Carried.model_fields and value is not None}
    carried = validated(Carried, carried, "options").model_dump(exclude_none=True)
    given: dict[str, Any] = {"task": None, "trust_remote_code": False, "yes": False, **said, **carried, "recipe": recipe}
    for name, value in given.items():  # the command's () is an option that was not given; an empty list is a list
        given[name] = list(value) if isinstance(value, tuple) and name != "sets" else value
    given = {name: value for name, value in given.items() if value is not None or name == "task"} | {"recipe": recipe}
    if given["task"] not in (None, *TASKS):
        raise UsageError(f"task {given['task']!r}: not a task; known are {', '.join(TASKS)}")
    return given | {"data": _as_place(stack, data), "eval_data": _as_place(stack, eval_data)}


def _as_place(stack: ExitStack, rows: Any) -> str | None:
    """Data as --data names them; an open data set is saved to a folder that lives as long as the call."""
    if rows is None or isinstance(rows, str | Path):
        return None if rows is None else str(rows)
    if not hasattr(rows, "save_to_disk"):
        raise UsageError(f"data: expected a path, a name, a Dataset or a DatasetDict, not {type(rows).__name__}")
    kind = f"datasets.{type(rows).__name__}"  # the report calls the data by the folder's name
    place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dsd-refine-"))) / kind
    rows.save_to_disk(place)
    return str(place)


def _source(stack: ExitStack, model: Any, folder: str | Path | None, given: Mapping[str, Any]) -> Source:
    """Where the weights come from; an open module's values are written into a copy of its checkpoint first."""
    pickles = bool(given.get("allow_pickle"))
    if not isinstance(model, nn.Module):
        if folder is not None:
            raise UsageError("folder: belongs to an open module; a model that is named has its own")
        return find_source(str(model), allow_pickle=pickles)
    if folder is None:
        raise UsageError("model: give the folder that the module was loaded from as `folder`: its files say the layout")
    source = find_source(str(folder), allow_pickle=pickles)
    library = open_library(source, given["task"], given["trust_remote_code"])
    checkpoint = open_checkpoint(source, library, allow_pickle=pickles, weights_key=given.get("weights_key"))
    try:
        checkpoint.model.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise UsageError(f"model: is not the model of {folder}: {' '.join(str(error).split())[:300]}") from None
    place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dsd-refine-"))) / Path(source.resolved).name
    place.mkdir()
    checkpoint.write(checkpoint.model, place)
    return replace(find_source(str(place)), model=f"{folder} (an open module)")  # the place is gone when the report is read


def _unfinished(out: Path) -> bool:
    return out.with_name(out.name + ".partial").is_dir()
