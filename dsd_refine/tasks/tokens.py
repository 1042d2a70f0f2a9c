"""Tokenizers: the checkpoint's own, and calls of it that end in a value or in an error of ours: its file's, or a text's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dsd_refine.data.tables import in_words
from dsd_refine.errors import CheckpointError, DataError

T = TypeVar("T")
BLOCK = 1000  # rows that are tokenized in one call


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
        DataError: it refuses them, as a closed vocabulary does words that it has not.
        CheckpointError: it panics, as one whose file contradicts itself does.
    """
    try:
        return dict(tokenizer(*texts, **options))
    except Exception as error:  # tokenizers raise whatever a strange text makes them raise
        raise DataError(f"unreadable text (the tokenizer: {in_words(error)[:120]})") from None
    except BaseException as error:
        raise _broken(error, f"{tokenizer.name_or_path}: its tokenizer fails on a text") from None


def or_reason(read: Callable[..., T], *texts: Any) -> tuple[T | None, str | None]:
    """(what is read, None), or (None, why a row of such texts is to be skipped)."""
    try:
        return read(*texts), None
    except DataError as error:
        return None, str(error)


def unreadable(tokenizer: Any, rows: Sequence[Sequence[str]], **options: Any) -> list[str | None]:
    """Why rows of one or more texts each cannot be tokenized; None where they can. One by one only where a block fails."""
    read = partial(tokenized, tokenizer, **options)
    found: list[str | None] = []
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        _, reason = or_reason(read, *map(list, zip(*block, strict=True)))
        found += [or_reason(read, *row)[1] for row in block] if reason else [None] * len(block)
    return found


@contextmanager
def _unheard() -> Iterator[None]:
    """Rust code that panics writes where it stood to descriptor 2, past `sys.stderr`."""
    kept = _standard_error()
    if kept is None:
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    sys.stderr.flush()
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _standard_error() -> int | None:
    """Another descriptor of the standard error. None where it is closed: nobody hears, and its number may be any file's."""
    try:
        return None if sys.stderr is None else os.dup(2)
    except OSError:
        return None


def _broken(error: BaseException, what: str) -> BaseException:
    """A panic in Rust code is no Exception; what asks the run to end goes on as it is."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return error
    return CheckpointError(f"{what}: {' '.join(str(error).split())[:200]}")
