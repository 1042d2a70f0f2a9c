"""Image classification: images of any mode, prepared by the checkpoint's own preprocessing. Several labels a row are
in `image_labels`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from dsd_refine.checkpoint.library import Library
from dsd_refine.checkpoint.preprocessing import Preprocessing
from dsd_refine.data.columns import IMAGE, LABEL, Kind, column, fits, label_set
from dsd_refine.data.reading import Table
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import Batch, Item, Tables, Task
from dsd_refine.tasks.classification import Classification, LabelledPart, labelled_parts, overlap_warning, skip_warnings
from dsd_refine.tasks.image_labels import prepare_image_labels
from dsd_refine.tasks.image_rows import ImageExaminer, ImageRows, with_files


class ImageClassification(ImageRows, Classification):
    """`image-classification` for models of all three libraries."""

    name = "image-classification"
    draws: ClassVar[bool] = True

    def report(self) -> Mapping[str, Any]:
        """As in `Classification`, and the preprocessing of the images."""
        return {**super().report(), "preprocessing": self.preprocessing.shown}

    def batch(self, part: LabelledPart, items: Sequence[Item]) -> Batch:
        """Decode the images, prepare them as the checkpoint does, and augment those with a seed.

        The input has the shape images x C x H x W. The targets are int64 class ids, one per image.
        """
        targets = torch.as_tensor(part.ids[[unit for unit, _ in items]])
        return Batch(self.inputs(part, items), targets, len(items))


def kinds(library: Library) -> tuple[tuple[Kind, ...], ...]:
    """The kinds of columns that the model is trained on.

    The config of a transformers model may say whether a row has one label or several. If it does not,
    the data tell.
    """
    names, _ = library.label_names()
    several, one = (IMAGE, label_set([name[0] for name in names or ()])), (IMAGE, LABEL)
    config = library.config
    said = getattr(config, "problem_type", None)
    if said == "multi_label_classification":
        return (several,)
    return (one,) if said is not None else (several, one)


def open_task(recipe: Recipe, library: Library, model: torch.nn.Module, tables: Tables, evaluation: Tables | None) -> Task:
    """The task on these data, with the checkpoint's own preprocessing and class names."""
    names, classes = library.label_names()
    ways = kinds(library)
    first = tables.get("train") or next(iter(tables.values()))
    several = next((labels for _, labels in ways if labels is not LABEL), None)
    is_set = several is not None and (len(ways) == 1 or fits(first, several, recipe.label_column))
    prepare = prepare_image_labels if is_set else prepare_images
    task: Task = prepare(recipe, tables, evaluation, library.preprocessing(model), names, classes)
    return task


def prepare_images(
    recipe: Recipe,
    tables: Tables,
    evaluation: Tables | None,
    preprocessing: Preprocessing,
    aliases: Sequence[Sequence[str]] | None,
    classes: int,
) -> ImageClassification:
    """Examine every image once, match labels, divide.

    Raises:
        DataError: no image or label column, no usable rows, labels that do not match.
    """
    image = column(next(iter(tables.values())), recipe.image_column, IMAGE)
    tables, evaluation = with_files(tables, evaluation, image, preprocessing, recipe.augment)
    examiner = ImageExaminer(image, preprocessing)

    def label(table: Table) -> str:
        return column(table, recipe.label_column, LABEL)

    matched, parts, divided = labelled_parts(
        tables, evaluation, label, examiner.examine, aliases, classes, recipe.holdout, recipe.label_map
    )
    train, holdout, judge = parts
    said = overlap_warning(divided) + skip_warnings(divided) + examiner.warnings()
    task = ImageClassification(matched, train, holdout, judge, said)  # type: ignore[arg-type]
    task.decide_by(recipe.metric)
    task.reads(image, preprocessing, recipe.augment)
    return task
