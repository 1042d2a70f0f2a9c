"""Conversations for causal-lm: rows become windows in which the tokens of the answers are the targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dsd_refine.data.columns import DIALOGUE, column
from dsd_refine.data.conversations import read_conversation
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined, Rows, divide, use_rows
from dsd_refine.data.tables import row_blocks
from dsd_refine.errors import DataError
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import Tables
from dsd_refine.tasks.classification import overlap_warning, skip_warnings
from dsd_refine.tasks.inputs.chats import ChatTemplate, Written
from dsd_refine.tasks.inputs.texts import TextInputs, text_digest
from dsd_refine.tasks.inputs.tokens import Doubled, Unknown, beyond_warnings, or_reason
from dsd_refine.tasks.inputs.windows import NO_TOKENS, WindowedPart, cut_windows

NOTHING = Written("", NO_TOKENS, np.empty(0, dtype=bool))


def prepare_conversations(
    recipe: Recipe, tables: Tables, evaluation: Tables | None, columns: Sequence[str], inputs: TextInputs
) -> tuple[tuple[WindowedPart, WindowedPart | None, WindowedPart], list[str]]:
    """Write every conversation with the chat template, skip those without a target, divide.

    A row is one window: its first `max_length` tokens.

    Returns:
        The parts that train, select and judge, and the warnings.

    Raises:
        DataError: no usable conversations, or an option that is for texts.
        CheckpointError: the tokenizer has no chat template.
    """
    if recipe.stride is not None:
        raise DataError("--stride is of texts that are cut into windows, and a conversation is one window: leave it out")
    examiner = _Examiner(ChatTemplate(inputs.tokenizer, inputs.size, on_answers=recipe.loss_on != "all"), inputs.max_length)

    def examined(table: Table) -> Rows:
        return examiner.examine(table, [column(table, name, DIALOGUE) for name in columns])

    used = {name: examined(table) for name, table in tables.items()}
    judged = {name: examined(table) for name, table in evaluation.items()} if evaluation else None
    divided = divide(used, judged, recipe.holdout)
    cut = examiner.windows
    parts = cut(divided.train), cut(divided.holdout) if divided.holdout else None, cut(divided.eval)
    return parts, overlap_warning(divided) + skip_warnings(divided) + examiner.warnings()


class _Examiner:
    """Writes the conversations of tables, and keeps what it has written."""

    def __init__(self, template: ChatTemplate, max_length: int) -> None:
        self.template, self.max_length, self.longer = template, max_length, 0
        self.doubled, self.unknown = Doubled(template.tokenizer), Unknown(template.tokenizer)
        self.written: dict[int, list[Written]] = {}  # id of a table -> what each of its rows is

    def examine(self, table: Table, names: Sequence[str]) -> Rows:
        """The usable rows of a table."""
        held = self.written[id(table)] = []
        rows: list[Examined] = []
        for values in (values for block in row_blocks(table, names) for values in block):
            written, reason = or_reason(self._read, names, values)
            held.append(written or NOTHING)
            answers = np.packbits(held[-1].asked).tobytes().hex()
            rows.append(Examined(b"" if reason else text_digest(held[-1].text, answers), None, reason))
        return use_rows(table, rows)

    def _read(self, names: Sequence[str], values: Sequence[Any]) -> Written:
        """A row as written, cut to `max_length`.

        Raises:
            DataError: it cannot be used.
        """
        whole = self.template.write(read_conversation(names, values))
        cut = replace(whole, ids=whole.ids[: self.max_length], asked=whole.asked[: self.max_length])
        is_longer = len(whole.ids) > self.max_length
        if not cut.asked[1:].any():
            raise DataError(f"no answer within {self.max_length:,} tokens (--max-length)" if is_longer else "no answer")
        self.longer += is_longer
        self.doubled.see(cut.ids)
        self.unknown.see(cut.ids)
        return cut

    def windows(self, rows: Rows) -> WindowedPart:
        """The rows of a part, each one window."""
        held = self.written[id(rows.table)]
        part = cut_windows(rows, [written.ids for written in held], self.max_length, lambda ids: True)
        return replace(part, asked=np.concatenate([held[int(number)].asked for number in rows.numbers]))

    def warnings(self) -> list[str]:
        """What is to be said of the conversations."""
        tokenizer, rows = self.template.tokenizer, self.doubled.rows
        lines = beyond_warnings(tokenizer, self.template.size) + self.doubled.warnings() + self.unknown.warnings()
        if self.longer:
            lines.append(
                f"{self.longer:,} of {rows:,} conversations are longer than {self.max_length:,} tokens: the rest of them is "
                "not read (--max-length)"
            )
        return lines + self.template.warnings()
