"""The evaluation rows that the result gained and lost against the source, for report.html.

They are read from the predictions. The content of the rows is shown only if the user asks for it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dsd_refine.data.pictures import FileRows, source_bytes
from dsd_refine.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from dsd_refine.data.splits import Rows

MOST = 10  # rows listed as gained, and as lost, if no content is shown
EXCERPT = 200  # the most characters of a text
SIDE = 160  # the longest side of a picture, in pixels
QUALITY = 80  # the JPEG quality of a picture


@dataclass(frozen=True)
class Content:
    """The content of a row as report.html shows it.

    Attributes:
        picture: A `data:` address of a small picture; None if the row has no picture.
        text: An excerpt of the row's texts; None if the row has no text.
    """

    picture: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Example:
    """An evaluation row with the predictions of both checkpoints.

    Attributes:
        row: The name of the row.
        target: The target as text; None if the row has none.
        before: The source's prediction, or its own value of the metric.
        after: The result's prediction, or its own value of the metric.
        content: The content of the row; None if it is not shown.
    """

    row: str
    target: str | None
    before: str
    after: str
    content: Content | None = None


@dataclass(frozen=True)
class Examples:
    """A choice of the rows that changed.

    Attributes:
        gained: Rows that became right or, if `decided` is False, that improved most.
        lost: Rows that became wrong or, if `decided` is False, that became worse by most.
        all_gained: The number of rows that `gained` is chosen from.
        all_lost: The number of rows that `lost` is chosen from.
        decided: Each row is either right or wrong.
    """

    gained: list[Example]
    lost: list[Example]
    all_gained: int
    all_lost: int
    decided: bool


ContentOf = Callable[[int], Content | None]


def examples(
    predictions: pa.Table,
    *,
    higher_is_better: bool,
    decided: bool,
    shown: int = 0,
    content: ContentOf | None = None,
    arm: str = "refined",
) -> Examples:
    """Choose some of the rows gained and lost.

    If rows are right or wrong, the chosen ones are spread evenly over the data. Otherwise they are
    the rows whose own value of the metric changed most, the largest change first.

    Args:
        predictions: The table of predictions.parquet.
        higher_is_better: False for losses and error rates.
        decided: Each row is either right or wrong.
        shown: How many rows of each kind are listed with their content. 0: at most MOST of each
            kind are listed, without content.
        content: Returns the content of a row.
        arm: The arm that is compared with the source.
    """
    sign = 1.0 if higher_is_better else -1.0
    change = sign * (_row_metric(predictions, arm) - _row_metric(predictions, "baseline"))
    most = shown or MOST
    by_direction = []
    for direction in (1.0, -1.0):
        rows = np.flatnonzero(direction * change > 0)
        chosen = _spread(rows, most) if decided else rows[np.argsort(-direction * change[rows], kind="stable")][:most]
        by_direction.append((len(rows), [_example(predictions, int(row), content if shown else None, arm) for row in chosen]))
    (all_gained, gained), (all_lost, lost) = by_direction
    return Examples(gained, lost, all_gained, all_lost, decided)


def _row_metric(predictions: pa.Table, arm: str) -> np.ndarray[Any, Any]:
    """Each row's own value of the metric, score / count, shape (rows,)."""
    score, count = (np.asarray(predictions[f"{name}_{arm}"], dtype=np.float64) for name in ("score", "count"))
    return score / np.maximum(count, 1.0)


def _spread(rows: np.ndarray[Any, Any], most: int) -> np.ndarray[Any, Any]:
    """At most `most` of the rows, at equal distances, because data are often sorted by class."""
    return rows if len(rows) <= most else rows[np.arange(most) * len(rows) // most]


def _example(predictions: pa.Table, row: int, content: ContentOf | None, result: str) -> Example:
    """Describe one row. `result` is the arm that is compared with the source.

    A language model's row has no prediction. It shows its own value of the metric.
    """

    def answer(arm: str) -> str:
        prediction = predictions[f"prediction_{arm}"][row].as_py()
        return f"{_row_metric(predictions.slice(row, 1), arm)[0]:.4f}" if prediction is None else excerpt(str(prediction))

    target = predictions["target"][row].as_py()
    return Example(
        row=excerpt(str(predictions["row"][row].as_py())),
        target=None if target is None else excerpt(str(target)),
        before=answer("baseline"),
        after=answer(result),
        content=content(row) if content else None,
    )


def excerpt(text: str) -> str:
    """Return the first EXCERPT characters of a text, on one line. A shortened text ends in "…"."""
    text = " ".join(text[: 4 * EXCERPT].split())
    return text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…"


def contents_of(rows: Rows, columns: Mapping[str, Sequence[str]]) -> ContentOf:
    """Return a function that gives the content of a row.

    Args:
        rows: The evaluation rows.
        columns: The names of the columns in use, by kind ("image", "text", "audio", …).
    """

    def content(row: int) -> Content | None:
        position, table = int(rows.numbers[row]), rows.table
        if images := columns.get("image"):
            try:
                (value,) = FileRows(table, images[:1]).columns([position])[images[0]]
                first = next(iter(value), None) if isinstance(value, list) else value  # of a conversation's pictures
                picture = thumbnail(source_bytes(first, table.folder)) if first is not None else None
            except (OSError, DataError):  # the file is gone since it was scored, which must not fail a finished run
                return None
            return Content(picture=picture) if picture else None
        if "audio" in columns or not (names := list(columns.get("text") or columns.get("source", ()))):
            return None
        values = table.rows.select_columns(names)[position]
        return Content(text=excerpt(" | ".join(str(values[name]) for name in names)))

    return content


def thumbnail(raw: bytes) -> str | None:
    """Return a picture as the address of a small JPEG (`data:image/jpeg;base64,…`).

    It is decoded as for a model. None: it cannot be decoded.
    """
    from dsd_refine.tasks.inputs.images import decode

    try:
        picture = decode(raw, channels=3)
    except DataError:
        return None
    picture.thumbnail((SIDE, SIDE))
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
