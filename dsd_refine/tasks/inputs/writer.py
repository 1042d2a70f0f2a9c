"""How an encoder-decoder writes: what its decoder learns of a text, and what it generates."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsd_refine.compat import shifted_right
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.tasks.inputs.generation import as_tokens, first_set, read_generation_config
from dsd_refine.tasks.inputs.languages import set_languages
from dsd_refine.tasks.inputs.tokens import tokenized

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TextWriter:
    """The tokenizer and the generation config of an encoder-decoder.

    A text of more than `most_labels` tokens is cut. `size` is the number of tokens that the model can
    predict. `warnings` are about its languages.
    """

    tokenizer: Any
    generation: Any
    ends: tuple[int, ...]
    start: int
    most_labels: int
    size: int | None = None
    warnings: tuple[str, ...] = ()

    def labels(self, text: str) -> tuple[Array, bool]:
        """What the decoder learns to write, int32, and whether the text is longer and was cut.

        The tokens are those of the tokenizer for a target, language and task tokens included. The
        start is left out, because the model's own shift puts it first. An end is added where the
        tokenizer sets none: a model must learn to stop.

        Raises:
            DataError: the tokenizer refuses the text, or the model has no such token.
        """
        ids = list(tokenized(self.tokenizer, text_target=text, size=self.size, verbose=False)["input_ids"])
        is_cut = len(ids) > self.most_labels
        if is_cut:
            options = {"truncation": True, "max_length": self.most_labels, "verbose": False}
            ids = list(tokenized(self.tokenizer, text_target=text, size=self.size, **options)["input_ids"])
        if len(ids) > 1 and ids[0] == self.start:
            ids = ids[1:]
        if self.ends and not {*ids[-2:]} & {*self.ends}:  # mBART's language token stands after the end
            ids.append(self.ends[0])
        return np.asarray(ids, dtype=np.int32), is_cut

    def generate(self, model: Any, inputs: dict[str, torch.Tensor]) -> list[str]:
        """The text that the model writes for each row, as its generation config says, without sampling."""
        written = model.generate(**inputs, generation_config=copy.deepcopy(self.generation))
        return [" ".join(str(self.tokenizer.decode(ids, skip_special_tokens=True)).split()) for ids in written.tolist()]


def open_writer(
    folder: Path, tokenizer: Any, model: Any, asked: int | None, default: int, languages: tuple[str | None, str | None]
) -> TextWriter:
    """What the checkpoint's configs say of generation. Sampling is off; beams, lengths and forced tokens stay.

    Args:
        folder: The checkpoint.
        tokenizer: Its tokenizer. It is set to the languages.
        model: Its model.
        asked: --max-length: the most tokens of a written text, and of a learned one.
        default: The most tokens, if neither `asked` nor the model has a limit.
        languages: The languages of sources and of targets. None: what the checkpoint says.

    Raises:
        CheckpointError: the configs name no start token.
        DataError: more was asked for than the model has positions, or a language that it does not know, or
            nothing says which language it is to write.
    """
    config, generation = model.config, read_generation_config(folder, model)
    start = first_set(config.decoder_start_token_id, generation.decoder_start_token_id)
    if start is None:
        raise CheckpointError(f"{folder}: its configs name no token that a text starts with (decoder_start_token_id)")
    positions = first_set(getattr(config, "max_target_positions", None), getattr(config, "max_position_embeddings", None))
    if asked is not None and positions and asked > positions:
        raise DataError(f"--max-length {asked}: the model has only {positions} positions")
    generation.update(do_sample=False, num_return_sequences=1, return_dict_in_generate=False)
    if asked is not None:
        generation.update(max_new_tokens=asked, max_length=None)
    warnings = set_languages(tokenizer, generation, *languages)
    ends = as_tokens(first_set(generation.eos_token_id, config.eos_token_id))
    head = model.get_output_embeddings()
    size = int(head.weight.shape[0]) if head is not None else None
    most = asked or min(positions or default, default)
    return TextWriter(tokenizer, generation, ends, int(start), most, size, tuple(warnings))


def has_limit(generation: Any) -> bool:
    """Return whether a generation config limits the length of what is written."""
    return bool(generation.max_new_tokens or generation.max_length)


def shift(model: Any, labels: Array) -> Array:
    """What the model's decoder sees before it writes each of the labels of one text, int32."""
    ids = torch.as_tensor(labels.astype(np.int64))[None]
    return np.asarray(shifted_right(model, ids)[0].tolist(), dtype=np.int32)
