"""Fetch a data set of the Hub by `datasets`, and check it against the Hub's checksums."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets

from dsd_refine.data import imagenet
from dsd_refine.data.files import guarded, validated
from dsd_refine.data.names import listed
from dsd_refine.data.reading import Reading, Table, named
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.hub import ask_hub, check_blobs

HUB_LIMIT = 5 * 10**9  # bytes; a larger download needs the user's agreement


def read_hub(spec: str, download: Callable[[str, int], bool]) -> Reading:
    """Read `org/name[:config]` as `datasets` loads it.

    The result's `unused` names other configurations.

    `download(name, bytes)` is called for more than HUB_LIMIT bytes. False refuses the download.

    Raises:
        DataError: The data cannot be fetched, or the download is refused, or there are several
            configurations and none is named.
    """
    name, _, config = spec.partition(":")
    try:
        _check_size(name, download)
        splits, others = _checked(name, lambda: guarded(Path(spec), lambda: _load(name, config or None)))
    except CheckpointError as error:
        raise DataError(str(error)) from None
    tables = {str(split): Table(rows, origin=f"{spec}: {split}") for split, rows in splits.items()}
    notes = tuple(f"{table.origin}: {len(table.rows)} rows" for table in tables.values())
    classes = imagenet.synsets() if name in imagenet.NUMBERED else None
    return Reading(named(tables, classes), others, notes)


def _check_size(name: str, download: Callable[[str, int], bool]) -> None:
    """Refuse a large download without agreement.

    If the Hub cannot be reached, the cache may have the data.
    """
    from huggingface_hub import HfApi

    try:
        info = ask_hub(name, lambda: HfApi().dataset_info(name, files_metadata=True), "data set")
    except CheckpointError as error:
        if error.__cause__ is None:
            raise
        return
    size = sum(file.size or 0 for file in info.siblings or [])
    if size > HUB_LIMIT and not download(name, size):
        raise DataError(f"{name}: {size / 1e9:.0f} GB to download; give --yes to agree")


def _load(name: str, config: str | None) -> tuple[dict[Any, Any], tuple[str, ...]]:
    """The rows of each split, and lines that name the configurations that are not read."""
    try:
        builder = datasets.load_dataset_builder(name, config)
    except ValueError as error:
        if "Config name is missing" not in str(error):
            raise
        known = " ".join(str(error).split()).partition("available configs: ")[2].partition("]")[0].strip("[")
        shown = listed(known.replace("'", "").split(", ")) if known else error
        raise DataError(f"{name}: has several configurations ({shown}); name one: --data {name}:CONFIG") from None
    builder.download_and_prepare()
    splits = validated(builder.as_dataset())
    others = [other for other in builder.builder_configs if other != builder.config.name]
    line = f"{name}: the configuration {builder.config.name!r} is read, not {', '.join(others[:12])}" + (
        f" … ({len(others)} others)" if len(others) > 12 else ""
    )
    return splits, (line,) if others else ()


def _checked(name: str, load: Callable[[], Any]) -> Any:
    """Load a data set of the Hub, and check the files that were fetched for it against the Hub's
    checksums.
    """
    from huggingface_hub import constants

    started = time.time() - 2  # a file system's clock may be coarser than ours
    snapshots = Path(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}", "snapshots")
    loaded: Any = ({}, ())
    try:
        loaded = ask_hub(name, load, "data set")
    finally:  # also after an error, because wrong bytes may be its cause, and are the better message
        try:
            check_blobs(name, [path for path in snapshots.rglob("*") if path.is_file() and path.stat().st_mtime >= started])
        except CheckpointError:
            for file in (file for table in loaded[0].values() for file in table.cache_files):  # made from wrong bytes
                shutil.rmtree(Path(file["filename"]).parent, ignore_errors=True)
            raise
    return loaded
