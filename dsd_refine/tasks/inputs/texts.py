"""Texts of rows: what counts as text, and the longest sequence that a model takes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from dsd_refine.data.reading import Table
from dsd_refine.errors import DataError

# tokens, where neither tokenizer nor config name a limit
LONGEST = {"text-classification": 512, "causal-lm": 1024, "masked-lm": 512}


def longest(tokenizer: Any, config: Any, task: str, asked: int | None, model: torch.nn.Module | None = None) -> int:
    """Tokens a window holds: what was asked for, within what tokenizer and position table allow.

    Raises:
        DataError: more was asked for than the model has positions.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    positions = positions if positions and positions > 0 else None  # XLNet says -1: it has no table of them
    for name, module in model.named_modules() if model else ():
        if isinstance(module, torch.nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            positions = module.num_embeddings - module.padding_idx - 1  # RoBERTa's positions begin after the padding's
    limits = [n for n in (tokenizer.model_max_length, positions) if isinstance(n, int) and 0 < n < 10**7]
    if asked is not None and positions and asked > positions:
        raise DataError(f"--max-length {asked}: the model has only {positions} positions")
    return asked or min([*limits, LONGEST[task]])


def is_text(table: Table, names: Sequence[str], row: int) -> bool:
    """Does a row have its text, or both of its pair?"""
    return all(name in table.rows.column_names and not no_text(table.rows[row][name]) for name in names)


def no_text(text: Any) -> bool:
    """Is it no text, or white space only?"""
    return not isinstance(text, str) or not text.strip()


def text_digest(*texts: str) -> bytes:
    """SHA-256 of a row's texts."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).digest()
