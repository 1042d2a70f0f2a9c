"""Conversations: rows become windows in which the tokens of the answers are the targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from dsd_refine.data.columns import DIALOGUE, PICTURES, column
from dsd_refine.data.conversations import read_conversation
from dsd_refine.data.pictures import has_pictures
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

Write = Callable[[], Written]  # writes one row; raises DataError where it cannot be used


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
    template = ChatTemplate(inputs.tokenizer, inputs.size, on_answers=recipe.loss_on != "all")

    def writers(table: Table) -> Iterator[Write]:
        names = [column(table, name, DIALOGUE) for name in columns]
        for block in row_blocks(table, names):
            yield from (partial(_write, template, names, values) for values in block)

    parts, warnings = divide_conversations(recipe, tables, evaluation, template, inputs.max_length, writers)
    return parts, warnings + _picture_warnings(next(iter(tables.values())))


def _picture_warnings(table: Table) -> list[str]:
    """One line if a column beside the conversations is one of pictures by its name."""
    known = {name for names, _ in PICTURES.sets for name in names}
    columns = [name for name in table.rows.column_names if name.strip().casefold() in known]
    return [f"the column {name!r} is not read: models that see pictures are for --task image-text-to-text" for name in columns]


def _write(template: ChatTemplate, names: Sequence[str], values: Sequence[Any]) -> Written:
    conversation = read_conversation(names, values)
    if has_pictures(conversation):
        raise DataError("has a picture, which causal-lm does not read: --task image-text-to-text is for models that do")
    return template.write(conversation)


def divide_conversations(
    recipe: Recipe,
    tables: Tables,
    evaluation: Tables | None,
    template: ChatTemplate,
    max_length: int,
    writers: Callable[[Table], Iterator[Write]],
) -> tuple[tuple[WindowedPart, WindowedPart | None, WindowedPart], list[str]]:
    """Write every row, skip those that cannot be used, and divide. `writers` gives for each row of a table what writes it.

    Returns and raises as `prepare_conversations`.
    """
    examiner = _Examiner(template, max_length)
    used = {name: examiner.examine(table, writers(table)) for name, table in tables.items()}
    judged = {name: examiner.examine(table, writers(table)) for name, table in evaluation.items()} if evaluation else None
    divided = divide(used, judged, recipe.holdout)
    cut = examiner.windows
    parts = cut(divided.train), cut(divided.holdout) if divided.holdout else None, cut(divided.eval)
    return parts, overlap_warning(divided) + skip_warnings(divided) + examiner.warnings()


class _Examiner:
    """Keeps what the conversations of tables are written as."""

    def __init__(self, template: ChatTemplate, max_length: int) -> None:
        self.template, self.max_length, self.longer = template, max_length, 0
        self.doubled, self.unknown = Doubled(template.tokenizer), Unknown(template.tokenizer)
        self.written: dict[int, list[Written]] = {}  # id of a table -> what each of its rows is

    def examine(self, table: Table, writers: Iterable[Write]) -> Rows:
        """The usable rows of a table."""
        held = self.written[id(table)] = []
        rows: list[Examined] = []
        for write in writers:
            written, reason = or_reason(self._cut, write)
            held.append(written or NOTHING)
            rows.append(Examined(b"", None, reason) if reason else _examined(held[-1]))
        return use_rows(table, rows)

    def _cut(self, write: Write) -> Written:
        """A row as written, cut to `max_length`.

        Raises:
            DataError: it cannot be used.
        """
        whole = write()
        if whole.uncut > self.max_length:
            raise DataError(
                f"its pictures end at token {whole.uncut:,}, and pictures cannot be cut: a row has {self.max_length:,} "
                "tokens (--max-length)"
            )
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


def _examined(written: Written) -> Examined:
    """What a row is. Equal pictures stay in one part, whatever is said of them."""
    answers = np.packbits(written.asked).tobytes().hex()
    if written.pictures:
        return Examined(text_digest(*written.pictures), texts=(written.text, answers))
    return Examined(text_digest(written.text, answers))
