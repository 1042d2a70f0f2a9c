"""Read a data set's folder with a README from the Hub, which says which files are which split."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import DatasetCard

from dsd_refine.compat import card_configs, card_infos, default_config
from dsd_refine.data.files import Place, check_shards, guarded, is_table, read_file, validated
from dsd_refine.data.listing import left_over
from dsd_refine.data.names import listed
from dsd_refine.data.plain import refuse_pointer, suffix_of
from dsd_refine.data.reading import Reading, Table, first_and_last, joined, together
from dsd_refine.errors import DataError


def read_configured(path: Path, config: str | None, place: Place) -> Reading | None:
    """Read a folder whose README has configurations, as `datasets` opens it.

    We read text files ourselves, because we count their lines. `datasets` reads them if the README
    has options for them, besides their places.

    Args:
        path: The folder.
        config: The configuration that the user asked for.
        place: Where files are parsed into.

    Returns:
        None if the README has no configurations.

    Raises:
        DataError: The configuration does not exist, or there are several without a default.
    """
    known = _configs(path)
    if not known:
        if config is not None:
            raise DataError(f"{path}:{config}: its README.md names no configurations; give {path}")
        return None
    name = _choose(path, known, config)
    builder = _builder(path, name, place)
    files = {
        str(split): [path / os.path.relpath(file, path.resolve()) for file in of_split]
        for split, of_split in builder.config.data_files.items()
    }
    every = [file for of_split in files.values() for file in of_split]
    _check(path, name, files)
    has_no_options = set(known[name]) <= {"data_files", "data_dir", "default"} and builder.info.features is None
    if has_no_options and all(is_table(file) and suffix_of(file) != ".parquet" for file in every):
        reading = _read_ourselves(path, files, place)
    else:
        reading = _read_by_datasets(path, builder, files)
    reason = f"no file of the configuration {name!r} (README.md)"
    return Reading(reading.tables, reading.unused + left_over(path, every, lambda _: reason), reading.notes)


def with_declared_names(path: Path, reading: Reading) -> Reading:
    """Give integer labels the class names that the folder's README declares in `dataset_info`.

    `datasets` does so for the configuration "default", even if the README names no files of it.

    Raises:
        DataError: An integer is none of these classes.
    """
    kinds = {name: kind for name, kind in _declared(path).items() if isinstance(kind, datasets.ClassLabel)}
    if not kinds:
        return reading
    return replace(reading, tables={split: _cast(path, table, kinds) for split, table in reading.tables.items()})


def _declared(path: Path) -> dict[str, Any]:
    """The features of the configuration "default" in a README that names no configurations."""
    card = path / "README.md"
    if not card.is_file() or "dataset_info:" not in card.read_text(encoding="utf-8", errors="replace") or _configs(path):
        return {}
    try:
        infos = card_infos(DatasetCard.load(card, ignore_metadata_errors=True).data)
    except Exception as error:  # a card may contain anything
        raise DataError(f"{card}: its `dataset_info` cannot be read: {' '.join(str(error).split())[:200]}") from None
    return dict(infos["default"].features or {}) if "default" in infos else {}


def _cast(path: Path, table: Table, kinds: dict[str, Any]) -> Table:
    """Turn integer columns into class labels."""
    rows = table.rows
    for name, kind in kinds.items():
        if str(getattr(rows.features.get(name), "dtype", "")).startswith(("int", "uint")):
            rows = guarded(path, partial(rows.cast_column, name, kind))
    return replace(table, rows=rows)


def _configs(path: Path) -> dict[str, dict[str, Any]]:
    """The configurations in a folder's README by name, each with its options."""
    card = path / "README.md"
    if not card.is_file():
        return {}
    try:
        return card_configs(DatasetCard.load(card, ignore_metadata_errors=True).data)
    except Exception as error:  # a card may contain anything
        if "configs:" not in card.read_text(encoding="utf-8", errors="replace"):
            return {}
        raise DataError(f"{card}: its configurations cannot be read: {' '.join(str(error).split())[:200]}") from None


def _choose(path: Path, known: dict[str, dict[str, Any]], asked: str | None) -> str:
    """The name of the configuration to read."""
    if asked is not None and asked not in known:
        raise DataError(f"{path}: has no configuration {asked!r}; README.md names {listed(list(known))}")
    name = asked or guarded(path, lambda: default_config(known))
    if name is None:
        raise DataError(
            f"{path}: has several configurations: {listed(list(known))}. Name one: --data {path}:{next(iter(known))}"
        )
    return str(name)


def _builder(path: Path, name: str, place: Place) -> Any:
    """The builder of `datasets` for a configuration, whose files must all be here."""
    try:
        return guarded(path, lambda: datasets.load_dataset_builder(str(path), name, cache_dir=str(place.cache)))
    except DataError as error:
        missing = re.search(r"Unable to find '(.*?)'|No \(supported\) data files found", str(error))
        if missing is None:
            raise
        file = f"the file {os.path.relpath(missing[1], path)}, which is" if missing[1] else "files that are"
        raise DataError(
            f"{path}: the configuration {name!r} in its README.md names {file} not there: fetch or correct it"
        ) from None


def _check(path: Path, config: str, files: dict[str, list[Path]]) -> None:
    """Check a configuration's files: all fetched, and of one kind, because `datasets` silently
    skips other kinds.

    Raises:
        DataError: They are not.
    """
    for split, of_split in files.items():
        for file in of_split:
            refuse_pointer(file)
        tables = [file for file in of_split if is_table(file) and not file.name.startswith("metadata.")]
        if tables and len(tables) < len([file for file in of_split if not file.name.startswith("metadata.")]):
            raise DataError(
                f"{path}: the configuration {config!r} takes files of several kinds for {split}: "
                f"{first_and_last([file.relative_to(path).as_posix() for file in of_split])}; "
                "let its `data_files` name one kind"
            )
        check_shards(path, split, tables)


def _read_ourselves(path: Path, files: dict[str, list[Path]], place: Place) -> Reading:
    """Read the table files of each split, and join them."""
    tables, readings = {}, []
    for split, shards in files.items():
        of_split = [read_file(file, file.relative_to(path).as_posix(), place) for file in shards]
        tables[split] = joined(of_split, path)
        readings += of_split
    all_files = together(readings)
    return Reading(tables, all_files.unused, all_files.notes)


def _read_by_datasets(path: Path, builder: Any, files: dict[str, list[Path]]) -> Reading:
    """Read all splits by `datasets`."""

    def load() -> Any:
        builder.download_and_prepare()
        return validated(builder.as_dataset())

    splits = guarded(path, load)
    tables = {
        str(split): Table(rows, folder=path, origin=f"{split} ({_files(path, files[str(split)])})")
        for split, rows in splits.items()
    }
    notes = tuple(f"{table.origin}: {len(table.rows)} rows" for table in tables.values())
    return Reading(tables, (), notes)


def _files(path: Path, files: list[Path]) -> str:
    """Files in words: the name of one, or their number and the first name."""
    first = files[0].relative_to(path).as_posix()
    return first if len(files) == 1 else f"{len(files)} files, {first} …"
