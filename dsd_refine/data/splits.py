"""Decide which rows train, which select (the holdout), and which evaluate.

This code knows no task and no model. A row has content, a label and a name.
"""

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
EVAL_SHARE = 0.2  # share of the rows that is carved for evaluation
FLAGS = {"test": "--eval-split", "validation": "--holdout-split"}


@dataclass(frozen=True, slots=True)
class Examined:
    """What a task found in one row.

    Attributes:
        digest: A hash of the row's content.
        label: The label as text; None if the row has none.
        reason: Why the row is skipped; None if it is used.
        texts: The target texts of a task without classes: a transcript, or captions.
        length: How long the row is as an input, in tokens or samples of sound. 0: rows have no length.
    """

    digest: bytes
    label: str | None = None
    reason: str | None = None
    texts: tuple[str, ...] = ()
    length: int = 0


@dataclass(frozen=True)
class Rows:
    """The used rows of a split or of a part of the run, in the data's order.

    Attributes:
        table: The table that they are in.
        numbers: Their numbers in `table.rows`, shape (rows,).
        digests: A hash of each row's content.
        labels: Each row's label as text; "" in a task without classes.
        skipped: The rows that are not used: `{row, reason}`.
        texts: Each row's target texts. Empty in a task without them.
        why: The rule by which these rows have their role.
        lengths: How long each row is as an input, shape (rows,). None: rows have no length.
    """

    table: Table
    numbers: np.ndarray[Any, Any]
    digests: list[bytes]
    labels: list[str]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    texts: list[tuple[str, ...]] = field(default_factory=list)
    why: str = ""
    lengths: np.ndarray[Any, Any] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, i: int) -> str | int:
        """Return the name of a row for the user: a file's name, or the row's number in the table."""
        return self.table.name(int(self.numbers[i]))

    def subset(self, chosen: Sequence[int], skipped: list[dict[str, Any]] | None = None) -> Rows:
        """Return the rows at these positions of `at`, in this order."""
        places = np.asarray(chosen, dtype=np.int64)
        return Rows(
            self.table,
            self.numbers[places],
            [self.digests[i] for i in chosen],
            [self.labels[i] for i in chosen],
            skipped or [],
            [self.texts[i] for i in chosen] if self.texts else [],
            lengths=None if self.lengths is None else self.lengths[places],
        )

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 over content, label and texts of all rows in order."""
        digest = hashlib.sha256()
        for content, label, texts in zip(self.digests, self.labels, self.texts or [()] * len(self), strict=True):
            digest.update(content + "\n".join((label, *texts)).encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """Return the rows' entry in the report's `data`."""
        return {"rows": len(self), "skipped": self.skipped, "fingerprint": self.fingerprint}


@dataclass(frozen=True)
class Parts:
    """The three parts of a run's data.

    Attributes:
        train: The rows that train.
        holdout: The rows that select between epochs and sparsities, or None.
        eval: The rows that evaluate the arms.
        overlap: The number of evaluation rows whose content is also in one of the other parts.
        rule: How the parts were chosen, in words.
        unused: Names of splits without a usable row.
    """

    train: Rows
    holdout: Rows | None
    eval: Rows
    overlap: int
    rule: str
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Splits:
    """The splits of DATA by role (train, validation, test).

    `unused` names the other splits, each with a reason.
    """

    tables: dict[str, Table]
    unused: tuple[str, ...] = ()


def by_role(
    reading: Reading, spec: str, *, evaluates: str | None = None, selects: str | None = None, use: str = "all"
) -> Splits:
    """Give the splits of DATA their roles.

    We do not guess. A name may only contain the word of a role (`validation_matched`,
    `test_small`). If such a split could evaluate or select, the data are refused until the user
    says which one does.

    Args:
        reading: What DATA was read as.
        spec: DATA as the user wrote it.
        evaluates: The split that `--eval-split` names.
        selects: The split that `--holdout-split` names.
        use: "all", or "train" if other data evaluate, or "evaluate" if these data only evaluate.

    Raises:
        DataError: A named split does not exist, or no split trains, or several could have one role.
    """
    names = list(reading.tables)
    given = _named_by_option(names, spec, evaluates, selects, trains=use != "evaluate")
    rest = [name for name in names if name not in given.values()]
    exact: dict[str | None, list[str]] = defaultdict(list)
    for name in rest:
        exact[role_of(name)].append(name)
    if use != "train" and "test" not in given and len(names) > 1:
        _refuse_unclear(exact, given, names, spec)
    named = {role: held[0] for role, held in exact.items() if role is not None and len(held) == 1}
    roles = named | given
    if "validation" in given and "validation" in named and use == "all":  # another split selects, so this one evaluates
        roles.setdefault("test", named["validation"])
    if use == "evaluate":
        roles = _evaluating_roles(roles, given, names, spec)
    else:
        roles["train"] = _training_split(exact, rest, names, spec)
    if use == "train":
        roles.pop("test", None)
    tables = {role: _placed(reading, name, spec, FLAGS[role] if role in given else "") for role, name in roles.items()}
    others = " (--eval-data evaluates)" if use == "train" else ""
    left = [name for name in names if name not in roles.values()]
    lines = [f"split {name}: not used{others if role_of(name) == 'test' else ''}" for name in left]
    return Splits(tables, shortened(lines))


def _named_by_option(
    names: Sequence[str], spec: str, evaluates: str | None, selects: str | None, *, trains: bool
) -> dict[str, str]:
    """The splits that options name, by role."""
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
    """Refuse splits that could evaluate or select by their names, while nobody says which one does.

    If the user has named the split that selects, only splits that could evaluate count.
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


def _training_split(exact: dict[str | None, list[str]], rest: Sequence[str], names: Sequence[str], spec: str) -> str:
    """The split that trains: the one with that name, else the only one with that word, else the
    only one of all.
    """
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


def _evaluating_roles(roles: dict[str, str], given: dict[str, str], names: Sequence[str], spec: str) -> dict[str, str]:
    """The splits that may evaluate, of data that only evaluate: the named one, else those with a
    role, else the only one.
    """
    if given:
        return {"test": given["test"]}
    if not roles and len(names) == 1:
        return {"test": names[0]}
    if not roles:
        raise DataError(f"{spec}: has the splits {listed(names)}; which evaluates is not known: give --eval-split NAME")
    return roles


def where_of(spec: str) -> tuple[str, Path | None]:
    """Return the name of DATA for the user (the last part of a path), and its path.

    None: a data set of the Hub.
    """
    folder, colon, config = spec.rpartition(":")
    for place, more in ((spec, ""), (folder, colon + config)):
        if place and Path(place).exists():
            return Path(place).resolve().name + more, Path(place)
    return spec, None


def is_on_hub(spec: str) -> bool:
    """Return whether DATA is the name of a data set of the Hub, and no path on this machine."""
    named = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", spec) and not spec.startswith(".")
    return bool(named) and where_of(spec)[1] is None


def _placed(reading: Reading, name: str, spec: str, option: str) -> Table:
    """Add to a table where it is in the data.

    Paths start at DATA, which is called by its last name.
    """
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
    """Return the rows of a split that can be used.

    The other rows are in `skipped`, each with a reason.
    """
    used = [i for i, row in enumerate(examined) if row.reason is None]
    skipped = [{"row": table.name(i), "reason": row.reason} for i, row in enumerate(examined) if row.reason is not None]
    lengths = np.array([examined[i].length for i in used], dtype=np.int64)
    return Rows(
        table,
        np.asarray(used, dtype=np.int64),
        [examined[i].digest for i in used],
        [examined[i].label or "" for i in used],
        skipped,
        [examined[i].texts for i in used] if any(row.texts for row in examined) else [],
        lengths=lengths if lengths.any() else None,
    )


def divide(tables: dict[str, Rows], evaluation: dict[str, Rows] | None, holdout_share: float) -> Parts:
    """Decide which rows train, select and evaluate. A split without usable rows counts as absent.

    Args:
        tables: The rows of DATA by role: train, validation, test.
        evaluation: The rows of the evaluation data by role, or None.
        holdout_share: Share of the training rows to carve as a holdout, if no split is one. 0:
            none.

    Raises:
        DataError: No rows are left to train or to evaluate on, or a split that the user named has
            no usable rows.
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
        usable = [evaluation[name] for name in ("test", "validation", "train") if name in evaluation and len(evaluation[name])]
        if not usable:
            raise DataError(f"no usable rows in --eval-data{''.join(map(_why, evaluation.values()))}")
        judge, rule = usable[0], "--eval-data"
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
    judge = replace(judge, why=_option_of(judge) or rule)
    if selecting is None and holdout_share:
        whole = train
        train, selecting = carve(train, holdout_share)
        selecting = replace(selecting, why=f"holdout carved ({holdout_share}) from the training rows")
        if not len(selecting):
            raise DataError(_no_holdout(whole, holdout_share))
    elif selecting is not None:
        selecting = replace(selecting, why=f"holdout is {_option_of(selecting) or 'validation'}")
    if not len(train):
        raise DataError(f"too few rows: {len(train)} left for training, {len(judge)} for evaluation{_advice(train)}")
    seen = {*train.digests, *(selecting.digests if selecting is not None else ())}
    unused = tuple(name for name, rows in tables.items() if rows.skipped and not len(rows))
    rule = "; ".join([judge.why, *([selecting.why] if selecting is not None else [])])
    return Parts(train, selecting, judge, sum(digest in seen for digest in judge.digests), rule, unused)


def _advice(rows: Rows) -> str:
    """Why rows of a table with few rows were skipped, and the reader's advice on it, or nothing."""
    skipped = f". Beside these rows{_why(rows).removeprefix(':')}" if rows.skipped else ""
    return skipped + (f"\n{rows.table.advice}" if rows.table.advice else "")


def _option_of(rows: Rows) -> str:
    """The option that names these rows' split, with the name. Empty: no option does."""
    return f"{rows.table.option} {rows.table.split}" if rows.table.option else ""


def _sizes(rows: Rows) -> str:
    """The number of rows of a class, in words."""
    counts = Counter(rows.labels)
    least, most = min(counts.values()), max(counts.values())
    number = str(most) if least == most else f"{least} to {most}"
    return (
        f"the {number} row{'' if most == 1 else 's'} of each class"
        if len(counts) > 1
        else f"{most} row{'' if most == 1 else 's'}"
    )


def _no_evaluation(rows: Rows) -> str:
    """Say why no evaluation rows could be carved, and what to do."""
    return (
        f"too few rows: {EVAL_SHARE} of {_sizes(rows)} rounds to no row that evaluates. Give rows to evaluate on: "
        f"--eval-data, or a test split{_advice(rows)}"
    )


def _no_holdout(rows: Rows, share: float) -> str:
    """Say why no holdout could be carved, and which share would take rows."""
    sizes = [count for count in Counter(rows.labels).values() if count > 1]
    larger = math.ceil(100 / min(sizes)) / 100 if sizes else 0.0  # takes a row of each class that has two
    taken = carve(rows, larger)[1] if sizes else rows.subset([])
    of_classes = f" of {len(set(taken.labels))} classes" if len(set(taken.labels)) > 1 else ""
    takes = f"--holdout {larger:g} takes {len(taken)}{of_classes}; or " if len(taken) else ""
    return (
        f"too few rows for a holdout: {share:g} of {_sizes(rows)} rounds to no row. {takes}"
        f"name a split that selects, --holdout-split NAME, or give --holdout 0 with --keep last{_advice(rows)}"
    )


def _why(rows: Rows | None) -> str:
    """Say why a split has no usable rows."""
    if rows is None or not rows.skipped:
        return ": the data has no train split" if rows is None else ""
    reasons = Counter(item["reason"] for item in rows.skipped)
    return f": {len(rows.skipped)} rows were skipped ({', '.join(f'{n} {reason}' for reason, n in reasons.most_common(3))})"


def carve(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """Carve a share of the rows of each class.

    Of n rows of a class, the round(share * n) with the smallest salted SHA-256 of their content are
    carved. The result does not depend on the seed. Equal rows stay together, also if their labels
    differ: all of them are carved, unless that would leave a class without rows.

    Returns:
        The rows that stay, and the carved rows.
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
        if content <= taken:  # equal rows of other classes may be all that this class has
            taken.remove(max(content, key=_salted))
    kept = [i for i, digest in enumerate(rows.digests) if digest not in taken]
    return rows.subset(kept, rows.skipped), rows.subset([i for i, digest in enumerate(rows.digests) if digest in taken])


def _salted(digest: bytes) -> bytes:
    return hashlib.sha256(SALT + digest).digest()
