"""Embedding: one vector a text, so that texts which belong together are close.

Two kinds of data train it: texts that belong together (`embedding_pairs`), and pairs of texts with a
score (`embedding_scores`).
"""

from __future__ import annotations

from typing import Any

import torch

from dsd_refine.checkpoint.library import Library
from dsd_refine.data.columns import SCORE_COLUMN, SCORE_OF_PAIR, SCORED_PAIR, TEXT, TOGETHER, Kind
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import Tables, Task
from dsd_refine.tasks.embedding_pairs import prepare_together
from dsd_refine.tasks.embedding_scores import prepare_scored_pairs
from dsd_refine.tasks.inputs.sentences import is_padding_neutral, open_sentence_inputs
from dsd_refine.tasks.sentence_rows import Sentences

LOOKED_AT = 8  # texts that are embedded together and one by one


def kinds(library: Library) -> tuple[tuple[Kind, ...], ...]:
    """The kinds of columns: two texts with a score, texts that belong together, or what the user names as the first."""
    return (SCORED_PAIR, SCORE_COLUMN), (TOGETHER,), (TEXT, SCORE_OF_PAIR)


def open_task(recipe: Recipe, library: Library, model: torch.nn.Module, tables: Tables, evaluation: Tables | None) -> Task:
    """The task on these data, with the checkpoint's own tokenizer, modules and prompts.

    Raises:
        DataError: data that do not fit. CheckpointError: an encoder-decoder, or as `open_sentence_inputs` says.
    """
    if recipe.label_names or recipe.label_map:
        raise DataError("label_names and label_map are of classes, and embedding has none: leave them out")
    config = library.config
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{library.folder}: {config.model_type} is an encoder-decoder; embedding is for encoders and decoders alone"
        )
    columns = tuple((recipe.text_column or "").split(","))
    if len(columns) < 2:
        raise DataError(
            f"embedding compares texts, and {columns[0]!r} is one column: name two with --text-column A,B. (The config names a "
            "class with no task's head; if the weights have one, give --task)"
        )
    inputs = open_sentence_inputs(recipe, library, model, columns)
    prepare = prepare_scored_pairs if recipe.label_column else prepare_together
    task: Any = prepare(recipe, tables, evaluation, inputs, columns)
    _warn_of_padding(task, model)
    opened: Task = task
    return opened


def _warn_of_padding(task: Sentences, model: torch.nn.Module) -> None:
    if next(model.parameters()).is_meta or model.training:
        return
    rows = task.eval.rows
    texts = rows.table.rows[[int(number) for number in rows.numbers[:LOOKED_AT]]][task.columns[0]]
    if not is_padding_neutral(task.sentences, texts, model):
        task.warnings.append("the model embeds a text that is padded to a longer one's length differently than by itself")
