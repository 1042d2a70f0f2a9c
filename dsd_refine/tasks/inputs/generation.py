"""The checkpoint's own settings of generation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any


def read_generation_config(folder: Path, model: Any) -> Any:
    """A copy of the folder's generation config, else of what the model's config says (for BLIP: of
    its decoder's).
    """
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return copy.deepcopy(getattr(model, "text_decoder", model).generation_config)


def first_set(*values: Any) -> Any:
    """The first value that is not None; None where all are."""
    return next((value for value in values if value is not None), None)


def as_tokens(ends: Any) -> tuple[int, ...]:
    """The tokens that end a text, as generation configs have them: None, a number, or several."""
    return tuple(map(int, ends)) if isinstance(ends, list | tuple) else () if ends is None else (int(ends),)
