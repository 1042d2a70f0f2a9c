"""Conversations with pictures: the checkpoint's processor prepares the pictures, and writes the tokens that stand for them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from dsd_refine.checkpoint.library import Library
from dsd_refine.checkpoint.preprocessing import json_values
from dsd_refine.data.conversations import Conversation, read_conversation
from dsd_refine.data.pictures import FileRows, separate_pictures, source_bytes
from dsd_refine.data.reading import Table
from dsd_refine.data.tables import in_words
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.tasks.inputs.chats import ChatTemplate, Span, Written, overlapping
from dsd_refine.tasks.inputs.images import Seen, decode, look
from dsd_refine.tasks.inputs.tokens import tokenized

CHANNELS = 3
PIXELS, MASK = "pixel_values", "pixel_attention_mask"


@dataclass(frozen=True)
class Shown:
    """A row with its pictures.

    Attributes:
        conversation: The conversation, with bare parts where pictures stand.
        digests: The SHA-256 of each picture's file.
        tokens: What the processor writes in place of each picture.
        seen: What is odd about each picture.
    """

    conversation: Conversation
    digests: tuple[str, ...]
    tokens: tuple[str, ...]
    seen: tuple[Seen, ...]


@dataclass(frozen=True)
class PictureColumns:
    """The columns of a row with pictures: those of the conversation, and the one of the pictures (None: the messages have
    them).
    """

    conversation: tuple[str, ...]
    pictures: str | None

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [*self.conversation, *([self.pictures] if self.pictures else [])]


class PictureReader:
    """Reads rows with pictures, and makes the pictures a model's inputs. Worker processes have a copy."""

    def __init__(self, processor: Any, columns: PictureColumns) -> None:
        self.processor, self.columns = processor, columns

    def _conversation(self, table: Table, values: dict[str, Any]) -> tuple[Conversation, list[bytes]]:
        """A row's conversation, and the files of its pictures.

        Raises:
            DataError: the row cannot be used.
        """
        names = self.columns.conversation
        conversation = read_conversation(names, [values[name] for name in names])
        column = values[self.columns.pictures] if self.columns.pictures else None
        conversation, sources = separate_pictures(conversation, column, self.processor.image_token)
        try:
            return conversation, [source_bytes(source, table.folder) for source in sources]
        except OSError as error:
            raise DataError(f"unreadable picture file ({error.strerror or error})") from None

    def show(self, table: Table, values: dict[str, Any]) -> Shown:
        """Look at a row's pictures. Safe in threads.

        Raises:
            DataError: the row, or one of its pictures, cannot be used.
        """
        conversation, files = self._conversation(table, values)
        looked = [look(file, CHANNELS) for file in files]
        prepared = self._prepared([image for image, _ in looked])
        tokens = [self.processor.replace_image_token(prepared, image_idx=number) for number in range(len(files))]
        digests = tuple(hashlib.sha256(file).hexdigest() for file in files)
        return Shown(conversation, digests, tuple(map(sys.intern, tokens)), tuple(seen for _, seen in looked))

    def _prepared(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """What the image processor makes of the pictures of one row: `pixel_values` of shape 1 x tiles x C x H x W, the
        mask of what is no padding, and the rows and columns of tiles of each picture.
        """
        if not images:
            return {}
        try:
            return dict(self.processor.image_processor([list(images)], return_row_col_info=True, return_tensors="pt"))
        except Exception as error:  # a processor raises whatever a strange picture makes it raise
            raise DataError(f"the image processor refuses its pictures ({in_words(error)[:120]})") from None

    def inputs(self, table: Table, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """The pictures of rows as the model takes them. Empty: none of them has a picture.

        `pixel_values` is float32 of shape rows x most tiles x C x H x W, filled with zeros, and
        `pixel_attention_mask` int64 of shape rows x most tiles x H x W.
        """
        columns = FileRows(table, self.columns.names).columns(list(rows))
        prepared = []
        for number, row in enumerate(rows):
            try:
                _, files = self._conversation(table, {name: values[number] for name, values in columns.items()})
                prepared.append(self._prepared([decode(file, CHANNELS) for file in files]))
            except DataError as error:  # it was readable when the run began
                raise DataError(f"{table.name(row)}: {error}") from None
        if not any(prepared):
            return {}
        return {name: _padded([one[name][0] if one else None for one in prepared]) for name in (PIXELS, MASK)}

    @property
    def shown(self) -> dict[str, Any]:
        """The settings of the image processor, for the report."""
        return dict(json_values(self.processor.image_processor.to_dict()))


def _padded(tiles: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Tensors of rows, tiles x … x H x W each (None: no tiles), filled with zeros to the largest of each length."""
    found = [one for one in tiles if one is not None]
    largest = [max(lengths) for lengths in zip(*(one.shape for one in found), strict=True)]
    padded = found[0].new_zeros((len(tiles), *largest))
    for row, one in enumerate(tiles):
        if one is not None:
            padded[row][tuple(slice(length) for length in one.shape)] = one
    return padded


class PictureChats:
    """Writes rows with pictures as the processor does: with its chat template, and its tokens in place of each picture."""

    def __init__(self, processor: Any, size: int | None, on_answers: bool) -> None:
        """`size` is the number of the model's embeddings.

        Raises:
            CheckpointError: it has no chat template, or its tokenizer does not tell where tokens stand.
        """
        self.processor, self.tokenizer, self.size = processor, processor.tokenizer, size
        self.tokenizer.chat_template = processor.chat_template or self.tokenizer.chat_template
        if not self.tokenizer.is_fast:
            raise CheckpointError(
                f"{self.tokenizer.name_or_path}: its tokenizer does not tell where a token stands in the text, so the pictures "
                "cannot be told from it"
            )
        self.template = ChatTemplate(self.tokenizer, size, on_answers)

    def write(self, shown: Shown) -> Written:
        """A row as tokens. What stands for a picture is no target.

        Raises:
            DataError: the template refuses the messages, or has not one place for each picture.
        """
        text = self.template.text(shown.conversation)
        token = self.processor.image_token
        if text.count(token) != len(shown.tokens):
            raise DataError(
                f"the chat template writes {text.count(token)} times {token}, which stands for a picture, and the row has "
                f"{len(shown.tokens)}"
            )
        asked = self.template.asked_spans(text, shown.conversation)
        (whole,), (places,) = self.processor.get_text_with_replacements([text], list(shown.tokens))
        encoded = tokenized(
            self.tokenizer, whole, size=self.size, add_special_tokens=False, verbose=False, return_offsets_mapping=True
        )
        offsets = encoded["offset_mapping"]
        pictures = overlapping(offsets, [place["new_span"] for place in places])
        wanted = overlapping(offsets, [_moved(span, places) for span in asked]) & ~pictures
        uncut = int(pictures.nonzero()[0][-1]) + 1 if pictures.any() else 0
        return Written(whole, np.asarray(encoded["input_ids"], dtype=np.int32), wanted, shown.digests, uncut)


def _moved(span: Span, places: Sequence[dict[str, Any]]) -> Span:
    """Where a span of the template's text is once pictures are written out."""

    def moved(character: int) -> int:
        before = [place for place in places if place["span"][1] <= character]
        return character + (before[-1]["new_span"][1] - before[-1]["span"][1] if before else 0)

    return moved(span[0]), moved(span[1])


def open_processor(library: Library) -> Any:
    """The checkpoint's processor, which must make of a picture what its model takes.

    Raises:
        CheckpointError: the folder has no usable processor, or it is one of another model.
    """
    from transformers import AutoProcessor

    folder, config = library.folder, library.config
    try:
        processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            folder, local_files_only=True, trust_remote_code=library.trust_remote_code
        )
        side = processor.image_processor.max_image_size["longest_edge"]
        pairs = [
            ("the id of the token of a picture", processor.image_token_id, config.image_token_id),
            ("the side of a picture in pixels", side, config.vision_config.image_size),
            ("the number of tokens of a picture", processor.image_seq_len, _tokens_of_picture(config)),
        ]
    except Exception as error:  # transformers raises whatever a strange file makes it raise
        raise CheckpointError(
            f"{folder}: its processor cannot be used: {' '.join(str(error).split())[:200]}. "
            "Conversations without pictures need only the tokenizer: --task causal-lm"
        ) from None
    for what, its_own, wanted in pairs:
        if its_own != wanted:
            raise CheckpointError(f"{folder}: {what} is {its_own} for its processor, and {wanted} for its model")
    return processor


def _tokens_of_picture(config: Any) -> int:
    vision = config.vision_config
    return int((vision.image_size // vision.patch_size) ** 2 / config.scale_factor**2)
