"""Pictures of conversations: where they stand in the messages, and the files that they come from."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from dsd_refine.data.conversations import USER, Conversation, Message
from dsd_refine.data.reading import Table
from dsd_refine.data.tables import file_bytes
from dsd_refine.errors import DataError

PICTURE = {"type": "image"}  # the part of a content that stands for a picture
WHERE = ("image", "path", "url", "base64", "image_url")  # keys of such a part that have the picture, or say where it is
NEXT = object()  # the source of a picture that is the next one of the row's column


def is_picture(part: Any) -> bool:
    """Return whether a part of a content is a picture."""
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def has_pictures(conversation: Conversation) -> bool:
    """Return whether a message of the conversation has a picture as a part of its content."""
    return any(is_picture(part) for message in conversation.messages for part in _parts(message))


def separate_pictures(conversation: Conversation, column: Any, token: str) -> tuple[Conversation, list[Any]]:
    """Take the pictures out of a conversation.

    A part of a content that is a picture has it, or says where it is. One that does neither stands for
    the next picture of the row's column, and so does `token` in a text. If there is no such place, the
    pictures of the column stand before the first message of the user.

    Args:
        conversation: The conversation.
        column: The row's value in the column of pictures: a list, one picture, or None.
        token: What a text has where a picture stands.

    Returns:
        The conversation with bare parts `{"type": "image"}`, and for each picture, in order, where it
        comes from (`source_bytes`).

    Raises:
        DataError: The column has more or fewer pictures than the messages have places, or an answer
            has a picture.
    """
    own = column if isinstance(column, list) else [] if column is None else [column]
    separated = [_separated(message, token) for message in conversation.messages]
    places = [source for _, sources in separated for source in sources]
    if own and not places:
        separated = _with_pictures_first(conversation.messages, len(own))
        places = [NEXT] * len(own)
    for number in conversation.answers:
        if separated[number][1]:
            raise DataError(f"message {number + 1} is an answer with a picture")
    if places.count(NEXT) != len(own):
        raise DataError(f"its messages have {places.count(NEXT)} places for the {len(own)} pictures of its column")
    rest = iter(own)
    sources = [next(rest) if source is NEXT else source for source in places]
    return replace(conversation, messages=tuple(message for message, _ in separated)), sources


def _parts(message: Message) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else ()


def _separated(message: Message, token: str) -> tuple[Message, list[Any]]:
    """The message with bare pictures, and the source of each."""
    if not (parts := _parts(message)):
        return message, [NEXT] * str(message.get("content") or "").count(token)
    sources: list[Any] = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else None
        sources += [_source(part)] if is_picture(part) else [NEXT] * str(text or "").count(token)
    return {**message, "content": [dict(PICTURE) if is_picture(part) else part for part in parts]}, sources


def _source(part: Message) -> Any:
    key = next((key for key in WHERE if part.get(key) is not None), None)
    if key is None:
        return NEXT
    value = part[key].get("url") if key == "image_url" and isinstance(part[key], dict) else part[key]
    return f"data:;base64,{value}" if key == "base64" else value


def _with_pictures_first(messages: Sequence[Message], count: int) -> list[tuple[Message, list[Any]]]:
    """The messages with so many pictures before what the user says first, as TRL puts them."""
    first = next((number for number, message in enumerate(messages) if message["role"] == USER), None)
    if first is None:
        raise DataError(f"no message of the {USER}, before which its pictures could stand")
    changed: list[tuple[Message, list[Any]]] = [(message, []) for message in messages]
    content = messages[first].get("content")
    parts = list(content) if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    pictures = [dict(PICTURE) for _ in range(count)]
    changed[first] = ({**messages[first], "content": [*pictures, *parts]}, [NEXT] * count)
    return changed


def source_bytes(source: Any, folder: Path | None) -> bytes:
    """Return the bytes of a picture: of a mapping of `bytes` and `path`, of bytes, of a path, or of a `data:` address.

    Raises:
        OSError: The file cannot be read.
        DataError: It is an address in a network, or nothing that names a picture.
    """
    if isinstance(source, str) and source.startswith("data:"):
        try:
            return base64.b64decode(source.partition(",")[2], validate=True)
        except ValueError:
            raise DataError("a picture in base64 that is broken") from None
    if isinstance(source, str) and re.match(r"\w+://", source) and not source.startswith("file://"):
        raise DataError(f"{source[:60]}: pictures are not fetched: download it, and give its path")
    if isinstance(source, dict) and source.get("bytes") is None:
        source = source.get("path")
    try:
        return file_bytes(source.removeprefix("file://") if isinstance(source, str) else source, folder)
    except TypeError:
        raise DataError("no picture") from None


class FileRows:
    """Rows of a table as they lie on the disk: their pictures are bytes and paths, wherever they stand in a column."""

    def __init__(self, table: Table, names: Sequence[str]) -> None:
        features = table.rows.features
        files = [name for name in names if _holds_images(features[name])]
        others = [name for name in names if name not in files]
        self.others = table.rows.select_columns(others) if others else None
        self.files = table.rows.select_columns(files).with_format("arrow") if files else None  # Arrow decodes nothing

    def columns(self, rows: slice | list[int]) -> dict[str, list[Any]]:
        """The values of these rows, by column."""
        found = dict(self.others[rows]) if self.others is not None else {}
        return found | (self.files[rows].to_pydict() if self.files is not None else {})


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, datasets.Image):
        return True
    if isinstance(feature, dict):
        return any(map(_holds_images, feature.values()))
    if isinstance(feature, list):
        return any(map(_holds_images, feature))
    return _holds_images(feature.feature) if hasattr(feature, "feature") else False
