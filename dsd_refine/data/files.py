"""Read a file as a table: CSV, TSV, JSON, Parquet, text. Notes say how its lines became rows."""

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
from dsd_refine.data.squad import is_squad, questions
from dsd_refine.errors import DataError
from dsd_refine.files import is_full
from dsd_refine.hub import is_of_the_hub

TABLE_SUFFIXES = {".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt"}

SEPARATORS = {",": ",", ";": ";", "\t": "tabs", "|": "|"}  # and what a message calls them
SAMPLED = 200  # records that are read to find the separator and quotes

NO_WORD_IS_EMPTY = {"keep_default_na": False, "na_values": [""]}  # the words NA and null may be texts
CSV_ROWS = 10_000  # rows in a block, as `datasets` reads a CSV
WRAPPERS = ("data", "rows", "examples", "instances", "items", "records", "samples")


@dataclass(frozen=True)
class Place:
    """The folder that files are parsed into, the encoding of text files, and what is a document in a
    .txt file (paragraphs, lines or file).
    """

    cache: Path
    encoding: str = "utf-8"
    documents: str = "paragraphs"


def is_table(path: Path) -> bool:
    """Return whether a file has the suffix of a table: `rows.csv`, `rows.csv.gz`."""
    return suffix_of(path) in TABLE_SUFFIXES


def read_file(path: Path, shown: str, place: Place) -> Reading:
    """Read a file as the split `train`, or as several splits if it has them.

    Args:
        path: The file.
        shown: Its name for the user.
        place: The folder that files are parsed into, and the encoding.

    Raises:
        DataError: The file is empty, broken or no table, or its lines could mean several things.
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
    reading = reader(path, plain, shown, place)
    return replace(reading, notes=tuple(", ".join((note, *plain.notes)) for note in reading.notes))


def _options(place: Place) -> dict[str, Any]:
    return {"cache_dir": str(place.cache), "keep_in_memory": False}


def _reading(rows: Any, path: Path, shown: str, notes: Sequence[str], advice: str = "") -> Reading:
    table = Table(rows, None, path.parent, origin=shown, advice=advice)
    return Reading({"train": table}, notes=(f"{shown}: {', '.join(notes)}",))


def validated(data: Any) -> Any:
    """Check the Arrow tables of a data set, or of its splits, and return the data.

    A wrong offset in a broken file could make Arrow ask for terabytes. Texts must be UTF-8.
    """
    for rows in data.values() if isinstance(data, dict) else [data]:
        rows.data.validate(full=True)
    return data


def guarded(path: Path, read: Callable[[], Any]) -> Any:
    """Return what `read` returns, and turn the libraries' errors about a broken file into one.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        return read()
    except (DataError, ConnectionError):
        raise
    except Exception as error:
        if is_of_the_hub(error) or is_full(error):  # not the file's fault
            raise
        # a broken file may make datasets, pandas and pyarrow raise any error
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):  # datasets' message for a table with a head and no rows
            raise DataError(f"{path}: holds no rows") from None
        raise DataError(f"{path}: cannot be read: {' '.join(str(cause).split())[:300] or type(cause).__name__}") from None


def check_shards(path: Path, split: str, files: list[Path]) -> None:
    """Check the files of one split: one kind of file, no data twice, and all shards here.

    Raises:
        DataError: They are not.
    """
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
    """Read a CSV or TSV. The notes tell everything that is not usual."""
    usual = "\t" if suffix_of(path) == ".tsv" else ","
    separator = _separator(path, plain, usual)
    is_quoted = suffix_of(path) != ".tsv" or separator != "\t" or _head_in_quotes(plain)
    how: dict[str, Any] = {"sep": separator} if is_quoted else {"sep": separator, "quoting": csv.QUOTE_NONE}
    if not is_quoted:
        _refuse_broken_records(path, plain)
    rows, of_text = _typed_csv(path, plain, how | NO_WORD_IS_EMPTY, place)
    notes = [_lines_and_rows(path, plain, rows, separator, is_quoted)]
    if "__index_level_0__" in rows.column_names:  # pandas takes the first of more fields than the head has as an index
        raise DataError(
            f"{path}: its first row has one field more than its head ({len(rows.column_names) - 1}): put texts that hold "
            f"{_in_words(separator)} in quotes, or name the first column in the head"
        )
    if of_text:
        notes.append(f"columns read as texts, for some of their rows hold texts: {', '.join(of_text)}")
    if separator != usual:
        notes.append(f"separated by {_in_words(separator)}")
    if not is_quoted and _quoted_texts(rows):
        notes.append("quotes are read as part of the texts, for a .tsv has no quoting (with it, call it .csv)")
    return _reading(rows, path, shown, notes)


def _typed_csv(path: Path, plain: Plain, how: dict[str, Any], place: Place) -> tuple[Any, list[str]]:
    """The rows, and the names of the columns that were made texts.

    `datasets` reads blocks of rows, and takes the type of each column from the first block. If a
    later block has another type, columns with a text in any block are read as texts in all blocks.
    """

    try:
        return guarded(path, lambda: validated(datasets.Dataset.from_csv(str(plain.path), **how, **_options(place)))), []
    except DataError:
        kinds = _kinds_of_blocks(plain, how)
        changing = [name for name, of_column in kinds.items() if len(of_column) > 1 and of_column & set("Ob")]
        if not any("O" in of_column for of_column in kinds.values()) and not changing:
            raise
        return guarded(path, lambda: validated(_with_texts(path, plain, how, kinds, place))), changing


def _blocks(plain: Plain, how: dict[str, Any], **more: Any) -> Iterator[pandas.DataFrame]:
    with pandas.read_csv(plain.path, chunksize=CSV_ROWS, **how, **more) as blocks:
        yield from blocks


def _kinds_of_blocks(plain: Plain, how: dict[str, Any]) -> dict[str, set[str]]:
    """The kinds of each column in the blocks of a CSV, as numpy's letters.

    Empty: the CSV cannot be parsed.
    """
    kinds: dict[str, set[str]] = defaultdict(set)
    try:
        for block in _blocks(plain, how):
            for name, values in block.items() if len(block) else ():
                kinds[str(name)].add(values.dtype.kind)
    except (ValueError, pandas.errors.ParserError):
        return {}
    return kinds


def _with_texts(path: Path, plain: Plain, how: dict[str, Any], kinds: dict[str, set[str]], place: Place) -> Any:
    """The rows, with each column that has a text in any block as texts.

    They are written into a file, block by block.
    """
    texts = [name for name, of_column in kinds.items() if not of_column <= set("if") and of_column != {"b"}]
    types = {name: pyarrow.int64() if of_column == {"i"} else pyarrow.float64() for name, of_column in kinds.items()}
    types |= {name: pyarrow.bool_() for name, of_column in kinds.items() if of_column == {"b"}}
    schema = pyarrow.schema(types | dict.fromkeys(texts, pyarrow.large_string()))
    name = hashlib.sha256(str(path.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    copy = place.cache / "plain" / f"{name}.parquet"
    copy.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.parquet.ParquetWriter(copy, schema) as file:
        for block in _blocks(plain, how, dtype=dict.fromkeys(texts, str)):
            file.write_table(pyarrow.Table.from_pandas(block, schema, preserve_index=False))
    return datasets.Dataset.from_parquet(str(copy), **_options(place))


def _refuse_broken_records(path: Path, plain: Plain) -> None:
    """Refuse a TSV with a quoted text over several lines, as pandas writes it.

    Each line would become a row.

    Such a text opens a quote in the last field of a line, and this line or the next one has too few
    fields.
    """
    fields, opened = 0, 0
    for number, line in enumerate(_lines(plain), 1):
        of_line = line.rstrip("\n").split("\t")
        if of_line == [""]:
            continue
        fields = fields or len(of_line)
        opens = number > 1 and of_line[-1].startswith('"') and _is_open(of_line[-1])
        if (opened or opens) and len(of_line) < fields:
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
    """True if all column names of a TSV are in quotes, as R writes them.

    Its texts are in quotes then too.
    """
    head = next((line.strip() for line in _lines(plain) if line.strip()), "")
    return bool(head) and all(len(name) > 1 and name[0] == name[-1] == '"' for name in head.split("\t"))


def _lines(plain: Plain) -> Iterator[str]:
    with plain.path.open(encoding="utf-8-sig") as file:
        yield from file


def _separator(path: Path, plain: Plain, usual: str) -> str:
    """The separator of the fields: the usual one, unless the head has one column and another sign
    fits all lines.

    Raises:
        DataError: The head contains another sign, and not all lines agree with it, or several signs
            fit.
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
    """True if the first records all have as many fields as the head."""
    counts = {len(record) for record in islice(_records(plain, separator), SAMPLED) if any(map(str.strip, record))}
    return len(counts) == 1 and counts != {1}


def text_columns(rows: Any) -> list[str]:
    """Return the names of the columns with texts."""
    return [name for name, kind in rows.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]


def _quoted_texts(rows: Any) -> bool:
    texts = text_columns(rows)
    first = rows.select_columns(texts)[:SAMPLED] if texts else {}
    return any(isinstance(v, str) and len(v) > 1 and v[0] == v[-1] == '"' for values in first.values() for v in values)


def _lines_and_rows(path: Path, plain: Plain, rows: Any, separator: str, is_quoted: bool) -> str:
    """Say how many lines became how many rows, and why the numbers differ.

    Raises:
        DataError: A quoted field over several lines is not closed properly.
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
    """Yield the number of the first line and the text of every record."""
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
    """Refuse a record with a quote that is closed in the middle of a field."""
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
    """The content of a file that is one JSON object and more than a row.

    None: lines, an array, or broken.
    """
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
    """Read the rows under a key such as `data`, or a split under each key with a split's name."""
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
        lines = questions(rows[key]) if is_squad(rows[key]) else rows[key]
        file.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
        of_key = guarded(path, lambda file=file: validated(datasets.Dataset.from_json(str(file), **_options(place))))  # type: ignore[misc]
        tables[key if splits else "train"] = Table(of_key, None, path.parent, origin=f"{shown}: {key}")
        notes.append(f"{shown}: {len(of_key)} rows under {key!r}")
    unused = tuple(f"{shown}: the key {key!r}: not rows" for key in whole if key not in keys)
    return Reading(tables, unused, tuple(notes))


def _read_text(path: Path, plain: Plain, shown: str, place: Place) -> Reading:
    """Read the paragraphs of a text file as documents, or its lines, or the file as one."""
    documents = list(DOCUMENTS[place.documents](plain.path))
    note = f"{plain.lines} lines, {len(documents)} documents (a {place.documents.removesuffix('s')} is one)"
    advice = ""
    if place.documents == "paragraphs" and len(documents) == 1 and plain.lines > 1:
        advice = (
            f"{path}: in a .txt a paragraph is a document, and its {plain.lines} lines have no blank one between them: one "
            "document. Put a blank line between documents, give --documents lines if each line is one, or give a .jsonl or "
            ".csv with a column `text`"
        )
        note += ": no blank line was found between two"
    return _reading(datasets.Dataset.from_dict({"text": documents}), path, shown, [note], advice)


def paragraphs(path: Path) -> Iterable[str]:
    """Yield the paragraphs of a text file, without outer white space. Blank lines separate them.

    Raises:
        DataError: The file is not UTF-8.
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


def _lines_of(path: Path) -> Iterable[str]:
    """Yield the lines of a text file, without outer white space. Blank lines are left out."""
    with path.open(encoding="utf-8-sig") as file:
        yield from (line.strip() for line in file if line.strip())


def _whole(path: Path) -> Iterable[str]:
    """Yield the text of a file as it is, unless it is only white space."""
    text = path.read_text(encoding="utf-8-sig")
    if text.strip():
        yield text


# what is a document in a .txt file: its name for `--documents`, and the function that reads them
DOCUMENTS: dict[str, Callable[[Path], Iterable[str]]] = {"paragraphs": paragraphs, "lines": _lines_of, "file": _whole}
