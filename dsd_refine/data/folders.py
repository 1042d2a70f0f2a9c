"""Read a folder: class folders, files with metadata, or table files.

Find its form, and what is not used.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from dsd_refine.data.configs import read_configured
from dsd_refine.data.files import Place, check_shards, guarded, is_table, read_file, text_columns, validated
from dsd_refine.data.listing import entries, files_below, folders_in, is_about, is_side_file, left_over, walk
from dsd_refine.data.plain import refuse_pointer, stem_of
from dsd_refine.data.reading import (
    SHARD,
    Reading,
    Table,
    first_and_last,
    is_glued,
    joined,
    role_of,
    roles_in,
    siblings,
    speaks_of,
    split_of,
    together,
    words_of,
)
from dsd_refine.errors import DataError

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64", ".m4a"}
# Names of columns with file names, the most certain first.
FILE_NAMES = (
    "file_name", "filename", "file_path", "filepath", "image_path", "audio_path", "image_file", "audio_file", "image_filename",
    "img_path", "image_name", "image_id", "path", "file",
)  # fmt: skip

# Words in the names of files whose rows are not meant for training.
ASIDE = re.compile(
    "unlabel|unsup|(no|without|missing) ?labels?|submission|predict|held ?out|hold ?out|(?<!la)(?<!con)(?<!pro)test( |$)"
)

ROWS_TRIED, ROWS_AT_ONCE = 20, 1000  # rows in which a file's name is looked for, and rows that are read at once

FILE_NAME = re.compile(r"[^\0\n]{1,200}\.[A-Za-z0-9]{1,5}")
# Names of the only folder in a split without classes.
UNKNOWN = re.compile("unknown|unlabell?ed|none|no[-_ ]?labels?|test|testing|images?|imgs?|all|data|files", re.IGNORECASE)
KNOWN_FORMS = (
    "Known forms: class folders, train/ and test/ of them, train.csv|jsonl|parquet|txt, metadata.csv|jsonl, or a folder that "
    "save_to_disk wrote"
)


def read_folder(path: Path, config: str | None, place: Place) -> Reading:
    """Read a folder of any known form. The result's `unused` names what is not used.

    Args:
        path: The folder.
        config: The configuration that the user asked for, or None.
        place: The folder that files are parsed into, and the encoding.

    Raises:
        DataError: The folder has no known form, or one that could mean several things.
    """
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path)
    configured = read_configured(path, config, place)
    if configured is not None:
        return configured
    top = [file for file in entries(path) if _is_data(file) and split_of(stem_of(file))]
    folders = folders_in(path)
    if top and _have_train(top, folders):
        return _table_files(path, top, place)
    if _metadata(path):
        return _with_metadata(path, path, place)
    with_metadata = any(role_of(folder.name) and _metadata(folder) for folder in folders)
    if not with_metadata and _holds_only_tables(path):
        return _table_files(path, _tables_below(path), place)
    return _class_or_split_folders(path, folders, place)


def _is_data(path: Path) -> bool:
    return is_table(path) and path.is_file() and not path.name.startswith(".") and not is_about(path)


def _have_train(files: list[Path], folders: list[Path]) -> bool:
    """True if a file is the training split, or no folder is."""
    roles = {role_of(split_of(stem_of(file)) or "") for file in files}
    return "train" in roles or not any(role_of(folder.name) == "train" for folder in folders)


def _saved(path: Path) -> Reading:
    """Read a folder that `save_to_disk` wrote."""
    for file in path.rglob("*.arrow"):
        refuse_pointer(file)
    saved = guarded(path, lambda: validated(datasets.load_from_disk(str(path))))
    splits = {"": saved} if isinstance(saved, datasets.Dataset) else dict(saved)
    used = [path / "dataset_dict.json"]
    for name, rows in splits.items():
        used += [path / name / "state.json", path / name / "dataset_info.json"]
        used += [path / name / Path(file["filename"]).name for file in rows.cache_files]
    tables = {name or "train": Table(rows, origin=name or _own_name(path)) for name, rows in splits.items()}
    notes = tuple(f"{name or _own_name(path)}: {len(rows)} rows" for name, rows in splits.items())
    return Reading(tables, left_over(path, used, lambda _: "no part of what save_to_disk wrote here"), notes)


def _own_name(path: Path) -> str:
    return f"{path.absolute().name}/"


def _holds_only_tables(path: Path) -> bool:
    """True if the folder has tables, and all files of its inner folders are tables."""
    if any((path / "data").glob("*-?????-of-?????*")):
        return any(_is_data(file) and SHARD.match(stem_of(file)) for file in entries(path / "data"))
    has_tables = False
    for file, problem in walk(path):
        if problem or is_about(file):
            continue
        has_tables = has_tables or _is_data(file)
        if file.parent != path and not _is_data(file):
            return False
    return has_tables


def _tables_below(path: Path) -> list[Path]:
    if any(SHARD.match(stem_of(file)) for file in (path / "data").glob("*") if _is_data(file)):
        return [file for file in entries(path / "data") if _is_data(file) and SHARD.match(stem_of(file))]
    return [file for file in files_below(path)[0] if _is_data(file)]


def _table_files(path: Path, files: list[Path], place: Place) -> Reading:
    """Read table files as the splits that their folders or names tell.

    If none tells one, all of them train.
    """
    splits, joins = _splits_of_files(path, files)
    readings, tables = [], {}
    places: tuple[str, ...] = ()
    for split, shards in splits.items():
        check_shards(path, split, shards)
        of_split = [read_file(file, file.relative_to(path).as_posix(), place) for file in shards]
        if any(len(reading.tables) > 1 for reading in of_split):
            raise DataError(f"{shards[0]}: holds several splits, and is one of a folder; give the file itself")
        tables[split], where = located(joined(of_split, path))
        places += where
        readings += of_split
    used = _used_files(path, [file for shards in splits.values() for file in shards], tables)
    _refuse_rivals(path, tables, used)
    parts = together(readings)
    first = next(iter(tables.values())).origin
    unused = left_over(path, used, lambda other: _beside(other, first))
    return Reading(tables, joins + parts.unused + unused, parts.notes + places)


def located(table: Table) -> tuple[Table, tuple[str, ...]]:
    """Find the folder beside a table that has all files that one of its columns names.

    Returns:
        The table with that folder, if there is exactly one, and a line that says so.
    """
    folder = table.folder
    if folder is None or not len(table.rows):
        return table, ()
    columns = text_columns(table.rows)
    first = {name: str(table.rows[0][name] or "") for name in columns}
    if any(_names_a_file(folder, text) for text in first.values()):
        return table, ()
    for name in (name for name in columns if FILE_NAME.fullmatch(first[name])):
        with_first = [inner for inner in sorted(folder.glob("[!.]*/")) if _names_a_file(inner, first[name])]
        values = [value for value in table.rows[name] if value]
        with_all = [inner for inner in with_first if all(_names_a_file(inner, value) for value in values)]
        if len(with_all) == 1:
            note = f"{table.origin}: the files of its column {name!r} are those in {with_all[0].name}/"
            return replace(table, folder=with_all[0]), (note,)
    return table, ()


def _splits_of_files(path: Path, files: list[Path]) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """The files of each split, and a line for the user if files with different names are joined.

    Raises:
        DataError: No name tells a split, and one has the words of two roles, or a word such as
            "unlabelled".
    """
    files = [file for file in files if not is_side_file(file)] or files
    splits: dict[str, list[Path]] = defaultdict(list)
    names: dict[str, str] = {}
    pairs = siblings(stem_of(file) for file in files)
    for file in files:
        split = pairs.get(stem_of(file)) or _split_of_file(path, file)
        if split is not None:
            splits[names.setdefault(split.casefold(), split)].append(file)
    if splits:
        return splits, ()
    _refuse_two_roles(path, [stem_of(file) for file in files])
    return {"train": files}, _joined_by_no_name(path, files)


def _refuse_two_roles(path: Path, names: list[str]) -> None:
    for name in names:
        if len(roles_in(name)) > 1:
            raise DataError(f"{path}: {name} is named like {' and '.join(roles_in(name))} at once; rename it")


def _joined_by_no_name(path: Path, files: list[Path]) -> tuple[str, ...]:
    """A line for the user if all files train although their names differ in more than numbers.

    Raises:
        DataError: A name has a word such as "unlabelled".
    """
    shown = [file.relative_to(path).as_posix() for file in files]
    if len({re.sub("[0-9]+", "0", name) for name in shown}) < 2:
        return ()
    remedy = "name the files train and test, give one file itself, or put those that train into a folder of their own"
    aside = [
        name
        for name, file in zip(shown, files, strict=True)
        if ASIDE.search(" ".join(words_of(name.removesuffix(file.suffix))))
    ]
    if aside:
        raise DataError(
            f"{path}: {first_and_last(shown)} say no split, and {first_and_last(aside)} speaks of rows that are not to train: "
            f"{remedy}"
        )
    return (f"{first_and_last(shown)}: names of no split, so all are joined as train; where that is wrong, {remedy}",)


def _refuse_rivals(path: Path, tables: dict[str, Table], used: Iterable[Path]) -> None:
    """Refuse unused entries of a folder that could be meant as well: other splits, or any data if
    nothing trains.
    """
    holding = {place for file in used for place in (file, *file.parents)}
    others = [entry for entry in entries(path) if entry not in holding and not entry.name.startswith(".")]
    others = [entry for entry in others if (entry.is_dir() and entries(entry)) or _is_data(entry)]
    roles = {role_of(split) for split in tables}
    rivals = [entry for entry in others if entry.is_dir() and (role_of(entry.name) or _roles_in(entry) - roles)]
    if rivals or (others and "train" not in roles):
        shown = ", ".join(f"{entry.name}/" if entry.is_dir() else entry.name for entry in (rivals or others)[:6])
        read = ", ".join(table.origin for table in tables.values())
        raise DataError(
            f"{path}: {read} would be its {' and '.join(tables)}, and {shown} would not be used: which are the data? Move the "
            "others away, name them like train and test, or give what is meant itself, such as "
            f"{path / next(iter(tables.values())).origin}"
        )


def _roles_in(folder: Path) -> set[str | None]:
    """The roles that the names in a folder tell."""
    names = [stem_of(entry) for entry in entries(folder) if entry.is_dir() or _is_data(entry)]
    return {role_of(split_of(name) or "") for name in names} - {None}


def _split_of_file(root: Path, file: Path) -> str | None:
    """The split that the innermost folder with a split's name tells, else the file's name."""
    stem = stem_of(file)
    if SHARD.match(stem):
        return split_of(stem)
    folders = file.parent.relative_to(root).parts
    return next((split for split in map(split_of, reversed(folders)) if split), None) or split_of(stem)


def _used_files(path: Path, files: list[Path], tables: dict[str, Table]) -> list[Path]:
    """The table files, and the files that their columns name."""
    if all(_is_data(file) or is_about(file) for file in entries(path)):  # no other files that a column could name
        return files
    named: list[Path] = []
    for table in tables.values():
        folder = table.folder or path
        for name in text_columns(table.rows) if len(table.rows) else ():
            values = table.rows.select_columns([name])
            if _names_a_file(folder, values[0][name]):
                named += [folder / value for value in values[name] if value and "\0" not in value]
        named += [folder / value for value in _named_inside(table.rows, folder)]
    return files + named


def _named_inside(rows: datasets.Dataset, folder: Path) -> Iterator[str]:
    """The files that lists and mappings in columns name, such as the pictures of conversations."""
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Value) or "Image(" in repr(feature) or "Audio(" in repr(feature):
            continue
        texts = (text for value in rows.select_columns([name])[:ROWS_TRIED][name] for text in _texts_in(value))
        if any(_names_a_file(folder, text) for text in texts):
            values = (block[name] for block in rows.select_columns([name]).iter(ROWS_AT_ONCE))
            yield from (text for block in values for text in _texts_in(block) if _names_a_file(folder, text))


def _texts_in(value: Any) -> Iterator[str]:
    """All texts in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(inner)


def _names_a_file(folder: Path, text: str | None) -> bool:
    return bool(text) and len(text or "") < 1000 and "\0" not in str(text) and os.path.isfile(folder / str(text))


def _beside(path: Path, first: str) -> str:
    """The reason why a path beside table files is not used. `first` is the first of them."""
    if path.is_dir():
        return f"a folder beside {first}"
    if is_side_file(path):
        return f"speaks about the data by its name, beside {first}"
    words = roles_in(stem_of(path))
    if len(words) > 1:
        return f"named like {' and '.join(words)} at once, so no split, beside {first}"
    return f"not named like a split, beside {first}" if is_table(path) else f"no table, beside {first}"


def _metadata(folder: Path) -> Path | None:
    """The metadata file of a folder, or None. Two are refused."""
    files = [folder / f"metadata.{suffix}" for suffix in ("csv", "jsonl", "parquet")]
    files = [file for file in files if file.is_file()]
    if len(files) > 1:
        raise DataError(f"{folder}: has {' and '.join(file.name for file in files)}; keep the one that counts")
    return files[0] if files else None


def _with_metadata(folder: Path, root: Path, place: Place) -> Reading:
    """Read the files that metadata name.

    Metadata above split folders give a table for each of these.
    """
    file = _metadata(folder)
    assert file is not None
    shown = file.relative_to(root).as_posix()
    read = read_file(file, shown, place)
    rows = read.tables["train"].rows
    column = next((c for known in FILE_NAMES for c in rows.column_names if c.casefold() == known), None)
    if column is None:
        raise DataError(f"{file}: has no `file_name` column, only {', '.join(rows.column_names)}")
    names = _with_suffix(folder, [str(name) for name in rows[column]])
    outside = next((name for name in names if not _inside(root, folder, name)), None)
    if outside is not None:
        raise DataError(f"{file}: the {column} {outside!r:.100} leads out of {root}; give paths inside the folder")
    kind = "audio" if any(map(_is_sound, names)) else "image"
    files = datasets.Dataset.from_dict({kind: [str((folder / n).absolute()) for n in names]})
    others = [name for name in rows.column_names if name not in (column, kind)]
    rows = datasets.concatenate_datasets([rows.select_columns(others), files], axis=1) if others else files
    table = Table(rows, [(folder / n).relative_to(root).as_posix() for n in names], folder, origin=shown)
    notes = read.notes if column == "file_name" else (f"{read.notes[0]}; file names in the column `{column}`",)
    used = {file, *(folder / name for name in names)}
    unused = left_over(folder, used, lambda path: f"named by no row of {file.name}")
    prefix = "" if folder == root else f"{folder.name}/"
    parts = _by_first_folder(table, folder, names) if folder == root else {"train": table}
    if folder == root:
        _refuse_rivals(root, parts, used)
    return Reading(parts, tuple(prefix + line for line in unused), notes)


def _is_sound(name: str) -> bool:
    return Path(name).suffix.lower() in AUDIO_SUFFIXES


def _with_suffix(folder: Path, names: list[str]) -> list[str]:
    """Add the suffixes to file names that have none: there must be one file of each name."""
    if not names or Path(names[0]).suffix or "\0" in names[0] or (folder / names[0]).is_file():
        return names
    known: dict[str, list[str]] = defaultdict(list)
    for file in files_below(folder)[0]:
        name = file.relative_to(folder).as_posix()
        known[name.removesuffix(file.suffix)].append(name)
        if "/" in name:
            known[file.stem].append(name)
    double = next((name for name in names if len(known.get(name, ())) > 1), None)
    if double is not None:
        raise DataError(f"{folder}: {' and '.join(known[double][:4])} could each be the {double!r} of its metadata")
    return [known[name][0] if name in known else name for name in names]


def _inside(root: Path, folder: Path, name: str) -> bool:
    return "\0" not in name and Path(os.path.abspath(folder / name)).is_relative_to(root.absolute())


def _by_first_folder(table: Table, folder: Path, names: list[str]) -> dict[str, Table]:
    """A table for each split folder with files, or one table if the files are in other folders too.

    Raises:
        DataError: Some files are in several split folders, and others in none.
    """
    firsts = [Path(name).parts[0] if len(Path(name).parts) > 1 else "" for name in names]
    splits = [first for first in dict.fromkeys(firsts) if role_of(first)]
    others = [first for first in dict.fromkeys(firsts) if not role_of(first)]
    if len({role_of(first) for first in splits}) > 1 and others:
        raise DataError(
            f"{folder}: its metadata name files in {', '.join(f'{s}/' for s in splits)} and files elsewhere "
            f"({', '.join(other + '/' if other else 'beside it' for other in others[:4])}), of no split"
        )
    if not splits or others:
        return {"train": table}
    tables = {}
    for split in splits:
        rows = [row for row, first in enumerate(firsts) if first == split]
        chosen: Any = table.rows.select(rows)
        assert table.names is not None
        tables[split] = Table(chosen, [table.names[row] for row in rows], folder, origin=f"{table.origin}: {split}/")
    return tables


def _class_or_split_folders(path: Path, folders: list[Path], place: Place) -> Reading:
    """Read class folders, or split folders that contain class folders or metadata."""
    splits = [folder for folder in folders if role_of(folder.name)]
    pairs = siblings(f.name for f in folders)
    named = [f for f in folders if split_of(f.name) or f.name in pairs]
    no_classes = [f for f in named if not _is_a_class(f)]
    roles = {speaks_of(pairs.get(f.name, f.name)) for f in named}
    if not splits and named == folders and "train" in roles and len(roles) > 1:
        splits = no_classes = named  # splits also without class folders in them: a train beside a test is no class
    if not splits and len(folders) > 1:
        has_word = any(is_glued(f.name) or f.name in pairs for f in no_classes)
        if no_classes == folders or has_word:
            splits = no_classes  # images_train/ and images_test/, trainset/ and testset/
    if not splits or (len(splits) == 1 < len(folders) and _is_a_class(splits[0])):
        _refuse_two_roles(path, [folder.name for folder in folders])
        _refuse_same_classes(path, folders)
        return _class_folders(path, path)
    # Folders with longer names (validation_matched/) are splits too. by_role() decides whether they
    # are used.
    splits = [f for f in folders if f in splits or f in no_classes]
    readings = []
    unlabelled = _unlabelled(splits)
    for split in [split for split in splits if split not in unlabelled]:
        of_split = _with_metadata(split, path, place) if _metadata(split) else _class_folders(split, path)
        (table,) = of_split.tables.values()
        readings.append(Reading({pairs.get(split.name, split.name): table}, of_split.unused, of_split.notes))
    shown = ", ".join(f"{split.name}/" for split in splits if split not in unlabelled)
    reading = together(readings)
    _refuse_rivals(path, reading.tables, splits)
    unused = tuple(f"{split.name}/: {why}: not used" for split, why in unlabelled.items())
    return together([reading, Reading({}, unused + left_over(path, splits, lambda p: _beside_splits(p, shown)))])


def _unlabelled(splits: list[Path]) -> dict[Path, str]:
    """The split folders without labels, beside a train/ of classes, each with the reason.

    Kaggle has such test splits.
    """
    trains = [split for split in splits if role_of(split.name) == "train" and not _metadata(split)]
    classes = {folder.name for split in trains for folder in folders_in(split)}
    reasons = {}
    for split in splits:
        if split in trains or len(classes) < 2 or _metadata(split):
            continue
        inner = [folder for folder in folders_in(split) if entries(folder)]
        files = [path for path in entries(split) if path.is_file() and not is_about(path)]
        if not inner and files:
            reasons[split] = f"{len(files)} files in no class folder, so of no label"
        elif len(inner) == 1 and UNKNOWN.fullmatch(inner[0].name) and inner[0].name not in classes:
            reasons[split] = f"one folder {inner[0].name}/, which is no class of {trains[0].name}/, so of no label"
    return reasons


def _refuse_same_classes(path: Path, folders: list[Path]) -> None:
    """Refuse several folders that all contain the same folders and no file: they are splits, not
    classes.
    """
    inner = [[entry.name for entry in folders_in(folder)] for folder in folders]
    if len(folders) < 2 or len(inner[0]) < 2 or any(names != inner[0] for names in inner):
        return
    if any(map(role_of, inner[0])):  # _check_no_splits() refuses splits inside classes
        return
    if any(entry.is_file() and not is_about(entry) for folder in folders for entry in entries(folder)):
        return
    shown = first_and_last([f"{folder.name}/" for folder in folders])
    raise DataError(
        f"{path}: {shown} hold the same folders ({first_and_last([f'{name}/' for name in inner[0]])}), so they seem to be "
        "splits, and which trains is not known: name them train/ and test/. If they are the classes, put their files beside "
        "each other"
    )


def _beside_splits(path: Path, shown: str) -> str:
    return f"a folder that is no split; the data are in {shown}" if path.is_dir() else f"a file beside {shown}"


def _class_folders(folder: Path, root: Path) -> Reading:
    """Read the files of class folders, with the folders' names as labels."""
    prefix = "" if folder == root else f"{folder.name}/"
    names: list[str] = []
    labels: list[str] = []
    unused: list[str] = []
    classes = []
    for c in folders_in(folder):
        _check_no_splits(c, folder)
        files, problems = files_below(c)
        unused += [f"{path.relative_to(root).as_posix()}: {reason}" for path, reason in problems]
        if files:
            classes.append(c)
        names += [file.relative_to(root).as_posix() for file in files]
        labels += [c.name] * len(files)
    if not names:
        raise DataError(f"{folder}: no images in class folders here. {KNOWN_FORMS}")
    tables = [path.name for path in entries(folder) if _is_data(path)]
    if len(classes) == 1 and tables:
        raise DataError(
            f"{folder}: holds tables ({first_and_last(tables)}) and one folder of other files ({classes[0].name}/): "
            "which are the data? Give the table itself; one that names the files is called metadata.csv"
        )
    place = root.absolute()
    are_sounds = 2 * sum(map(_is_sound, names)) > len(names)
    kind, feature = ("audio", datasets.Audio) if are_sounds else ("image", datasets.Image)
    rows = datasets.Dataset.from_dict({kind: [str(place / name) for name in names], "label": labels})
    origin = prefix or _own_name(root)
    table = Table(rows.cast_column(kind, feature(decode=False)), names, folder, origin=origin)
    unused += [prefix + line for line in left_over(folder, classes, _beside_classes)]
    return Reading({"train": table}, tuple(unused), (f"{origin}: {len(classes)} class folders, {len(names)} files",))


def _check_no_splits(folder: Path, root: Path) -> None:
    """Refuse a class folder with split folders in it: a/train, a/test, b/train, …"""
    inner = [part.name for part in folders_in(folder) if role_of(part.name)]
    if inner:
        shown = ", ".join(f"{folder.name}/{name}/" for name in inner)
        raise DataError(
            f"{root}: {shown}: splits inside a class folder. Put them above the classes (train/CLASS/, test/CLASS/), or if "
            f"{folder.name} is the data set, give {root / folder.name}"
        )


def _beside_classes(path: Path) -> str:
    if path.is_dir():
        return "a class folder without files"
    if is_table(path):
        return "a table beside class folders; one that names the files is called metadata.csv"
    return "a file beside class folders, so of no class"


def _is_a_class(folder: Path) -> bool:
    """True for a folder with files and no folders.

    It may be the class `train`, of trains, beside `cars`.
    """
    return not _metadata(folder) and not folders_in(folder)
