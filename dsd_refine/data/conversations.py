"""Rows as conversations: the columns that hold one, and the messages that a row becomes.

A row is a list of messages (`messages`, `conversations`), or a question and its answer
(`prompt` + `completion`, `instruction` [+ `input`] + `output`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsd_refine.data.reading import Table
from dsd_refine.errors import DataError

# Columns that together hold a conversation: those that must be there, and those that may be.
COLUMN_SETS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("messages",), ("tools",)),
    (("conversations",), ("tools",)),
    (("conversation",), ("tools",)),
    (("prompt", "completion"), ("tools",)),
    (("instruction", "output"), ("input",)),
)

USER = "user"
ASSISTANT = "assistant"
SAMPLED = 100  # rows that are read to tell a column of lists from one of texts
# what data sets with `from` and `value` call the speakers
ROLES = {"human": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bot": ASSISTANT, "function": "tool", "observation": "tool"}

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """A row's messages, each with `role` and `content` or `tool_calls`.

    Attributes:
        messages: The messages, in order.
        answers: The numbers of the messages that the model is to write.
        tools: JSON schemas of the tools that it may call, or None.
    """

    messages: tuple[Message, ...]
    answers: tuple[int, ...]
    tools: list[Any] | None = None


def is_conversation(table: Table, names: Sequence[str]) -> bool:
    """Return whether these columns hold a conversation: several columns, or one of lists."""
    if len(names) > 1:
        return True
    values = table.rows.select_columns([names[0]])[:SAMPLED][names[0]]
    return any(isinstance(value, list) for value in values)


def read_conversation(names: Sequence[str], values: Sequence[Any]) -> Conversation:
    """Return the conversation of a row.

    Args:
        names: The columns. `tools` and `input` are known by their names; of the others, the first
            is the list of messages or the question, and the second is the answer.
        values: The row's values in these columns.

    Raises:
        DataError: The row holds no conversation that a model could learn from.
    """
    row = dict(zip(names, values, strict=True))
    tools = _tools(next((row.pop(name) for name in names if name.casefold() == "tools"), None))
    more = next((row.pop(name) for name in names if name.casefold() == "input" and len(names) > 2), None)
    first, *rest = row.values()
    if rest:
        asked, answer = _turns(_with_input(first, more), "user"), _turns(rest[0], ASSISTANT)
        messages, start = (*asked, *answer), len(asked)
    else:
        messages, start = _turns(first, "user"), 0
    answers = tuple(n for n, message in enumerate(messages) if n >= start and message["role"] == ASSISTANT)
    _check(messages, answers)
    return Conversation(messages, answers, tools)


def _check(messages: Sequence[Message], answers: Sequence[int]) -> None:
    if not messages:
        raise DataError("no messages")
    if messages[-1]["role"] != ASSISTANT:
        raise DataError(f"ends with a message of the {messages[-1]['role']}: no answer follows")
    for number in answers:
        if not _has_content(messages[number]):
            raise DataError(f"message {number + 1} is an empty answer")


def _has_content(message: Message) -> bool:
    content = message.get("content")
    if message.get("tool_calls"):
        return True
    if isinstance(content, list):
        return any(_says(part) for part in content)
    return bool(content.strip() if isinstance(content, str) else content)


def _says(part: Any) -> bool:
    """True for a part of a content that is no text, or a text with more than white space."""
    return not isinstance(part, dict) or part.get("type") != "text" or bool(str(part.get("text", "")).strip())


def _with_input(question: Any, more: Any) -> Any:
    """The instruction and its input, with a blank line between them."""
    return f"{question}\n\n{more}" if isinstance(question, str) and isinstance(more, str) and more.strip() else question


def _turns(value: Any, role: str) -> tuple[Message, ...]:
    """A list of messages; a text is one message of `role`."""
    if isinstance(value, str):
        if not value.strip():
            raise DataError("an empty answer" if role == ASSISTANT else "no text")
        return ({"role": role, "content": value},)
    if not isinstance(value, list | tuple):
        raise DataError("no messages")
    return tuple(_message(item, number) for number, item in enumerate(value, 1))


def _message(item: Any, number: int) -> Message:
    """A message with `role`. Arrow fills keys that only other messages have with None; these are removed."""
    message = _without_none(item)
    if not isinstance(message, dict):
        raise DataError(f"message {number} is no mapping of role and content")
    if "from" in message and "role" not in message:
        speaker = str(message.pop("from"))
        message = {"role": ROLES.get(speaker, speaker), "content": message.pop("value", ""), **message}
    if not isinstance(message.get("role"), str):
        raise DataError(f"message {number} does not say whose it is (`role` or `from`)")
    return message


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list | tuple) else value


def _tools(value: Any) -> list[Any] | None:
    """The schemas of tools: a list, or a JSON text of one."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError("its tools are no JSON list") from None
    if value is not None and not isinstance(value, list | str):
        raise DataError("its tools are no list")
    return [_without_none(tool) if isinstance(tool, dict) else _parsed(tool) for tool in value or ()] or None


def _parsed(tool: Any) -> Any:
    try:
        return json.loads(tool)
    except (TypeError, ValueError, RecursionError):
        raise DataError("a tool is no JSON schema") from None
