"""Find the columns of a table to use: as the user asks, by their type, or by a known name.

If several columns could be meant, the data are refused. A silent choice could give a wrong result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import pyarrow

from dsd_refine.data.conversations import COLUMN_SETS
from dsd_refine.data.names import MOST
from dsd_refine.data.reading import Table
from dsd_refine.data.tables import lacks_head
from dsd_refine.errors import DataError

WIDEST = 40  # characters of a column's name that a message shows
PARSES = ("_parse", "_binary_parse")  # columns of SNLI and MNLI with the parse of each sentence
SAMPLE = 1000  # rows that are read to tell a column of texts from one of names
PAIRS = (
    ("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("sentence_a", "sentence_b"),
    ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("question", "passage"), ("question", "context"), ("text1", "text2"), ("text_1", "text_2"),
    ("text_a", "text_b"), ("text", "text_pair"), ("query", "document"), ("query", "passage"),
    ("claim", "evidence"),
)  # fmt: skip

# Names of columns beside the content: numbers, places, times, authors.
ASIDE = re.compile(
    r"(?:.*_)?(?:id|ids|idx|index|guid|uid|uuid|url|uri|link|date|time|timestamp|year|lang|language|"
    r"locale|split|source|domain|license|author|user|username|speaker|hash|md5|sha256|name|file|"
    r"filename|path|filepath)|.*[a-z]ID|__.*__|unnamed: ?\d+",
)


@dataclass(frozen=True)
class Kind:
    """What a task looks for in a table.

    Attributes:
        what: image, audio, label, text, source or target.
        known: Known column names in ranks. A column of an earlier rank is preferred.
        feature: The type of `datasets` that such a column may have.
        decides: If there are columns of that type, no other column can be meant.
        pairs: Two columns may form a pair of texts.
        sets: Columns that together are the content: those that must be there, and those that may be.
        lists: The column has a list in each row.
        advice: What else helps if there is no such column, for the message.
        inside: Columns of mappings, each of whose entries counts as a column (`data.translations`).
    """

    what: str
    known: tuple[tuple[str, ...], ...]
    feature: Any = None
    decides: bool = False
    pairs: bool = False
    sets: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()
    lists: bool = False
    advice: str = ""
    inside: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        """The option that names such a column."""
        return f"--set {self.what}_column=NAME" if self.inside else f"--{self.what}-column"

    def rank(self, name: str) -> int | None:
        """Return the rank of a column's name in any case, or None for an unknown name."""
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
DIALOGUE = replace(DOCUMENT, sets=COLUMN_SETS)  # documents, or conversations
# the pictures of a conversation, which its messages have places for
PICTURES = Kind("image", (), sets=((("images",), ()), (("image",), ())))
TRANSCRIPT = Kind(
    "text",
    (("text", "transcription", "transcript", "sentence"), ("normalized_text", "raw_transcription", "raw_text")),
)

CAPTION = Kind(
    "text",
    (("text", "caption", "captions", "sentence", "sentences", "description", "descriptions"), ("raw",)),
)


# a text, and the text that a model is to write for it: a translation, a summary, an answer
SOURCE = Kind(
    "source",
    (
        ("source", "src", "source_text"),
        ("input", "inputs", "input_text", "article", "document", "dialogue", "text"),
    ),
    inside=("translation",),
)
TARGET = Kind(
    "target",
    (
        ("target", "tgt", "target_text"),
        ("output", "outputs", "output_text", "targets", "summary", "highlights", "abstract"),
    ),
    inside=("translation",),
)

WORDS = Kind("text", (("tokens", "words"),), lists=True)
TAGS = Kind(
    "label",
    (("ner_tags", "tags", "labels"), ("ner", "ner_labels", "pos_tags", "upos", "xpos", "chunk_tags")),
    lists=True,
)

QUESTION = Kind("text", (), sets=((("question", "context"), ()),), lists=True)
ANSWERS = Kind("label", (("answers", "answer"),), lists=True)

# what heads on texts are trained on besides one label a row
SCORE = Kind(
    "label",
    (("label", "labels", "score", "scores"), ("similarity", "similarity_score", "relevance", "rating", "stars", "target", "y")),
)
# what embeddings are trained on: texts that belong together, or two texts with a score
NEGATIVES = ("negative", *(f"negative_{number}" for number in range(1, 11)))
TOGETHER = Kind(
    "text",
    (),
    sets=tuple((pair, NEGATIVES) for pair in (
        ("anchor", "positive"), ("query", "positive"), ("query", "passage"), ("query", "document"), ("query", "answer"),
        ("question", "passage"), ("question", "answer"), ("question", "context"),
    )),
    lists=True,
)  # fmt: skip
SCORED_PAIR = Kind("text", (), sets=tuple((pair, ()) for pair in PAIRS), lists=True)
NAMES_OF_SCORES = ("label", "labels", "score", "scores", "similarity", "similarity_score", "relevance")
SCORE_COLUMN = Kind("label", (), sets=tuple(((name,), ()) for name in NAMES_OF_SCORES))
SCORE_OF_PAIR = replace(SCORE, advice=". Texts that belong together have no score: call the columns anchor and positive")
PREFERENCE = Kind("text", (), sets=((("chosen", "rejected"), ("prompt",)),), lists=True)


def label_set(names: Sequence[str]) -> Kind:
    """Return the kind of labels of which a row has several: a column of lists, or a column of 0 and 1 for each
    of the classes `names`.
    """
    sets = ((tuple(name.strip().casefold() for name in names), ()),) if len(names) > 1 else ()
    known = (("label", "labels"), ("tags", "categories", "genres", "emotions", "topics", "classes"))
    return Kind("label", known, sets=sets, lists=True)


def is_preference(names: Sequence[str]) -> bool:
    """Return whether these columns are pairs of answers, the chosen one and the rejected one."""
    return {"chosen", "rejected"} <= {name.strip().casefold() for name in names}


def has_set(table: Table, kind: Kind, asked: str | None) -> bool:
    """Return whether the table (or the user, with `asked`) has all columns of a set of this kind.

    A column of labels or pictures that the user names counts, whatever its name is.
    """
    if kind.what in ("label", "image") and asked is not None and not kind.lists:
        return True
    names = table.rows.column_names if asked is None else asked.split(",")
    plain = {name.strip().casefold() for name in names}
    return any(plain >= set(needed) for needed, _ in kind.sets)


def fits(table: Table, kind: Kind, asked: str | None) -> bool:
    """Return whether the table has what tells this kind from others: all columns of a set, or a column of lists.

    True for a kind that nothing of that tells.
    """
    if not kind.sets and not kind.lists:
        return True
    names = [name for name in table.rows.column_names if (kind.rank(name) is not None if asked is None else name == asked)]
    return has_set(table, kind, asked) or any(_has_lists(table, name) for name in names)


def _has_lists(table: Table, name: str) -> bool:
    """True if the column holds lists, and not one value in each."""
    values = table.rows.with_format("arrow")[:SAMPLE][name].combine_chunks()
    if not (pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type)):
        return False
    return any(length not in (None, 1) for length in values.value_lengths().to_pylist())


class MissingColumn(DataError):
    """A split has no column with the asked name, or with any known name."""


def column(table: Table, asked: str | None, kind: Kind, taken: Sequence[str] = ()) -> str:
    """Return the column of a kind: the asked one, else one by type and name, else the only column
    of texts.

    Args:
        table: The table.
        asked: The name that the user gives, or None.
        kind: What to look for.
        taken: Columns that are used as something else.

    Raises:
        MissingColumn: There is no such column.
        DataError: Several columns could be meant.
    """
    if asked is not None:
        return _with_name(table, asked, kind)
    by_type = kind.what == "text" and not kind.lists
    candidates = _preferred(table, kind, taken) or (_strings(table, taken) if by_type else [])
    known = any(kind.rank(name) is not None or _is_typed(table, name, kind) for name in candidates)
    if len(candidates) == 1:
        return candidates[0]
    if known:
        raise DataError(
            f"{_listed(candidates)} could each be the {kind.what} column: name the one that is meant with {kind.flag}"
        )
    looked = ", ".join([name for names in kind.known for name in names] or ["+".join(names) for names, _ in kind.sets])
    raise _missing(table, f"no {kind.what} column found (looked for {looked})", kind)


def choose(table: Table, kinds: Sequence[Kind], asked: Mapping[str, str | None]) -> dict[str, tuple[str, ...]]:
    """Return the columns of each kind in a table, by `Kind.what`. A text may be a pair of columns.

    Args:
        table: The table.
        kinds: What to look for.
        asked: The names that the user gives, by `Kind.what`.

    Raises:
        MissingColumn: A kind has no column.
        DataError: Several columns could be meant, or there are more columns of texts than are used.
    """
    chosen: dict[str, tuple[str, ...]] = {}
    missing: dict[str, MissingColumn] = {}
    for kind in sorted(kinds, key=lambda kind: kind.what == "text"):  # texts last: among the columns that are left
        taken = [name for names in chosen.values() for name in names]
        try:
            if kind.sets:
                chosen[kind.what] = _set_of_columns(table, asked[kind.what], kind, taken)
            elif kind.pairs:
                chosen[kind.what] = _texts(table, asked[kind.what], kind, taken)
            else:
                chosen[kind.what] = (column(table, asked[kind.what], kind, taken),)
        except MissingColumn as error:
            missing[kind.what] = error
    for kind in kinds:
        if kind.what in missing:
            raise missing[kind.what]
    _refuse_two_uses(chosen)
    return {kind.what: chosen[kind.what] for kind in kinds}


def _set_of_columns(table: Table, asked: str | None, kind: Kind, taken: Sequence[str]) -> tuple[str, ...]:
    """The columns of the one known set that the table has, else one column as `column` finds it.

    Several sets, or a set beside a known column, are refused: each could be meant.
    """
    if asked is not None:
        names = [asked] if asked in table.rows.column_names else [name.strip() for name in asked.split(",")]
        return tuple(_with_name(table, name, kind) for name in names)
    plain = {name.strip().casefold(): name for name in table.rows.column_names if name not in taken}
    sets = [
        tuple(plain[name] for name in (*needed, *beside) if name in plain)
        for needed, beside in kind.sets
        if all(name in plain for name in needed)
    ]
    single = [(name,) for name in _preferred(table, kind, taken)] if sets else []
    if len(sets) + len(single) > 1:
        shown = " or ".join("+".join(names) for names in [*sets, *single])
        raise DataError(f"{shown} could each be the {kind.what}: name what is meant, as {kind.flag} {','.join(sets[0])}")
    return sets[0] if sets else (column(table, None, kind, taken),)


def _refuse_two_uses(chosen: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse a column that is used as two things.

    A label in the text would tell the model the answer.
    """
    uses: dict[str, list[str]] = {}
    for what, names in chosen.items():
        for name in names:
            uses.setdefault(name, []).append(what)
    for name, whats in uses.items():
        if len(whats) > 1:
            flags = " or ".join(f"--{what}-column" for what in dict.fromkeys(whats))
            raise DataError(f"the column {name!r} would be read as {' and as '.join(whats)}: name another one with {flags}")


def in_short(names: Sequence[str]) -> str:
    """Return column names in a line: the first dozen, each cut to WIDEST characters, and the number
    of all.
    """
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
    """Rename the columns of a split's table to their names in the split that trains.

    Args:
        table: The table.
        chosen: The columns of the split that trains, by `Kind.what`.
        kinds: What the task looks for.
        asked: The names that the user gives, by `Kind.what`.
        may_lack_label: Return a table without a label column as it is.

    Raises:
        MissingColumn: The table has no such column, under this or another known name.
        DataError: Several columns could be meant.
    """
    for kind in sorted(kinds, key=lambda kind: kind.what != "label"):
        for name in chosen[kind.what]:
            if name in table.rows.column_names:
                continue
            by_name = asked[kind.what] is not None or len(chosen[kind.what]) > 1
            try:
                own = _with_name(table, name, kind)
            except MissingColumn as error:
                try:
                    own = column(table, name if by_name else None, kind)
                except MissingColumn:
                    if kind.what == "label" and may_lack_label:  # such as a test split with secret labels
                        return table
                    raise MissingColumn(f"{table.origin}: {error}") from None
            table = replace(table, rows=table.rows.rename_column(own, name))
    return table


def unused_columns(table: Table, chosen: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return the columns of a table that are not used."""
    used = {name for names in chosen.values() for name in names}
    return [name for name in table.rows.column_names if name not in used]


def _texts(table: Table, asked: str | None, kind: Kind, taken: Sequence[str]) -> tuple[str, ...]:
    """One column of texts, or the two of a pair.

    A further column of texts is refused: it could be meant.
    """
    if asked is not None:  # a comma separates two names, or belongs to one
        names = [asked] if asked in table.rows.column_names else [name.strip() for name in asked.split(",")]
        if len(names) > 2:
            raise DataError(f"{kind.flag} {asked}: a text is one column, or two for a pair; these are {len(names)}")
        return tuple(_with_name(table, name, kind) for name in names)
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


def _with_name(table: Table, asked: str, kind: Kind) -> str:
    """The column with a name, else the only one with that name in another case."""
    columns = table.rows.column_names
    alike = [name for name in columns if name.strip().casefold() == asked.strip().casefold()]
    if asked in columns:
        return asked
    if len(alike) != 1:
        raise _missing(table, f"no column {asked!r}", kind)
    return str(alike[0])


def _missing(table: Table, what: str, kind: Kind) -> MissingColumn:
    """The error for a missing column, with the columns that there are and a remedy."""
    named = f"{what}; the data has {in_short(table.rows.column_names)}."
    if lacks_head(table):
        head = "The first line seems to be data, and no head: put a line of column names above it, such as text,label"
        return MissingColumn(f"{named} {head}; or name the column with {kind.flag}")
    if str(table.origin).endswith(".txt") and kind.what != "text":
        table_of = f"give a CSV, JSON-lines or Parquet file with a column of each, text and {kind.what}"
        return MissingColumn(f"{named} A .txt file holds texts alone: {table_of}")
    if kind.inside:
        return MissingColumn(f"{named} Say which text is for which: {SOURCE.flag} {TARGET.flag}")
    return MissingColumn(f"{named} Name it with {kind.flag}{kind.advice}")


def _preferred(table: Table, kind: Kind, taken: Sequence[str]) -> list[str]:
    """The columns that could be meant: those of the best rank, and those of the type if no column
    of that rank has it.
    """
    free = [name for name in table.rows.column_names if name not in taken]
    typed = [name for name in free if _is_typed(table, name, kind)]
    candidates = typed if typed and kind.decides else [name for name in free if name in typed or kind.rank(name) is not None]
    candidates = [name for name in candidates if _may_hold(table, name, kind)] or candidates
    # a column of the type without a known name has the second rank
    ranks = {name: 1 if (rank := kind.rank(name)) is None else rank for name in candidates}
    best = [name for name in candidates if ranks[name] == min(ranks.values())]
    untyped = not kind.decides and not any(name in typed for name in best)
    return [name for name in candidates if name in best or (untyped and name in typed)]


def _may_hold(table: Table, name: str, kind: Kind) -> bool:
    """False for an empty column, and for a column of numbers if a text is looked for."""
    dtype = str(getattr(table.rows.features[name], "dtype", ""))
    return dtype != "null" and not (kind.what == "text" and re.match("u?int|float|bool", dtype))


def _is_typed(table: Table, name: str, kind: Kind) -> bool:
    return kind.feature is not None and isinstance(table.rows.features[name], kind.feature)


def _strings(table: Table, taken: Sequence[str]) -> list[str]:
    """Columns of strings that may be the content: not addresses, times or labels by their names."""
    kinds = {name: getattr(feature, "dtype", None) for name, feature in table.rows.features.items()}
    strings = [name for name, kind in kinds.items() if kind in ("string", "large_string") and name not in taken]
    return [name for name in strings if not _is_aside(name)]


def _is_aside(name: str) -> bool:
    return any(ASIDE.fullmatch(form) for form in (name, name.casefold())) or LABEL.rank(name) is not None


def _is_text(table: Table, name: str, kind: Kind) -> bool:
    """True if a column has texts, and not one value or a few names.

    Its name may be known as that of texts.
    """
    values = table.rows.select_columns([name])[:SAMPLE][name]
    texts = [value.strip() for value in values if isinstance(value, str) and value.strip()]
    several = len(set(texts)) > 1
    words = sum(len(text.split()) > 1 for text in texts)
    return several and (kind.rank(name) is not None or (2 * words >= len(texts) and 4 * len(set(texts)) >= len(texts)))


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) <= MOST else in_short(names)
