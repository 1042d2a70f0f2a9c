"""Text classification and causal language modelling: tokens exactly as the checkpoint's tokenizer makes them."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from dsd_refine.data.columns import DOCUMENT, LABEL, TEXT, choose, column
from dsd_refine.data.splits import Examined, Rows, divide, use_rows
from dsd_refine.data.tables import Table, row_blocks
from dsd_refine.errors import DataError
from dsd_refine.forward import logits_of
from dsd_refine.recipe import Recipe
from dsd_refine.tasks import Batch, Forward, Guess, Item, Score, Scores, ratio
from dsd_refine.tasks.causality import WINDOWS, refuse_foresight
from dsd_refine.tasks.classify import (
    Classification,
    LabelledPart,
    labelled_parts,
    overlap_warning,
    skip_warnings,
)
from dsd_refine.tasks.tokens import Doubled, Unknown, beyond_warnings, ids_or_reasons, or_reason, tokenized

Ids = np.ndarray[Any, Any]
NONE: Ids = np.empty(0, dtype=np.int32)
NO_TARGET = -100  # at a position that nothing is to be predicted at
PADDING_NOISE = 1e-4  # what rounding may do, as a share of the largest logit
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


class TextClassification(Classification):
    """`text-classification` for transformers models."""

    name = "text-classification"
    columns: tuple[str, ...]
    tokenizer: Any
    max_length: int
    size: int | None = None  # embeddings of the model
    pad: int = 0  # the id that fills, and on which side: what `fit_padding` found
    left: bool = False

    def encode(self, part: LabelledPart, units: Sequence[int]) -> dict[str, list[list[int]]]:
        """What the tokenizer makes of rows, each by itself."""
        rows = part.rows.table.rows[[int(part.rows.at[unit]) for unit in units]]
        texts = [[str(text) for text in rows[name]] for name in self.columns]
        return tokenized(self.tokenizer, *texts, truncation=True, max_length=self.max_length)

    def batch(self, part: LabelledPart, items: Sequence[Item]) -> Batch:
        fills = {"input_ids": self.pad, "token_type_ids": int(getattr(self.tokenizer, "pad_token_type_id", 0) or 0)}
        side = "left" if self.left else "right"
        inputs = {
            name: torch.nn.utils.rnn.pad_sequence(
                [torch.as_tensor(row, dtype=torch.int64) for row in rows],
                batch_first=True,
                padding_value=fills.get(name, 0),
                padding_side=side,
            )
            for name, rows in self.encode(part, [unit for unit, _ in items]).items()
        }
        targets = torch.as_tensor(part.ids[[unit for unit, _ in items]])
        return Batch(inputs, targets, len(items))


def fit_padding(task: TextClassification, model: Any) -> None:
    """Fill rows so that the model answers each as it does by itself.

    Models that read a row's answer at its last token take every id that equals the config's pad id for padding, also a
    row's own. Without a pad id in the config nothing of a single row is padding: then the filler is an id that ends no row.

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
    if _alone_as_together(task, model):
        return
    task.left = not task.left
    if not _alone_as_together(task, model):
        task.left = not task.left
        task.warnings.append("the model answers a row that is padded to a longer one's length differently than by itself")


def _ends_no_row(task: TextClassification, parts: Sequence[LabelledPart]) -> int:
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
def _alone_as_together(task: TextClassification, model: Any) -> bool:
    """Are the answers to a few rows the same in one batch and one by one?"""
    units = range(min(8, task.eval.units))
    try:
        together = logits_of(model, task.batch(task.eval, [(unit, None) for unit in units]).inputs)
        alone = torch.cat([logits_of(model, task.batch(task.eval, [(unit, None)]).inputs) for unit in units])
    except Exception:  # a model raises whatever inputs that it is not made for make it raise: `first_look` refuses it
        return True
    return bool((together - alone).abs().max() <= PADDING_NOISE * alone.abs().max() + PADDING_NOISE)


def prepare_texts(
    recipe: Recipe,
    tables: dict[str, Table],
    evaluation: dict[str, Table] | None,
    tokenizer: Any,
    max_length: int,
    aliases: Sequence[Sequence[str]] | None,
    classes: int,
    size: int | None = None,
    ends: int | None = None,
) -> TextClassification:
    """Match labels, skip rows without label or readable text, divide. `--text-column a,b` gives the tokenizer a pair.

    `size` is the number of the model's embeddings, `ends` an id that the model must find equally often in all rows.

    Raises:
        DataError: no text or label column, no usable rows, labels that do not match.
    """
    first = tables.get("train") or next(iter(tables.values()))
    columns = choose(first, (TEXT, LABEL), {"text": recipe.text_column, "label": recipe.label_column})["text"]

    def label(table: Table) -> str:
        return column(table, recipe.label_column, LABEL)

    looked = _Looked(tokenizer, max_length, size, ends)

    def examine(table: Table, labels: list[str | None]) -> list[Examined]:
        return looked.through(row_blocks(table, [column(table, name, TEXT) for name in columns]), labels)

    matched, parts, divided = labelled_parts(
        tables, evaluation, label, examine, aliases, classes, recipe.holdout, recipe.label_map
    )
    train, holdout, judge = parts
    task = TextClassification(matched, train, holdout, judge, overlap_warning(divided) + skip_warnings(divided))  # type: ignore[arg-type]
    task.warnings += beyond_warnings(tokenizer, size) + looked.warnings()
    task.columns, task.tokenizer, task.max_length, task.size = columns, tokenizer, max_length, size
    return task


class _Looked:
    """Rows of texts, looked through before they are used: which can be, and what of them there is to say."""

    def __init__(self, tokenizer: Any, max_length: int, size: int | None, ends: int | None) -> None:
        self.tokenizer, self.max_length, self.size, self.ends = tokenizer, max_length, size, ends
        self.doubled, self.unknown, self.longer = Doubled(tokenizer), Unknown(tokenizer), 0

    def through(self, blocks: Iterable[list[tuple[Any, ...]]], labels: Sequence[str | None]) -> list[Examined]:
        """What there is to know of each row of a table, a block at a time."""
        examined: list[Examined] = []
        counts: dict[int, int] = {}  # of `ends`, in each row that can be used
        left = iter(labels)
        for rows in blocks:
            block = [_examine(texts, label) for texts, label in zip(rows, left, strict=False)]
            self._read(rows, block, counts, len(examined))
            examined += block
        for number, reason in _uneven(counts, self.tokenizer, self.ends).items():
            examined[number] = replace(examined[number], reason=reason)
        return examined

    def _read(self, rows: list[tuple[Any, ...]], block: list[Examined], counts: dict[int, int], start: int) -> None:
        good = [number for number, row in enumerate(block) if row.reason is None]
        cut: set[int] = set()
        read = ids_or_reasons(
            self.tokenizer, [rows[number] for number in good], cut, size=self.size, truncation=True, max_length=self.max_length
        )
        self.longer += len(cut)
        for number, (ids, problem) in zip(good, read, strict=True):
            if ids is None:
                block[number] = replace(block[number], reason=problem)
                continue
            self.doubled.see(ids)
            self.unknown.see(ids)
            counts[start + number] = 0 if self.ends is None else ids.count(self.ends)

    def warnings(self) -> list[str]:
        lines = self.doubled.warnings() + self.unknown.warnings()
        if self.longer:
            lines.append(
                f"{self.longer:,} of {self.doubled.rows:,} texts are longer than {self.max_length:,} tokens: the rest of them "
                "is not read (--max-length)"
            )
        return lines


def answer_end(config: Any) -> int | None:
    """The id that an encoder-decoder classifier reads its answer at: it takes only rows that hold it equally often."""
    text = config.get_text_config()
    ends = text.eos_token_id if getattr(text, "is_encoder_decoder", False) else None
    return ends if isinstance(ends, int) else None


def _uneven(counts: Mapping[int, int], tokenizer: Any, ends: int | None) -> dict[int, str]:
    """Row -> why it cannot stand beside the others: it holds another number of the token that the answer is read at."""
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


def is_text(table: Table, names: Sequence[str], row: int) -> bool:
    """Does a row have its text, or both of its pair?"""
    return all(name in table.rows.column_names and not no_text(table.rows[row][name]) for name in names)


def no_text(text: Any) -> bool:
    """Is it no text, or white space only?"""
    return not isinstance(text, str) or not text.strip()


def text_digest(*texts: str) -> bytes:
    """SHA-256 of a row's texts."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True)
class WindowedPart:
    """Documents cut into windows: window u is tokens[start[u] : stop[u]] of the document `row[u]`."""

    rows: Rows
    tokens: np.ndarray[Any, Any]
    row: np.ndarray[Any, Any]
    start: np.ndarray[Any, Any]
    stop: np.ndarray[Any, Any]

    @property
    def units(self) -> int:
        return len(self.row)

    def row_of(self, unit: int) -> int:
        return int(self.row[unit])


@dataclass
class CausalLM:
    """`causal-lm` for transformers models. A row is a document; its windows' sums are added.

    Targets have the shape of the tokens: what each position predicts, or NO_TARGET.
    """

    train: WindowedPart
    holdout: WindowedPart | None
    eval: WindowedPart
    warnings: list[str] = field(default_factory=list)
    name: str = "causal-lm"
    metric: str = "loss"
    higher_is_better: bool = False
    vocabulary: int = field(kw_only=True)  # tokens that the tokenizer knows

    @property
    def guesses(self) -> tuple[Guess, ...]:
        return (guess_token(self.vocabulary),)

    def batch(self, part: WindowedPart, items: Sequence[Item]) -> Batch:
        windows = [torch.as_tensor(part.tokens[part.start[u] : part.stop[u]].astype(np.int64)) for u, _ in items]
        ids = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True)  # what fills is masked by length, never by id
        mask = torch.arange(ids.shape[1])[None, :] < torch.tensor([len(w) for w in windows])[:, None]
        targets = torch.full_like(ids, NO_TARGET)  # of every position what follows it; cutting logits instead copies them twice
        targets[:, :-1] = torch.where(mask[:, 1:], ids[:, 1:], NO_TARGET)
        return Batch({"input_ids": ids, "attention_mask": mask.long()}, targets, int(mask[:, 1:].sum()))

    def logits(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Targets x vocabulary."""
        return logits_of(forward, batch.inputs)[batch.targets != NO_TARGET]

    def refuse_foresight(self, forward: Forward, device: torch.device) -> None:
        """Raises CheckpointError where the model sees the tokens that it is to say."""
        units = range(min(WINDOWS, self.train.units))
        windows = [self.batch(self.train, [(unit, None)]).to(device).inputs for unit in units]
        refuse_foresight(self.name, lambda inputs: logits_of(forward, inputs), windows, ("input_ids", "attention_mask"))

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        return self._nll(forward, batch).sum()

    def score(self, forward: Forward, batch: Batch) -> list[Score]:
        sums = self._nll(forward, batch).double().sum(1).tolist()
        counts = (batch.targets != NO_TARGET).sum(1).tolist()
        return [Score(s, c, s) for s, c in zip(sums, counts, strict=True)]

    def _nll(self, forward: Forward, batch: Batch) -> torch.Tensor:
        logits = logits_of(forward, batch.inputs)
        flat = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=NO_TARGET, reduction="none")
        return flat.reshape(batch.targets.shape)

    def metrics(self, scores: Scores) -> dict[str, float]:
        loss = ratio(scores.score, scores.count)
        return {"loss": loss, "perplexity": float(np.exp(min(loss, 700.0)))}

    def target(self, part: WindowedPart, row: int) -> str | None:
        return None

    def shown(self, prediction: int) -> str | None:
        return None

    def report(self) -> Mapping[str, Any]:
        return {"labels": None, "warnings": self.warnings}


def prepare_documents(
    recipe: Recipe,
    tables: dict[str, Table],
    evaluation: dict[str, Table] | None,
    tokenizer: Any,
    max_length: int,
    size: int | None = None,
) -> CausalLM:
    """Tokenize every document, skip those without a target, divide. `size` is the number of the model's embeddings.

    Raises:
        DataError: no text column, or no usable documents.
    """
    # the first token of a window is no target: a last window of one token has none
    parts, warnings = cut_documents(
        recipe, tables, evaluation, tokenizer, max_length, _document, lambda ids: len(ids) > 1, size
    )
    return CausalLM(*parts, warnings, vocabulary=min(len(tokenizer), size or len(tokenizer)))


def guess_token(vocabulary: int) -> Guess:
    """The mean loss of holding every token for equally likely."""
    return Guess("loss", math.log(vocabulary), f"guessing among the tokenizer's {vocabulary:,} tokens")


def cut_documents(
    recipe: Recipe,
    tables: dict[str, Table],
    evaluation: dict[str, Table] | None,
    tokenizer: Any,
    max_length: int,
    examine: Callable[[Any, Ids], Examined],
    counts: Callable[[Ids], bool],
    size: int | None = None,
) -> tuple[tuple[WindowedPart, WindowedPart | None, WindowedPart], list[str]]:
    """Tokenize every document, examine it, divide, and cut into consecutive windows; those that `counts` denies are left out.

    Returns the parts that train, select and judge, and the warnings.

    Raises:
        DataError: no text column, or no usable documents.
    """
    ids: dict[int, list[Ids]] = {}
    doubled, unknown = Doubled(tokenizer), Unknown(tokenizer)

    def examined(table: Table) -> Rows:
        name = column(table, recipe.text_column, DOCUMENT)
        held = ids[id(table)] = []
        rows: list[Examined] = []
        for text in (text for block in row_blocks(table, [name]) for (text,) in block):
            found, why = or_reason(_tokens, tokenizer, text, size)
            held.append(NONE if found is None else found)
            rows.append(Examined(b"", None, why) if found is None else examine(text, found))
            if rows[-1].reason is None:
                doubled.see(held[-1])
                unknown.see(held[-1])
        return use_rows(table, rows)

    def cut(rows: Rows) -> WindowedPart:
        return _windows(rows, ids[id(rows.table)], max_length, counts)

    used = {name: examined(table) for name, table in tables.items()}
    judged = {name: examined(table) for name, table in evaluation.items()} if evaluation else None
    divided = divide(used, judged, recipe.holdout)
    parts = cut(divided.train), cut(divided.holdout) if divided.holdout else None, cut(divided.eval)
    noted = beyond_warnings(tokenizer, size) + doubled.warnings() + unknown.warnings()
    return parts, overlap_warning(divided) + skip_warnings(divided) + noted


def _tokens(tokenizer: Any, text: Any, size: int | None) -> Ids:
    found = tokenized(tokenizer, text, size=size, verbose=False)["input_ids"] if isinstance(text, str) and text else []
    return np.asarray(found, dtype=np.int32)


def _document(text: Any, ids: Ids) -> Examined:
    if no_text(text):
        return Examined(b"", None, "no text")
    if len(ids) < 2:
        return Examined(b"", None, "fewer than two tokens: nothing to predict")
    return Examined(text_digest(text))


def _windows(rows: Rows, ids: list[Ids], max_length: int, counts: Callable[[Ids], bool]) -> WindowedPart:
    spans, tokens, at = [], [], 0
    for row, number in enumerate(rows.at):
        document = ids[int(number)]
        tokens.append(document)
        starts = [start for start in range(0, len(document), max_length) if counts(document[start : start + max_length])]
        spans += [(row, at + start, at + min(start + max_length, len(document))) for start in starts]
        at += len(document)
    table = np.asarray(spans, dtype=np.int64).reshape(-1, 3)
    joined = np.concatenate(tokens) if tokens else np.empty(0, dtype=np.int32)
    return WindowedPart(rows, joined, table[:, 0], table[:, 1], table[:, 2])
