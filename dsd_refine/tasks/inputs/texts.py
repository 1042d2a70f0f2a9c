"""Texts of rows: what counts as text, and how many tokens of one a model takes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsd_refine.checkpoint.library import Library
from dsd_refine.data.reading import Table
from dsd_refine.errors import DataError
from dsd_refine.recipe import Recipe
from dsd_refine.task_specs import TASKS
from dsd_refine.tasks.inputs.tokens import load_tokenizer, rows_of_embedding

UNLIMITED = 10**7  # tokens; tokenizers without a limit say 10**30


@dataclass(frozen=True)
class TextInputs:
    """What cuts texts into tokens. `size` is the number of the model's embeddings (None: not
    known).
    """

    tokenizer: Any
    max_length: int
    size: int | None


def open_text_inputs(recipe: Recipe, library: Library, model: torch.nn.Module) -> TextInputs:
    """The checkpoint's tokenizer, and the limits of its model.

    Raises:
        CheckpointError: the folder has no usable tokenizer. DataError: as `window_length` says.
    """
    tokenizer = load_tokenizer(library.folder, library.trust_remote_code)
    default = TASKS[library.task].default_length or UNLIMITED
    length = window_length(tokenizer, library.config, recipe.max_length, default, model)
    return TextInputs(tokenizer, length, rows_of_embedding(model, library.config))


def window_length(tokenizer: Any, config: Any, asked: int | None, default: int, model: torch.nn.Module) -> int:
    """Tokens that a window holds: as asked, else the least of the limits of tokenizer and position
    table and the default.

    Raises:
        DataError: more was asked for than the model has positions.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    positions = positions if positions and positions > 0 else None  # XLNet says -1: it has no table of them
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            positions = module.num_embeddings - module.padding_idx - 1  # RoBERTa's positions begin after the padding's
    limits = [n for n in (tokenizer.model_max_length, positions) if isinstance(n, int) and 0 < n < UNLIMITED]
    if asked is not None and positions and asked > positions:
        raise DataError(f"--max-length {asked}: the model has only {positions} positions")
    return asked or min([*limits, default])


def is_text(table: Table, names: Sequence[str], row: int) -> bool:
    """Does a row have its text, or both of its pair?"""
    return all(name in table.rows.column_names and not no_text(table.rows[row][name]) for name in names)


def no_text(text: Any) -> bool:
    """Is it no text, or white space only?"""
    return not isinstance(text, str) or not text.strip()


def text_digest(*texts: str) -> bytes:
    """SHA-256 of a row's texts."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).digest()
