"""How a captioner generates text: what its training puts before and after a caption, and greedy
generation.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.tasks.inputs.generation import as_tokens, first_set, read_generation_config
from dsd_refine.tasks.inputs.tokens import tokenized

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class CaptionGenerator:
    """How a model generates captions: its tokenizer, and the tokens that its training puts around a
    caption.

    Generation begins with `start` and stops at one of `ends`. `max_new_tokens` counts a generated
    caption with its end; a training caption is cut after `cut` tokens. `inputs` names the model's
    arguments for tokens and their mask. `keeps_first`: a token that the tokenizer puts first is
    learned like any other; else `start` takes its place.
    """

    tokenizer: Any
    generation: Any
    start: int
    ends: tuple[int, ...]
    max_new_tokens: int
    cut: int
    inputs: tuple[str, str]
    keeps_first: bool
    size: int | None = None  # embeddings of the text decoder

    def tokens(self, text: str) -> Array:
        """Start, the tokenizer's ids, and an end (added where the tokenizer sets none, for a model
        must learn to stop), cut after `cut` tokens beside the start.
        """
        ids = list(tokenized(self.tokenizer, text, size=self.size, verbose=False)["input_ids"])
        firsts = (self.tokenizer.cls_token_id, self.tokenizer.bos_token_id)
        if not self.keeps_first and ids and ids[0] in firsts:
            ids = ids[1:]
        if self.ends and (not ids or ids[-1] not in self.ends):
            ids.append(self.ends[0])
        return np.asarray([self.start, *ids][: self.cut + 1], dtype=np.int64)

    def generate(self, model: Any, images: torch.Tensor) -> list[str]:
        """A caption of each image by greedy decoding: the same weights give the same text."""
        written = model.generate(pixel_values=images, generation_config=copy.deepcopy(self.generation)).tolist()
        return [self.text(ids[1:] if ids[:1] == [self.start] else ids) for ids in written]

    def text(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, up to the first end."""
        stop = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        return " ".join(str(self.tokenizer.decode(ids[:stop], skip_special_tokens=True)).split())


def open_caption_generator(folder: Path, tokenizer: Any, model: Any, asked: int | None, default: int) -> CaptionGenerator:
    """What the checkpoint's configs say of generation.

    `asked` is --max-length: tokens of a caption, its end included; `default` holds where the
    configs have no limit.

    Raises:
        CheckpointError: no start token. DataError: more was asked for than the model has positions.
    """
    config = model.config
    text = config.get_text_config(decoder=True)
    generation = read_generation_config(folder, model)
    if config.model_type == "blip":  # its `generate` takes these from the text config, whatever else says
        start, ends = text.bos_token_id, text.sep_token_id
    elif config.model_type == "git":
        start, ends = (
            first_set(generation.bos_token_id, config.bos_token_id),
            first_set(generation.eos_token_id, config.eos_token_id),
        )
    else:
        starts = (config.decoder_start_token_id, generation.decoder_start_token_id, generation.bos_token_id)
        start = first_set(*starts, getattr(text, "bos_token_id", None))
        ends = first_set(generation.eos_token_id, config.eos_token_id, getattr(text, "eos_token_id", None))
    if start is None:
        raise CheckpointError(f"{folder}: its configs name no token that a caption starts with (decoder_start_token_id)")
    positions = first_set(getattr(text, "max_position_embeddings", None), getattr(text, "n_positions", None))
    if asked is not None and positions and asked > positions:
        raise DataError(f"--max-length {asked}: the model has only {positions} positions")
    own = generation.max_new_tokens or (generation.max_length or default + 1) - 1
    most = asked or min(own, positions or own)
    generation.update(max_new_tokens=most, max_length=None, num_beams=1, do_sample=False, return_dict_in_generate=False)
    named = config.model_type == "vision-encoder-decoder"
    inputs = ("decoder_input_ids", "decoder_attention_mask") if named else ("input_ids", "attention_mask")
    cut = asked or positions or 10**6
    size = getattr(text, "vocab_size", None)
    return CaptionGenerator(tokenizer, generation, int(start), as_tokens(ends), most, cut, inputs, keeps_first=named, size=size)
