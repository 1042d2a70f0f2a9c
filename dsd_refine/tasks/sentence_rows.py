"""Rows of texts for embeddings: how they become inputs and vectors, and which of them can be used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch

from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined, Parts, Rows, divide, use_rows
from dsd_refine.data.tables import row_blocks
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import Batch, Forward, Item, RowPart, Tables
from dsd_refine.tasks.classification import overlap_warning, skip_warnings
from dsd_refine.tasks.inputs.sentences import SentenceInputs, shown_inputs
from dsd_refine.tasks.inputs.texts import no_text
from dsd_refine.tasks.inputs.tokens import Doubled, Unknown, beyond_warnings, ids_or_reasons

Reader = Callable[[int, Sequence[str]], Examined]  # what a row is: its number in the table, and its texts


@dataclass(frozen=True)
class SentencePart(RowPart):
    """Rows of texts; `values` has what a task knows of each row, an array of shape (rows, …)."""

    values: np.ndarray[Any, Any]


@dataclass
class Sentences:
    """What the tasks on embeddings share: how rows become inputs, and vectors."""

    columns: tuple[str, ...]
    sentences: SentenceInputs
    train: SentencePart
    holdout: SentencePart | None
    eval: SentencePart
    metric: str
    warnings: list[str] = field(default_factory=list)
    name: str = "embedding"
    draws: ClassVar[bool] = False

    def batch(self, part: SentencePart, items: Sequence[Item]) -> Batch:
        """Tokenize the texts of the rows and pad them to the longest.

        The inputs have a row for each text: those of the first column, then those of the second, and so on.
        The targets are the rows' `values`. `aside["seen"]` has what the pooling sees, rows x columns x
        tokens. The seeds of the items are not used.
        """
        units = [unit for unit, _ in items]
        texts = part.rows.table.rows[[int(part.rows.numbers[unit]) for unit in units]]
        inputs, seen = self.sentences.batch([texts[name] for name in self.columns])
        by_row = seen.reshape(len(self.columns), len(units), -1).transpose(0, 1)
        return Batch(inputs, torch.from_numpy(part.values[units]), len(units), {"seen": by_row})

    def vectors(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The embeddings of a batch, float32, columns x rows x dimensions."""
        seen = batch.aside["seen"].transpose(0, 1)
        found = self.sentences.vectors(forward, batch.inputs, seen.flatten(0, 1))
        return found.reshape(*seen.shape[:2], -1)

    def shown(self, prediction: int) -> str | None:
        """None: this task predicts no class."""
        return None

    def report_of(self, loss: str) -> Mapping[str, Any]:
        """No labels, the warnings, the loss, and how texts are read."""
        return {
            "labels": None,
            "preprocessing": {"loss": loss, **shown_inputs(self.sentences, self.columns)},
            "warnings": self.warnings,
        }


class Examiner:
    """Looks through rows of texts: which can be used, and what to warn of."""

    def __init__(self, inputs: SentenceInputs, columns: Sequence[str]) -> None:
        self.inputs, self.columns, self.rows, self.longer = inputs, columns, 0, 0
        self.doubled, self.unknown = Doubled(inputs.tokenizer), Unknown(inputs.tokenizer)

    def examine(self, table: Table, read: Reader) -> Rows:
        """The usable rows of a table. `read` says what a row with its texts is."""
        found: list[Examined] = []
        for block in row_blocks(table, self.columns):
            rows = [self._lacks(texts) or read(len(found) + number, texts) for number, texts in enumerate(block)]
            self._look_at(block, rows)
            found += rows
        return use_rows(table, found)

    def _lacks(self, texts: Sequence[Any]) -> Examined | None:
        """The row if it lacks a text, else None."""
        empty = next((name for name, text in zip(self.columns, texts, strict=True) if no_text(text)), None)
        return None if empty is None else Examined(b"", None, f"no {empty}")

    def _look_at(self, block: Sequence[Sequence[Any]], rows: list[Examined]) -> None:
        """Tokenize the texts of usable rows. A row with a text that cannot be read gets the reason."""
        good = [number for number, row in enumerate(rows) if row.reason is None]
        cut: set[int] = set()
        for column in range(len(self.columns)):
            texts = [(self.inputs.text(column, block[number][column]),) for number in good]
            for number, (ids, reason) in zip(
                good, ids_or_reasons(self.inputs.tokenizer, texts, cut, **self.inputs.options), strict=True
            ):
                rows[number] = rows[number] if reason is None else replace(rows[number], reason=reason)
                if ids is not None:
                    self.doubled.see(ids)
                    self.unknown.see(ids)
        self.rows, self.longer = self.rows + len(good), self.longer + len(cut)

    def warnings(self, parts: Parts) -> list[str]:
        """What is to be said of the rows and their texts."""
        tokenizer = self.inputs.tokenizer
        lines = overlap_warning(parts) + skip_warnings(parts) + beyond_warnings(tokenizer, self.inputs.size)
        if self.longer:
            lines.append(
                f"{self.longer:,} of {self.rows:,} rows have a text longer than {self.inputs.max_length:,} tokens: the rest of "
                "it is not read (--max-length)"
            )
        return lines + self.doubled.warnings() + self.unknown.warnings()


def divided(recipe: Recipe, tables: Tables, evaluation: Tables | None, examine: Callable[[Table], Rows]) -> Parts:
    """The rows of the three parts."""
    used = {name: examine(table) for name, table in tables.items()}
    judged = {name: examine(table) for name, table in evaluation.items()} if evaluation else None
    return divide(used, judged, recipe.holdout)
