"""Rows of tokens cut into windows that a model can take, and which of their tokens are targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsd_refine.data.splits import Rows

Ids = np.ndarray[Any, Any]

NO_TOKENS: Ids = np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class WindowedPart:
    """Documents cut into windows: window u is tokens[start[u] : stop[u]] of the document `row[u]`.

    `context[u]` is the number of tokens at a window's start that are no targets, because an earlier
    window has them (None: there are none). `asked` says of each token whether it may be a target
    (None: each may be).
    """

    rows: Rows
    tokens: np.ndarray[Any, Any]
    row: np.ndarray[Any, Any]
    start: np.ndarray[Any, Any]
    stop: np.ndarray[Any, Any]
    context: np.ndarray[Any, Any] | None = None
    asked: np.ndarray[Any, Any] | None = None

    @property
    def units(self) -> int:
        """The number of windows of all documents."""
        return len(self.row)

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """The tokens of each window, shape (windows,)."""
        return np.asarray(self.stop - self.start)

    def row_of(self, unit: int) -> int:
        """The index of the document that the window was cut from."""
        return int(self.row[unit])

    def targets(self, unit: int) -> np.ndarray[Any, Any]:
        """Which tokens of a window are targets, bool of shape (tokens,). The first one never is."""
        start, stop = int(self.start[unit]), int(self.stop[unit])
        wanted = np.ones(stop - start, dtype=bool) if self.asked is None else self.asked[start:stop].copy()
        wanted[: 1 if self.context is None else max(1, int(self.context[unit]))] = False
        return wanted


def cut_windows(
    rows: Rows, ids: Sequence[Ids], max_length: int, counts: Callable[[Ids], bool], stride: int | None = None
) -> WindowedPart:
    """Cut the documents of `rows` into windows.

    Args:
        rows: The usable rows.
        ids: The tokens of each row of the table.
        max_length: Most tokens of a window.
        counts: Says whether a window has a target. Windows without one are left out. Not used with
            a stride.
        stride: None: windows follow each other. Else windows begin so many tokens apart, and the
            tokens that an earlier window has are context.
    """
    spans, tokens, offset = [], [], 0  # offset: of the document in the joined tokens
    for row, number in enumerate(rows.numbers):
        document = ids[int(number)]
        tokens.append(document)
        if stride is None:
            starts = [start for start in range(0, len(document), max_length) if counts(document[start : start + max_length])]
            cuts = [(start, min(start + max_length, len(document)), 0) for start in starts]
        else:
            cuts = list(_strided(len(document), max_length, stride))
        spans += [(row, offset + start, offset + stop, context) for start, stop, context in cuts]
        offset += len(document)
    table = np.asarray(spans, dtype=np.int64).reshape(-1, 4)
    joined = np.concatenate(tokens) if tokens else NO_TOKENS
    return WindowedPart(rows, joined, table[:, 0], table[:, 1], table[:, 2], None if stride is None else table[:, 3])


def _strided(length: int, max_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, tokens of context). Each token but the first is a target of one window."""
    done = 0
    for start in range(0, length, stride):
        stop = min(start + max_length, length)
        context = done - start
        if stop - start > max(1, context):
            yield start, stop, context
        done = stop
        if stop == length:
            return
