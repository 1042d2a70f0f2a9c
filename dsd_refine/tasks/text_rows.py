"""Rows of texts for every head on texts: how they become a model's inputs, which can be used, and how they are padded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined, Rows
from dsd_refine.errors import DataError
from dsd_refine.forward import logits_of
from dsd_refine.tasks.base import Item
from dsd_refine.tasks.inputs.padding import same_but_for_rounding
from dsd_refine.tasks.inputs.texts import TextInputs, no_text, text_digest
from dsd_refine.tasks.inputs.tokens import Doubled, Unknown, ids_or_reasons, tokenized

OUTPUTS = ("input_ids", "token_type_ids", "attention_mask")  # what tokenizers make of a row


class TextPart(Protocol):
    """A part whose units are rows of texts."""

    @property
    def rows(self) -> Rows:
        """The usable rows."""
        ...

    @property
    def units(self) -> int:
        """The number of rows."""
        ...


class TextRows:
    """The inputs of a task on texts, one or two a row."""

    columns: tuple[str, ...]
    tokenizer: Any
    max_length: int
    size: int | None = None  # embeddings of the model
    pad: int = 0  # the id that fills, and the side that it fills, as `fit_padding` sets them
    left: bool = False
    train: Any
    holdout: Any
    eval: Any
    warnings: list[str]

    def reads(self, columns: tuple[str, ...], inputs: TextInputs) -> None:
        """Set the columns and the tokenizer."""
        self.columns, self.tokenizer, self.max_length, self.size = columns, inputs.tokenizer, inputs.max_length, inputs.size

    def encode(self, part: Any, units: Sequence[int]) -> dict[str, list[list[int]]]:
        """The tokenizer's output for rows, each without padding: as it is held, or made again."""
        table, numbers = part.rows.table, [int(part.rows.numbers[unit]) for unit in units]
        held = [encoding_of(table, number) for number in numbers]
        if None not in held:
            return {name: [encoding[name] for encoding in held if encoding] for name in held[0] or ()}
        rows = table.rows[numbers]
        texts = [[str(text) for text in rows[name]] for name in self.columns]
        return tokenized(self.tokenizer, *texts, truncation=True, max_length=self.max_length)

    def inputs(self, part: Any, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """Each of the tokenizer's outputs, padded to the longest row on the side that `fit_padding`
        chose: int64 of shape rows x longest row.
        """
        fills = {"input_ids": self.pad, "token_type_ids": int(getattr(self.tokenizer, "pad_token_type_id", 0) or 0)}
        side = "left" if self.left else "right"
        return {
            name: torch.nn.utils.rnn.pad_sequence(
                [torch.as_tensor(row, dtype=torch.int64) for row in rows],
                batch_first=True,
                padding_value=fills.get(name, 0),
                padding_side=side,
            )
            for name, rows in self.encode(part, [unit for unit, _ in items]).items()
        }


def fit_padding(task: TextRows, model: Any) -> None:
    """Choose the pad id and side with which the model's logits of a row are those of the row
    without padding.

    Models that read a row's answer at its last token take every token with the config's pad id for
    padding, also one of the row's own. Without a pad id in the config no token of a row is padding:
    then an id that ends no row is used.

    Raises:
        DataError: each of the tokenizer's ids ends some row.
    """
    parts = [part for part in (task.train, task.holdout, task.eval) if part is not None]
    configs = [model.config, model.config.get_text_config()]
    known = next((c.pad_token_id for c in configs if getattr(c, "pad_token_id", None) is not None), None)
    known = known if known is not None and 0 <= known < (task.size or known + 1) else None  # LLaMA's says -1
    task.pad, task.left = 0 if known is None else int(known), task.tokenizer.padding_side == "left"
    if next(model.parameters()).is_meta or model.training:
        return
    if known is None:
        task.pad = _ends_no_row(task, parts)
        for config in configs:
            config.pad_token_id = task.pad
    if _is_padding_neutral(task, model):
        return
    task.left = not task.left
    if not _is_padding_neutral(task, model):
        task.left = not task.left
        task.warnings.append("the model answers a row that is padded to a longer one's length differently than by itself")


def _ends_no_row(task: TextRows, parts: Sequence[TextPart]) -> int:
    ends = {task.tokenizer.eos_token_id}
    for part in parts:
        for start in range(0, part.units, 1000):
            rows = task.encode(part, range(start, min(start + 1000, part.units)))["input_ids"]
            ends |= {row[-1] for row in rows if row}
    ids = sorted(set(task.tokenizer.get_vocab().values()))
    free = [task.tokenizer.pad_token_id] if task.tokenizer.pad_token_id is not None else []
    for number in [*free, *ids]:
        if number not in ends and number < (task.size or number + 1):
            return int(number)
    raise DataError("the model's config has no pad_token_id, and each of the tokenizer's ids ends some row: none can fill")


@torch.no_grad()
def _is_padding_neutral(task: TextRows, model: Any) -> bool:
    """Are the answers to a few rows the same in one batch and one by one?"""
    units = range(min(8, task.eval.units))
    try:
        together = logits_of(model, task.inputs(task.eval, [(unit, None) for unit in units]))
        alone = torch.cat([logits_of(model, task.inputs(task.eval, [(unit, None)])) for unit in units])
    except Exception:  # a model raises whatever inputs that it is not made for make it raise: `first_look` refuses it
        return True
    return same_but_for_rounding(together, alone)


class TextExaminer:
    """Looks through rows of texts before they are used: which can be used, and what to warn of."""

    def __init__(self, inputs: TextInputs, ends: int | None) -> None:
        """`ends` is an id that the model must find equally often in all rows."""
        self.tokenizer, self.max_length, self.size, self.ends = inputs.tokenizer, inputs.max_length, inputs.size, ends
        self.doubled, self.unknown, self.longer = Doubled(self.tokenizer), Unknown(self.tokenizer), 0

    def examine(self, table: Table, blocks: Iterable[list[tuple[Any, ...]]], labels: Sequence[str | None]) -> list[Examined]:
        """What each row of a table is; a block of rows is tokenized at a time."""
        examined: list[Examined] = []
        counts: dict[int, int] = {}  # of `ends`, in each row that can be used
        left = iter(labels)
        for rows in blocks:
            block = [_examine(texts, label) for texts, label in zip(rows, left, strict=False)]
            self._read(table, rows, block, counts, len(examined))
            examined += block
        for number, reason in _uneven(counts, self.tokenizer, self.ends).items():
            examined[number] = replace(examined[number], reason=reason)
        return examined

    def _read(
        self, table: Table, rows: list[tuple[Any, ...]], block: list[Examined], counts: dict[int, int], start: int
    ) -> None:
        good = [number for number, row in enumerate(block) if row.reason is None]
        cut: set[int] = set()
        read = ids_or_reasons(
            self.tokenizer,
            [rows[number] for number in good],
            cut,
            lambda number, encoding: hold_encoding(table, start + good[number], encoding),
            size=self.size,
            truncation=True,
            max_length=self.max_length,
        )
        self.longer += len(cut)
        for number, (ids, problem) in zip(good, read, strict=True):
            if ids is None:
                block[number] = replace(block[number], reason=problem)
                continue
            block[number] = replace(block[number], length=len(ids))
            self.doubled.see(ids)
            self.unknown.see(ids)
            counts[start + number] = 0 if self.ends is None else ids.count(self.ends)

    def warnings(self) -> list[str]:
        """What is to be said of the texts."""
        lines = self.doubled.warnings() + self.unknown.warnings()
        if self.longer:
            lines.append(
                f"{self.longer:,} of {self.doubled.rows:,} texts are longer than {self.max_length:,} tokens: the rest of them "
                "is not read (--max-length)"
            )
        return lines


def hold_encoding(table: Table, row: int, encoding: Mapping[str, Sequence[int]]) -> None:
    """Hold the tokenizer's outputs for a row, as int32, if they are equally long and their names are the usual ones."""
    lengths = {len(values) for values in encoding.values()}
    if table.decoded is not None and len(lengths) == 1 and set(encoding) <= set(OUTPUTS):
        names = [name for name in OUTPUTS if name in encoding]
        flags = sum(1 << OUTPUTS.index(name) for name in names)
        values = np.array([encoding[name] for name in names], dtype=np.int32)
        table.decoded.put(row, values.tobytes(), flags, values.shape[1])


def encoding_of(table: Table, row: int) -> dict[str, list[int]] | None:
    """Return the outputs that `hold_encoding` held for a row, or None."""
    held = table.decoded.get(row) if table.decoded is not None else None
    if held is None:
        return None
    content, flags, length = held
    names = [name for number, name in enumerate(OUTPUTS) if flags >> number & 1]
    values = np.frombuffer(content, dtype=np.int32).reshape(len(names), length).tolist()
    return dict(zip(names, values, strict=True))


def answer_end(config: Any) -> int | None:
    """The id that an encoder-decoder classifier reads its answer at: it takes only rows that hold
    it equally often.
    """
    text = config.get_text_config()
    ends = text.eos_token_id if getattr(text, "is_encoder_decoder", False) else None
    return ends if isinstance(ends, int) else None


def _uneven(counts: Mapping[int, int], tokenizer: Any, ends: int | None) -> dict[int, str]:
    """Row -> why it cannot stand beside the others: it holds another number of the token that the
    answer is read at.
    """
    if ends is None or not counts:
        return {}
    usual = min(Counter(counts.values()).items(), key=lambda pair: (-pair[1], pair[0]))[0]
    token = tokenizer.convert_ids_to_tokens(ends)
    return {
        row: f"holds {token!r} {count} times, other rows {usual}: the model reads its answer there; take it out of the text"
        for row, count in counts.items()
        if count != usual
    }


def _examine(texts: Sequence[Any], label: str | None) -> Examined:
    if label is None:
        return Examined(b"", None, "no label")
    if any(no_text(text) for text in texts):
        return Examined(b"", label, "no text")
    return Examined(text_digest(*texts), label)
