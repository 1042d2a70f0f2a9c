"""Conversations as tokens: the checkpoint's own chat template writes them, and tells which tokens are answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsd_refine.data.conversations import ASSISTANT, Conversation, Message
from dsd_refine.data.tables import in_words
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.tasks.inputs.tokens import tokenized
from dsd_refine.tasks.inputs.windows import Ids

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # what a template marks answers with, as transformers looks for it

# Some templates write the date of the day. A run is to repeat another day, so the date stands still; it is
# the one that Llama's templates write if they cannot know it. A macro hides the library's function of this name.
FIXED_DATE = "{%- macro strftime_now(format) -%}{{ '2024-07-26' if format == '%Y-%m-%d' else '26 Jul 2024' }}{%- endmacro -%}"

Span = tuple[int, int]  # first character, and the one after the last


@dataclass(frozen=True)
class Written:
    """A conversation as the template writes it.

    Attributes:
        text: The text.
        ids: Its tokens, int32 of shape (tokens,).
        asked: Which tokens are targets of the loss, bool of shape (tokens,).
    """

    text: str
    ids: Ids
    asked: np.ndarray[Any, Any]


class ChatTemplate:
    """Writes conversations with a tokenizer's chat template, which transformers runs in a sandbox.

    The template writes all special tokens, so the tokenizer adds none.
    """

    def __init__(self, tokenizer: Any, size: int | None = None, on_answers: bool = True) -> None:
        """`size` is the number of the model's embeddings.

        Raises:
            CheckpointError: the tokenizer has no chat template, or does not tell where its tokens
                stand in the text.
        """
        self.tokenizer, self.size, self.on_answers = tokenizer, size, on_answers
        if not tokenizer.chat_template:
            raise CheckpointError(
                f"{tokenizer.name_or_path}: its tokenizer has no chat template, which writes conversations as text. Is it a "
                "base model? Take the instruction-tuned one, put a chat_template.jinja into its folder, or give texts (column "
                "`text`)"
            )
        if on_answers and not tokenizer.is_fast:
            raise CheckpointError(
                f"{tokenizer.name_or_path}: its tokenizer does not tell where a token stands in the text, so the answers "
                "cannot be found: give --set loss_on=all"
            )
        templates = tokenizer.chat_template
        self.source = "".join(templates.values()) if isinstance(templates, dict) else str(templates)

    def write(self, conversation: Conversation, by_marks: bool | None = None) -> Written:
        """A conversation as text and tokens.

        Args:
            conversation: The conversation.
            by_marks: Find the answers by the template's marks, or by writing the beginnings of the
                conversation. None: by the marks if the template has them and all answers are wanted.

        Raises:
            DataError: the template refuses the messages, or the answers cannot be found.
        """
        text = self._text(conversation.messages, conversation.tools)
        options = {"return_offsets_mapping": True} if self.on_answers else {}
        encoded = tokenized(self.tokenizer, text, size=self.size, add_special_tokens=False, verbose=False, **options)
        ids = np.asarray(encoded["input_ids"], dtype=np.int32)
        if not self.on_answers:
            return Written(text, ids, np.ones(len(ids), dtype=bool))
        if by_marks is None:
            every = tuple(n for n, message in enumerate(conversation.messages) if message["role"] == ASSISTANT)
            by_marks = bool(MARK.search(self.source)) and conversation.answers == every
        if by_marks:
            return Written(text, ids, self._marked(conversation))
        offsets = np.asarray(encoded["offset_mapping"]).reshape(-1, 2)
        asked = np.zeros(len(ids), dtype=bool)
        for start, stop in self._spans(text, conversation):
            asked |= (offsets[:, 1] > start) & (offsets[:, 0] < stop)
        return Written(text, ids, asked)

    def _apply(self, messages: Sequence[Message], tools: list[Any] | None, **options: Any) -> Any:
        try:
            template = self.tokenizer.get_chat_template(None, tools)
            if "strftime_now" in template:
                template = FIXED_DATE + template
            return self.tokenizer.apply_chat_template(list(messages), tools=tools, chat_template=template, **options)
        except Exception as error:  # a template raises whatever messages that it is not made for make it raise
            raise DataError(f"the chat template refuses it ({in_words(error)[:120]})") from None

    def _text(self, messages: Sequence[Message], tools: list[Any] | None, prompt: bool = False) -> str:
        return str(self._apply(messages, tools, tokenize=False, add_generation_prompt=prompt))

    def _marked(self, conversation: Conversation) -> np.ndarray[Any, Any]:
        """Which tokens the template marks as the assistant's."""
        encoded = self._apply(
            conversation.messages, conversation.tools,
            return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False},
        )  # fmt: skip
        return np.asarray(encoded["assistant_masks"], dtype=bool).reshape(-1)

    def _spans(self, text: str, conversation: Conversation) -> Iterator[Span]:
        """Where each answer stands in the text: between the conversation before it, with the header of
        an answer, and the conversation that ends with it.
        """
        messages, tools = conversation.messages, conversation.tools
        for number in conversation.answers:
            if number == 0:
                raise DataError("begins with an answer, so what comes before it cannot be told from it")
            before = self._text(messages[:number], tools)
            header = _common(self._text(messages[:number], tools, prompt=True), text)
            whole = self._text(messages[: number + 1], tools)
            start = len(header)
            if start < len(before) or not whole.startswith(header):
                raise DataError(_another(number))
            yield start, self._end(text, start, whole[start:], messages[number], number)

    def _end(self, text: str, start: int, answer: str, message: Message, number: int) -> int:
        """Where an answer ends, with the token that ends a message but without white space after that.

        Some templates write more into a last answer than into an earlier one (an empty `<think>`). Then the
        answer is what begins with the message's content.
        """
        if not text.startswith(answer, start):
            content = message.get("content")
            place = answer.rfind(content.strip()) if isinstance(content, str) else -1
            answer = answer[place:]
            if place < 0 or not text.startswith(answer, start):
                raise DataError(_another(number))
        bare = answer.rstrip()
        ends = bare != "" and any(bare.endswith(token) for token in self.tokenizer.get_added_vocab())
        return start + len(bare if ends else answer)

    def warnings(self) -> list[str]:
        """One line if the template writes the date of the day."""
        if "strftime_now" not in self.source:
            return []
        return ["the chat template writes the date of the day: it is always 26 July 2024 here, so that a run can be repeated"]


def _common(one: str, other: str) -> str:
    """The longest beginning of two texts."""
    differing = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differing, min(len(one), len(other)))]


def _another(number: int) -> str:
    return (
        f"the chat template writes what comes before message {number + 1} in another way if more follows, so the answer cannot "
        "be told from the rest"
    )
