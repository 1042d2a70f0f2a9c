"""Images with several labels a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dsd_refine.checkpoint.preprocessing import Preprocessing
from dsd_refine.data.columns import IMAGE, choose, label_set
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import Tables
from dsd_refine.tasks.classification import overlap_warning, skip_warnings
from dsd_refine.tasks.image_rows import ImageExaminer, ImageRows, with_files
from dsd_refine.tasks.label_sets import LabelSets, decide_by, label_set_parts


class ImageLabels(ImageRows, LabelSets):
    """`image-classification` of models for several labels a row, of all three libraries."""

    name = "image-classification"
    draws: ClassVar[bool] = True

    def report(self) -> Mapping[str, Any]:
        """As in `LabelSets`, and the preprocessing of the images."""
        return {**super().report(), "preprocessing": self.preprocessing.shown}


def prepare_image_labels(
    recipe: Recipe,
    tables: Tables,
    evaluation: Tables | None,
    preprocessing: Preprocessing,
    aliases: Sequence[Sequence[str]] | None,
    classes: int,
) -> ImageLabels:
    """Examine every image once, match the labels of all splits, divide.

    Raises:
        DataError: no image or label column, no usable rows, labels that do not match.
    """
    metric = decide_by(recipe.metric)
    kinds = (IMAGE, label_set([names[0] for names in aliases or ()]))
    first = tables.get("train") or next(iter(tables.values()))
    chosen = choose(first, kinds, {"image": recipe.image_column, "label": recipe.label_column})
    (image,) = chosen["image"]
    examiner = ImageExaminer(image, preprocessing)
    tables, evaluation = with_files(tables, evaluation, image, preprocessing, recipe.augment)
    matched, (train, holdout, judge), divided = label_set_parts(
        recipe, tables, evaluation, chosen["label"], examiner.examine, aliases, classes
    )
    warnings = overlap_warning(divided) + skip_warnings(divided) + examiner.warnings()
    task = ImageLabels(matched, train, holdout, judge, metric, warnings)  # type: ignore[arg-type]
    task.reads(image, preprocessing, recipe.augment)
    return task
