"""A folder as tables: class folders, metadata with files, table files. Which form it has, and what of it is not used."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
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
    is_glued,
    joined,
    listed,
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
# what a column of file names is called, the surer first
FILE_NAMES = (
    "file_name", "filename", "file_path", "filepath", "image_path", "audio_path", "image_file", "audio_file", "image_filename",
    "img_path", "image_name", "image_id", "path", "file",
)  # fmt: skip

# words of rows that are not to train
ASIDE = re.compile(
    "unlabel|unsup|(no|without|missing) ?labels?|submission|predict|held ?out|hold ?out|(?<!la)(?<!con)(?<!pro)test( |$)"
)

FILE_NAME = re.compile(r"[^\0\n]{1,200}\.[A-Za-z0-9]{1,5}")
# what the one folder of a split without classes is called
UNKNOWN = re.compile("unknown|unlabell?ed|none|no[-_ ]?labels?|test|testing|images?|imgs?|all|data|files", re.IGNORECASE)
KNOWN_FORMS = (
    "Known forms: class folders, train/ and test/ of them, train.csv|jsonl|parquet|txt, metadata.csv|jsonl, or a folder that "
    "save_to_disk wrote"
)


def read_folder(path: Path, config: str | None, place: Place) -> Reading:
    """Any folder that holds data; what in it is not used is in the reading's `unused`.

    Raises:
        DataError: of no known form, or of a form that could mean several things.
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
    """Is train among the files, or at least no folder?"""
    roles = {role_of(split_of(stem_of(file)) or "") for file in files}
    return "train" in roles or not any(role_of(folder.name) == "train" for folder in folders)


def _saved(path: Path) -> Reading:
    for file in path.rglob("*.arrow"):
        refuse_pointer(file)
    found = guarded(path, lambda: validated(datasets.load_from_disk(str(path))))
    splits = {"": found} if isinstance(found, datasets.Dataset) else dict(found)
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
    """Are all files in its folders tables (or all there is is tables at the top)? Stops at the first that is none."""
    if any((path / "data").glob("*-?????-of-?????*")):
        return any(_is_data(file) and SHARD.match(stem_of(file)) for file in entries(path / "data"))
    some = False
    for file, problem in walk(path):
        if problem or is_about(file):
            continue
        some = some or _is_data(file)
        if file.parent != path and not _is_data(file):
            return False
    return some


def _tables_below(path: Path) -> list[Path]:
    if any(SHARD.match(stem_of(file)) for file in (path / "data").glob("*") if _is_data(file)):
        return [file for file in entries(path / "data") if _is_data(file) and SHARD.match(stem_of(file))]
    return [file for file in files_below(path)[0] if _is_data(file)]


def _table_files(path: Path, files: list[Path], place: Place) -> Reading:
    """Table files by the split that their folders or names say; where none says one, all of them train."""
    splits, joins = _splits_of_files(path, files)
    readings, tables = [], {}
    places: tuple[str, ...] = ()
    for split, shards in splits.items():
        check_shards(path, split, shards)
        read = [read_file(file, file.relative_to(path).as_posix(), place) for file in shards]
        if any(len(each.tables) > 1 for each in read):
            raise DataError(f"{shards[0]}: holds several splits, and is one of a folder; give the file itself")
        tables[split], where = located(joined(read, path))
        places += where
        readings += read
    used = _used_files(path, [file for shards in splits.values() for file in shards], tables)
    _refuse_rivals(path, tables, used)
    parts = together(readings)
    first = next(iter(tables.values())).origin
    unused = left_over(path, used, lambda other: _beside(other, first))
    return Reading(tables, joins + parts.unused + unused, parts.notes + places)


def located(table: Table) -> tuple[Table, tuple[str, ...]]:
    """The table with the folder that its file names count from, where that is the one folder beside it that holds all of
    them, and a line that says so."""
    folder = table.folder
    if folder is None or not len(table.rows):
        return table, ()
    columns = text_columns(table.rows)
    first = {name: str(table.rows[0][name] or "") for name in columns}
    if any(_names_a_file(folder, text) for text in first.values()):
        return table, ()
    for name in (name for name in columns if FILE_NAME.fullmatch(first[name])):
        inner = [each for each in sorted(folder.glob("[!.]*/")) if _names_a_file(each, first[name])]
        values = [value for value in table.rows[name] if value]
        holding = [each for each in inner if all(_names_a_file(each, value) for value in values)]
        if len(holding) == 1:
            said = f"{table.origin}: the files of its column {name!r} are those in {holding[0].name}/"
            return replace(table, folder=holding[0]), (said,)
    return table, ()


def _splits_of_files(path: Path, files: list[Path]) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """The files of each split, and a line to the user where files of unrelated names are joined.

    Raises:
        DataError: a name speaks of two roles, or of rows that are not to train, and none says a split.
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
    """What to say where files that all train have names that are not one name with numbers.

    Raises:
        DataError: one of them speaks of rows that are not to train.
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
            f"{path}: {listed(shown)} say no split, and {listed(aside)} speaks of rows that are not to train: {remedy}"
        )
    return (f"{listed(shown)}: names of no split, so all are joined as train; where that is wrong, {remedy}",)


def _refuse_rivals(path: Path, tables: dict[str, Table], used: Iterable[Path]) -> None:
    """Refuse where what is not used could be meant as much as what is: another split, or anything where nothing trains.

    Raises:
        DataError: names both.
    """
    holding = {place for file in used for place in (file, *file.parents)}
    others = [each for each in entries(path) if each not in holding and not each.name.startswith(".")]
    others = [each for each in others if (each.is_dir() and entries(each)) or _is_data(each)]
    roles = {role_of(split) for split in tables}
    rivals = [each for each in others if each.is_dir() and (role_of(each.name) or _roles_in(each) - roles)]
    if rivals or (others and "train" not in roles):
        shown = ", ".join(f"{each.name}/" if each.is_dir() else each.name for each in (rivals or others)[:6])
        read = ", ".join(table.origin for table in tables.values())
        raise DataError(
            f"{path}: {read} would be its {' and '.join(tables)}, and {shown} would not be used: which are the data? Move the "
            "others away, name them like train and test, or give what is meant itself, such as "
            f"{path / next(iter(tables.values())).origin}"
        )


def _roles_in(folder: Path) -> set[str | None]:
    """The roles that the names in a folder say."""
    names = [stem_of(each) for each in entries(folder) if each.is_dir() or _is_data(each)]
    return {role_of(split_of(name) or "") for name in names} - {None}


def _split_of_file(root: Path, file: Path) -> str | None:
    stem = stem_of(file)
    if SHARD.match(stem):
        return split_of(stem)
    folders = file.parent.relative_to(root).parts
    return next((split for split in map(split_of, reversed(folders)) if split), None) or split_of(stem)


def _used_files(path: Path, files: list[Path], tables: dict[str, Table]) -> list[Path]:
    """The table files, and the files that a column of theirs names."""
    if all(_is_data(file) or is_about(file) for file in entries(path)):  # nothing that a column could name
        return files
    named: list[Path] = []
    for table in tables.values():
        folder = table.folder or path
        for name in text_columns(table.rows) if len(table.rows) else ():
            values = table.rows.select_columns([name])
            if _names_a_file(folder, values[0][name]):
                named += [folder / value for value in values[name] if value and "\0" not in value]
    return files + named


def _names_a_file(folder: Path, text: str | None) -> bool:
    return bool(text) and len(text or "") < 1000 and "\0" not in str(text) and os.path.isfile(folder / str(text))


def _beside(path: Path, first: str) -> str:
    if path.is_dir():
        return f"a folder beside {first}"
    if is_side_file(path):
        return f"speaks about the data by its name, beside {first}"
    words = roles_in(stem_of(path))
    if len(words) > 1:
        return f"named like {' and '.join(words)} at once, so no split, beside {first}"
    return f"not named like a split, beside {first}" if is_table(path) else f"no table, beside {first}"


def _metadata(folder: Path) -> Path | None:
    """Raises DataError where there are two."""
    found = [folder / f"metadata.{suffix}" for suffix in ("csv", "jsonl", "parquet")]
    found = [file for file in found if file.is_file()]
    if len(found) > 1:
        raise DataError(f"{folder}: has {' and '.join(file.name for file in found)}; keep the one that counts")
    return found[0] if found else None


def _with_metadata(folder: Path, root: Path, place: Place) -> Reading:
    """The files that metadata name. Of metadata above split folders, a table for each of them."""
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
    kind = "audio" if any(Path(name).suffix.lower() in AUDIO_SUFFIXES for name in names) else "image"
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


def _with_suffix(folder: Path, names: list[str]) -> list[str]:
    """File names, where metadata give ids: the one file of that name with a suffix."""
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
    """A table for each split folder that the files lie in; one where they lie otherwise.

    Raises:
        DataError: rows in several split folders, and rows in none.
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
    found = {}
    for split in splits:
        rows = [row for row, first in enumerate(firsts) if first == split]
        chosen: Any = table.rows.select(rows)
        assert table.names is not None
        found[split] = Table(chosen, [table.names[row] for row in rows], folder, origin=f"{table.origin}: {split}/")
    return found


def _class_or_split_folders(path: Path, folders: list[Path], place: Place) -> Reading:
    parts = [folder for folder in folders if role_of(folder.name)]
    pairs = siblings(f.name for f in folders)
    named = [f for f in folders if split_of(f.name) or f.name in pairs]
    said = [f for f in named if not _is_a_class(f)]
    roles = {speaks_of(pairs.get(f.name, f.name)) for f in named}
    if not parts and named == folders and "train" in roles and len(roles) > 1:
        parts = said = named  # without classes in them too: what is a train beside a test is no class
    if not parts and len(folders) > 1 and (said == folders or any(is_glued(f.name) or f.name in pairs for f in said)):
        parts = said  # images_train/ and images_test/, trainset/ and testset/
    if not parts or (len(parts) == 1 < len(folders) and _is_a_class(parts[0])):
        _refuse_two_roles(path, [folder.name for folder in folders])
        _refuse_same_classes(path, folders)
        return _class_folders(path, path)
    # a split of a name of its own (validation_matched/) is one too: whether it is used is not for the reader to say
    parts = [f for f in folders if f in parts or f in said]
    readings = []
    unlabelled = _unlabelled(parts)
    for part in [part for part in parts if part not in unlabelled]:
        found = _with_metadata(part, path, place) if _metadata(part) else _class_folders(part, path)
        (table,) = found.tables.values()
        readings.append(Reading({pairs.get(part.name, part.name): table}, found.unused, found.notes))
    shown = ", ".join(f"{part.name}/" for part in parts if part not in unlabelled)
    found = together(readings)
    _refuse_rivals(path, found.tables, parts)
    unused = tuple(f"{part.name}/: {why}: not used" for part, why in unlabelled.items())
    return together([found, Reading({}, unused + left_over(path, parts, lambda p: _beside_splits(p, shown)))])


def _unlabelled(parts: list[Path]) -> dict[Path, str]:
    """The splits beside a train of classes whose pictures lie in no class of it, as Kaggle gives a test split, with why."""
    trains = [part for part in parts if role_of(part.name) == "train" and not _metadata(part)]
    classes = {folder.name for part in trains for folder in folders_in(part)}
    why = {}
    for part in parts:
        if part in trains or len(classes) < 2 or _metadata(part):
            continue
        inner = [folder for folder in folders_in(part) if entries(folder)]
        files = [path for path in entries(part) if path.is_file() and not is_about(path)]
        if not inner and files:
            why[part] = f"{len(files)} files in no class folder, so of no label"
        elif len(inner) == 1 and UNKNOWN.fullmatch(inner[0].name) and inner[0].name not in classes:
            why[part] = f"one folder {inner[0].name}/, which is no class of {trains[0].name}/, so of no label"
    return why


def _refuse_same_classes(path: Path, folders: list[Path]) -> None:
    """Raises DataError where each of several folders holds the same folders and no file: these are splits, not classes."""
    inner = [[each.name for each in folders_in(folder)] for folder in folders]
    if len(folders) < 2 or len(inner[0]) < 2 or any(names != inner[0] for names in inner):
        return
    if any(map(role_of, inner[0])):  # splits inside classes, which are refused as such
        return
    if any(each.is_file() and not is_about(each) for folder in folders for each in entries(folder)):
        return
    shown = listed([f"{folder.name}/" for folder in folders])
    raise DataError(
        f"{path}: {shown} hold the same folders ({listed([f'{name}/' for name in inner[0]])}), so they seem to be splits, and "
        "which trains is not known: name them train/ and test/. If they are the classes, put their files beside each other"
    )


def _beside_splits(path: Path, shown: str) -> str:
    return f"a folder that is no split; the data are in {shown}" if path.is_dir() else f"a file beside {shown}"


def _class_folders(folder: Path, root: Path) -> Reading:
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
            f"{folder}: holds tables ({listed(tables)}) and one folder of other files ({classes[0].name}/): which are the "
            "data? Give the table itself; one that names the files is called metadata.csv"
        )
    place = root.absolute()
    rows = datasets.Dataset.from_dict({"image": [str(place / name) for name in names], "label": labels})
    origin = prefix or _own_name(root)
    table = Table(rows.cast_column("image", datasets.Image(decode=False)), names, folder, origin=origin)
    unused += [prefix + line for line in left_over(folder, classes, _beside_classes)]
    return Reading({"train": table}, tuple(unused), (f"{origin}: {len(classes)} class folders, {len(names)} files",))


def _check_no_splits(folder: Path, root: Path) -> None:
    """Raises DataError where a class folder holds split folders: a/train, a/test, b/train, …"""
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
    """A folder named like a split that has files and no folders, among others named otherwise: a train beside cars."""
    return not _metadata(folder) and not folders_in(folder)
