"""Conversations with pictures, for models that read both and write text: Idefics3 and SmolVLM.

The loss is that of the answers' tokens. What is trained depends on the recipe: the default one leaves
the vision encoder and its connector as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from dsd_refine.checkpoint.library import Library
from dsd_refine.data.columns import DIALOGUE, PICTURES, Kind, choose, column
from dsd_refine.data.pictures import FileRows
from dsd_refine.data.reading import Table
from dsd_refine.data.tables import ROWS_AT_ONCE, in_threads
from dsd_refine.errors import DataError
from dsd_refine.forward import logits_of
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import Batch, Forward, Item, Tables
from dsd_refine.tasks.causal_lm import CausalLM
from dsd_refine.tasks.causality import WINDOWS, refuse_foresight
from dsd_refine.tasks.conversations import Write, divide_conversations
from dsd_refine.tasks.inputs.chats import Written
from dsd_refine.tasks.inputs.images import Seen, look_warnings
from dsd_refine.tasks.inputs.picture_chats import PictureChats, PictureColumns, PictureReader, Shown, open_processor
from dsd_refine.tasks.inputs.texts import open_text_inputs
from dsd_refine.tasks.inputs.tokens import known_tokens, or_reason
from dsd_refine.tasks.inputs.windows import WindowedPart


@dataclass
class ImageTextToText(CausalLM):
    """`image-text-to-text` for transformers models. A row is a conversation, and one window."""

    name: str = "image-text-to-text"
    reader: PictureReader = field(kw_only=True)

    def batch(self, part: Any, items: Sequence[Item]) -> Batch:
        """As in `CausalLM`, with the pictures of the rows (`PictureReader.inputs`)."""
        batch = super().batch(part, items)
        rows = [int(part.rows.numbers[part.row_of(unit)]) for unit, _ in items]
        return replace(batch, inputs=batch.inputs | self.reader.inputs(part.rows.table, rows))

    def refuse_foresight(self, forward: Forward, device: torch.device) -> None:
        """Raises CheckpointError where the model sees the tokens that it is to predict. It is given texts without their
        pictures.
        """
        assert isinstance(self.train, WindowedPart)
        texts = [self._text(self.train, unit).to(device) for unit in range(min(WINDOWS, self.train.units))]
        windows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in texts]
        refuse_foresight(self.name, lambda inputs: logits_of(forward, inputs), windows, ("input_ids", "attention_mask"))

    def _text(self, part: WindowedPart, unit: int) -> torch.Tensor:
        """The tokens of a window that are no picture, int64 of shape 1 x tokens."""
        ids = part.tokens[part.start[unit] : part.stop[unit]].astype(np.int64)
        return torch.from_numpy(ids[ids != self.reader.processor.image_token_id])[None]

    def report(self) -> Mapping[str, Any]:
        """No labels, how pictures are prepared, and the warnings about the rows."""
        return {"labels": None, "preprocessing": self.reader.shown, "warnings": self.warnings}


def kinds(library: Library) -> Sequence[Sequence[Kind]]:
    """Conversations whose pictures are in a column, else those that have them, or name them, in their messages."""
    return [DIALOGUE, PICTURES], [DIALOGUE]


def open_task(
    recipe: Recipe, library: Library, model: torch.nn.Module, tables: Tables, evaluation: Tables | None
) -> ImageTextToText:
    """The task on these conversations, with the checkpoint's own processor.

    Raises:
        DataError: no usable conversations.
        CheckpointError: no usable processor, or one without a chat template.
    """
    processor = open_processor(library)
    inputs = open_text_inputs(recipe, library, model)
    chats = PictureChats(processor, inputs.size, on_answers=recipe.loss_on != "all")
    first = tables.get("train") or next(iter(tables.values()))
    names = choose(first, (DIALOGUE,), {"text": recipe.text_column})["text"]
    pictures = column(first, recipe.image_column, PICTURES) if recipe.image_column else None
    examiner = _Examiner(PictureReader(processor, PictureColumns(names, pictures)), chats)
    parts, warnings = divide_conversations(recipe, tables, evaluation, chats.template, inputs.max_length, examiner.writers)
    known = known_tokens(chats.tokenizer, inputs.size)
    return ImageTextToText(*parts, warnings + look_warnings(examiner.seen), vocabulary=known, reader=examiner.reader)


class _Examiner:
    """Looks at the pictures of tables, in threads, and writes their rows, one after the other."""

    def __init__(self, reader: PictureReader, chats: PictureChats) -> None:
        self.reader, self.chats = reader, chats
        self.seen: list[tuple[str | int, Seen]] = []  # a row's name, and what is odd about a picture of it

    def writers(self, table: Table) -> Iterator[Write]:
        """What writes each row of a table."""
        rows = FileRows(table, self.reader.columns.names)
        for start in range(0, len(table.rows), ROWS_AT_ONCE):
            columns = rows.columns(slice(start, start + ROWS_AT_ONCE))
            block = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            shown = self._shown(table, block)
            yield from (partial(self._write, table.name(start + row), *one) for row, one in enumerate(shown))

    def _shown(self, table: Table, block: Sequence[dict[str, Any]]) -> list[tuple[Shown | None, str | None]]:
        """Of each row, what it shows, or why it cannot be used."""
        return in_threads(lambda row: or_reason(partial(self.reader.show, table), block[row]), len(block))

    def _write(self, name: str | int, shown: Shown | None, reason: str | None) -> Written:
        if shown is None:
            raise DataError(str(reason))
        written = self.chats.write(shown)
        self.seen += [(name, seen) for seen in shown.seen]
        return written
