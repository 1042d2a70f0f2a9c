"""Recipes, tables and texts with labels, for tests of the data alone."""

import datasets
from builders import word_tokenizer

from dsd_refine.data.reading import Table
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.tasks.text_classification import prepare_texts

NAMED = (("tabby cat", "n02"), ("dog", "n01"), ("great_white", "n03"))


def recipe(**fields):
    """A recipe of one dense step, with these fields."""
    return Recipe(phases=(Phase(kind="dense", steps=1, lr=0.1),), **fields)


def table(**columns):
    """A table in memory."""
    return Table(datasets.Dataset.from_dict(columns))


def texts(tables, aliases=(("neg",), ("pos",)), evaluation=None, classes=2, **fields):
    """The prepared splits of a text classifier of two classes."""
    return prepare_texts(recipe(**fields), tables, evaluation, word_tokenizer(), 16, aliases, classes)
