"""From a recipe, a library adapter and its model to a task with its data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dsd_refine.data.columns import AUDIO, CAPTION, DOCUMENT, IMAGE, LABEL, TEXT, TRANSCRIPT, Kind
from dsd_refine.data.given import Given, read_given
from dsd_refine.data.imagenet import outputs, synsets
from dsd_refine.data.names import are_placeholders, listed
from dsd_refine.data.reading import Table, named
from dsd_refine.data.splits import Rows
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import Task

Download = Callable[[str, int], bool]

COLUMNS: dict[str, tuple[Kind, ...]] = {
    "image-classification": (IMAGE, LABEL),
    "text-classification": (TEXT, LABEL),
    "causal-lm": (DOCUMENT,),
    "masked-lm": (DOCUMENT,),
    "ctc-speech": (AUDIO, TRANSCRIPT),
    "image-captioning": (IMAGE, CAPTION),
}


def look_at_data(recipe: Recipe, name: str, library: Any, cache: Path, download: Download) -> Given:
    """What can be known of the recipe's data before the weights are touched: splits, columns, labels.

    Raises:
        DataError: no data given, or data that do not fit the task or the classes of the checkpoint's config.
    """
    if recipe.data is None:
        raise DataError("no data: give --data (a directory, a file, or a Hub data set org/name), or a recipe that names one")
    if name in WITHOUT_CLASSES and (recipe.label_names or recipe.label_map):
        raise DataError(f"label_names and label_map are of classes, and {name} has none: leave them out")
    kinds = COLUMNS[name]
    _refuse_useless(recipe, name, kinds)
    asked = {kind.what: getattr(recipe, f"{kind.what}_column") for kind in kinds}
    splits = recipe.eval_split, recipe.holdout_split
    given = read_given(recipe.data, recipe.eval_data, splits, kinds, asked, cache, download, recipe.encoding)
    classes = synsets() if recipe.label_names == "imagenet-1k" else recipe.label_names
    evaluation = None if given.evaluation is None else named(given.evaluation, classes)
    given = replace(given, tables=named(given.tables, classes), evaluation=evaluation)
    if LABEL in kinds:
        _check_labels(given, recipe, name, library)
    return given


def _refuse_useless(recipe: Recipe, name: str, kinds: Sequence[Kind]) -> None:
    """Raises DataError for an option that the task has no use for: whoever gives it expects something of it."""
    used = [kind.what for kind in kinds]
    for kind in (IMAGE, AUDIO, LABEL, TEXT):
        if kind.what not in used and getattr(recipe, f"{kind.what}_column") is not None:
            raise DataError(f"{kind.flag}: {name} reads columns of {' and '.join(used)}, and no {kind.what}: leave it out")
    if recipe.max_length is not None and name in WITHOUT_LENGTH:
        raise DataError(f"--max-length is of texts that are cut into tokens, and {name} cuts none: leave it out")


def _check_labels(given: Given, recipe: Recipe, name: str, library: Any) -> None:
    from dsd_refine.tasks.classification import check_labels

    if name == "image-classification":
        from dsd_refine.tasks.inputs.images import is_picture as counts
    else:
        from dsd_refine.tasks.inputs.texts import is_text as counts
    aliases, classes = _classes(library)
    check_labels(given, aliases, classes, recipe.label_map, counts)


def open_task(recipe: Recipe, name: str, library: Any, model: torch.nn.Module, cache: Path, download: Download) -> Task:
    """Read the recipe's data for a task and hold it against the model.

    Raises:
        DataError: no data given, or data that do not fit.
        CheckpointError: the checkpoint lacks its preprocessing.
    """
    return prepare_task(recipe, name, library, model, look_at_data(recipe, name, library, cache, download))


def prepare_task(recipe: Recipe, name: str, library: Any, model: torch.nn.Module, given: Given) -> Task:
    """The task with data that were looked at: every row is examined.

    Raises:
        DataError: data that do not fit.
        CheckpointError: the checkpoint lacks its preprocessing.
    """
    chosen = {f"{what}_column": ",".join(names) for what, names in given.columns.items()}
    return _OPENERS[name](recipe.model_copy(update=chosen), library, model, given.tables, given.evaluation)


def parts_of(task: Task) -> dict[str, Rows | None]:
    """The rows of each part, as the report names the parts."""
    holdout = task.holdout.rows if task.holdout is not None else None
    return {"train": task.train.rows, "holdout": holdout, "eval": task.eval.rows}


Tables = dict[str, Table]

WITHOUT_LENGTH = ("image-classification", "ctc-speech")
WITHOUT_CLASSES = ("causal-lm", "masked-lm", "ctc-speech", "image-captioning")


def _images(recipe: Recipe, library: Any, model: torch.nn.Module, tables: Tables, evaluation: Tables | None) -> Task:
    from dsd_refine.tasks import image_classification as images
    from dsd_refine.tasks.inputs.images import timm_preprocessing, torchvision_preprocessing, transformers_preprocessing

    names, classes = _classes(library)
    if library.name == "timm":
        preprocessing = timm_preprocessing(model)
    elif library.name == "torchvision":
        preprocessing = torchvision_preprocessing(library.preprocessing)
    else:
        preprocessing = transformers_preprocessing(library.folder, library.config, library.trust_remote_code)
    taken = "pixel_values" if library.name == "transformers" else "x"
    return images.prepare_images(recipe, tables, evaluation, preprocessing, names, classes, taken)


def _texts(recipe: Recipe, library: Any, model: torch.nn.Module, tables: Tables, evaluation: Tables | None) -> Task:
    from dsd_refine.tasks.inputs.texts import longest
    from dsd_refine.tasks.inputs.tokens import load_tokenizer, rows_of_embedding
    from dsd_refine.tasks.text_classification import answer_end, fit_padding, prepare_texts

    tokenizer = load_tokenizer(library.folder, library.trust_remote_code)
    size = rows_of_embedding(model, library.config)
    length = longest(tokenizer, library.config, "text-classification", recipe.max_length, model)
    names, classes = _classes(library)
    ends = answer_end(library.config)
    task = prepare_texts(recipe, tables, evaluation, tokenizer, length, names, classes, size, ends)
    fit_padding(task, model)
    return task


def _documents(recipe: Recipe, library: Any, model: torch.nn.Module, tables: Tables, evaluation: Tables | None) -> Task:
    from dsd_refine.tasks.causal_lm import prepare_documents
    from dsd_refine.tasks.inputs.texts import longest
    from dsd_refine.tasks.inputs.tokens import load_tokenizer, rows_of_embedding

    tokenizer = load_tokenizer(library.folder, library.trust_remote_code)
    size = rows_of_embedding(model, library.config)
    length = longest(tokenizer, library.config, "causal-lm", recipe.max_length, model)
    return prepare_documents(recipe, tables, evaluation, tokenizer, length, size)


def _masked(recipe: Recipe, library: Any, model: torch.nn.Module, tables: Tables, evaluation: Tables | None) -> Task:
    from dsd_refine.tasks.inputs.texts import longest
    from dsd_refine.tasks.inputs.tokens import load_tokenizer, rows_of_embedding
    from dsd_refine.tasks.masked_lm import prepare_masked

    tokenizer = load_tokenizer(library.folder, library.trust_remote_code)
    size = rows_of_embedding(model, library.config)
    length = longest(tokenizer, library.config, "masked-lm", recipe.max_length, model)
    return prepare_masked(recipe, tables, evaluation, tokenizer, length, size)


def _speech(recipe: Recipe, library: Any, model: torch.nn.Module, tables: Tables, evaluation: Tables | None) -> Task:
    from dsd_refine.tasks.ctc_speech import open_words, prepare_speech
    from dsd_refine.tasks.inputs.audio import open_hearing
    from dsd_refine.tasks.inputs.tokens import load_tokenizer

    words = open_words(load_tokenizer(library.folder, library.trust_remote_code), library.config)
    hearing = open_hearing(library.folder, model, library.trust_remote_code)
    return prepare_speech(recipe, tables, evaluation, hearing, words, model)


def _captions(recipe: Recipe, library: Any, model: torch.nn.Module, tables: Tables, evaluation: Tables | None) -> Task:
    from dsd_refine.tasks.image_captioning import prepare_captions
    from dsd_refine.tasks.inputs.captioner import open_speaker
    from dsd_refine.tasks.inputs.images import transformers_preprocessing
    from dsd_refine.tasks.inputs.tokens import load_tokenizer

    config = library.config
    vision = getattr(config, "encoder", None) or getattr(config, "vision_config", config)
    preprocessing = transformers_preprocessing(library.folder, vision, library.trust_remote_code)
    tokenizer = load_tokenizer(library.folder, library.trust_remote_code)
    speaker = open_speaker(library.folder, tokenizer, model, recipe.max_length)
    return prepare_captions(recipe, tables, evaluation, preprocessing, speaker)


_OPENERS: dict[str, Callable[..., Task]] = {
    "image-classification": _images,
    "text-classification": _texts,
    "causal-lm": _documents,
    "masked-lm": _masked,
    "ctc-speech": _speech,
    "image-captioning": _captions,
}


def _classes(library: Any) -> tuple[Sequence[Sequence[str]] | None, int]:
    """(the names of each class, None where there are none; how many classes), as the checkpoint's config says."""
    if library.name == "timm":
        classes = int(library.args.get("num_classes", library.cfg["num_classes"]))
        return _timm_names(library, classes), classes
    if library.name == "torchvision":
        return _torchvision_names(library), int(library.num_classes)
    return _config_names(library.config), int(library.config.num_labels)


def _config_names(config: Any) -> list[list[str]] | None:
    """The class names of a transformers config; LABEL_0 and the like count as none, then `label2id` may name them.

    Raises:
        CheckpointError: names that are none, or `label2id` names the classes in another order.
    """
    found = [config.id2label[i] for i in range(config.num_labels)]
    if not all(isinstance(name, str | int) for name in found):
        raise CheckpointError("config.json: `id2label` has class names that are no texts")
    names, back = [str(name) for name in found], _named_backwards(config)
    if not are_placeholders(names):
        if back is not None and back != names and sorted(back) == sorted(names):
            raise CheckpointError(
                f"config.json: `id2label` names the classes {listed(names)}, `label2id` {listed(back)}: correct the wrong one"
            )
        return [[name] for name in names]
    return None if back is None else [[name] for name in back]


def _named_backwards(config: Any) -> list[str] | None:
    """The names in order of `label2id`, where it gives each class one that says something."""
    numbers = {number: str(name) for name, number in (getattr(config, "label2id", None) or {}).items()}
    names = [numbers[i] for i in range(config.num_labels) if i in numbers]
    return names if len(names) == len(numbers) == config.num_labels and not are_placeholders(names) else None


def _torchvision_names(library: Any) -> list[list[str]] | None:
    """The class names of a torchvision checkpoint; where they are its names of ImageNet-1k, the synsets mean them too."""
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    names = library.label_names
    if names is None:
        return None
    if list(names) != list(_IMAGENET_CATEGORIES):
        return [[name] for name in _own_names(names, library.num_classes)]
    return [[name, synset] for name, (synset, _) in zip(names, outputs(len(names)) or (), strict=True)]


def _timm_names(library: Any, classes: int) -> list[list[str]] | None:
    """The class names of a timm checkpoint, else ImageNet's synsets and descriptions where the head has its size.

    Raises:
        CheckpointError: `label_names` that are not one text for each class.
    """
    own = library.cfg.get("label_names")
    if own:
        described = library.cfg.get("label_descriptions") or {}
        return [
            [name, *([str(described[name])] if isinstance(described, dict) and name in described else [])]
            for name in _own_names(own, classes)
        ]
    found = outputs(classes)
    return None if found is None else [list(dict.fromkeys(names)) for names in found]


def _own_names(names: Any, classes: int) -> list[str]:
    """A config's `label_names`, one for each class of the head.

    Raises:
        CheckpointError: no list of texts, another number of names than of classes, a name twice.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise CheckpointError("config.json: `label_names` is not a list of texts, one for each class in order")
    if len(names) != classes:
        raise CheckpointError(
            f"config.json: label_names has {len(names)} names, the head {classes}: {listed(names)}. Correct the list (or take "
            "it out, then the data's own order or `label_map` says which class is which)"
        )
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None) if classes < 1000 else None
    if twice is not None:
        raise CheckpointError(f"config.json: label_names has {twice!r} for two classes; give each class a name of its own")
    return list(names)
