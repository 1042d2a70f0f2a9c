"""A question and its context as windows of tokens, and spans of the context in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dsd_refine.errors import DataError
from dsd_refine.tasks.inputs.tokens import tokenized, with_offsets

LONGEST_ANSWER = 30  # tokens, as in the scripts of BERT and of transformers
BESIDE = ("offset_mapping", "overflow_to_sample_mapping", "special_tokens_mask")  # outputs that no model takes

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Window:
    """One window.

    Attributes:
        inputs: What the model takes: the values of each token, by name.
        places: The characters of the context where each token begins and ends, int64 of shape
            (tokens, 2); -1 for a token that is not of the context.
        nowhere: The token that a span points at if the window has no answer.
    """

    inputs: dict[str, list[int]]
    places: Array
    nowhere: int

    def span(self, begin: int, end: int) -> tuple[int, int] | None:
        """The first and the last token of the characters begin..end; None if they are not all in this window."""
        inside = np.flatnonzero(self.places[:, 1] > self.places[:, 0])
        if not len(inside) or begin < self.places[inside[0], 0] or end > self.places[inside[-1], 1]:
            return None
        places = self.places[inside]
        first, last = np.searchsorted(places[:, 1], begin, "right"), np.searchsorted(places[:, 0], end, "left") - 1
        return (int(inside[first]), int(inside[last])) if first <= last else None


@dataclass(frozen=True)
class WindowCutter:
    """Cuts questions with their contexts into windows.

    Each window has the whole question. The parts of the context begin `stride` tokens apart, or follow
    each other if they are shorter. As in the scripts of transformers, a tokenizer that pads on the left
    (XLNet) is given the context first.
    """

    tokenizer: Any
    max_length: int
    stride: int
    size: int | None = None

    def cut(self, question: str, context: str) -> list[Window]:
        """The windows, in order.

        Raises:
            DataError: the question leaves no room, or the tokenizer refuses the texts.
        """
        question = question.strip()
        asked = len(tokenized(self.tokenizer, question, add_special_tokens=False, verbose=False)["input_ids"])
        room = self.max_length - asked - self.tokenizer.num_special_tokens_to_add(pair=True)
        if room < 1:
            raise DataError(f"its question has {asked} tokens, and leaves no room for the context (--max-length)")
        context_first = self.tokenizer.padding_side == "left"
        encoded = with_offsets(
            self.tokenizer, *((context, question) if context_first else (question, context)),
            size=self.size, truncation="only_first" if context_first else "only_second",
            max_length=self.max_length, stride=room - min(self.stride, room), verbose=False,
        )  # fmt: skip
        names = [name for name in encoded if name not in BESIDE]
        return [
            self._window({name: encoded[name][k] for name in names}, encoded["offset_mapping"][k], encoded.sequence_ids(k))
            for k in range(len(encoded["input_ids"]))
        ]

    def _window(self, inputs: dict[str, list[int]], offsets: Any, sequences: list[int | None]) -> Window:
        wanted = 0 if self.tokenizer.padding_side == "left" else 1
        places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        places[[sequence != wanted for sequence in sequences]] = -1
        ids = inputs["input_ids"]
        starts = (self.tokenizer.cls_token_id, self.tokenizer.bos_token_id)
        return Window(inputs, places, next((ids.index(token) for token in starts if token in ids), 0))


def best_spans(starts: torch.Tensor, ends: torch.Tensor, allowed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best span of each window: the sum of its two logits, and its first and last token.

    Args:
        starts: The logits of the first token, float of shape (windows, tokens).
        ends: Those of the last token.
        allowed: bool, the tokens that may be in an answer.

    Returns:
        (sums, float of shape (windows,); tokens, int64 of shape (windows, 2)). The best one is exact: all spans of up to
        LONGEST_ANSWER tokens are looked at.
    """
    windows, tokens = starts.shape
    longest = min(LONGEST_ANSWER, tokens)
    lowest = float("-inf")
    starts, ends = starts.masked_fill(~allowed, lowest), ends.masked_fill(~allowed, lowest)
    sums = starts.new_full((windows, longest, tokens), lowest)
    for more in range(longest):
        sums[:, more, : tokens - more] = starts[:, : tokens - more] + ends[:, more:]
    best, place = sums.flatten(1).max(1)
    first = place % tokens
    return best, torch.stack([first, first + place // tokens], dim=1)
