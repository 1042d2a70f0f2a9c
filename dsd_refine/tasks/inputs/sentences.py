"""Embeddings of texts, as sentence-transformers makes them: prompts, tokens, pooling, and what comes after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dsd_refine.checkpoint.library import Library
from dsd_refine.checkpoint.sentence_layout import POOLINGS, Dense, SentenceLayout, read_sentence_layout
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.forward import logits_of
from dsd_refine.recipe import Recipe
from dsd_refine.task_specs import TASKS
from dsd_refine.tasks.inputs.padding import same_but_for_rounding
from dsd_refine.tasks.inputs.texts import UNLIMITED, window_length
from dsd_refine.tasks.inputs.tokens import load_tokenizer, rows_of_embedding, tokenized

QUERIES = ("query", "question")  # columns whose texts get the prompt of queries
PASSAGE_PROMPTS = ("document", "passage", "corpus")  # prompts of the other texts beside them, the first that is there


@dataclass(frozen=True)
class SentenceInputs:
    """Makes a model's inputs of texts, and embeddings of its outputs.

    Attributes:
        tokenizer: The checkpoint's.
        max_length: The most tokens of a text, with its prompt.
        size: The number of the model's embeddings (None: not known).
        layout: The modules of the checkpoint.
        prompts: What is put before the texts of each column.
    """

    tokenizer: Any
    max_length: int
    size: int | None
    layout: SentenceLayout
    prompts: tuple[str, ...] = ()

    def text(self, column: int, text: str) -> str:
        """A text with its column's prompt, in lower case if the checkpoint says so."""
        whole = self.prompts[column] + text
        return whole.lower() if self.layout.lower else whole

    @property
    def options(self) -> dict[str, Any]:
        """How the tokenizer is called. No id may lie beyond the model's embeddings."""
        cut = {"truncation": True, "max_length": self.max_length}
        return {**cut, "size": self.size, "return_attention_mask": True, "verbose": False}

    def tokens(self, texts: Sequence[str]) -> dict[str, list[list[int]]]:
        """The tokenizer's outputs for texts with their prompts, each cut to `max_length` and without padding.

        Raises:
            DataError: the tokenizer refuses them, or the model has no such token.
        """
        return tokenized(self.tokenizer, list(texts), **self.options)

    def batch(self, columns: Sequence[Sequence[str]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The model's inputs for the texts of each column, one column after the other, padded on the right.

        Returns:
            int64 tensors by name, and the tokens that the pooling sees (1) or not (0); each of shape
            texts x longest text.
        """
        encoded = self.tokens([self.text(number, text) for number, texts in enumerate(columns) for text in texts])
        fills = {
            "input_ids": int(self.tokenizer.pad_token_id or 0),
            "token_type_ids": int(getattr(self.tokenizer, "pad_token_type_id", 0) or 0),
        }
        padded = {
            name: nn.utils.rnn.pad_sequence(
                [torch.as_tensor(row, dtype=torch.int64) for row in rows], batch_first=True, padding_value=fills.get(name, 0)
            )
            for name, rows in encoded.items()
        }
        seen, start = padded["attention_mask"].clone(), 0
        for number, texts in enumerate(columns):
            if not self.layout.include_prompt and self.prompts[number]:
                seen[start : start + len(texts), : self._prompt_length(number)] = 0
            start += len(texts)
        return padded, seen

    def _prompt_length(self, column: int) -> int:
        """The number of tokens that a prompt begins a text with."""
        (ids,) = self.tokens([self.text(column, "")])["input_ids"]
        return len(ids) - (ids[-1] in self.tokenizer.all_special_ids)

    def vectors(self, forward: Any, tensors: Mapping[str, torch.Tensor], seen: torch.Tensor) -> torch.Tensor:
        """The embeddings of texts, float32, texts x dimensions. `tensors` and `seen` are what `batch` gives.

        They have the length 1 where the checkpoint compares by cosine.
        """
        found = embeddings(logits_of(forward, tensors), seen, self.layout)
        return F.normalize(found, dim=-1) if self.layout.similarity == "cosine" else found


def embeddings(hidden: torch.Tensor, seen: torch.Tensor, layout: SentenceLayout) -> torch.Tensor:
    """One embedding a text.

    Args:
        hidden: The encoder's outputs, texts x tokens x width; the padding is on the right.
        seen: 1 for the tokens that count, else 0; texts x tokens.
        layout: The pooling, and what comes after it.
    """
    found = torch.cat([_pooled(hidden, seen, mode) for mode in layout.poolings], dim=-1)
    for step in layout.steps:
        found = F.normalize(found, dim=-1) if step is None else _through(step, found)
    return found


def _through(dense: Dense, found: torch.Tensor) -> torch.Tensor:
    if found.shape[-1] != dense.weight.shape[1]:
        raise CheckpointError(f"a Dense module takes {dense.weight.shape[1]} values, and the pooling gives {found.shape[-1]}")
    bias = None if dense.bias is None else dense.bias.to(found.device)
    activate = getattr(nn, dense.activation)()
    result: torch.Tensor = activate(F.linear(found, dense.weight.to(found.device), bias))
    return result


def _pooled(hidden: torch.Tensor, seen: torch.Tensor, mode: str) -> torch.Tensor:
    """The pooling of a mode (`POOLINGS`), texts x width."""
    tokens, rows = hidden.shape[1], torch.arange(len(hidden), device=hidden.device)
    places = torch.arange(1, tokens + 1, device=hidden.device)
    if mode == "cls":
        return hidden[rows, seen.argmax(1)]
    if mode == "lasttoken":
        return hidden[rows, (seen * places).argmax(1)]
    weights = seen.unsqueeze(-1).to(hidden.dtype)
    if mode == "max":
        return hidden.masked_fill(weights == 0, float("-inf")).max(1).values
    if mode == "weightedmean":
        weights = weights * places.unsqueeze(-1)
    count = weights.sum(1).clamp(min=1e-9)
    return (hidden * weights).sum(1) / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)


def open_sentence_inputs(recipe: Recipe, library: Library, model: nn.Module, columns: Sequence[str]) -> SentenceInputs:
    """The checkpoint's tokenizer, modules and prompts for these columns.

    Raises:
        CheckpointError: the folder has no usable tokenizer, or modules that are not supported, or nothing
            says how an embedding is made.
    """
    layout = _layout(recipe, library)
    tokenizer = load_tokenizer(library.folder, library.trust_remote_code)
    if layout.max_length is not None:
        tokenizer.model_max_length = layout.max_length  # it replaces the tokenizer's own, as in sentence-transformers
    default = layout.max_length or TASKS[library.task].default_length or UNLIMITED
    length = window_length(tokenizer, library.config, recipe.max_length, default, model)
    size = rows_of_embedding(model, library.config)
    return SentenceInputs(tokenizer, length, size, layout, prompts_of(layout, columns))


def _layout(recipe: Recipe, library: Library) -> SentenceLayout:
    layout = read_sentence_layout(library.folder)
    if layout is not None and recipe.pooling is not None:
        raise DataError(f"pooling: {recipe.pooling}: the checkpoint's modules.json says {layout.shown}: leave it out")
    if layout is not None:
        return layout
    if recipe.pooling is None:
        raise CheckpointError(
            f"{library.folder}: has no modules.json (sentence-transformers' layout), so nothing says how an embedding is made "
            f"of the encoder's outputs: give --set pooling=mean, or what it was trained with ({', '.join(POOLINGS)})"
        )
    return SentenceLayout((recipe.pooling,))


def prompts_of(layout: SentenceLayout, columns: Sequence[str]) -> tuple[str, ...]:
    """What is put before the texts of each column.

    Queries and passages get the prompts of that name, as `encode_query` and `encode_document` give them;
    other columns get the default prompt, as `encode` does.
    """
    default = layout.prompts.get(layout.default_prompt or "", "")
    if columns[0].strip().casefold() not in QUERIES:
        return (default,) * len(columns)
    passage = next((layout.prompts[name] for name in PASSAGE_PROMPTS if name in layout.prompts), None)
    query = layout.prompts.get("query", default)
    return (query, *[default if passage is None else passage] * (len(columns) - 1))


def is_padding_neutral(inputs: SentenceInputs, texts: Sequence[str], model: Any) -> bool:
    """Return whether the embeddings of a few texts are the same in one batch and one by one."""
    plain = replace(inputs, prompts=("",))

    def embedded(some: Sequence[str]) -> torch.Tensor:
        tensors, seen = plain.batch([some])
        return embeddings(logits_of(model, tensors), seen, inputs.layout)

    try:
        with torch.no_grad():
            return same_but_for_rounding(embedded(texts), torch.cat([embedded([text]) for text in texts]))
    except Exception:  # a model raises whatever inputs that it is not made for make it raise: `first_look` refuses it
        return True


def shown_inputs(inputs: SentenceInputs, columns: Sequence[str]) -> Mapping[str, Any]:
    """What the report says of how texts are read."""
    return {
        "modules": inputs.layout.shown,
        "similarity": inputs.layout.similarity,
        "max_length": inputs.max_length,
        "prompts": dict(zip(columns, inputs.prompts, strict=True)),
    }
