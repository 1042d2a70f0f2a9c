"""Which columns of a table are used: as asked, by a telling type, by a known name. No task, no model.

Where several columns could each be meant, none is chosen: a silent choice would be another result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets

from dsd_refine.data.names import MOST
from dsd_refine.data.reading import Table
from dsd_refine.data.tables import lacks_head
from dsd_refine.errors import DataError

WIDEST = 40  # characters of a column's name that a message shows
PARSES = ("_parse", "_binary_parse")  # SNLI and MNLI give each sentence's parse beside it
SAMPLE = 1000  # rows that are looked at to tell a column of texts from one of names
PAIRS = (
    ("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("sentence_a", "sentence_b"),
    ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("question", "passage"), ("question", "context"), ("text1", "text2"), ("text_1", "text_2"),
    ("text_a", "text_b"), ("text", "text_pair"), ("query", "document"), ("query", "passage"),
    ("claim", "evidence"),
)  # fmt: skip

# what is beside the content in many data sets: numbers, places, times, who said it
ASIDE = re.compile(
    r"(?:.*_)?(?:id|ids|idx|index|guid|uid|uuid|url|uri|link|date|time|timestamp|year|lang|language|"
    r"locale|split|source|domain|license|author|user|username|speaker|hash|md5|sha256|name|file|"
    r"filename|path|filepath)|.*[a-z]ID|__.*__|unnamed: ?\d+",
)


@dataclass(frozen=True)
class Kind:
    """What a task looks for. `known` are names in ranks: a column of an earlier rank is preferred.

    `feature` is the type of `datasets` that tells such a column. `decides`: where columns of that
    type are there, no other can be it.
    """

    what: str
    known: tuple[tuple[str, ...], ...]
    feature: Any = None
    decides: bool = False
    pairs: bool = False

    @property
    def flag(self) -> str:
        return f"--{self.what}-column"

    def rank(self, name: str) -> int | None:
        """The rank of a column's name, whatever its case; None for an unknown one."""
        plain = name.strip().casefold()
        return next((rank for rank, names in enumerate(self.known) if plain in names), None)


IMAGE = Kind(
    "image",
    (
        ("image", "img", "picture", "photo", "pixel_values", "jpg", "jpeg", "png", "webp"),
        ("image_path", "image_file", "image_file_name", "image_name", "filepath", "file_path",
         "filename", "file_name", "file", "path"),
        ("image_id",),
    ),
    datasets.Image,
    decides=True,
)  # fmt: skip

AUDIO = Kind(
    "audio",
    (
        ("audio", "speech", "clip", "sound", "wav", "flac", "mp3"),
        ("audio_path", "audio_file", "audio_filepath", "filepath", "file_path", "filename",
         "file_name", "file", "path"),
    ),
    datasets.Audio,
    decides=True,
)  # fmt: skip

LABEL = Kind(
    "label",
    (
        ("label", "labels"),
        ("class", "target", "gold_label", "category", "y", "cls", "sentiment", "intent", "emotion", "topic",
         "fine_label", "coarse_label", "label_fine", "label_coarse"),
        ("class_name", "label_name", "label_text", "class_id", "label_id"),
    ),
    datasets.ClassLabel,
)  # fmt: skip

TEXT = Kind(
    "text",
    (("text", "sentence", "content", "document", "review", "review_body", "tweet", "comment", "utterance"),),
    pairs=True,
)

DOCUMENT = replace(TEXT, pairs=False)
TRANSCRIPT = Kind(
    "text",
    (("text", "transcription", "transcript", "sentence"), ("normalized_text", "raw_transcription", "raw_text")),
)

CAPTION = Kind(
    "text",
    (("text", "caption", "captions", "sentence", "sentences", "description", "descriptions"), ("raw",)),
)


class MissingColumn(DataError):
    """A split has no column of the name asked for, or of any known name."""


def column(table: Table, asked: str | None, kind: Kind, taken: Sequence[str] = ()) -> str:
    """The one column of a kind: the one asked for, else by type and name, else the only column of texts.

    `taken` are columns that are used as something else.

    Raises:
        MissingColumn: there is none; lists the columns. DataError: several could each be it.
    """
    if asked is not None:
        return _called(table, asked, kind)
    found = _preferred(table, kind, taken) or (_strings(table, taken) if kind.what == "text" else [])
    known = any(kind.rank(name) is not None or _is_typed(table, name, kind) for name in found)
    if len(found) == 1:
        return found[0]
    if known:
        raise DataError(f"{_listed(found)} could each be the {kind.what} column: name the one that is meant with {kind.flag}")
    looked = ", ".join(name for names in kind.known for name in names)
    raise _missing(table, f"no {kind.what} column found (looked for {looked})", kind)


def choose(table: Table, kinds: Sequence[Kind], asked: Mapping[str, str | None]) -> dict[str, tuple[str, ...]]:
    """What each kind is called in a table, by `Kind.what`; a text may be a pair of columns.

    Raises:
        MissingColumn, DataError: as `column` says, and for a further text beside the ones used.
    """
    chosen: dict[str, tuple[str, ...]] = {}
    missing: dict[str, MissingColumn] = {}
    for kind in sorted(kinds, key=lambda kind: kind.what == "text"):  # a text is what is nothing else
        taken = [name for names in chosen.values() for name in names]
        try:
            chosen[kind.what] = _texts(table, asked[kind.what], kind, taken) if kind.pairs else (
                column(table, asked[kind.what], kind, taken),
            )  # fmt: skip
        except MissingColumn as error:
            missing[kind.what] = error
    for kind in kinds:
        if kind.what in missing:
            raise missing[kind.what]
    _refuse_two_uses(chosen)
    return {kind.what: chosen[kind.what] for kind in kinds}


def _refuse_two_uses(chosen: Mapping[str, tuple[str, ...]]) -> None:
    """Raises DataError for a column that is used as two things: a label in the text is the answer itself."""
    uses: dict[str, list[str]] = {}
    for what, names in chosen.items():
        for name in names:
            uses.setdefault(name, []).append(what)
    for name, whats in uses.items():
        if len(whats) > 1:
            flags = " or ".join(f"--{what}-column" for what in dict.fromkeys(whats))
            raise DataError(f"the column {name!r} would be read as {' and as '.join(whats)}: name another one with {flags}")


def in_short(names: Sequence[str]) -> str:
    """Names of columns in a line: the first dozen, each cut to WIDEST characters, and how many there are."""
    cut = [name if len(name) <= WIDEST else f"{name[: WIDEST - 1]}…" for name in names[:MOST]]
    return ", ".join(cut) + (f", … ({len(names)} in all)" if len(names) > MOST else "")


def aligned(
    table: Table,
    chosen: Mapping[str, tuple[str, ...]],
    kinds: Sequence[Kind],
    asked: Mapping[str, str | None],
    *,
    may_lack_label: bool,
) -> Table:
    """The table of another split, with the columns used called as in the split that trains.

    Raises:
        MissingColumn: a column that it has not, under this or another known name. DataError: several could each be meant.
    """
    for kind in sorted(kinds, key=lambda kind: kind is not LABEL):
        for name in chosen[kind.what]:
            if name in table.rows.column_names:
                continue
            by_name = asked[kind.what] is not None or len(chosen[kind.what]) > 1
            try:
                own = _called(table, name, kind)
            except MissingColumn as error:
                try:
                    own = column(table, name if by_name else None, kind)
                except MissingColumn:
                    if kind is LABEL and may_lack_label:  # as a test split whose labels nobody gives away
                        return table
                    raise MissingColumn(f"{table.origin}: {error}") from None
            table = replace(table, rows=table.rows.rename_column(own, name))
    return table


def unused_columns(table: Table, chosen: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The columns of a table that nothing is read from."""
    used = {name for names in chosen.values() for name in names}
    return [name for name in table.rows.column_names if name not in used]


def _texts(table: Table, asked: str | None, kind: Kind, taken: Sequence[str]) -> tuple[str, ...]:
    """One text column, or the two of a pair; a further column of texts is refused, for which is meant is not known."""
    if asked is not None:  # a name may hold a comma itself
        names = [asked] if asked in table.rows.column_names else [name.strip() for name in asked.split(",")]
        if len(names) > 2:
            raise DataError(f"{kind.flag} {asked}: a text is one column, or two for a pair; these are {len(names)}")
        return tuple(_called(table, name, kind) for name in names)
    plain = {name.strip().casefold(): name for name in table.rows.column_names if name not in taken}
    pairs = [(plain[a], plain[b]) for a, b in PAIRS if a in plain and b in plain]
    used = pairs[0] if pairs else (column(table, None, kind, taken),)
    aside = {*used, *(name + end for name in used for end in PARSES)}
    further = [name for name in _strings(table, taken) if name not in aside and _is_text(table, name, kind)]
    if further:
        every = [name for name in table.rows.column_names if name in (*used, *further)]
        raise DataError(
            f"{_listed(every)} are columns of texts: name the one that the model is to read with {kind.flag} NAME, "
            f"or two for a pair, such as {kind.flag} {','.join(used if pairs else every[:2])}"
        )
    return used


def _called(table: Table, asked: str, kind: Kind) -> str:
    columns = table.rows.column_names
    alike = [name for name in columns if name.strip().casefold() == asked.strip().casefold()]
    if asked in columns:
        return asked
    if len(alike) != 1:
        raise _missing(table, f"no column {asked!r}", kind)
    return str(alike[0])


def _missing(table: Table, what: str, kind: Kind) -> MissingColumn:
    named = f"{what}; the data has {in_short(table.rows.column_names)}."
    if lacks_head(table):
        head = "The first line seems to be data, and no head: put a line of column names above it, such as text,label"
        return MissingColumn(f"{named} {head}; or name the column with {kind.flag}")
    if str(table.origin).endswith(".txt") and kind.what != "text":
        table_of = f"give a CSV, JSON-lines or Parquet file with a column of each, text and {kind.what}"
        return MissingColumn(f"{named} A .txt file holds texts alone: {table_of}")
    return MissingColumn(f"{named} Name it with {kind.flag}")


def _preferred(table: Table, kind: Kind, taken: Sequence[str]) -> list[str]:
    """The columns that could be it by type or name: those of the best rank, and any whose type says more than that rank."""
    free = [name for name in table.rows.column_names if name not in taken]
    typed = [name for name in free if _is_typed(table, name, kind)]
    candidates = typed if typed and kind.decides else [name for name in free if name in typed or kind.rank(name) is not None]
    candidates = [name for name in candidates if _may_hold(table, name, kind)] or candidates
    # a column of a telling type and no known name stands with the second rank
    ranks = {name: 1 if (rank := kind.rank(name)) is None else rank for name in candidates}
    best = [name for name in candidates if ranks[name] == min(ranks.values())]
    untyped = not kind.decides and not any(name in typed for name in best)
    return [name for name in candidates if name in best or (untyped and name in typed)]


def _may_hold(table: Table, name: str, kind: Kind) -> bool:
    """Is it not empty, and for a text no number?"""
    dtype = str(getattr(table.rows.features[name], "dtype", ""))
    return dtype != "null" and not (kind.what == "text" and re.match("u?int|float|bool", dtype))


def _is_typed(table: Table, name: str, kind: Kind) -> bool:
    return kind.feature is not None and isinstance(table.rows.features[name], kind.feature)


def _strings(table: Table, taken: Sequence[str]) -> list[str]:
    """Columns of strings that may hold the content: by their names no addresses, times or labels."""
    kinds = {name: getattr(feature, "dtype", None) for name, feature in table.rows.features.items()}
    strings = [name for name, kind in kinds.items() if kind in ("string", "large_string") and name not in taken]
    return [name for name in strings if not _is_aside(name)]


def _is_aside(name: str) -> bool:
    return any(ASIDE.fullmatch(form) for form in (name, name.casefold())) or LABEL.rank(name) is not None


def _is_text(table: Table, name: str, kind: Kind) -> bool:
    """Does it hold texts, and not one value, or the names of a few things? A known name is believed."""
    values = table.rows.select_columns([name])[:SAMPLE][name]
    texts = [value.strip() for value in values if isinstance(value, str) and value.strip()]
    several = len(set(texts)) > 1
    words = sum(len(text.split()) > 1 for text in texts)
    return several and (kind.rank(name) is not None or (2 * words >= len(texts) and 4 * len(set(texts)) >= len(texts)))


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) <= MOST else in_short(names)
