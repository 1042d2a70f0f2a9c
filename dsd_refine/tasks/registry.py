"""From a recipe, a library adapter and its model to a task with its data. Which tasks there are:
`task_specs.TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TypeVar

import torch

from dsd_refine.checkpoint.library import Library
from dsd_refine.data.columns import (
    ANSWERS,
    AUDIO,
    CAPTION,
    DIALOGUE,
    DOCUMENT,
    IMAGE,
    LABEL,
    PICTURES,
    QUESTION,
    SCORE_COLUMN,
    SOURCE,
    TAGS,
    TARGET,
    TEXT,
    TOGETHER,
    TRANSCRIPT,
    WORDS,
    Kind,
)
from dsd_refine.data.conversations import is_conversation
from dsd_refine.data.decoded import Store
from dsd_refine.data.given import Given, read_given
from dsd_refine.data.imagenet import synsets
from dsd_refine.data.joining import join_rows
from dsd_refine.data.reading import Table, named
from dsd_refine.data.splits import Rows
from dsd_refine.errors import DataError
from dsd_refine.recipe import Recipe
from dsd_refine.task_specs import OWN_FIELDS, TASKS, TaskSpec
from dsd_refine.tasks.base import Corpus, Task

Download = Callable[[str, int], bool]

HELD = {"image", "audio", "text"}  # content that takes time to decode; documents are tokenized once anyway

T = TypeVar("T", dict[str, Table], dict[str, Table] | None)

KINDS: dict[str, Kind] = {
    "image": IMAGE,
    "audio": AUDIO,
    "label": LABEL,
    "words": WORDS,
    "tags": TAGS,
    "question": QUESTION,
    "answers": ANSWERS,
    "text": TEXT,
    "document": DOCUMENT,
    "dialogue": DIALOGUE,
    "pictures": PICTURES,
    "transcript": TRANSCRIPT,
    "caption": CAPTION,
    "together": TOGETHER,
    "score": SCORE_COLUMN,
    "source": SOURCE,
    "target": TARGET,
}


def look_at_data(
    recipe: Recipe, name: str, library: Library, cache: Path, download: Download, store: Store | None = None
) -> Given:
    """What can be known of the recipe's data before the weights are touched: splits, columns,
    labels.

    Args:
        cache: A folder for what `datasets` reads.
        download: Whether a data set of so many bytes may be fetched.
        store: Where decoded pictures and sounds are to be held.

    Raises:
        DataError: no data given, or data that do not fit the task or the classes of the
            checkpoint's config.
    """
    if recipe.data is None:
        raise DataError("no data: give --data (a directory, a file, or a Hub data set org/name), or a recipe that names one")
    spec = TASKS[name]
    if not spec.has_classes and (recipe.label_names or recipe.label_map):
        raise DataError(f"label_names and label_map are of classes, and {name} has none: leave them out")
    ways = _kinds(spec, library)
    kinds = [kind for way in ways for kind in way]
    _refuse_useless(recipe, spec, kinds)
    asked = {kind.what: getattr(recipe, f"{kind.what}_column") for kind in kinds}
    splits = recipe.eval_split, recipe.holdout_split
    beside = (recipe.join,) if recipe.join else ()
    given = read_given(
        recipe.data, recipe.eval_data, splits, ways, asked, cache, download, recipe.encoding, recipe.documents, beside
    )
    _refuse_unread(asked, given)
    if recipe.join:
        given = _joined(given, recipe)
    classes = synsets() if recipe.label_names == "imagenet-1k" else recipe.label_names
    evaluation = None if given.evaluation is None else named(given.evaluation, classes)
    given = replace(given, tables=named(given.tables, classes), evaluation=evaluation)
    if store is not None and is_held(name):
        given = replace(given, tables=_held(given.tables, store), evaluation=_held(given.evaluation, store))
    if LABEL in given.kinds:
        _check_labels(given, recipe, spec, library)
    return given


def is_held(task: str) -> bool:
    """Return whether a run of the task holds the decoded content of its rows on the disk."""
    return bool(HELD & set(TASKS[task].columns))


def _held(tables: T, store: Store) -> T:
    """The tables (or None) with a place for the decoded content of their rows."""
    if tables is None:
        return tables
    return {name: replace(table, decoded=store.rows(len(table.rows))) for name, table in tables.items()}


def _kinds(spec: TaskSpec, library: Library) -> Sequence[Sequence[Kind]]:
    """The kinds of columns that the task reads: for each way to train the model, one list."""
    if not spec.kinds:
        return [[KINDS[column] for column in spec.columns]]
    module, function = spec.kinds.split(":")
    found: Sequence[Sequence[Kind]] = getattr(import_module(module), function)(library)
    return found


def _joined(given: Given, recipe: Recipe) -> Given:
    """The data with documents in place of rows, as the recipe's `join` says.

    Raises:
        DataError: the rows are conversations, or as `join_rows` says.
    """
    assert recipe.join is not None
    by, between, names = recipe.join, recipe.join_with, given.columns["text"]
    if is_conversation(given.tables["train"], names):
        raise DataError("join: is of rows that are texts, and these are conversations: leave it out")
    joined = [
        {role: join_rows(table, names[0], by, between) for role, table in tables.items()}
        for tables in (given.tables, given.evaluation or {})
    ]
    note = f"rows are joined to documents (join: {by}): " + ", ".join(
        f"{len(table.rows)} of {role}" for tables in joined for role, table in tables.items()
    )
    return replace(given, tables=joined[0], evaluation=joined[1] or None, notes=(*given.notes, note))


def _refuse_useless(recipe: Recipe, spec: TaskSpec, kinds: Sequence[Kind]) -> None:
    """Raises DataError for an option that the task has no use for: whoever gives it expects
    something of it.
    """
    used = [kind.what for kind in kinds]
    for name in OWN_FIELDS:
        if getattr(recipe, name) is not None and name not in spec.fields:
            raise DataError(f"{name}: {spec.name} has no use for it: leave it out")
    for kind in (IMAGE, AUDIO, LABEL, TEXT, SOURCE, TARGET):
        if kind.what not in used and getattr(recipe, f"{kind.what}_column") is not None:
            raise DataError(f"{kind.flag}: {spec.name} reads columns of {' and '.join(used)}, and no {kind.what}: leave it out")
    if recipe.max_length is not None and spec.default_length is None:
        raise DataError(f"--max-length is of texts that are cut into tokens, and {spec.name} cuts none: leave it out")


def _refuse_unread(asked: Mapping[str, str | None], given: Given) -> None:
    """Refuse a column that the user names, where the data are read in a way that has no use for it."""
    for what, name in asked.items():
        if name is not None and what not in given.columns:
            read = " and ".join(",".join(names) for names in given.columns.values())
            raise DataError(f"--{what}-column {name}: the data are read as {read}, which have no {what}: leave it out")


def _check_labels(given: Given, recipe: Recipe, spec: TaskSpec, library: Library) -> None:
    from dsd_refine.tasks.classification import check_labels

    if "image" in spec.columns:
        from dsd_refine.tasks.inputs.images import is_picture as is_usable
    elif "audio" in spec.columns:
        from dsd_refine.tasks.audio_classification import is_sound as is_usable
    else:
        from dsd_refine.tasks.inputs.texts import is_text as is_usable
    aliases, classes = library.label_names()
    check_labels(given, aliases, classes, recipe.label_map, is_usable)


def prepare_task(recipe: Recipe, name: str, library: Library, model: torch.nn.Module, given: Given) -> Task:
    """The task with data that were looked at: every row is examined.

    Raises:
        DataError: data that do not fit.
        CheckpointError: the checkpoint lacks its preprocessing.
    """
    chosen = {f"{what}_column": ",".join(names) for what, names in given.columns.items()}
    module, function = TASKS[name].opener.split(":")
    opener = getattr(import_module(module), function)
    task: Task = opener(recipe.model_copy(update=chosen), library, model, given.tables, given.evaluation)
    return task


def corpus_of(task: str, metric: str) -> Corpus | None:
    """What computes a metric from the statistics of rows; None: it is a ratio of sums."""
    place = TASKS[task].corpora.get(metric) if task in TASKS else None
    if place is None:
        return None
    module, function = place.split(":")
    found: Corpus = getattr(import_module(module), function)
    return found


def parts_of(task: Task) -> dict[str, Rows | None]:
    """The rows of each part, as the report names the parts."""
    holdout = task.holdout.rows if task.holdout is not None else None
    return {"train": task.train.rows, "holdout": holdout, "eval": task.eval.rows}
