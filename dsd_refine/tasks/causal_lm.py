"""Causal language modelling: the next token of documents, which are tokenized exactly as the
checkpoint's tokenizer does, or of conversations, which its chat template writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from dsd_refine.checkpoint.library import Library
from dsd_refine.data.columns import DIALOGUE, DOCUMENT, choose, column
from dsd_refine.data.conversations import is_conversation
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined, Rows, divide, use_rows
from dsd_refine.data.tables import row_blocks
from dsd_refine.errors import DataError
from dsd_refine.forward import logits_of
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import IGNORED, Batch, ChanceBaseline, Forward, Item, Score, Scores, Tables, ratio
from dsd_refine.tasks.causality import WINDOWS, refuse_foresight
from dsd_refine.tasks.classification import overlap_warning, skip_warnings
from dsd_refine.tasks.conversations import prepare_conversations
from dsd_refine.tasks.inputs.texts import no_text, open_text_inputs, text_digest
from dsd_refine.tasks.inputs.tokens import Doubled, Unknown, beyond_warnings, known_tokens, or_reason, tokenized
from dsd_refine.tasks.inputs.windows import NO_TOKENS, Ids, WindowedPart, cut_windows
from dsd_refine.tasks.packed_texts import PackedPart, packed, packed_batch, refuse_mixing


@dataclass
class CausalLM:
    """`causal-lm` for transformers models. A row is a document; its windows' sums are added.

    Targets have the shape of the tokens: what each position predicts, or IGNORED.
    """

    train: WindowedPart | PackedPart
    holdout: WindowedPart | None
    eval: WindowedPart
    warnings: list[str] = field(default_factory=list)
    name: str = "causal-lm"
    metric: str = "loss"
    higher_is_better: bool = False
    draws: ClassVar[bool] = False
    vocabulary: int = field(kw_only=True)  # tokens that the tokenizer knows

    @property
    def chance_baselines(self) -> tuple[ChanceBaseline, ...]:
        """The loss of a predictor that gives every token of the tokenizer the same probability."""
        return (uniform_baseline(self.vocabulary),)

    def batch(self, part: Any, items: Sequence[Item]) -> Batch:
        """Pad the windows to the longest one; each position predicts the token after it.

        `input_ids`, `attention_mask` and the targets are int64 of shape windows x longest window. The
        targets of the last token and of the padding are IGNORED, and those of tokens that are not asked
        for (`WindowedPart.targets`). The seeds of the items are not used. Packed rows: see `packed_batch`.
        """
        if isinstance(part, PackedPart):
            return packed_batch(part.part, [part.packs[unit] for unit, _ in items])
        windows = [torch.as_tensor(part.tokens[part.start[u] : part.stop[u]].astype(np.int64)) for u, _ in items]
        ids = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True)  # what fills is masked by length, never by id
        mask = torch.arange(ids.shape[1])[None, :] < torch.tensor([len(w) for w in windows])[:, None]
        wanted = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(part.targets(u)) for u, _ in items], batch_first=True)
        targets = torch.full_like(ids, IGNORED)  # of every position what follows it; cutting logits instead copies them twice
        targets[:, :-1] = torch.where(wanted[:, 1:], ids[:, 1:], IGNORED)
        return Batch({"input_ids": ids, "attention_mask": mask.long()}, targets, int(wanted.sum()))

    def logits(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Targets x vocabulary."""
        return logits_of(forward, batch.inputs)[batch.targets != IGNORED]

    def refuse_foresight(self, forward: Forward, device: torch.device) -> None:
        """Raises CheckpointError where the model sees the tokens that it is to predict, or other texts of a packed row."""
        part = self.train.part if isinstance(self.train, PackedPart) else self.train
        units = range(min(WINDOWS, part.units))
        windows = [self.batch(part, [(unit, None)]).to(device).inputs for unit in units]
        refuse_foresight(self.name, lambda inputs: logits_of(forward, inputs), windows, ("input_ids", "attention_mask"))
        if isinstance(self.train, PackedPart):
            refuse_mixing(lambda inputs: logits_of(forward, inputs), self.train, device)

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The sum of -log p(target) over the batch's targets, a float32 scalar."""
        return self._nll(forward, batch).sum()

    def score(self, forward: Forward, batch: Batch) -> list[Score]:
        """For each window, the sum of -log p(target), as both score and loss, and its number of targets."""
        sums = self._nll(forward, batch).double().sum(1).tolist()
        counts = (batch.targets != IGNORED).sum(1).tolist()
        return [Score(s, c, s) for s, c in zip(sums, counts, strict=True)]

    def _nll(self, forward: Forward, batch: Batch) -> torch.Tensor:
        logits = logits_of(forward, batch.inputs)
        flat = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="none")
        return flat.reshape(batch.targets.shape)

    def metrics(self, scores: Scores) -> dict[str, float]:
        """The mean loss per target token, and the perplexity exp(loss), where the loss is cut at 700."""
        loss = ratio(scores.score, scores.count)
        return {"loss": loss, "perplexity": float(np.exp(min(loss, 700.0)))}

    def target(self, part: WindowedPart, row: int) -> str | None:
        """None: a document has no label beside its own text."""
        return None

    def shown(self, prediction: int) -> str | None:
        """None: this task predicts no class."""
        return None

    def report(self) -> Mapping[str, Any]:
        """No labels, and the warnings about the documents."""
        return {"labels": None, "warnings": self.warnings}


def open_task(recipe: Recipe, library: Library, model: torch.nn.Module, tables: Tables, evaluation: Tables | None) -> CausalLM:
    """The task on these documents or conversations, with the checkpoint's own tokenizer."""
    inputs = open_text_inputs(recipe, library, model)
    first = tables.get("train") or next(iter(tables.values()))
    columns = choose(first, (DIALOGUE,), {"text": recipe.text_column})["text"]
    if is_conversation(first, columns):
        parts, warnings = prepare_conversations(recipe, tables, evaluation, columns, inputs)
        task = CausalLM(*parts, warnings, vocabulary=known_tokens(inputs.tokenizer, inputs.size))
    elif recipe.loss_on is not None:
        raise DataError(f"loss_on: {recipe.loss_on}: is of conversations, and these are texts: leave it out")
    else:
        task = prepare_documents(recipe, tables, evaluation, inputs.tokenizer, inputs.max_length, inputs.size)
    if recipe.pack and isinstance(task.train, WindowedPart):
        task.train = packed(task.train, inputs.max_length)
    return task


def prepare_documents(
    recipe: Recipe,
    tables: Tables,
    evaluation: Tables | None,
    tokenizer: Any,
    max_length: int,
    size: int | None = None,
) -> CausalLM:
    """Tokenize every document, skip those without a target, divide. `size` is the number of the
    model's embeddings.

    Raises:
        DataError: no text column, or no usable documents.
    """
    # the first token of a window is no target: a last window of one token has none
    if recipe.stride is not None and recipe.stride >= max_length:
        raise DataError(
            f"--stride {recipe.stride}: windows hold {max_length} tokens, so the first one of each would have no context: "
            "give a smaller number"
        )
    parts, warnings = cut_documents(
        recipe, tables, evaluation, tokenizer, max_length, _document, lambda ids: len(ids) > 1, size
    )
    return CausalLM(*parts, warnings, vocabulary=known_tokens(tokenizer, size))


def uniform_baseline(vocabulary: int) -> ChanceBaseline:
    """The mean loss of a predictor to which every token is equally likely."""
    return ChanceBaseline("loss", math.log(vocabulary), f"guessing among the tokenizer's {vocabulary:,} tokens")


def cut_documents(
    recipe: Recipe,
    tables: Tables,
    evaluation: Tables | None,
    tokenizer: Any,
    max_length: int,
    examine: Callable[[Any, Ids], Examined],
    counts: Callable[[Ids], bool],
    size: int | None = None,
) -> tuple[tuple[WindowedPart, WindowedPart | None, WindowedPart], list[str]]:
    """Tokenize every document, examine it, divide, and cut into consecutive windows; those that
    `counts` denies are left out.

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
            tokens, why = or_reason(_tokens, tokenizer, text, size)
            held.append(NO_TOKENS if tokens is None else tokens)
            rows.append(Examined(b"", None, why) if tokens is None else examine(text, tokens))
            if rows[-1].reason is None:
                doubled.see(held[-1])
                unknown.see(held[-1])
        return use_rows(table, rows)

    def cut(rows: Rows, stride: int | None = None) -> WindowedPart:
        return cut_windows(rows, ids[id(rows.table)], max_length, counts, stride)

    used = {name: examined(table) for name, table in tables.items()}
    judged = {name: examined(table) for name, table in evaluation.items()} if evaluation else None
    divided = divide(used, judged, recipe.holdout)
    stride = recipe.stride  # only in evaluation: windows of training follow each other
    parts = cut(divided.train), cut(divided.holdout, stride) if divided.holdout else None, cut(divided.eval, stride)
    noted = beyond_warnings(tokenizer, size) + doubled.warnings() + unknown.warnings()
    return parts, overlap_warning(divided) + skip_warnings(divided) + noted


def _tokens(tokenizer: Any, text: Any, size: int | None) -> Ids:
    ids = tokenized(tokenizer, text, size=size, verbose=False)["input_ids"] if isinstance(text, str) and text else []
    return np.asarray(ids, dtype=np.int32)


def _document(text: Any, ids: Ids) -> Examined:
    if no_text(text):
        return Examined(b"", None, "no text")
    if len(ids) < 2:
        return Examined(b"", None, "fewer than two tokens: nothing to predict")
    return Examined(text_digest(text))
