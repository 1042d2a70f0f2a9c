"""Which rows train, select and judge. No task, no model: rows have content, a label, a name."""

from __future__ import annotations

import glob
import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dsd_refine.data.names import listed
from dsd_refine.data.reading import Reading, Table, role_of, shortened, speaks_of
from dsd_refine.errors import DataError

SALT = b"dsd-refine holdout 1"
EVAL_SHARE = 0.2
FLAGS = {"test": "--eval-split", "validation": "--holdout-split"}


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

    `texts` are each row's `Examined.texts`, empty for a task without them. `why` is the rule by which these rows are the part.
    """

    table: Table
    at: np.ndarray[Any, Any]
    digests: list[bytes]
    labels: list[str]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    texts: list[tuple[str, ...]] = field(default_factory=list)
    why: str = ""

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

    @cached_property
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


@dataclass(frozen=True)
class Splits:
    """The splits of one DATA that are used, by role (train, validation, test); `unused` names the others with the reason."""

    tables: dict[str, Table]
    unused: tuple[str, ...] = ()


def by_role(
    reading: Reading, spec: str, *, evaluates: str | None = None, selects: str | None = None, use: str = "all"
) -> Splits:
    """Give the splits of DATA their roles. `evaluates` and `selects` name splits (`--eval-split`, `--holdout-split`).

    A split whose name speaks of a role without being its name (`validation_matched`, `test_small`) is no guess of ours: while
    it could be the one that evaluates or selects, the data are refused. `use`: "all", "train" (other data evaluate), or
    "evaluate" (these only evaluate).

    Raises:
        DataError: no such split, none that trains, or several that could each have a role.
    """
    names = list(reading.tables)
    given = _given(names, spec, evaluates, selects, trains=use != "evaluate")
    rest = [name for name in names if name not in given.values()]
    exact: dict[str | None, list[str]] = defaultdict(list)
    for name in rest:
        exact[role_of(name)].append(name)
    if use != "train" and "test" not in given and len(names) > 1:
        _refuse_unclear(exact, given, names, spec)
    named = {role: held[0] for role, held in exact.items() if role is not None and len(held) == 1}
    roles = named | given
    if "validation" in given and "validation" in named and use == "all":  # what selects is named: the other may judge
        roles.setdefault("test", named["validation"])
    if use == "evaluate":
        roles = _judging(roles, given, names, spec)
    else:
        roles["train"] = _training(exact, rest, names, spec)
    if use == "train":
        roles.pop("test", None)
    tables = {role: _placed(reading, name, spec, FLAGS[role] if role in given else "") for role, name in roles.items()}
    others = " (--eval-data evaluates)" if use == "train" else ""
    left = [name for name in names if name not in roles.values()]
    lines = [f"split {name}: not used{others if role_of(name) == 'test' else ''}" for name in left]
    return Splits(tables, shortened(lines))


def _given(names: Sequence[str], spec: str, evaluates: str | None, selects: str | None, *, trains: bool) -> dict[str, str]:
    """Role -> the split that an option names for it."""
    given = {}
    for role, asked in (("test", evaluates), ("validation", selects)):
        if asked is None:
            continue
        alike = [name for name in names if name == asked] or [n for n in names if n.casefold() == asked.casefold()]
        if len(alike) != 1:
            raise DataError(f"{FLAGS[role]} {asked}: {spec} has no split of that name; it has {listed(names)}")
        if trains and (role_of(alike[0]) == "train" or len(names) == 1):
            raise DataError(f"{FLAGS[role]} {asked}: that split trains; {spec} has {listed(names)}")
        given[role] = alike[0]
    if len(given) == 2 and given["test"] == given["validation"]:
        raise DataError(f"--eval-split and --holdout-split both name {given['test']}: rows that select cannot judge")
    return given


def _refuse_unclear(exact: dict[str | None, list[str]], given: dict[str, str], names: Sequence[str], spec: str) -> None:
    """Refuse while a split that speaks of evaluating or selecting is spoken for by nobody.

    Once the split that selects is named, only those matter that could be the one that judges.
    """
    near = {role: [name for name in exact[None] if speaks_of(name) == role] for role in ("test", "validation")}
    unclear = []
    for role in ("test", "validation"):
        if role == "validation" and "validation" in given and len(exact["test"]) == 1:
            continue
        unclear += near[role] + (exact[role] if near[role] or len(exact[role]) > 1 else [])
    if unclear:
        raise DataError(
            f"{spec}: has the splits {listed(names)}. Which of {listed(unclear)} evaluates is not known: "
            "give --eval-split NAME, and --holdout-split NAME for one that selects"
        )


def _training(exact: dict[str | None, list[str]], rest: Sequence[str], names: Sequence[str], spec: str) -> str:
    """The split that trains: by its name, else the only one that speaks of it, else the only one there is."""
    for known in (exact["train"], [name for name in exact[None] if speaks_of(name) == "train"]):
        if len(known) == 1:
            return known[0]
        if known:
            raise DataError(
                f"{spec}: has the splits {listed(names)}. {' and '.join(known)} could each be its train split: "
                "give the one that is meant as --data"
            )
    if len(names) == 1 and speaks_of(names[0]) is None:
        return names[0]
    only = f"has only the split {names[0]}" if len(names) == 1 else f"has the splits {listed(names)}"
    raise DataError(f"{spec}: {only}; none is train, and which is to train is not known")


def _judging(roles: dict[str, str], given: dict[str, str], names: Sequence[str], spec: str) -> dict[str, str]:
    """What may evaluate, of data that only evaluate: the split named, else those with a role, else the only one."""
    if given:
        return {"test": given["test"]}
    if not roles and len(names) == 1:
        return {"test": names[0]}
    if not roles:
        raise DataError(f"{spec}: has the splits {listed(names)}; which evaluates is not known: give --eval-split NAME")
    return roles


def where_of(spec: str) -> tuple[str, Path | None]:
    """(what DATA is called, where it lies): a path by its last name; None for a data set of the Hub."""
    folder, colon, config = spec.rpartition(":")
    for place, more in ((spec, ""), (folder, colon + config)):
        if place and Path(place).exists():
            return Path(place).resolve().name + more, Path(place)
    return spec, None


def is_on_hub(spec: str) -> bool:
    """Is it the name of a data set of the Hub, and nothing that lies here?"""
    named = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", spec) and not spec.startswith(".")
    return bool(named) and where_of(spec)[1] is None


def _placed(reading: Reading, name: str, spec: str, option: str) -> Table:
    """The table with where it stands among the data: paths count from DATA, which is called by its last name."""
    table = reading.tables[name]
    data, path = where_of(spec)
    if path is None or not path.is_dir():
        split = name if path is None or len(reading.tables) > 1 else ""
        return replace(table, data=data, origin=data, split=split, option=option)
    if table.names is not None:  # a class may be called train
        own = len(reading.tables) > 1 or all(file.startswith(f"{name}/") for file in table.names)
    else:
        own = len(reading.tables) > 1 or (path / name).exists() or any(path.glob(f"{glob.escape(name)}.*"))
    inner = table.origin.rstrip("/")
    if Path(inner).is_absolute() or (inner == name and not own):
        inner = ""
    inside = inner and inner != data and not inner.startswith(f"{data}/")
    origin = f"{data}/{inner}" if inside else inner or data
    return replace(table, data=data, origin=origin, split=name if own else "", option=option)


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
        DataError: nothing left to train on or to evaluate on, or a split that was named has no usable rows.
    """
    for rows in [*tables.values(), *(evaluation or {}).values()]:
        if rows.table.option and not len(rows):
            raise DataError(f"{rows.table.option} {rows.table.split}: the split has no usable rows{_why(rows)}")
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
        judge, rule = test, role_of(test.table.split) or "test"
    elif validation is not None and not validation.table.option:
        judge, rule, selecting = validation, "validation", None
    else:
        whole = train
        train, judge = carve(train, EVAL_SHARE)
        rule = f"carved ({EVAL_SHARE}) from the training rows"
        if not len(judge):
            raise DataError(_no_evaluation(whole))
    judge = replace(judge, why=_chosen(judge) or rule)
    if selecting is None and holdout_share:
        whole = train
        train, selecting = carve(train, holdout_share)
        selecting = replace(selecting, why=f"holdout carved ({holdout_share}) from the training rows")
        if not len(selecting):
            raise DataError(_no_holdout(whole, holdout_share))
    elif selecting is not None:
        selecting = replace(selecting, why=f"holdout is {_chosen(selecting) or 'validation'}")
    if not len(train):
        raise DataError(f"too few rows: {len(train)} left for training, {len(judge)} for evaluation{_advice(train)}")
    seen = {*train.digests, *(selecting.digests if selecting is not None else ())}
    unused = tuple(name for name, rows in tables.items() if rows.skipped and not len(rows))
    rule = "; ".join([judge.why, *([selecting.why] if selecting is not None else [])])
    return Parts(train, selecting, judge, sum(digest in seen for digest in judge.digests), rule, unused)


def _advice(rows: Rows) -> str:
    """What the reader knows of why the rows are few."""
    return f"\n{rows.table.advice}" if rows.table.advice else ""


def _chosen(rows: Rows) -> str:
    """The option that names these rows' split, with the name."""
    return f"{rows.table.option} {rows.table.split}" if rows.table.option else ""


def _sizes(rows: Rows) -> str:
    """How many rows a class has, in words."""
    counts = Counter(rows.labels)
    least, most = min(counts.values()), max(counts.values())
    number = str(most) if least == most else f"{least} to {most}"
    return (
        f"the {number} row{'' if most == 1 else 's'} of each class"
        if len(counts) > 1
        else f"{most} row{'' if most == 1 else 's'}"
    )


def _no_evaluation(rows: Rows) -> str:
    """Why no evaluation rows could be carved, and what to do."""
    return (
        f"too few rows: {EVAL_SHARE} of {_sizes(rows)} rounds to no row that evaluates. Give rows to evaluate on: "
        f"--eval-data, or a test split{_advice(rows)}"
    )


def _no_holdout(rows: Rows, share: float) -> str:
    """Why no holdout could be carved, and which share would: one that takes a row of each class that has two."""
    sizes = [count for count in Counter(rows.labels).values() if count > 1]
    larger = math.ceil(100 / min(sizes)) / 100 if sizes else 0.0  # a row of the smallest class that has two
    taken = carve(rows, larger)[1] if sizes else rows.subset([])
    of_classes = f" of {len(set(taken.labels))} classes" if len(set(taken.labels)) > 1 else ""
    takes = f"--holdout {larger:g} takes {len(taken)}{of_classes}; or " if len(taken) else ""
    return (
        f"too few rows for a holdout: {share:g} of {_sizes(rows)} rounds to no row. {takes}"
        f"name a split that selects, --holdout-split NAME, or give --holdout 0 with --keep last{_advice(rows)}"
    )


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
