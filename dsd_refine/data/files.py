"""One file as a table: CSV, TSV, JSON, Parquet, text. How its lines became rows is said, and no line is lost unsaid."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow.parquet

from dsd_refine.data.plain import Plain, make_plain, refuse_pointer, stem_of, suffix_of
from dsd_refine.data.reading import SHARD, Reading, Table, role_of
from dsd_refine.errors import DataError
from dsd_refine.files import is_full
from dsd_refine.hub import is_of_the_hub

TABLE_SUFFIXES = {".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt"}

SEPARATORS, LOOKED_AT = {",": ",", ";": ";", "\t": "tabs", "|": "|"}, 200

NO_WORD_IS_EMPTY = {"keep_default_na": False, "na_values": [""]}  # a text may be NA or null
BLOCK_OF_ROWS = 10_000  # the rows by which `datasets` reads a CSV
WRAPPERS = ("data", "rows", "examples", "instances", "items", "records", "samples")


@dataclass(frozen=True)
class Place:
    """Where files are parsed into, and what text files are written in."""

    cache: Path
    encoding: str = "utf-8"


def is_table(path: Path) -> bool:
    """Does its name say that it is a table? `rows.csv.gz` is one too."""
    return suffix_of(path) in TABLE_SUFFIXES


def read_file(path: Path, shown: str, place: Place) -> Reading:
    """One file, under `train` where it says nothing of splits. `shown` is what the user calls it.

    Raises:
        DataError: empty, broken, not a table, or with lines of which it is not clear what they are.
    """
    kind = suffix_of(path)
    if kind not in TABLE_SUFFIXES:
        raise DataError(f"{path}: a {kind or 'nameless'} file; known are {', '.join(sorted(TABLE_SUFFIXES))}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty")
    if kind == ".parquet":
        refuse_pointer(path)
        rows = guarded(path, lambda: validated(datasets.Dataset.from_parquet(str(path), **_options(place))))
        return _reading(rows, path, shown, [f"{len(rows)} rows"])
    plain = make_plain(path, place.cache, place.encoding)
    if not plain.lines:
        raise DataError(f"{path}: is empty")
    reader = {".csv": _read_csv, ".tsv": _read_csv, ".txt": _read_text}.get(kind, _read_json)
    found = reader(path, plain, shown, place)
    return replace(found, notes=tuple(", ".join((note, *plain.notes)) for note in found.notes))


def _options(place: Place) -> dict[str, Any]:
    return {"cache_dir": str(place.cache), "keep_in_memory": False}


def _reading(rows: Any, path: Path, shown: str, said: Sequence[str], advice: str = "") -> Reading:
    table = Table(rows, None, path.parent, origin=shown, advice=advice)
    return Reading({"train": table}, notes=(f"{shown}: {', '.join(said)}",))


def validated(found: Any) -> Any:
    """The same, once its Arrow tables are known to be what they say: a wrong offset asks for terabytes, a text is UTF-8."""
    for rows in found.values() if isinstance(found, dict) else [found]:
        rows.data.validate(full=True)
    return found


def guarded(path: Path, read: Callable[[], Any]) -> Any:
    """What `read` returns. Raises DataError, naming the file, for whatever a broken file makes the libraries raise."""
    try:
        return read()
    except (DataError, ConnectionError):
        raise
    except Exception as error:
        if is_of_the_hub(error) or is_full(error):  # not the file's fault
            raise
        # datasets, pandas and pyarrow raise whatever a broken file makes them raise
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):  # what datasets says of a table with a head and nothing below it
            raise DataError(f"{path}: holds no rows") from None
        raise DataError(f"{path}: cannot be read: {' '.join(str(cause).split())[:300] or type(cause).__name__}") from None


def check_shards(path: Path, split: str, files: list[Path]) -> None:
    """Raises DataError where files of one split are the same data twice, of several kinds, or not all there."""
    shown = ", ".join(file.relative_to(path).as_posix() for file in files[:6])
    kinds = {suffix_of(file) for file in files}
    if len(kinds - {".json", ".jsonl", ".ndjson"}) + bool(kinds & {".json", ".jsonl", ".ndjson"}) > 1:
        raise DataError(f"{path}: {shown} could each be its {split} split; keep one kind of file, or give one file itself")
    stems = [file.parent / stem_of(file) for file in files]
    if len(set(stems)) < len(stems):
        raise DataError(f"{path}: {shown} could each be its {split} split; keep one of those that differ by suffix alone")
    shards = [match for match in (SHARD.match(stem_of(file)) for file in files) if match]
    for match in shards:
        if len(shards) < int(match["count"]):
            raise DataError(
                f"{path}: {split} has {len(shards)} of its {int(match['count'])} files ({shown}): "
                "fetch the others, or rename these"
            )


def _read_csv(path: Path, plain: Plain, shown: str, place: Place) -> Reading:
    usual = "\t" if suffix_of(path) == ".tsv" else ","
    separator = _separator(path, plain, usual)
    is_quoted = suffix_of(path) != ".tsv" or separator != "\t" or _head_in_quotes(plain)
    how: dict[str, Any] = {"sep": separator} if is_quoted else {"sep": separator, "quoting": csv.QUOTE_NONE}
    if not is_quoted:
        _refuse_broken_records(path, plain)
    rows, of_text = _typed_csv(path, plain, how | NO_WORD_IS_EMPTY, place)
    said = [_lines_and_rows(path, plain, rows, separator, is_quoted)]
    if "__index_level_0__" in rows.column_names:  # pandas takes a first field beyond the head for the row's name
        raise DataError(
            f"{path}: its first row has one field more than its head ({len(rows.column_names) - 1}): put texts that hold "
            f"{_in_words(separator)} in quotes, or name the first column in the head"
        )
    if of_text:
        said.append(f"columns read as texts, for some of their rows hold texts: {', '.join(of_text)}")
    if separator != usual:
        said.append(f"separated by {_in_words(separator)}")
    if not is_quoted and _quoted_texts(rows):
        said.append("quotes are read as part of the texts, for a .tsv has no quoting (with it, call it .csv)")
    return _reading(rows, path, shown, said)


def _typed_csv(path: Path, plain: Plain, how: dict[str, Any], place: Place) -> tuple[Any, list[str]]:
    """The rows, and the columns that were made texts.

    `datasets` reads blocks of rows and takes each column for what the first block holds. Where a later one holds something
    else, the columns that hold texts anywhere are texts everywhere.
    """

    try:
        return guarded(path, lambda: validated(datasets.Dataset.from_csv(str(plain.path), **how, **_options(place)))), []
    except DataError:
        kinds = _kinds_of_blocks(plain, how)
        changing = [name for name, held in kinds.items() if len(held) > 1 and held & set("Ob")]
        if not any("O" in held for held in kinds.values()) and not changing:
            raise
        return guarded(path, lambda: validated(_with_texts(path, plain, how, kinds, place))), changing


def _blocks(plain: Plain, how: dict[str, Any], **more: Any) -> Iterator[pandas.DataFrame]:
    with pandas.read_csv(plain.path, chunksize=BLOCK_OF_ROWS, **how, **more) as blocks:
        yield from blocks


def _kinds_of_blocks(plain: Plain, how: dict[str, Any]) -> dict[str, set[str]]:
    """Each column's kinds of values (numpy's letters) over the blocks of a CSV; none where it cannot be parsed."""
    kinds: dict[str, set[str]] = defaultdict(set)
    try:
        for block in _blocks(plain, how):
            for name, values in block.items() if len(block) else ():
                kinds[str(name)].add(values.dtype.kind)
    except (ValueError, pandas.errors.ParserError):
        return {}
    return kinds


def _with_texts(path: Path, plain: Plain, how: dict[str, Any], kinds: dict[str, set[str]], place: Place) -> Any:
    """The rows with a column as texts where a block of it holds texts; written down, for they may not fit in memory."""
    texts = [name for name, held in kinds.items() if not held <= set("if") and held != {"b"}]
    types = {name: pyarrow.int64() if held == {"i"} else pyarrow.float64() for name, held in kinds.items()}
    types |= {name: pyarrow.bool_() for name, held in kinds.items() if held == {"b"}}
    schema = pyarrow.schema(types | dict.fromkeys(texts, pyarrow.large_string()))
    name = hashlib.sha256(str(path.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    copy = place.cache / "plain" / f"{name}.parquet"
    copy.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.parquet.ParquetWriter(copy, schema) as file:
        for block in _blocks(plain, how, dtype=dict.fromkeys(texts, str)):
            file.write_table(pyarrow.Table.from_pandas(block, schema, preserve_index=False))
    return datasets.Dataset.from_parquet(str(copy), **_options(place))


def _refuse_broken_records(path: Path, plain: Plain) -> None:
    """Refuse a TSV in which a text in quotes goes over several lines, as pandas writes it: each line would be a row.

    Raises:
        DataError: a line's last field opens a quote and does not close it, and it or the next line is short of fields.
    """
    fields, opened = 0, 0
    for number, line in enumerate(_lines(plain), 1):
        held = line.rstrip("\n").split("\t")
        if held == [""]:
            continue
        fields = fields or len(held)
        opens = number > 1 and held[-1].startswith('"') and _is_open(held[-1])
        if (opened or opens) and len(held) < fields:
            raise DataError(
                f'{path}: line {opened or number} opens a quote (") that it does not close, and a line there is short of '
                "fields: a text with line breaks, which a .tsv cannot hold. Write it without them, or as a .csv"
            )
        opened = number if opens else 0


def _is_open(field: str) -> bool:
    return field.count('"') % 2 == 1


def _in_words(separator: str) -> str:
    word = SEPARATORS[separator]
    return word if word.isalpha() else f"`{word}`"


def _records(plain: Plain, separator: str, **how: Any) -> Iterator[list[str]]:
    csv.field_size_limit(sys.maxsize)
    with plain.path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.reader(file, delimiter=separator, **how)


def _head(plain: Plain, separator: str) -> list[str]:
    return next((record for record in _records(plain, separator) if any(field.strip() for field in record)), [])


def _head_in_quotes(plain: Plain) -> bool:
    """Are all names of a TSV's columns in quotes, as R writes them? Then its texts are too."""
    head = next((line.strip() for line in _lines(plain) if line.strip()), "")
    return bool(head) and all(len(name) > 1 and name[0] == name[-1] == '"' for name in head.split("\t"))


def _lines(plain: Plain) -> Iterator[str]:
    with plain.path.open(encoding="utf-8-sig") as file:
        yield from file


def _separator(path: Path, plain: Plain, usual: str) -> str:
    """What stands between the fields: the usual, unless the head has one column and another sign fits every line.

    Raises:
        DataError: the head holds another sign, and the lines do not agree on it.
    """
    head = _head(plain, usual)
    others = [sign for sign in SEPARATORS if len(head) == 1 and sign != usual and sign in head[0]]
    fitting = [sign for sign in others if _agree(plain, sign)]
    if others and len(fitting) != 1:
        raise DataError(
            f"{path}: its head {head[0]!r:.100} looks separated by {' or '.join(map(_in_words, fitting or others))}, but "
            f"{'each would do' if fitting else 'not every line is'}: write it with {_in_words(usual)} between the fields, and "
            "texts that hold one in quotes"
        )
    return fitting[0] if fitting else usual


def _agree(plain: Plain, separator: str) -> bool:
    """Do the first records all have as many fields as the head?"""
    counts = {len(record) for record in islice(_records(plain, separator), LOOKED_AT) if any(map(str.strip, record))}
    return len(counts) == 1 and counts != {1}


def text_columns(rows: Any) -> list[str]:
    """The columns of plain texts."""
    return [name for name, kind in rows.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]


def _quoted_texts(rows: Any) -> bool:
    texts = text_columns(rows)
    some = rows.select_columns(texts)[:LOOKED_AT] if texts else {}
    return any(isinstance(v, str) and len(v) > 1 and v[0] == v[-1] == '"' for values in some.values() for v in values)


def _lines_and_rows(path: Path, plain: Plain, rows: Any, separator: str, is_quoted: bool) -> str:
    """How many lines became how many rows, and why not as many.

    Raises:
        DataError: a field in quotes goes over several lines, and does not end as one does.
    """
    counted = f"{plain.lines} lines with the head, {len(rows)} rows"
    if plain.lines == len(rows) + 1:
        return counted
    blank, long = 0, []
    for start, text in _spans(plain, separator, is_quoted):
        if "\n" in text.rstrip("\r\n") or "\r" in text.rstrip("\r\n"):
            _check_quotes(path, start, text, separator)
            long.append(start)
        blank += not text.strip()
    reasons = [f"{blank} blank lines"] * bool(blank)
    if long:
        many = f"{len(long)} rows have a field that goes over several lines, the first at line {long[0]}"
        reasons.append(many if len(long) > 1 else f"a field goes over several lines at line {long[0]}")
    return f"{counted} ({'; '.join(reasons)})" if reasons else counted


def _spans(plain: Plain, separator: str, is_quoted: bool) -> Iterator[tuple[int, str]]:
    """(number of the first line, text) of every record."""
    csv.field_size_limit(sys.maxsize)
    taken: list[str] = []

    def noted(lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line

    with plain.path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(noted(file), delimiter=separator, quoting=csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE)
        start = 1
        for _ in reader:
            yield start, "".join(taken)
            start += len(taken)
            taken.clear()


def _check_quotes(path: Path, line: int, record: str, separator: str) -> None:
    try:
        list(csv.reader(record.splitlines(keepends=True), delimiter=separator, strict=True))
    except csv.Error:
        raise DataError(
            f'{path}: line {line} opens a quote (") that is closed {len(record.splitlines()) - 1} lines further down, in the '
            'middle of a field, so that rows would be lost: write a quote inside a text as "", and the text in quotes; '
            "or give a .tsv, which has no quoting"
        ) from None


def _read_json(path: Path, plain: Plain, shown: str, place: Place) -> Reading:
    whole = _one_object(plain) if suffix_of(path) == ".json" else None
    if whole is not None:
        return _from_object(path, plain, whole, shown, place)
    rows = guarded(path, lambda: validated(datasets.Dataset.from_json(str(plain.path), **_options(place))))
    return _reading(rows, path, shown, [f"{plain.lines} lines, {len(rows)} rows"])


def _one_object(plain: Plain) -> dict[str, Any] | None:
    """The file where it is one JSON object that holds more than a row; None for lines, an array, or what is broken."""
    first, more = "", ""
    for line in _lines(plain):
        if line.strip():
            first, more = (line, more) if not first else (first, line)
        if more:
            break
    if not first.lstrip().startswith("{") or (more and _parsed(first) is not None):
        return None
    whole = _parsed(plain.path.read_text(encoding="utf-8-sig"))
    is_row = isinstance(whole, dict) and not any(isinstance(value, list | dict) for value in whole.values())
    return whole if isinstance(whole, dict) and not is_row else None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _from_object(path: Path, plain: Plain, whole: dict[str, Any], shown: str, place: Place) -> Reading:
    """The rows under a key such as `data`, or a split under each key that is named like one."""
    rows = {key: value for key, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)}
    splits = [key for key in rows if role_of(key)]
    keys = splits or [key for key in WRAPPERS if key in rows]
    if not splits and len(keys) != 1:
        raise DataError(
            f"{path}: is one JSON object with the keys {', '.join(map(repr, list(whole)[:8]))}: give its rows as an "
            "array, as a line each (.jsonl), or under the key `data`"
        )
    tables, notes = {}, []
    for key in keys:
        file = place.cache / "plain" / f"{plain.path.stem}-{keys.index(key)}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[key]), encoding="utf-8")
        found = guarded(path, lambda file=file: validated(datasets.Dataset.from_json(str(file), **_options(place))))  # type: ignore[misc]
        tables[key if splits else "train"] = Table(found, None, path.parent, origin=f"{shown}: {key}")
        notes.append(f"{shown}: {len(found)} rows under {key!r}")
    unused = tuple(f"{shown}: the key {key!r}: not rows" for key in whole if key not in keys)
    return Reading(tables, unused, tuple(notes))


def _read_text(path: Path, plain: Plain, shown: str, place: Place) -> Reading:
    documents = list(paragraphs(plain.path))
    said = f"{plain.lines} lines, {len(documents)} documents (a paragraph is one)"
    advice = ""
    if len(documents) == 1 and plain.lines > 1:
        advice = (
            f"{path}: in a .txt a paragraph is a document, and its {plain.lines} lines have no blank one between them: one "
            "document. Put a blank line between documents, or give a .jsonl or .csv with a column `text`"
        )
        said += ": no blank line was found between two"
    return _reading(datasets.Dataset.from_dict({"text": documents}), path, shown, [said], advice)


def paragraphs(path: Path) -> Iterable[str]:
    """The documents of a text file: runs of lines without a blank one between them, stripped of outer white space.

    Raises:
        DataError: not UTF-8.
    """
    block: list[str] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in (*file, "\n"):
                if line.strip():
                    block.append(line)
                elif block:
                    yield "".join(block).strip()
                    block = []
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
