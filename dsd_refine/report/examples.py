"""Rows that the result gained and lost against the source, for report.html: from the predictions, with content where asked."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dsd_refine.data.tables import raw_bytes
from dsd_refine.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from dsd_refine.data.splits import Rows

MOST = 10  # rows of a kind that are listed where no content is asked for
EXCERPT = 200  # characters of a text
SIDE = 160  # pixels: the longest side of a picture
QUALITY = 80  # of its JPEG


@dataclass(frozen=True)
class Content:
    """What a row holds, for a reader: the address of an inline picture (`data:`), an excerpt of its texts, or both."""

    picture: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Example:
    """An evaluation row with what the source (`before`) and the result (`after`) made of it."""

    row: str
    target: str | None
    before: str
    after: str
    content: Content | None = None


@dataclass(frozen=True)
class Examples:
    """`all_gained` and `all_lost` count the rows that `gained` and `lost` are taken from.

    `decided`: a row is right or wrong; else gained are the rows that improved most.
    """

    gained: list[Example]
    lost: list[Example]
    all_gained: int
    all_lost: int
    decided: bool


ContentOf = Callable[[int], Content | None]


def examples(
    predictions: pa.Table, *, higher_is_better: bool, decided: bool, shown: int = 0, content: ContentOf | None = None
) -> Examples:
    """Rows gained and lost, at most MOST of each; with `shown` so many of each, with their content.

    Of right and wrong rows, those taken are spread evenly over the data. Else they are the rows whose own score changed
    most, the largest change first.
    """
    sign = 1.0 if higher_is_better else -1.0
    change = sign * (_rate(predictions, "refined") - _rate(predictions, "baseline"))
    most = shown or MOST
    found = []
    for direction in (1.0, -1.0):
        rows = np.flatnonzero(direction * change > 0)
        taken = _spread(rows, most) if decided else rows[np.argsort(-direction * change[rows], kind="stable")][:most]
        found.append((len(rows), [_example(predictions, int(row), content if shown else None) for row in taken]))
    (all_gained, gained), (all_lost, lost) = found
    return Examples(gained, lost, all_gained, all_lost, decided)


def _rate(predictions: pa.Table, arm: str) -> np.ndarray[Any, Any]:
    """A row's own value of the metric: its score over its count."""
    score, count = (np.asarray(predictions[f"{name}_{arm}"], dtype=np.float64) for name in ("score", "count"))
    return score / np.maximum(count, 1.0)


def _spread(rows: np.ndarray[Any, Any], most: int) -> np.ndarray[Any, Any]:
    """`most` of the rows, at equal distances: data are often sorted by class."""
    return rows if len(rows) <= most else rows[np.arange(most) * len(rows) // most]


def _example(predictions: pa.Table, row: int, content: ContentOf | None) -> Example:
    """A row without a prediction in words (a language model's) shows its own value of the metric."""

    def said(arm: str) -> str:
        prediction = predictions[f"prediction_{arm}"][row].as_py()
        return f"{_rate(predictions.slice(row, 1), arm)[0]:.4f}" if prediction is None else excerpt(str(prediction))

    target = predictions["target"][row].as_py()
    return Example(
        row=excerpt(str(predictions["row"][row].as_py())),
        target=None if target is None else excerpt(str(target)),
        before=said("baseline"),
        after=said("refined"),
        content=content(row) if content else None,
    )


def excerpt(text: str) -> str:
    """The first EXCERPT characters of a text on one line; one that is cut ends in a mark that says so."""
    text = " ".join(text[: 4 * EXCERPT].split())
    return text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…"


def contents_of(rows: Rows, columns: Mapping[str, Sequence[str]]) -> ContentOf:
    """Row -> what it holds: `columns` are the names of those used, by what they are (image, text, audio, …)."""

    def content(row: int) -> Content | None:
        place, table = int(rows.numbers[row]), rows.table
        if images := columns.get("image"):
            try:
                picture = thumbnail(raw_bytes(table, images[0], place))
            except OSError:  # gone since it was scored: no reason to lose a finished run
                return None
            return Content(picture=picture) if picture else None
        if "audio" in columns or not (names := list(columns.get("text", ()))):
            return None
        held = table.rows.select_columns(names)[place]
        return Content(text=excerpt(" | ".join(str(held[name]) for name in names)))

    return content


def thumbnail(raw: bytes) -> str | None:
    """A picture, decoded as for a model, as the address of a small JPEG (`data:image/jpeg;base64,…`).

    None where it cannot be decoded.
    """
    from dsd_refine.tasks.inputs.images import decode

    try:
        picture = decode(raw, channels=3)
    except DataError:
        return None
    picture.thumbnail((SIDE, SIDE))
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode()
