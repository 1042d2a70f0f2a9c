"""Reward models: of two answers, the chosen one is to score higher than the rejected one (Bradley and Terry's loss)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from dsd_refine.data.columns import PREFERENCE, choose, column
from dsd_refine.data.conversations import read_conversation
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined, Rows, divide, use_rows
from dsd_refine.data.tables import row_blocks
from dsd_refine.errors import DataError
from dsd_refine.forward import logits_of
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import Batch, ChanceBaseline, Forward, Item, RowPart, Score, Scores, Tables, choose_metric, ratio
from dsd_refine.tasks.classification import overlap_warning, skip_warnings
from dsd_refine.tasks.inputs.chats import ChatTemplate
from dsd_refine.tasks.inputs.texts import TextInputs, no_text, text_digest
from dsd_refine.tasks.inputs.tokens import Doubled, Unknown, beyond_warnings, or_reason, tokenized
from dsd_refine.tasks.text_rows import TextRows

Encoded = dict[str, list[int]]  # the tokenizer's outputs for one text
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class PairPart(RowPart):
    """Rows with the tokens of the chosen and of the rejected answer."""

    pairs: list[tuple[Encoded, Encoded]]


@dataclass
class TextPairs(TextRows):
    """`text-classification` of models with one output, on pairs of answers. A real target is a pair."""

    train: PairPart
    holdout: PairPart | None
    eval: PairPart
    warnings: list[str] = field(default_factory=list)
    name: str = "text-classification"
    metric: str = "accuracy"
    higher_is_better: bool = True
    draws: ClassVar[bool] = False

    @property
    def chance_baselines(self) -> tuple[ChanceBaseline, ...]:
        """The accuracy of guessing, a half."""
        return (ChanceBaseline("accuracy", 0.5, "guessing", self.eval.units, higher_is_better=True),)

    def encode(self, part: PairPart, units: Sequence[int]) -> dict[str, list[list[int]]]:
        """The tokens of rows, each without padding: chosen and rejected in turn."""
        texts = [text for unit in units for text in part.pairs[unit]]
        return {name: [text[name] for text in texts] for name in texts[0]}

    def batch(self, part: PairPart, items: Sequence[Item]) -> Batch:
        """Pad the answers to the longest one. The inputs have two rows for each pair: the chosen answer, then
        the rejected one. The targets are 0, int64 of shape (pairs,): the first of the two is right.
        """
        return Batch(self.inputs(part, items), torch.zeros(len(items), dtype=torch.int64), len(items))

    def logits(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The scores of both answers, pairs x 2."""
        return logits_of(forward, batch.inputs)[:, 0].reshape(-1, 2)

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The summed -log sigmoid(chosen - rejected), a float32 scalar."""
        scores = self.logits(forward, batch)
        return -F.logsigmoid(scores[:, 0] - scores[:, 1]).sum()

    def score(self, forward: Forward, batch: Batch) -> list[Score]:
        """For each pair: 1 if the chosen answer scores higher, else 0, with the count 1."""
        scores = self.logits(forward, batch)
        ahead = scores[:, 0] - scores[:, 1]
        losses = (-F.logsigmoid(ahead)).tolist()
        texts = [f"{a:.6g} to {b:.6g}" for a, b in scores.tolist()]
        hits = (ahead > 0).tolist()
        return [Score(float(hit), 1, loss, text=text) for hit, loss, text in zip(hits, losses, texts, strict=True)]

    def metrics(self, scores: Scores) -> dict[str, float]:
        """The share of pairs in the right order, and the mean loss of a pair."""
        return {"accuracy": ratio(scores.score, scores.count), "loss": ratio(scores.loss, scores.count)}

    def target(self, part: PairPart, row: int) -> str | None:
        """None: which answer was chosen is told by its column."""
        return None

    def shown(self, prediction: int) -> str | None:
        """None: the prediction is a pair of scores."""
        return None

    def report(self) -> Mapping[str, Any]:
        """No labels, the warnings, and the loss."""
        loss = "-log sigmoid(chosen - rejected)"
        return {"labels": None, "preprocessing": {"loss": loss}, "warnings": self.warnings}


def prepare_preferences(
    recipe: Recipe, tables: Tables, evaluation: Tables | None, inputs: TextInputs, ends: int | None
) -> TextPairs:
    """Tokenize both answers of every row, skip rows that cannot be used, divide.

    Raises:
        DataError: no columns `chosen` and `rejected`, no usable rows, or a model that reads its score at
            a token of the text.
        CheckpointError: the answers are conversations, and the tokenizer has no chat template.
    """
    if recipe.label_names or recipe.label_map:
        raise DataError("label_names and label_map are of classes, and pairs of answers have none: leave them out")
    if ends is not None:
        raise DataError("pairs of answers are not supported for encoder-decoders, which read the score at the text's end token")
    choose_metric("a model of preferences", recipe.metric, ("accuracy",), ("loss",))
    first = tables.get("train") or next(iter(tables.values()))
    columns = choose(first, (PREFERENCE,), {"text": recipe.text_column})["text"]
    examiner = _Examiner(inputs, columns)
    used = {name: examiner.examine(table) for name, table in tables.items()}
    judged = {name: examiner.examine(table) for name, table in evaluation.items()} if evaluation else None
    divided = divide(used, judged, recipe.holdout)
    train, holdout, judge = (examiner.part(rows) for rows in (divided.train, divided.holdout, divided.eval))
    warnings = overlap_warning(divided) + skip_warnings(divided) + examiner.warnings()
    task = TextPairs(train, holdout, judge, warnings)  # type: ignore[arg-type]
    task.reads(columns, inputs)
    return task


class _Examiner:
    """Tokenizes pairs of answers, and keeps those that can be used."""

    def __init__(self, inputs: TextInputs, columns: Sequence[str]) -> None:
        self.inputs, self.columns, self.longer = inputs, columns, 0
        self.doubled, self.unknown = Doubled(inputs.tokenizer), Unknown(inputs.tokenizer)
        self.template: ChatTemplate | None = None
        self.kept: dict[int, list[tuple[Encoded, Encoded]]] = {}  # id of a table -> its rows

    def examine(self, table: Table) -> Rows:
        """The usable rows of a table."""
        kept, rows = self.kept.setdefault(id(table), []), []
        names = [column(table, name, PREFERENCE) for name in self.columns]
        for values in (values for block in row_blocks(table, names) for values in block):
            pair, reason = or_reason(self._read, dict(zip((name.casefold() for name in names), values, strict=True)))
            kept.append(pair or ({}, {}))
            content = text_digest(*(str(answer["input_ids"]) for answer in pair)) if pair else b""
            length = max(len(answer["input_ids"]) for answer in pair) if pair else 0
            rows.append(Examined(content, None, reason, length=length))
        return use_rows(table, rows)

    def _read(self, row: Mapping[str, Any]) -> tuple[Encoded, Encoded]:
        """The tokens of both answers.

        Raises:
            DataError: the row cannot be used.
        """
        for side in SIDES:
            if not isinstance(row[side], list) and no_text(row[side]):
                raise DataError(f"no {side} answer")
        (chosen, long), (rejected, also_long) = (self._tokens(row.get("prompt"), row[side]) for side in SIDES)
        if chosen["input_ids"] == rejected["input_ids"]:
            within = f" within {self.inputs.max_length:,} tokens (--max-length)" if long or also_long else ""
            raise DataError(f"chosen and rejected are the same{within}")
        self.longer += long or also_long
        for answer in (chosen, rejected):
            self.doubled.see(answer["input_ids"])
            self.unknown.see(answer["input_ids"])
        return chosen, rejected

    def _tokens(self, prompt: Any, answer: Any) -> tuple[Encoded, bool]:
        """The tokens of an answer with its prompt, cut to the length, and whether they were cut.

        Conversations, and a prompt for a tokenizer with a chat template, are written by the template. Else
        a prompt and its answer are a pair of texts.
        """
        tokenizer, size = self.inputs.tokenizer, self.inputs.size
        has_prompt = isinstance(prompt, list) or not no_text(prompt)
        options: dict[str, Any] = {"size": size, "verbose": False}
        if isinstance(answer, list) or isinstance(prompt, list) or (has_prompt and tokenizer.chat_template):
            self.template = self.template or ChatTemplate(tokenizer, size, on_answers=False)
            names, values = (("prompt", "answer"), (prompt, answer)) if has_prompt else (("messages",), (answer,))
            texts = [self.template.write(read_conversation(names, values)).text]
            options["add_special_tokens"] = False
        else:
            texts = [prompt, answer] if has_prompt else [answer]
        whole = tokenized(tokenizer, *texts, **options)
        if len(whole["input_ids"]) <= self.inputs.max_length:
            return whole, False
        return tokenized(tokenizer, *texts, truncation=True, max_length=self.inputs.max_length, **options), True

    def part(self, rows: Rows | None) -> PairPart | None:
        """The rows of a part with their tokens."""
        return None if rows is None else PairPart(rows, [self.kept[id(rows.table)][int(number)] for number in rows.numbers])

    def warnings(self) -> list[str]:
        """What is to be said of the texts."""
        lines = beyond_warnings(self.inputs.tokenizer, self.inputs.size) + self.doubled.warnings() + self.unknown.warnings()
        if self.longer:
            lines.append(
                f"{self.longer:,} of {self.doubled.rows // 2:,} pairs have an answer longer than {self.inputs.max_length:,} "
                "tokens: the rest of it is not read (--max-length)"
            )
        return lines + (self.template.warnings() if self.template else [])
