"""Windows of texts packed into rows of training batches: several stand one after another, and do not see each other."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dsd_refine.data.splits import Rows
from dsd_refine.errors import CheckpointError
from dsd_refine.tasks.base import IGNORED, Batch
from dsd_refine.tasks.inputs.padding import same_but_for_rounding
from dsd_refine.tasks.inputs.windows import WindowedPart

LOOKED_AT = 3  # packed rows that are compared with their windows


@dataclass(frozen=True)
class PackedPart:
    """A part for training, whose units are packed rows: `packs[u]` are the windows of row u, in this order."""

    part: WindowedPart
    packs: list[list[int]]

    @property
    def rows(self) -> Rows:
        """The usable rows."""
        return self.part.rows

    @property
    def units(self) -> int:
        """The number of packed rows."""
        return len(self.packs)

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """The tokens of each packed row, shape (units,)."""
        return np.array([self.part.lengths[pack].sum() for pack in self.packs], dtype=np.int64)

    def row_of(self, unit: int) -> int:
        """The index of the document that the first window of a packed row was cut from."""
        return self.part.row_of(self.packs[unit][0])


def pack_windows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack windows into as few rows as best-fit decreasing finds: the longest first, each into the fullest row that has room.

    Args:
        lengths: The tokens of each window.
        room: The most tokens of a row, at least the longest window.

    Returns:
        The windows of each row, by their numbers.
    """
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # tokens that are left -> rows with so many, the newest last
    rooms: list[int] = []  # the keys that have rows, sorted
    for window in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        place = bisect_left(rooms, lengths[window])
        if place < len(rooms):
            left = rooms[place]
            pack = with_room[left].pop()
            if not with_room[left]:
                del rooms[place]
        else:
            left, pack = room, len(packs)
            packs.append([])
        packs[pack].append(window)
        left -= lengths[window]
        if not with_room[left]:
            insort(rooms, left)
        with_room[left].append(pack)
    return packs


def packed(part: WindowedPart, room: int) -> PackedPart:
    """The part with its windows packed into rows of at most `room` tokens."""
    return PackedPart(part, pack_windows(part.lengths.tolist(), room))


def packed_batch(part: WindowedPart, packs: Sequence[Sequence[int]]) -> Batch:
    """Put the windows of each pack one after another.

    There is no attention mask: `position_ids` count from 0 in each window, and the model keeps windows apart by them.
    `input_ids`, `position_ids` and the targets are int64 of shape packs x longest pack. What fills a row counts as one more
    window, without targets.

    Args:
        part: The windows.
        packs: The windows of each row, by their numbers.
    """
    rows = [_joined(part, windows) for windows in packs]
    ids, positions, targets = (
        torch.nn.utils.rnn.pad_sequence([row[column] for row in rows], batch_first=True, padding_value=fill)
        for column, fill in enumerate((0, -1, IGNORED))
    )
    fill = positions < 0
    positions[fill] = (fill.cumsum(1) - 1)[fill]
    return Batch({"input_ids": ids, "position_ids": positions}, targets, int((targets != IGNORED).sum()))


def _joined(part: WindowedPart, windows: Sequence[int]) -> list[torch.Tensor]:
    """The ids of windows, one after another, the place of each in its window, and what each one predicts."""
    columns: list[list[np.ndarray[Any, Any]]] = [[], [], []]
    for window in windows:
        ids = part.tokens[part.start[window] : part.stop[window]].astype(np.int64)
        targets = np.append(np.where(part.targets(window)[1:], ids[1:], IGNORED), IGNORED)
        for column, values in zip(columns, (ids, np.arange(len(ids)), targets), strict=True):
            column.append(values)
    return [torch.from_numpy(np.concatenate(column)) for column in columns]


def refuse_mixing(logits: Callable[[Mapping[str, torch.Tensor]], torch.Tensor], part: PackedPart, device: torch.device) -> None:
    """Check that packed windows do not see each other: their logits must be those of each window alone, but for rounding.

    Args:
        logits: Computes the logits of inputs, of shape rows x tokens x vocabulary.
        part: The packed rows. A few of those with several windows are compared.
        device: Where the model is.

    Raises:
        CheckpointError: the model mixes them.
    """
    several = [pack[:3] for pack in part.packs if len(pack) > 1][:LOOKED_AT]
    for pack in several:
        together = logits(packed_batch(part.part, [pack]).to(device).inputs)[0]
        alone = [logits(packed_batch(part.part, [[window]]).to(device).inputs)[0] for window in pack]
        if not same_but_for_rounding(together, torch.cat(alone)):
            raise CheckpointError(
                "pack: this model lets a text see the texts before it in a packed row; leave pack out (group_by_length: true "
                "avoids padding too)"
            )
