"""A data set's folder as it came from the Hub: the configurations in its README say which files are which split."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard

from dsd_refine.data.files import Place, check_shards, guarded, is_table, read_file, validated
from dsd_refine.data.listing import left_over
from dsd_refine.data.names import listed as shown_names
from dsd_refine.data.plain import refuse_pointer, suffix_of
from dsd_refine.data.reading import Reading, Table, joined, listed, together
from dsd_refine.errors import DataError


def read_configured(path: Path, config: str | None, place: Place) -> Reading | None:
    """The folder as `datasets` opens it, where the README in it has configurations; None where it has none.

    Text files are read by us, who count lines, unless the README says more of them than where they are.

    Raises:
        DataError: several configurations and none is asked for or the default, or one that is not there.
    """
    known = _configs(path)
    if not known:
        if config is not None:
            raise DataError(f"{path}:{config}: its README.md names no configurations; give {path}")
        return None
    name = _chosen(path, known, config)
    builder = _builder(path, name, place)
    files = {
        str(split): [path / os.path.relpath(file, path.resolve()) for file in found]
        for split, found in builder.config.data_files.items()
    }
    every = [file for found in files.values() for file in found]
    _check(path, name, files)
    is_plain = set(known[name]) <= {"data_files", "data_dir", "default"} and builder.info.features is None
    if is_plain and all(is_table(file) and suffix_of(file) != ".parquet" for file in every):
        found = _own(path, files, place)
    else:
        found = _theirs(path, builder, files)
    reason = f"no file of the configuration {name!r} (README.md)"
    return Reading(found.tables, found.unused + left_over(path, every, lambda _: reason), found.notes)


def with_declared_names(path: Path, reading: Reading) -> Reading:
    """The same, its integers classes by the names that the folder's README gives in `dataset_info`.

    So does `datasets` for the configuration "default", also where the README names no files of it.

    Raises:
        DataError: an integer that is none of these classes.
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
        infos = DatasetInfosDict.from_dataset_card_data(DatasetCard.load(card, ignore_metadata_errors=True).data)
    except Exception as error:  # a card may hold anything
        raise DataError(f"{card}: its `dataset_info` cannot be read: {' '.join(str(error).split())[:200]}") from None
    return dict(infos["default"].features or {}) if "default" in infos else {}


def _cast(path: Path, table: Table, kinds: dict[str, Any]) -> Table:
    rows = table.rows
    for name, kind in kinds.items():
        if str(getattr(rows.features.get(name), "dtype", "")).startswith(("int", "uint")):
            rows = guarded(path, partial(rows.cast_column, name, kind))
    return replace(table, rows=rows)


def _configs(path: Path) -> dict[str, dict[str, Any]]:
    card = path / "README.md"
    if not card.is_file():
        return {}
    try:
        return dict(MetadataConfigs.from_dataset_card_data(DatasetCard.load(card, ignore_metadata_errors=True).data))
    except Exception as error:  # a card may hold anything
        if "configs:" not in card.read_text(encoding="utf-8", errors="replace"):
            return {}
        raise DataError(f"{card}: its configurations cannot be read: {' '.join(str(error).split())[:200]}") from None


def _chosen(path: Path, known: dict[str, dict[str, Any]], asked: str | None) -> str:
    if asked is not None and asked not in known:
        raise DataError(f"{path}: has no configuration {asked!r}; README.md names {shown_names(list(known))}")
    name = asked or guarded(path, lambda: MetadataConfigs(known).get_default_config_name())
    if name is None:
        raise DataError(
            f"{path}: has several configurations: {shown_names(list(known))}. Name one: --data {path}:{next(iter(known))}"
        )
    return str(name)


def _builder(path: Path, name: str, place: Place) -> Any:
    try:
        return guarded(path, lambda: datasets.load_dataset_builder(str(path), name, cache_dir=str(place.cache)))
    except DataError as error:
        gone = re.search(r"Unable to find '(.*?)'|No \(supported\) data files found", str(error))
        if gone is None:
            raise
        file = f"the file {os.path.relpath(gone[1], path)}, which is" if gone[1] else "files that are"
        raise DataError(
            f"{path}: the configuration {name!r} in its README.md names {file} not there: fetch or correct it"
        ) from None


def _check(path: Path, config: str, files: dict[str, list[Path]]) -> None:
    """Raises DataError for a file that was not fetched, and where `datasets` would leave files out without a word."""
    for split, found in files.items():
        for file in found:
            refuse_pointer(file)
        tables = [file for file in found if is_table(file) and not file.name.startswith("metadata.")]
        if tables and len(tables) < len([file for file in found if not file.name.startswith("metadata.")]):
            raise DataError(
                f"{path}: the configuration {config!r} takes files of several kinds for {split}: "
                f"{listed([file.relative_to(path).as_posix() for file in found])}; let its `data_files` name one kind"
            )
        check_shards(path, split, tables)


def _own(path: Path, files: dict[str, list[Path]], place: Place) -> Reading:
    tables, parts = {}, []
    for split, shards in files.items():
        read = [read_file(file, file.relative_to(path).as_posix(), place) for file in shards]
        tables[split] = joined(read, path)
        parts += read
    found = together(parts)
    return Reading(tables, found.unused, found.notes)


def _theirs(path: Path, builder: Any, files: dict[str, list[Path]]) -> Reading:
    def load() -> Any:
        builder.download_and_prepare()
        return validated(builder.as_dataset())

    found = guarded(path, load)
    tables = {
        str(split): Table(rows, folder=path, origin=f"{split} ({_files(path, files[str(split)])})")
        for split, rows in found.items()
    }
    notes = tuple(f"{table.origin}: {len(table.rows)} rows" for table in tables.values())
    return Reading(tables, (), notes)


def _files(path: Path, files: list[Path]) -> str:
    first = files[0].relative_to(path).as_posix()
    return first if len(files) == 1 else f"{len(files)} files, {first} …"
