"""Tokenizers: the checkpoint's own, and calls of it that end in a value or in an error of ours."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dsd_refine.errors import CheckpointError


def open_tokenizer(folder: Path, config: Any, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer, which knows no more tokens than the model. Nothing of it is written.

    Raises:
        CheckpointError: the folder has no usable tokenizer, or one of more tokens.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    size = getattr(config.get_text_config(), "vocab_size", highest + 1)
    if highest >= size:
        raise CheckpointError(f"{folder}: the tokenizer has ids up to {highest}, the model {size} tokens")
    return tokenizer


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder as it is.

    Raises:
        CheckpointError: the folder has no usable tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        with _unheard():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
            with suppress(Exception):  # a word that it has not is no fault of its file
                tokenizer("a")  # a file that contradicts itself panics here
    except BaseException as error:  # transformers raises whatever a strange file makes it raise
        raise _broken(error, f"{folder}: its tokenizer cannot be loaded") from None
    files = set(tokenizer.vocab_files_names.values())
    if files and not any((folder / name).is_file() for name in files):  # transformers then makes up one that knows no word
        raise CheckpointError(f"{folder}: has no tokenizer (none of {', '.join(sorted(files))} is there)")
    return tokenizer


def tokenized(tokenizer: Any, *texts: Any, **options: Any) -> dict[str, Any]:
    """What a tokenizer makes of texts.

    Raises:
        CheckpointError: it fails on them, as one whose file contradicts itself does.
    """
    try:
        return dict(tokenizer(*texts, **options))
    except BaseException as error:
        raise _broken(error, f"{tokenizer.name_or_path}: its tokenizer fails on a text") from None


@contextmanager
def _unheard() -> Iterator[None]:
    """Rust code that panics writes where it stood to descriptor 2, past `sys.stderr`."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _broken(error: BaseException, what: str) -> BaseException:
    """A panic in Rust code is no Exception; what asks the run to end goes on as it is."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return error
    return CheckpointError(f"{what}: {' '.join(str(error).split())[:200]}")
