"""Which rows train, select and judge. No task, no model: rows have content, a label, a name."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsd_refine.data.tables import Reading, Table, role_of
from dsd_refine.errors import DataError

SALT = b"dsd-refine holdout 1"
EVAL_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Examined:
    """What a task says of one row: `digest` of its content, `label` as text (None: has none), `reason` to skip it.

    `texts` are what the row should be turned into, where that is no class: a transcript, captions.
    """

    digest: bytes
    label: str | None = None
    reason: str | None = None
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rows:
    """The used rows of one part, in the data's order. `at` indexes `table.rows`; `labels` are texts ("" without classes).

    `texts` are each row's `Examined.texts`, empty for a task without them.
    """

    table: Table
    at: np.ndarray[Any, Any]
    digests: list[bytes]
    labels: list[str]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    texts: list[tuple[str, ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.at)

    def name(self, i: int) -> str | int:
        return self.table.name(int(self.at[i]))

    def subset(self, chosen: Sequence[int], skipped: list[dict[str, Any]] | None = None) -> Rows:
        """The rows at these positions, in this order."""
        return Rows(
            self.table,
            self.at[np.asarray(chosen, dtype=np.int64)],
            [self.digests[i] for i in chosen],
            [self.labels[i] for i in chosen],
            skipped or [],
            [self.texts[i] for i in chosen] if self.texts else [],
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over content, label and texts of every row in order."""
        digest = hashlib.sha256()
        for content, label, texts in zip(self.digests, self.labels, self.texts or [()] * len(self), strict=True):
            digest.update(content + "\n".join((label, *texts)).encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """The report's `data` entry."""
        return {"rows": len(self), "skipped": self.skipped, "fingerprint": self.fingerprint}


@dataclass(frozen=True)
class Parts:
    """The three parts of a run. `overlap` counts evaluation rows whose content also trains or selects."""

    train: Rows
    holdout: Rows | None
    eval: Rows
    overlap: int
    rule: str
    unused: tuple[str, ...] = ()


def by_role(reading: Reading, spec: str) -> dict[str, Table]:
    """Role (train, validation, test) -> table. Every split has a role of its own, or the data are refused.

    Raises:
        DataError: a split of no known role, or two of one.
    """
    owners: dict[str | None, list[str]] = defaultdict(list)
    for name in reading.tables:
        owners[role_of(name)].append(name)
    if None in owners and len(owners) == 1:
        raise DataError(f"{spec}: has the splits {', '.join(reading.tables)}; none is train, validation or test")
    for role, names in owners.items():
        if role is not None and len(names) > 1:
            raise DataError(f"{spec}: {' and '.join(names)} could each be its {role} split")
    return {role: reading.tables[names[0]] for role, names in owners.items() if role is not None}


def use_rows(table: Table, examined: Sequence[Examined]) -> Rows:
    """The rows of a split that can be used; the others are named with their reasons."""
    used = [i for i, row in enumerate(examined) if row.reason is None]
    skipped = [{"row": table.name(i), "reason": row.reason} for i, row in enumerate(examined) if row.reason is not None]
    return Rows(
        table,
        np.asarray(used, dtype=np.int64),
        [examined[i].digest for i in used],
        [examined[i].label or "" for i in used],
        skipped,
        [examined[i].texts for i in used] if any(row.texts for row in examined) else [],
    )


def divide(tables: dict[str, Rows], evaluation: dict[str, Rows] | None, holdout_share: float) -> Parts:
    """Which rows train, select and judge, as the contract's splits say. A split without labelled rows counts as absent.

    Raises:
        DataError: nothing left to train on or to evaluate on.
    """
    splits = {name: rows for name, rows in tables.items() if len(rows)}
    if "train" not in splits:
        raise DataError(f"no usable training rows{_why(tables.get('train'))}")
    train, test, validation = splits["train"], splits.get("test"), splits.get("validation")
    selecting = validation
    if evaluation is not None:
        given = [evaluation[name] for name in ("test", "validation", "train") if name in evaluation and len(evaluation[name])]
        if not given:
            raise DataError("no usable rows in --eval-data")
        judge, rule = given[0], "--eval-data"
    elif test is not None:
        judge, rule = test, "test"
    elif validation is not None:
        judge, rule, selecting = validation, "validation", None
    else:
        train, judge = carve(train, EVAL_SHARE)
        rule = f"carved ({EVAL_SHARE}) from the training rows"
    if selecting is None and holdout_share:
        train, selecting = carve(train, holdout_share)
        rule += f"; holdout carved ({holdout_share}) from the training rows"
    elif selecting is not None:
        rule += "; holdout is validation"
    if not len(train) or not len(judge):
        raise DataError(f"too few rows: {len(train)} left for training, {len(judge)} for evaluation{_advice(tables)}")
    if selecting is not None and not len(selecting):
        raise DataError(f"too few rows for a holdout; give more data, or --holdout 0 with --keep last{_advice(tables)}")
    seen = {*train.digests, *(selecting.digests if selecting is not None else ())}
    unused = tuple(name for name, rows in tables.items() if rows.skipped and not len(rows))
    return Parts(train, selecting, judge, sum(digest in seen for digest in judge.digests), rule, unused)


def _advice(tables: dict[str, Rows]) -> str:
    """What the reader knows of why the rows are few."""
    return "".join(dict.fromkeys(f"\n{rows.table.advice}" for rows in tables.values() if rows.table.advice))


def _why(rows: Rows | None) -> str:
    if rows is None or not rows.skipped:
        return ": the data has no train split" if rows is None else ""
    reasons = Counter(item["reason"] for item in rows.skipped)
    return f": {len(rows.skipped)} rows were skipped ({', '.join(f'{n} {reason}' for reason, n in reasons.most_common(3))})"


def carve(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """(kept, carved): per class the round(share * n) rows with the smallest salted SHA-256 of content; no seed in it.

    Equal rows stay together, under whatever labels: a group at the border goes over whole, unless that would empty a class.
    """
    by_class: dict[str, list[int]] = defaultdict(list)
    for i, label in enumerate(rows.labels):
        by_class[label].append(i)
    taken: set[bytes] = set()
    for members in by_class.values():
        ordered = sorted((rows.digests[i] for i in members), key=_salted)
        count = round(share * len(ordered))
        while 0 < count < len(ordered) and ordered[count] == ordered[count - 1]:
            count += 1
        if count == len(ordered):
            count = ordered.index(ordered[-1])
        taken.update(ordered[:count])
    for _, members in sorted(by_class.items()):
        content = {rows.digests[i] for i in members}
        if content <= taken:  # what other classes take may be all that this one has
            taken.remove(max(content, key=_salted))
    kept = [i for i, digest in enumerate(rows.digests) if digest not in taken]
    return rows.subset(kept, rows.skipped), rows.subset([i for i, digest in enumerate(rows.digests) if digest in taken])


def _salted(digest: bytes) -> bytes:
    return hashlib.sha256(SALT + digest).digest()
