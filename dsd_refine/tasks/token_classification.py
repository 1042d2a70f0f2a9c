"""Token classification: a tag for each word, such as the names in a text. The first piece of a word carries its tag.

Entities are judged as seqeval judges them (CoNLL's F1): one counts if its kind, begin and end are right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from dsd_refine.checkpoint.library import Library
from dsd_refine.data.columns import TAGS, WORDS, column
from dsd_refine.data.labels import LabelMap, left_out, match_labels
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined, Rows, divide, use_rows
from dsd_refine.data.tables import row_blocks
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.forward import logits_of
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import (
    IGNORED,
    Batch,
    ChanceBaseline,
    Forward,
    Item,
    RowPart,
    Score,
    Scores,
    Tables,
    choose_metric,
    ratio,
    require,
)
from dsd_refine.tasks.classification import overlap_warning, skip_warnings
from dsd_refine.tasks.inputs.texts import TextInputs, open_text_inputs, text_digest
from dsd_refine.tasks.inputs.tokens import Unknown, beyond_warnings, for_words, or_reason, word_pieces
from dsd_refine.tasks.text_rows import encoding_of, hold_encoding

ENTITY = re.compile(r"[BIESLUM]-.+")  # a tag of an entity; `O` is none
STATS = 5  # entities that are right, predicted and true; words that are right, and all

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TaggedPart(RowPart):
    """Rows of words. For row u, `tags[u]` has the class of each word, or IGNORED, and `firsts[u]` the place of its
    first piece, or -1 where the row was cut before it.
    """

    words: list[list[str]]
    tags: list[Array]
    firsts: list[Array]


@dataclass
class TokenClassification:
    """`token-classification` for transformers models. A real target is a word with a tag.

    Per row, `stats` are the numbers of right, predicted and true entities, and of right words and all.
    For the metric `f1`, `score` is twice the right entities and `count` the predicted and the true
    ones; for `accuracy` they are the right words and all.
    """

    names: LabelMap
    train: TaggedPart
    holdout: TaggedPart | None
    eval: TaggedPart
    tokenizer: Any
    max_length: int
    size: int | None
    metric: str
    warnings: list[str] = field(default_factory=list)
    name: str = "token-classification"
    higher_is_better: bool = True
    draws: ClassVar[bool] = False

    @property
    def corpus(self) -> Callable[[Array], Array] | None:
        """The metric of summed `stats`, for the bootstrap. None: it is a ratio of sums."""
        return entity_f1 if self.metric == "f1" else None

    @property
    def chance_baselines(self) -> tuple[ChanceBaseline, ...]:
        """The F1 of finding nothing, 0, or the accuracy of always naming the commonest tag."""
        if self.metric == "f1":
            return (ChanceBaseline("f1", 0.0, "finding nothing", higher_is_better=True),)
        tags = np.concatenate(self.eval.tags)
        counts = np.bincount(tags[tags != IGNORED])
        how = f"always naming {self.names.model[int(counts.argmax())]!r}, the commonest tag here,"
        return (ChanceBaseline("accuracy", float(counts.max() / counts.sum()), how, higher_is_better=True),)

    def batch(self, part: TaggedPart, items: Sequence[Item]) -> Batch:
        """Cut the words into pieces and pad the rows to the longest one.

        Each of the tokenizer's outputs is an int64 input of shape rows x longest row. The targets have
        the same shape: the class of a word at its first piece, IGNORED elsewhere. The seeds of the
        items are not used.
        """
        rows = [self._pieces(part, unit) for unit, _ in items]
        fills = {"input_ids": int(self.tokenizer.pad_token_id or 0)}
        padded = {
            name: torch.nn.utils.rnn.pad_sequence(
                [torch.as_tensor(row[name], dtype=torch.int64) for row in rows],
                batch_first=True,
                padding_value=fills.get(name, 0),
            )
            for name in rows[0]
        }
        targets = torch.full_like(padded["input_ids"], IGNORED)
        for row, (unit, _) in enumerate(items):
            is_read = part.firsts[unit] >= 0
            targets[row, part.firsts[unit][is_read]] = torch.as_tensor(part.tags[unit][is_read])
        return Batch(padded, targets, int((targets != IGNORED).sum()))

    def _pieces(self, part: TaggedPart, unit: int) -> dict[str, list[int]]:
        """The tokenizer's outputs for a row: as they are held, or made again."""
        held = encoding_of(part.rows.table, int(part.rows.numbers[unit]))
        if held is not None:
            return held
        inputs, _ = word_pieces(self.tokenizer, [part.words[unit]], self.max_length, self.size)
        return {name: rows[0] for name, rows in inputs.items()}

    def logits(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Targets x classes."""
        return logits_of(forward, batch.inputs)[batch.targets != IGNORED]

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The summed cross-entropy of the words, a float32 scalar."""
        logits = logits_of(forward, batch.inputs)
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def score(self, forward: Forward, batch: Batch) -> list[Score]:
        """For each row the sums that F1 and accuracy are made of, the loss, and the predicted tags."""
        logits = logits_of(forward, batch.inputs)
        flat = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="none")
        losses = flat.reshape(batch.targets.shape).double().sum(1).tolist()
        predictions, wanted = logits.argmax(-1), batch.targets != IGNORED
        rows = zip(predictions, batch.targets, wanted, losses, strict=True)
        return [self._score(guess[real].tolist(), true[real].tolist(), loss) for guess, true, real, loss in rows]

    def _score(self, guess: list[int], true: list[int], loss: float) -> Score:
        right_words = sum(a == b for a, b in zip(guess, true, strict=True))
        guessed, real = self._names(guess), self._names(true)
        found, wanted = entities(guessed), entities(real)
        stats = (len(found & wanted), len(found), len(wanted), right_words, len(true))
        score, count = (2 * stats[0], stats[1] + stats[2]) if self.metric == "f1" else (right_words, len(true))
        return Score(float(score), count, loss, text=" ".join(guessed), stats=tuple(map(float, stats)))

    def _names(self, classes: Sequence[int]) -> list[str]:
        return [self.names.model[number] for number in classes]

    def metrics(self, scores: Scores) -> dict[str, float]:
        """The task's metric, then the others: of entities F1, precision and recall; accuracy and loss a word."""
        stats = scores.stats if scores.stats is not None else np.zeros((1, STATS))
        right, predicted, true, right_words, words = stats.sum(0)
        found = {"accuracy": right_words / max(1, words), "loss": ratio(scores.loss, stats[:, -1])}
        if is_of_entities(self.names.model):
            f1 = {"f1": float(entity_f1(stats.sum(0)))}
            found = f1 | {"precision": right / max(1, predicted), "recall": right / max(1, true)} | found
        return {name: float(found[name]) for name in (self.metric, *(name for name in found if name != self.metric))}

    def target(self, part: TaggedPart, row: int) -> str | None:
        """The true tags of the row, with spaces between them."""
        return " ".join(self._names([int(tag) for tag in part.tags[row] if tag != IGNORED]))

    def shown(self, prediction: int) -> str | None:
        """None: a row has many tags, which are its text."""
        return None

    def report(self) -> Mapping[str, Any]:
        """The matching of tags and the warnings."""
        labels = {"model": list(self.names.model), "data": list(self.names.data), "rule": self.names.rule}
        return {"labels": labels, "warnings": [*self.warnings, *self.names.warnings]}


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(kind, first word, last word) of each entity, as seqeval finds them."""
    from seqeval.metrics.sequence_labeling import get_entities

    if not all(tag == "O" or ENTITY.fullmatch(tag) for tag in tags):
        return set()
    return set(get_entities(list(tags)))


def entity_f1(sums: Array) -> Array:
    """F1 of summed `stats` (…, statistics): 2 right / (predicted + true), and 0 where there are none."""
    both = sums[..., 1] + sums[..., 2]
    return np.where(both > 0, 2 * sums[..., 0] / np.maximum(both, 1), 0.0)


def is_of_entities(names: Sequence[str]) -> bool:
    """Return whether the classes are tags of entities (B-PER, I-PER, O), and not of parts of speech."""
    others = [name for name in names if name != "O"]
    return bool(others) and all(ENTITY.fullmatch(name) for name in others)


def open_task(
    recipe: Recipe, library: Library, model: torch.nn.Module, tables: Tables, evaluation: Tables | None
) -> TokenClassification:
    """The task on these rows of words, with the checkpoint's own tokenizer and class names."""
    inputs = open_text_inputs(recipe, library, model)
    tokenizer = for_words(inputs.tokenizer, library.folder, library.trust_remote_code)
    names, classes = library.label_names()
    return prepare_words(recipe, tables, evaluation, TextInputs(tokenizer, inputs.max_length, inputs.size), names, classes)


def prepare_words(
    recipe: Recipe,
    tables: Tables,
    evaluation: Tables | None,
    inputs: TextInputs,
    aliases: Sequence[Sequence[str]] | None,
    classes: int,
) -> TokenClassification:
    """Match the tags of all splits once, skip rows that cannot be used, divide.

    Raises:
        DataError: no column of words or tags, tags that do not match, or no usable rows.
        CheckpointError: the tokenizer does not tell which word a piece is of.
        UsageError: seqeval is not installed.
    """
    require("token-classification", "tagging", "seqeval")
    if not inputs.tokenizer.is_fast:
        raise CheckpointError(
            f"{inputs.tokenizer.name_or_path}: its tokenizer does not tell which word a piece is of, which tags of words need"
        )
    first = tables.get("train") or next(iter(tables.values()))
    words, tags = column(first, recipe.text_column, WORDS), column(first, recipe.label_column, TAGS)
    unwanted = frozenset(label for label, name in recipe.label_map.items() if name is None)
    examiner = _Examiner(inputs, words, tags, unwanted)
    used = {name: examiner.examine(table) for name, table in tables.items()}
    judged = {name: examiner.examine(table) for name, table in evaluation.items()} if evaluation else None
    every = [examiner.texts_of(rows) for rows in (*used.values(), *(judged or {}).values())]
    left = left_out(recipe.label_map, every)
    said = {label: name for label, name in recipe.label_map.items() if name is not None}
    spoken = {text for texts in every for text in texts} - left
    if not spoken:
        divide(used, judged, recipe.holdout)  # says why no row can be used
        raise DataError("no word has a tag")
    matched = match_labels(aliases, classes, spoken, _declared(first, tags), said)
    divided = divide(used, judged, recipe.holdout)
    train, holdout, judge = (examiner.part(rows, matched) for rows in (divided.train, divided.holdout, divided.eval))
    assert train is not None
    assert judge is not None
    allowed = ("f1", "accuracy") if is_of_entities(matched.model) else ("accuracy",)
    metric = choose_metric("token-classification", recipe.metric, allowed)
    warnings = overlap_warning(divided) + skip_warnings(divided) + examiner.warnings()
    return TokenClassification(
        matched, train, holdout, judge, inputs.tokenizer, inputs.max_length, inputs.size, metric, warnings
    )


@dataclass(frozen=True)
class _Read:
    """A row as it was read: its words, the tag of each or None, the place of each one's first piece or -1, and the
    tokenizer's outputs.
    """

    words: list[str] = field(default_factory=list)
    tags: list[str | None] = field(default_factory=list)
    firsts: Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    pieces: dict[str, list[int]] = field(default_factory=dict)


class _Examiner:
    """Looks through rows of words, and keeps the words and tags of those that can be used."""

    def __init__(self, inputs: TextInputs, words: str, tags: str, unwanted: frozenset[str]) -> None:
        self.inputs, self.words, self.tags, self.unwanted = inputs, words, tags, unwanted
        self.unknown, self.longer = Unknown(inputs.tokenizer), 0
        self.kept: dict[int, list[_Read]] = {}  # id of a table -> its rows

    def examine(self, table: Table) -> Rows:
        """The usable rows of a table."""
        names, kept = _declared(table, self.tags), self.kept.setdefault(id(table), [])
        rows: list[Examined] = []
        for words, tags in (values for block in row_blocks(table, [self.words, self.tags]) for values in block):
            read, reason = or_reason(self._read, words, tags, names)
            kept.append(read or _Read())
            digest = b"" if read is None else text_digest(*read.words, *map(str, read.tags))
            if read is not None:
                hold_encoding(table, len(rows), read.pieces)
            rows.append(Examined(digest, None, reason, length=len(kept[-1].pieces.get("input_ids", ()))))
            kept[-1].pieces.clear()
        return use_rows(table, rows)

    def _read(self, words: Any, tags: Any, names: Sequence[str] | None) -> _Read:
        """A row. Words that no piece is of because the row was cut have no tag.

        Raises:
            DataError: the row cannot be used.
        """
        if not isinstance(words, list) or not words:
            raise DataError("no words")
        if not isinstance(tags, list) or all(tag is None for tag in tags):
            raise DataError("no tags")
        if len(words) != len(tags):
            raise DataError(f"{len(words)} words and {len(tags)} tags")
        if not all(isinstance(word, str) for word in words):
            raise DataError("a word is no text")
        texts = [_tag_text(tag, names) for tag in tags]
        inputs, (firsts,) = word_pieces(self.inputs.tokenizer, [words], self.inputs.max_length, self.inputs.size)
        self.unknown.see(inputs["input_ids"][0])
        last = max(firsts, default=-1)
        lost = next((n for n, word in enumerate(words) if n not in firsts and (n < last or not word.strip())), None)
        if lost is not None:
            raise DataError(f"word {lost + 1} ({words[lost]!r:.40}) gives the tokenizer no piece")
        read = [text if n in firsts else None for n, text in enumerate(texts)]
        if all(text is None or text in self.unwanted for text in read):
            raise DataError("no tags")
        self.longer += last + 1 < len(words)
        places = np.asarray([firsts.get(n, -1) for n in range(len(words))], dtype=np.int64)
        return _Read(words, read, places, {name: rows[0] for name, rows in inputs.items()})

    def texts_of(self, rows: Rows) -> list[str]:
        """The tags of all usable rows of a table, as the data have them."""
        kept = self.kept[id(rows.table)]
        return [tag for number in rows.numbers for tag in kept[int(number)].tags if tag is not None]

    def part(self, rows: Rows | None, matched: LabelMap) -> TaggedPart | None:
        """The rows with the model's classes. Tags that `label_map` leaves out are IGNORED."""
        if rows is None:
            return None
        kept = [self.kept[id(rows.table)][int(number)] for number in rows.numbers]
        tags = [
            np.asarray([IGNORED if tag is None else matched.ids.get(tag, IGNORED) for tag in read.tags], dtype=np.int64)
            for read in kept
        ]
        return TaggedPart(rows, [read.words for read in kept], tags, [read.firsts for read in kept])

    def warnings(self) -> list[str]:
        """What is to be said of the rows."""
        lines = beyond_warnings(self.inputs.tokenizer, self.inputs.size) + self.unknown.warnings()
        if self.longer:
            lines.append(
                f"{self.longer:,} of {self.unknown.rows:,} rows are longer than {self.inputs.max_length:,} tokens: the words "
                "after these have no prediction (--max-length)"
            )
        return lines


def _declared(table: Table, name: str) -> list[str] | None:
    """The names of integer tags, in order: the recipe's, else the data set's own; None if there are none."""
    names = table.classes or getattr(getattr(table.rows.features[name], "feature", None), "names", None)
    return list(names) if names else None


def _tag_text(tag: Any, names: Sequence[str] | None) -> str | None:
    """A tag as text; a number becomes its name. None, and the -100 of prepared data: the word has no tag."""
    if tag is None or tag == IGNORED:
        return None
    if names is not None and isinstance(tag, int):
        if not 0 <= tag < len(names):
            raise DataError(f"tag {tag} is outside 0..{len(names) - 1}")
        return names[tag]
    if not isinstance(tag, str | int):
        raise DataError(f"the tag {tag!r:.40} is no name")
    return str(tag)
