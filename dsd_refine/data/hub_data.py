"""A data set of the Hub, fetched by `datasets` and held against the Hub's checksums."""

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

HUB_LIMIT = 5 * 10**9


def read_hub(spec: str, download: Callable[[str, int], bool]) -> Reading:
    """`org/name[:config]` as `datasets` loads it. Configurations that are not read are named as unused.

    Raises:
        DataError: it cannot be had, is more than HUB_LIMIT and nobody agreed, or has several configurations.
    """
    name, _, config = spec.partition(":")
    try:
        _agree(name, download)
        found, others = _checked(name, lambda: guarded(Path(spec), lambda: _loaded(name, config or None)))
    except CheckpointError as error:
        raise DataError(str(error)) from None
    tables = {str(split): Table(rows, origin=f"{spec}: {split}") for split, rows in found.items()}
    notes = tuple(f"{table.origin}: {len(table.rows)} rows" for table in tables.values())
    classes = imagenet.synsets() if name in imagenet.NUMBERED else None
    return Reading(named(tables, classes), others, notes)


def _agree(name: str, download: Callable[[str, int], bool]) -> None:
    """Raises DataError where the download is large and nobody agrees. Without a Hub to ask, the cache may do."""
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


def _loaded(name: str, config: str | None) -> tuple[dict[Any, Any], tuple[str, ...]]:
    """(split -> rows, what of the repository is not read)."""
    try:
        builder = datasets.load_dataset_builder(name, config)
    except ValueError as error:
        if "Config name is missing" not in str(error):
            raise
        known = " ".join(str(error).split()).partition("available configs: ")[2].partition("]")[0].strip("[")
        shown = listed(known.replace("'", "").split(", ")) if known else error
        raise DataError(f"{name}: has several configurations ({shown}); name one: --data {name}:CONFIG") from None
    builder.download_and_prepare()
    found = validated(builder.as_dataset())
    others = [other for other in builder.builder_configs if other != builder.config.name]
    said = f"{name}: the configuration {builder.config.name!r} is read, not {', '.join(others[:12])}" + (
        f" … ({len(others)} others)" if len(others) > 12 else ""
    )
    return found, (said,) if others else ()


def _checked(name: str, load: Callable[[], Any]) -> Any:
    """Load a data set of the Hub, and hold what was fetched for it against the Hub's checksums."""
    from huggingface_hub import constants

    started = time.time() - 2  # a file system's clock may be coarser than ours
    snapshots = Path(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}", "snapshots")
    found: Any = ({}, ())
    try:
        found = ask_hub(name, load, "data set")
    finally:  # wrong bytes are also a reason why it cannot be loaded, and the better one
        try:
            check_blobs(name, [path for path in snapshots.rglob("*") if path.is_file() and path.stat().st_mtime >= started])
        except CheckpointError:
            for file in (file for table in found[0].values() for file in table.cache_files):  # prepared from those bytes
                shutil.rmtree(Path(file["filename"]).parent, ignore_errors=True)
            raise
    return found
