"""The checkpoint's own tokenizer: loading it, and calls of it that return a value or raise
DataError or CheckpointError.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dsd_refine.data.tables import in_words
from dsd_refine.errors import CheckpointError, DataError

T = TypeVar("T")
BLOCK = 1000  # rows that are tokenized in one call
PIECES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # package -> module that reads its models


def rows_of_embedding(model: Any, config: Any) -> int | None:
    """How many ids the model can look up. None where neither the model nor its config says so."""
    embedding = None
    with suppress(AttributeError, NotImplementedError):  # a model without any
        embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None) or getattr(config.get_text_config(), "vocab_size", None)
    return int(rows) if rows else None


def known_tokens(tokenizer: Any, size: int | None) -> int:
    """How many of the tokenizer's tokens the model has an embedding for. `size` is the number of
    its embeddings.
    """
    return min(len(tokenizer), size or len(tokenizer))


def beyond_warnings(tokenizer: Any, size: int | None) -> list[str]:
    """One line where the tokenizer has tokens that the model has no embedding for. Rows that hold
    none can be used.
    """
    extra = sorted((number, token) for token, number in tokenizer.get_vocab().items() if size is not None and number >= size)
    if not extra:
        return []
    shown = ", ".join(f"{token!r} ({number})" for number, token in extra[:5]) + (", …" if len(extra) > 5 else "")
    return [f"the tokenizer has {len(extra)} tokens beyond the model's {size:,}: {shown}; rows that hold one are skipped"]


def load_tokenizer(folder: Path, trust_remote_code: bool = False, **options: Any) -> Any:
    """The tokenizer of a folder as it is, or with `options` in place of its own settings.

    Raises:
        CheckpointError: the folder has no usable tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        with _silenced():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code, **options
            )
            with suppress(Exception):  # a word that it has not is no fault of its file
                tokenizer("a")  # a file that contradicts itself panics here
    except BaseException as error:  # transformers raises whatever a strange file makes it raise
        if isinstance(error, Exception) and "tiktoken" in str(error) and (file := _pieces(folder)):
            raise CheckpointError(_no_pieces(file)) from None
        raise _broken(error, f"{folder}: its tokenizer cannot be loaded") from None
    files = set(tokenizer.vocab_files_names.values())
    # without a file transformers makes up one that knows no word
    if files and not _pieces(folder) and not any((folder / name).is_file() for name in files):
        raise CheckpointError(f"{folder}: has no tokenizer (none of {', '.join(sorted(files))} is there)")
    return tokenizer


def for_words(tokenizer: Any, folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer as it reads texts that are cut into words already.

    RoBERTa's, GPT-2's and others put the space before a word into its first piece. They must put it
    there before the first word too.
    """
    if getattr(tokenizer, "add_prefix_space", True):
        return tokenizer
    return load_tokenizer(folder, trust_remote_code, add_prefix_space=True)


def word_pieces(
    tokenizer: Any, rows: Sequence[Sequence[str]], max_length: int, size: int | None = None
) -> tuple[dict[str, Any], list[dict[int, int]]]:
    """The tokenizer's outputs for rows of words, cut to `max_length`, and for each row: word -> place
    of its first piece.

    Raises:
        DataError: it refuses them, or the model has no such token.
    """
    encoded = _encoded(
        tokenizer, [list(row) for row in rows],
        size=size, is_split_into_words=True, truncation=True, max_length=max_length, verbose=False,
    )  # fmt: skip
    firsts: list[dict[int, int]] = []
    for row in range(len(rows)):
        places: dict[int, int] = {}
        for place, word in enumerate(encoded.word_ids(row)):
            if word is not None:
                places.setdefault(word, place)
        firsts.append(places)
    return dict(encoded), firsts


def with_offsets(tokenizer: Any, first: str, second: str, **options: Any) -> Any:
    """The windows of a pair of texts that is longer than `max_length`, with the characters of each token.

    Returns what the tokenizer does, with a list of each output: a window is an entry. Raises as
    `tokenized`.
    """
    return _encoded(tokenizer, first, second, return_overflowing_tokens=True, return_offsets_mapping=True, **options)


def _pieces(folder: Path) -> Path | None:
    """The folder's sentencepiece model: families name it differently, and what reads one reads all."""
    return next((path for path in sorted(folder.glob("*.model")) if path.name != "tiktoken.model"), None)


def _no_pieces(file: Path) -> str:
    """Why a sentencepiece model could not be read. The library tries tiktoken next, and speaks of
    nothing else.
    """
    missing = [name for name, module in PIECES.items() if not _installed(module)]
    if missing:
        names = " and ".join(missing)
        return f"{file}: the tokenizer is a sentencepiece model, which needs {names}: pip install {' '.join(missing)}"
    return f"{file}: cannot be read as a sentencepiece model; is the file whole?"


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of what it lies in
        return False


def tokenized(tokenizer: Any, *texts: Any, size: int | None = None, **options: Any) -> dict[str, Any]:
    """What a tokenizer makes of texts. `size` is the number of the model's embeddings: no id may
    lie beyond.

    Raises:
        DataError: it refuses them, as a closed vocabulary does words that it has not; or the model
            has no such token.
        CheckpointError: it panics, as one whose file contradicts itself does.
    """
    return dict(_encoded(tokenizer, *texts, size=size, **options))


def _encoded(tokenizer: Any, *texts: Any, size: int | None = None, **options: Any) -> Any:
    """As `tokenized`, in the tokenizer's own type, which also says what was cut off."""
    try:
        encoded = tokenizer(*texts, **options)
    except Exception as error:  # tokenizers raise whatever a strange text makes them raise
        raise DataError(f"unreadable text (the tokenizer: {in_words(error)[:120]})") from None
    except BaseException as error:
        raise _broken(error, f"{tokenizer.name_or_path}: its tokenizer fails on a text") from None
    if size is not None:
        _refuse_beyond(tokenizer, encoded["input_ids"], size)
    return encoded


def _refuse_beyond(tokenizer: Any, ids: Any, size: int) -> None:
    highest = max((number for row in ids for number in (row if isinstance(row, list) else [row])), default=-1)
    if highest >= size:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise DataError(f"holds the token {token!r} ({highest}), which the model has not: it has {size:,}")


def or_reason(read: Callable[..., T], *texts: Any) -> tuple[T | None, str | None]:
    """(the result of `read`, None), or (None, why a row of such texts is to be skipped)."""
    try:
        return read(*texts), None
    except DataError as error:
        return None, str(error)


def ids_or_reasons(
    tokenizer: Any,
    rows: Sequence[Sequence[str]],
    cut: set[int] | None = None,
    keep: Callable[[int, dict[str, list[int]]], None] = lambda number, encoded: None,
    **options: Any,
) -> list[tuple[list[int] | None, str | None]]:
    """(ids, None) of each row of one or more texts, or (None, why it cannot be used).

    Where a block of rows fails, its rows are read one by one. Rows longer than `max_length` are
    added to `cut`. `keep` is called with the number of each row that can be used and all that the
    tokenizer makes of it.
    """
    read = partial(_encoded, tokenizer, **options)
    answers: list[tuple[list[int] | None, str | None]] = []
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        together, reason = or_reason(read, *map(list, zip(*block, strict=True)))
        if together is not None:
            if cut is not None:
                cut |= {start + number for number in _cut(tokenizer, together, block, options)}
            for number, ids in enumerate(together["input_ids"]):
                keep(start + number, {name: values[number] for name, values in together.items()})
                answers.append((ids, None))
            continue
        for number, row in enumerate(block):
            alone, reason = or_reason(read, *row)
            if alone is not None and cut is not None and _cut(tokenizer, alone, [row], options):
                cut.add(start + number)
            if alone is not None:
                keep(start + number, dict(alone))
            answers.append((None if alone is None else alone["input_ids"], reason))
    return answers


def _cut(tokenizer: Any, encoded: Any, rows: Sequence[Sequence[str]], options: dict[str, Any]) -> list[int]:
    """The numbers of the rows that were cut. A tokenizer in Rust keeps what it cut off beside the
    ids.
    """
    if getattr(encoded, "encodings", None):
        return [number for number, row in enumerate(encoded.encodings) if row.overflowing]
    ids = encoded["input_ids"]
    ids = ids if ids and isinstance(ids[0], list) else [ids]
    full = [number for number, row in enumerate(ids) if len(row) >= options.get("max_length", len(row) + 1)]
    return [number for number in full if len(tokenizer(*rows[number], verbose=False)["input_ids"]) > len(ids[number])]


class Unknown:
    """Counts rows of mostly unknown tokens: the model reads next to nothing of such texts."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.rows, self.count = tokenizer, 0, 0
        special = set(tokenizer.all_special_ids)
        around = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
        self.unknown = None if tokenizer.unk_token_id in around else tokenizer.unk_token_id  # GPT-2's ends a text
        self.special = list(special - {self.unknown})

    def see(self, ids: Any) -> None:
        """Count a row's ids."""
        self.rows += 1
        if self.unknown is None:
            return
        row = np.asarray(ids)
        unknown = int((row == self.unknown).sum())
        if unknown:
            self.count += 2 * unknown > len(row) - int(np.isin(row, self.special).sum())

    def warnings(self) -> list[str]:
        """One line where these are more than a tenth of the rows."""
        if 10 * self.count <= self.rows:
            return []
        return [
            f"{self.count:,} of {self.rows:,} texts ({self.count / self.rows:.0%}) are for more than half "
            f"{self.tokenizer.unk_token!r}, which stands for what the tokenizer does not know: are they of the model's "
            "language and writing?"
        ]


class Doubled:
    """Counts rows that begin or end with the same special token twice: the text holds what its
    tokenizer adds.

    Rendered chat text begins with `<s>`, and a tokenizer puts one more before it; a model has seen
    only one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.rows, self.count = tokenizer, 0, Counter[tuple[str, int]]()
        self.first = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
        self.last = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}

    def see(self, ids: Any) -> None:
        """Count a row's ids."""
        self.rows += 1
        if len(ids) < 2:
            return
        if ids[0] == ids[1] and ids[0] in self.first:
            self.count["begin", int(ids[0])] += 1
        if ids[-1] == ids[-2] and ids[-1] in self.last:
            self.count["end", int(ids[-1])] += 1

    def warnings(self) -> list[str]:
        """One line for each token that stands twice."""
        return [
            f"{count:,} of {self.rows:,} rows {where} with {self.tokenizer.convert_ids_to_tokens(token)!r} twice: the text "
            "holds what the tokenizer adds, and the model was hardly trained so; take it out of the texts"
            for (where, token), count in self.count.items()
        ]


@contextmanager
def _silenced() -> Iterator[None]:
    """Within, descriptor 2 leads nowhere: Rust code that panics writes to it, past `sys.stderr`."""
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
    """A copy of the standard error's descriptor. None where it is closed, for then its number may
    be another file's.
    """
    try:
        return None if sys.stderr is None else os.dup(2)
    except OSError:
        return None


def _broken(error: BaseException, what: str) -> BaseException:
    """The error to raise. A panic in Rust code is no `Exception`; KeyboardInterrupt and the like
    are passed on.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return error
    return CheckpointError(f"{what}: {' '.join(str(error).split())[:200]}")
