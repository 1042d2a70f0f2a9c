"""Conversations as tokens: the checkpoint's own chat template writes them, and tells which tokens are answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsd_refine.checkpoint.safetensors_file import read_json
from dsd_refine.data.conversations import ASSISTANT, USER, Conversation, Message
from dsd_refine.data.tables import in_words
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.tasks.inputs.tokens import tokenized
from dsd_refine.tasks.inputs.windows import Ids

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # what a template marks answers with, as transformers looks for it

# Some templates write the date of the day. A run is to repeat another day, so the date stands still; it is
# the one that Llama's templates write if they cannot know it. A macro hides the library's function of this name.
PROBE = "probe"  # a text that is written to see how the template takes contents
FIXED_DATE = "{%- macro strftime_now(format) -%}{{ '2024-07-26' if format == '%Y-%m-%d' else '26 Jul 2024' }}{%- endmacro -%}"

Span = tuple[int, int]  # first character, and the one after the last


@dataclass(frozen=True)
class Written:
    """A conversation as the template writes it.

    Attributes:
        text: The text.
        ids: Its tokens, int32 of shape (tokens,).
        asked: Which tokens are targets of the loss, bool of shape (tokens,).
        pictures: The SHA-256 of each picture in it.
        uncut: How many of its first tokens must stay: those up to the end of the last picture.
    """

    text: str
    ids: Ids
    asked: np.ndarray[Any, Any]
    pictures: tuple[str, ...] = ()
    uncut: int = 0


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
        self.reads_texts = self.reads_parts = True
        if not tokenizer.chat_template:
            tokenizer.chat_template = _template_of_processor(Path(tokenizer.name_or_path))
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
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)  # of two that fit, the longer one
        self.uncut = re.compile("|".join(map(re.escape, added)) or "(?!)")
        self.source = "".join(templates.values()) if isinstance(templates, dict) else str(templates)
        texts, parts = self._writes(PROBE), self._writes([{"type": "text", "text": PROBE}])
        self.reads_texts, self.reads_parts = texts or not parts, parts or not texts

    def _writes(self, content: Any) -> bool:
        """Does the template write a content of this form as its text, and not as Python writes a list?"""
        try:
            text = self._text(({"role": USER, "content": content},), None)
        except DataError:
            return False
        return PROBE in text and f"'{PROBE}'" not in text and f'"{PROBE}"' not in text

    def write(self, conversation: Conversation, by_marks: bool | None = None) -> Written:
        """A conversation as text and tokens.

        Args:
            conversation: The conversation.
            by_marks: Find the answers by the template's marks, or by writing the beginnings of the
                conversation. None: by the marks if the template has them and all answers are wanted.

        Raises:
            DataError: the template refuses the messages, or the answers cannot be found.
        """
        text = self.text(conversation)
        options = {"return_offsets_mapping": True} if self.on_answers else {}
        encoded = tokenized(self.tokenizer, text, size=self.size, add_special_tokens=False, verbose=False, **options)
        ids = np.asarray(encoded["input_ids"], dtype=np.int32)
        if not self.on_answers:
            return Written(text, ids, np.ones(len(ids), dtype=bool))
        if self._has_marks(conversation) if by_marks is None else by_marks:
            return Written(text, ids, self._marked(conversation))
        return Written(text, ids, overlapping(encoded["offset_mapping"], self._spans(text, conversation)))

    def text(self, conversation: Conversation) -> str:
        """A conversation as text. Raises DataError where the template refuses it."""
        return self._text(conversation.messages, conversation.tools)

    def asked_spans(self, text: str, conversation: Conversation) -> list[Span]:
        """Where the conversation's text has what is asked for: its answers, or all.

        Raises:
            DataError: the answers cannot be found.
        """
        if not self.on_answers:
            return [(0, len(text))]
        if not self._has_marks(conversation):
            return list(self._spans(text, conversation))
        encoded = tokenized(self.tokenizer, text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        marked = zip(encoded["offset_mapping"], self._marked(conversation), strict=True)
        return [span for span, is_asked in marked if is_asked]

    def _has_marks(self, conversation: Conversation) -> bool:
        """Does the template mark answers, and are all of the conversation's wanted?"""
        every = tuple(n for n, message in enumerate(conversation.messages) if message["role"] == ASSISTANT)
        return bool(MARK.search(self.source)) and conversation.answers == every

    def _apply(self, messages: Sequence[Message], tools: list[Any] | None, **options: Any) -> Any:
        try:
            template = self.tokenizer.get_chat_template(None, tools)
            if "strftime_now" in template:
                template = FIXED_DATE + template
            messages = [self._in_its_form(message) for message in messages]
            return self.tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, **options)
        except Exception as error:  # a template raises whatever messages that it is not made for make it raise
            raise DataError(f"the chat template refuses it ({in_words(error)[:120]})") from None

    def _in_its_form(self, message: Message) -> Message:
        """The message with its content in a form that the template reads: a text, or a list of parts."""
        content = message.get("content")
        if isinstance(content, str) and not self.reads_texts:
            return {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, list) and not self.reads_parts and all(part.get("type") == "text" for part in content):
            return {**message, "content": "\n".join(str(part.get("text", "")) for part in content)}  # as vLLM joins them
        return message

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
        """Where each answer stands in the text."""
        for number in conversation.answers:
            start = self._start(text, conversation, number)
            whole = self._text(conversation.messages[: number + 1], conversation.tools)
            if not whole.startswith(text[:start]):
                raise DataError(_another(number))
            yield start, start + len(self._answer(text[start:], whole[start:], conversation.messages[number], number))

    def _start(self, text: str, conversation: Conversation, number: int) -> int:
        """Where an answer begins: after what comes before it and the header of an answer.

        The header that asks for an answer may go on with what an answer in the text does not have, such as
        `<think>`. Then it ends with the last token that both have.
        """
        if number == 0:
            raise DataError("begins with an answer, so what comes before it cannot be told from it")
        messages, tools = conversation.messages[:number], conversation.tools
        before, asking = self._text(messages, tools), self._text(messages, tools, prompt=True)
        least, header = len(_common(before, asking)), _common(asking, text)
        if len(header) < least:
            raise DataError(_another(number))
        cut = (start for start, end in self._tokens(asking) if start < len(header) < end)
        return next(cut, len(header))

    def _answer(self, text: str, answer: str, message: Message, number: int) -> str:
        """The answer that `text` begins with, with the token that ends a message but without white space after that.

        `answer` is how the template writes it if nothing follows. Some templates then write more: before the
        content (an empty `<think>`) or at the end (a token that ends the text).
        """
        content = self._in_its_form(message).get("content")
        content = content.strip() if isinstance(content, str) else ""
        # a call of a tool has no content: then all is needed but the last token
        for candidate in (answer, answer[answer.rfind(content) :]) if content in answer and content else (answer,):
            ends = sorted((end for _, end in self._tokens(candidate)), reverse=True)
            least = candidate.rfind(content) + len(content) if content else (*ends, len(candidate), len(candidate))[1]
            for end in (len(candidate), *ends):
                if end >= least and text.startswith(candidate[:end]):
                    bare = candidate[:end].rstrip()
                    return bare if len(bare) in ends else candidate[:end]
        raise DataError(_another(number))

    def _tokens(self, text: str) -> list[Span]:
        """Where the tokens stand that a tokenizer never cuts, such as `<|im_end|>`."""
        return [match.span() for match in self.uncut.finditer(text)]

    def warnings(self) -> list[str]:
        """One line if the template writes the date of the day."""
        if "strftime_now" not in self.source:
            return []
        return ["the chat template writes the date of the day: it is always 26 July 2024 here, so that a run can be repeated"]


def overlapping(offsets: Any, spans: Iterable[Span]) -> np.ndarray[Any, Any]:
    """Which tokens have a character in one of the spans, bool of shape (tokens,). `offsets` is each token's span."""
    places = np.asarray(offsets).reshape(-1, 2)
    found = np.zeros(len(places), dtype=bool)
    for start, stop in spans:
        found |= (places[:, 1] > start) & (places[:, 0] < stop)
    return found


def _template_of_processor(folder: Path) -> str | None:
    """The chat template that a processor's older file has, which tokenizers do not read."""
    file = folder / "chat_template.json"
    template = read_json(file).get("chat_template") if file.is_file() else None
    return template if isinstance(template, str) else None


def _common(one: str, other: str) -> str:
    """The longest beginning of two texts."""
    if other.startswith(one):
        return one
    differing = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differing, min(len(one), len(other)))]


def _another(number: int) -> str:
    return (
        f"the chat template writes what comes before message {number + 1} in another way if more follows, so the answer cannot "
        "be told from the rest"
    )
