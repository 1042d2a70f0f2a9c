"""Masked language modelling (Devlin et al., 2019, section 3.1): the model fills in what a seeded
draw has hidden.

In evaluation the draw depends on the row's content alone, so that every arm, run and process
predicts the same tokens; in training it is a function of (seed, phase, epoch, row), as augmentation
is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from dsd_refine.checkpoint.library import Library
from dsd_refine.data.splits import Examined
from dsd_refine.errors import CheckpointError
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import IGNORED, Batch, Forward, Item, Tables
from dsd_refine.tasks.causal_lm import CausalLM, cut_documents
from dsd_refine.tasks.inputs.texts import no_text, open_text_inputs, text_digest
from dsd_refine.tasks.inputs.tokens import known_tokens
from dsd_refine.tasks.inputs.windows import Ids, WindowedPart

SALT = b"dsd-refine masked-lm 1"

# share of the tokens that is asked for; of these, the shares shown as the mask token and as a
# random one (others: as they are)
SHARE, HIDDEN, REPLACED = 0.15, 0.8, 0.1


@dataclass(frozen=True)
class Masking:
    """Of a tokenizer: the id of its mask token, the special ids (never hidden), the other ids
    (random replacements).
    """

    mask: int
    special: Ids
    replacements: Ids

    @classmethod
    def of(cls, tokenizer: Any, size: int | None = None) -> Masking:
        """`size` is the number of the model's embeddings. Raises CheckpointError for a tokenizer
        without mask token.
        """
        if tokenizer.mask_token_id is None:
            raise CheckpointError(
                f"{tokenizer.name_or_path}: its tokenizer has no mask token, which masked-lm hides words with; was it made for "
                "another task (--task)?"
            )
        known = known_tokens(tokenizer, size)
        if tokenizer.mask_token_id >= known:
            raise CheckpointError(
                f"{tokenizer.name_or_path}: its tokenizer's mask token {tokenizer.mask_token!r} is "
                f"{tokenizer.mask_token_id}, the model has only {known} tokens"
            )
        special = np.unique(np.asarray(tokenizer.all_special_ids, dtype=np.int64))
        return cls(int(tokenizer.mask_token_id), special, np.setdiff1d(np.arange(known), special))

    def can_hide(self, ids: Ids) -> Ids:
        """Which positions may be hidden, bool."""
        return ~np.isin(ids, self.special)

    def hide(self, ids: Ids, seed: int) -> tuple[Ids, Ids]:
        """(ids that the model sees, targets with IGNORED elsewhere): round(15 %) of what can be
        hidden, at least 1.
        """
        draw = np.random.default_rng(seed)
        places = np.flatnonzero(self.can_hide(ids))
        count = min(len(places), max(1, round(SHARE * len(places))))
        chosen = places[np.argsort(draw.random(len(places)), kind="stable")[:count]]
        fate = draw.random(count)
        random = self.replacements[(draw.random(count) * len(self.replacements)).astype(np.int64)]
        seen, targets = ids.copy(), np.full_like(ids, IGNORED)
        seen[chosen] = np.where(fate < HIDDEN, self.mask, np.where(fate < HIDDEN + REPLACED, random, ids[chosen]))
        targets[chosen] = ids[chosen]
        return seen, targets


@dataclass
class MaskedLM(CausalLM):
    """`masked-lm` for transformers models. A row is a document; the sums over its windows' hidden
    tokens are added.
    """

    name: str = "masked-lm"
    draws: ClassVar[bool] = True
    masking: Masking = field(kw_only=True)

    def refuse_foresight(self, forward: Forward, device: torch.device) -> None:
        """Nothing to refuse: the mask token hides the targets, and a masked language model may see
        all else.
        """

    def batch(self, part: Any, items: Sequence[Item]) -> Batch:
        """Draw tokens of each window as targets, hide most of them, and pad to the longest window.

        `input_ids`, `attention_mask` and the targets are int64 of shape windows x longest window. The
        targets are the true ids of the drawn tokens, and IGNORED elsewhere. An item's seed decides
        the draw. Without a seed, the content of the row and the window's number in it decide.
        """
        pairs = [self._hidden(part, unit, seed) for unit, seed in items]
        ids, targets = (
            torch.nn.utils.rnn.pad_sequence([torch.from_numpy(ids) for ids in column], batch_first=True, padding_value=filler)
            for column, filler in zip(zip(*pairs, strict=True), (0, IGNORED), strict=True)
        )
        mask = torch.arange(ids.shape[1])[None, :] < torch.tensor([len(seen) for seen, _ in pairs])[:, None]
        return Batch({"input_ids": ids, "attention_mask": mask.long()}, targets, int((targets != IGNORED).sum()))

    def _hidden(self, part: WindowedPart, unit: int, seed: int | None) -> tuple[Ids, Ids]:
        ids = part.tokens[part.start[unit] : part.stop[unit]].astype(np.int64)
        return self.masking.hide(ids, _fixed_seed(part, unit) if seed is None else seed)


def _fixed_seed(part: WindowedPart, unit: int) -> int:
    """Of evaluation: a function of the row's content and the window's number in it, whatever else
    is in the data.
    """
    row = part.row_of(unit)
    number = unit - int(np.searchsorted(part.row, row))
    return int.from_bytes(hashlib.sha256(SALT + part.rows.digests[row] + number.to_bytes(8, "little")).digest()[:8], "little")


def open_task(recipe: Recipe, library: Library, model: torch.nn.Module, tables: Tables, evaluation: Tables | None) -> MaskedLM:
    """The task on these documents, with the checkpoint's own tokenizer."""
    inputs = open_text_inputs(recipe, library, model)
    return prepare_masked(recipe, tables, evaluation, inputs.tokenizer, inputs.max_length, inputs.size)


def prepare_masked(
    recipe: Recipe,
    tables: Tables,
    evaluation: Tables | None,
    tokenizer: Any,
    max_length: int,
    size: int | None = None,
) -> MaskedLM:
    """Tokenize every document, skip those without a token that could be hidden, divide. `size` as
    in `prepare_documents`.

    Raises:
        CheckpointError: a tokenizer without mask token.
        DataError: no text column, or no usable documents.
    """
    masking = Masking.of(tokenizer, size)

    def examine(text: Any, ids: Ids) -> Examined:
        if no_text(text):
            return Examined(b"", None, "no text")
        if not masking.can_hide(ids).any():
            return Examined(b"", None, "no token that could be hidden: special ones only")
        return Examined(text_digest(text))

    def counts(window: Ids) -> bool:
        return bool(masking.can_hide(window).any())

    parts, warnings = cut_documents(recipe, tables, evaluation, tokenizer, max_length, examine, counts, size)
    return MaskedLM(*parts, warnings, masking=masking, vocabulary=known_tokens(tokenizer, size))
