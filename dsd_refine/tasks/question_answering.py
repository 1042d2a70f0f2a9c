"""Question answering: the answer is a span of the context. Judged as SQuAD's script judges: F1 of words, and exact match."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from dsd_refine.checkpoint.library import Library
from dsd_refine.data.columns import ANSWERS, QUESTION, MissingColumn, choose, column
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined, Rows, divide, use_rows
from dsd_refine.data.tables import row_blocks
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.forward import logits_of
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.answers import Answers, exact_match, f1, read_answers
from dsd_refine.tasks.base import Batch, ChanceBaseline, Forward, Item, Score, Scores, Tables, choose_metric, ratio
from dsd_refine.tasks.classification import overlap_warning, skip_warnings
from dsd_refine.tasks.inputs.spans import LONGEST_ANSWER, Window, WindowCutter, best_spans
from dsd_refine.tasks.inputs.texts import no_text, open_text_inputs, text_digest
from dsd_refine.tasks.inputs.tokens import Unknown, beyond_warnings, or_reason

METRICS = ("f1", "exact_match")
STATS = 3  # of a row: F1, exact match, windows
NEVER = -1e30  # the logit of a place that is no token

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Asked:
    """The answers of a row, and the number of its windows."""

    answers: Answers
    windows: int


@dataclass(frozen=True)
class Found:
    """The best span of a window: the sum of its two logits, that of no answer, and its characters in the context."""

    logits: float
    none: float
    begin: int
    end: int


@dataclass(frozen=True)
class QuestionPart:
    """Rows with a question each. A unit is a window where `by_window`, else a row with all its windows.

    `places` has the row of each unit and the number of its window (-1: all), int64 of shape (units, 2).
    """

    rows: Rows
    asked: list[Asked]
    places: Array

    @classmethod
    def of(cls, rows: Rows, asked: list[Asked], *, by_window: bool) -> QuestionPart:
        """The part, whose units are windows or rows."""
        windows = [range(of_row.windows) if by_window else (-1,) for of_row in asked]
        return cls(rows, asked, np.array([(row, k) for row, of_row in enumerate(windows) for k in of_row], dtype=np.int64))

    @property
    def units(self) -> int:
        """The number of windows or of rows."""
        return len(self.places)

    def row_of(self, unit: int) -> int:
        """The row that the unit is of."""
        return int(self.places[unit, 0])


@dataclass
class QuestionAnswering:
    """`question-answering` for transformers models. A real target is a window.

    A window's loss is the mean of the cross-entropies of the first and the last token of its answer. If
    it has none, both point at the window's first token. `unanswerable`: there are rows whose context
    does not have the answer, so the empty answer is predicted where it is the likeliest.

    Per row, `stats` are F1, exact match, and the number of windows.
    """

    train: QuestionPart
    holdout: QuestionPart | None
    eval: QuestionPart
    columns: tuple[str, str]
    cutter: WindowCutter
    unanswerable: bool
    metric: str
    warnings: list[str] = field(default_factory=list)
    name: str = "question-answering"
    higher_is_better: bool = True
    draws: ClassVar[bool] = False

    @property
    def chance_baselines(self) -> tuple[ChanceBaseline, ...]:
        """The share of rows without an answer: so much is right without reading."""
        share = float(np.mean([not asked.answers.texts for asked in self.eval.asked]))
        return (ChanceBaseline(self.metric, share, "giving no answer", higher_is_better=True),)

    def batch(self, part: QuestionPart, items: Sequence[Item]) -> Batch:
        """The windows of the units, padded to the longest.

        Each input is int64 of shape windows x longest window. The targets are int64 of shape (windows,
        2): the first and the last token of the answer. `aside` has the item of each window, the token that
        stands for no answer, and of each token the characters of the context (-1: not of it). `texts` has
        the context and the right answers of each item. The seeds of the items are not used.
        """
        rows = [part.row_of(unit) for unit, _ in items]
        read = part.rows.table.rows[[int(part.rows.numbers[row]) for row in rows]]
        texts = list(zip(*(read[name] for name in self.columns), strict=True))
        windows: list[Window] = []
        targets, of_item = [], []
        for item, ((unit, _), row, (question, context)) in enumerate(zip(items, rows, texts, strict=True)):
            number, cut = int(part.places[unit, 1]), self.cutter.cut(question, context)
            for window in cut if number < 0 else [cut[number]]:
                windows.append(window)
                of_item.append(item)
                targets.append(target_of(window, part.asked[row].answers))
        aside = {
            "item": torch.tensor(of_item),
            "places": _padded([window.places for window in windows], -1),
            "nowhere": torch.tensor([window.nowhere for window in windows]),
        }
        right = tuple((context, *part.asked[row].answers.texts) for row, (_, context) in zip(rows, texts, strict=True))
        return Batch(self._inputs(windows), torch.tensor(targets), len(windows), aside, right)

    def _inputs(self, windows: Sequence[Window]) -> dict[str, torch.Tensor]:
        fills = {"input_ids": int(self.cutter.tokenizer.pad_token_id or 0)}
        inputs = {name: _padded([w.inputs[name] for w in windows], fills.get(name, 0)) for name in windows[0].inputs}
        lengths = torch.tensor([len(window.places) for window in windows])
        real = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return inputs if "attention_mask" in inputs else inputs | {"attention_mask": real}

    def _logits(self, forward: Forward, batch: Batch) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of windows and their logits, windows x 2 x tokens. A row may have many windows: the model is
        given no more of them at once than there are items.
        """
        most = len(batch.texts)
        for start in range(0, len(batch.targets), most):
            chosen = slice(start, start + most)
            inputs = {name: values[chosen] for name, values in batch.inputs.items()}
            is_token = inputs["attention_mask"][:, None, :] > 0
            yield chosen, logits_of(forward, inputs).transpose(1, 2).masked_fill(~is_token, NEVER)

    def logits(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Places to find (first and last token of each window) x tokens."""
        return torch.cat([logits for _, logits in self._logits(forward, batch)]).flatten(0, 1)

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The sum over windows of the mean cross-entropy of the first and the last token, a float32 scalar."""
        return F.cross_entropy(self.logits(forward, batch), batch.targets.flatten(), reduction="sum") / 2

    def score(self, forward: Forward, batch: Batch) -> list[Score]:
        """For each item F1, exact match, its loss, and the best span of all its windows as text."""
        found: list[list[Found]] = [[] for _ in batch.texts]
        losses = [0.0] * len(found)
        for chosen, logits in self._logits(forward, batch):
            flat = F.cross_entropy(logits.flatten(0, 1), batch.targets[chosen].flatten(), reduction="none")
            of_windows = flat.double().view(-1, 2).mean(1).tolist()
            spans = _found(logits, batch.aside["places"][chosen], batch.aside["nowhere"][chosen])
            for item, loss, span in zip(batch.aside["item"][chosen].tolist(), of_windows, spans, strict=True):
                losses[item] += loss
                found[item].append(span)
        return [self._score(*row) for row in zip(found, batch.texts, losses, strict=True)]

    def _score(self, windows: Sequence[Found], texts: Sequence[str], loss: float) -> Score:
        """The score of a row from the best span of each of its windows, its context and its right answers."""
        best = max(windows, key=lambda window: window.logits)
        is_empty = self.unanswerable and min(window.none for window in windows) > best.logits
        answer = "" if is_empty else texts[0][best.begin : best.end].strip()
        stats = (f1(answer, texts[1:]), exact_match(answer, texts[1:]), float(len(windows)))
        return Score(stats[METRICS.index(self.metric)], 1, loss, text=answer, stats=stats)

    def metrics(self, scores: Scores) -> dict[str, float]:
        """F1 and exact match, the deciding one first, and the loss per window."""
        stats = scores.stats if scores.stats is not None else np.zeros((1, STATS))
        found = {name: float(stats[:, number].mean()) for number, name in enumerate(METRICS)}
        found["loss"] = ratio(scores.loss, stats[:, -1])
        return {name: found[name] for name in (self.metric, *(name for name in found if name != self.metric))}

    def target(self, part: QuestionPart, row: int) -> str | None:
        """The right answers, each once, with ` | ` between them; empty where there is none."""
        return " | ".join(dict.fromkeys(part.asked[row].answers.texts))

    def shown(self, prediction: int) -> str | None:
        """None: this task predicts texts, not classes."""
        return None

    def report(self) -> Mapping[str, Any]:
        """No labels, how contexts are cut and answers found, and the warnings."""
        preprocessing = {
            "window": self.cutter.max_length, "stride": self.cutter.stride,
            "longest_answer": LONGEST_ANSWER, "may_be_unanswerable": self.unanswerable,
        }  # fmt: skip
        return {"labels": None, "preprocessing": preprocessing, "warnings": self.warnings}


def _found(logits: torch.Tensor, places: torch.Tensor, nowhere: torch.Tensor) -> list[Found]:
    """What is found in each window.

    Args:
        logits: Of the first and the last token, shape (windows, 2, tokens).
        places: The characters of the context of each token, shape (windows, tokens, 2).
        nowhere: The token that stands for no answer, shape (windows,).
    """
    starts, ends = logits.unbind(1)
    sums, tokens = best_spans(starts, ends, places[..., 1] > places[..., 0])
    none = logits.gather(2, nowhere[:, None, None].expand(-1, 2, 1)).sum((1, 2))
    begin, end = (places[..., side].gather(1, tokens[:, side, None])[:, 0] for side in (0, 1))
    return [Found(*values) for values in zip(*(each.tolist() for each in (sums, none, begin, end)), strict=True)]


def target_of(window: Window, answers: Answers) -> tuple[int, int]:
    """The first and the last token of the answer that trains, or of nothing if it is not in the window."""
    span = window.span(answers.begin, answers.end) if answers.texts else None
    return span or (window.nowhere, window.nowhere)


def _padded(rows: Sequence[Any], fill: int) -> torch.Tensor:
    tensors = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)


def open_task(
    recipe: Recipe, library: Library, model: torch.nn.Module, tables: Tables, evaluation: Tables | None
) -> QuestionAnswering:
    """The task on these questions, with the checkpoint's own tokenizer.

    Raises:
        CheckpointError: the tokenizer does not tell which characters a token is of.
        DataError: no usable rows, or a metric that is not of this task.
    """
    inputs = open_text_inputs(recipe, library, model)
    if not inputs.tokenizer.is_fast:
        raise CheckpointError(
            f"{library.folder}: its tokenizer does not tell which characters a token is of, which spans of a text need"
        )
    stride = recipe.stride or max(1, inputs.max_length // 3)  # as BERT's script: 128 tokens of 384
    cutter = WindowCutter(inputs.tokenizer, inputs.max_length, stride, inputs.size)
    return prepare_questions(recipe, tables, evaluation, cutter)


def prepare_questions(recipe: Recipe, tables: Tables, evaluation: Tables | None, cutter: WindowCutter) -> QuestionAnswering:
    """Find the answers in their contexts, skip rows that cannot be used, divide.

    Raises:
        DataError: no column of questions, contexts or answers, or no usable rows.
    """
    metric = choose_metric("question-answering", recipe.metric, METRICS, ("loss",))
    first = tables.get("train") or next(iter(tables.values()))
    chosen = choose(first, (QUESTION, ANSWERS), {"text": recipe.text_column, "label": recipe.label_column})
    if len(chosen["text"]) != 2:
        raise DataError(f"--text-column {','.join(chosen['text'])}: name two columns, the question and the context")
    question, context = chosen["text"]
    examiner = _Examiner(cutter, (question, context), chosen["label"][0])
    used = {name: examiner.examine(table) for name, table in tables.items()}
    judged = {name: examiner.examine(table) for name, table in evaluation.items()} if evaluation else None
    divided = divide(used, judged, recipe.holdout)
    train, holdout = examiner.part(divided.train, by_window=True), examiner.part(divided.holdout)
    judge = examiner.part(divided.eval)
    assert train is not None
    assert judge is not None
    warnings = overlap_warning(divided) + skip_warnings(divided) + examiner.warnings()
    parts = [part for part in (train, holdout, judge) if part is not None]
    unanswerable = any(not asked.answers.texts for part in parts for asked in part.asked)
    return QuestionAnswering(train, holdout, judge, (question, context), cutter, unanswerable, metric, warnings)


class _Examiner:
    """Looks through rows of questions, and keeps the answers of those that can be used."""

    def __init__(self, cutter: WindowCutter, texts: tuple[str, str], answers: str) -> None:
        self.cutter, self.texts, self.answers = cutter, texts, answers
        self.unknown, self.long = Unknown(cutter.tokenizer), 0
        self.kept: dict[int, list[Asked | None]] = {}  # id of a table -> its rows

    def examine(self, table: Table) -> Rows:
        """The usable rows of a table."""
        kept = self.kept.setdefault(id(table), [])
        try:
            names = [*self.texts, column(table, self.answers, ANSWERS)]
        except MissingColumn:  # such as a test split with secret answers
            kept += [None] * len(table.rows)
            return use_rows(table, [Examined(b"", None, "no answers")] * len(table.rows))
        rows: list[Examined] = []
        for question, context, answers in (values for block in row_blocks(table, names) for values in block):
            asked, reason = or_reason(self._read, question, context, answers)
            kept.append(asked)
            texts = asked.answers.texts if asked else ()
            rows.append(Examined(b"" if asked is None else text_digest(question, context), None, reason, texts))
        if not any(asked is not None and asked.answers.texts for asked in kept):
            hidden = "no answers (no row of this split has one)"  # secret answers may be written as empty ones
            rows = [row if row.reason else Examined(row.digest, None, hidden) for row in rows]
        return use_rows(table, rows)

    def _read(self, question: Any, context: Any, value: Any) -> Asked:
        """The answers of a row.

        Raises:
            DataError: the row cannot be used.
        """
        for text, what in ((question, "question"), (context, "context")):
            if no_text(text):
                raise DataError(f"no {what}")
        answers = read_answers(value, context)
        windows = self.cutter.cut(question, context)
        spans = [window.span(answers.begin, answers.end) for window in windows] if answers.texts else []
        lengths = [last - first + 1 for first, last in (span for span in spans if span is not None)]
        if answers.texts and not lengths:
            raise DataError(
                f"its answer {answers.texts[0][:40]!r} does not fit into a window of {self.cutter.max_length} tokens"
            )
        self.unknown.see(windows[0].inputs["input_ids"])
        self.long += any(length > LONGEST_ANSWER for length in lengths)
        return Asked(answers, len(windows))

    def part(self, rows: Rows | None, *, by_window: bool = False) -> QuestionPart | None:
        """The part of these rows."""
        if rows is None:
            return None
        kept = self.kept[id(rows.table)]
        asked = [kept[int(number)] for number in rows.numbers]
        return QuestionPart.of(rows, [each for each in asked if each is not None], by_window=by_window)

    def warnings(self) -> list[str]:
        """What is to be said of the rows."""
        lines = beyond_warnings(self.cutter.tokenizer, self.cutter.size) + self.unknown.warnings()
        if self.long:
            lines.append(
                f"{self.long:,} of {self.unknown.rows:,} rows have an answer of more than {LONGEST_ANSWER} tokens, which is "
                "the longest that is predicted: they cannot be found whole"
            )
        return lines
