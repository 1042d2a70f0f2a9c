"""What a run gets, and where things are."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDS = 3


@dataclass(frozen=True)
class Given:
    """What a run gets: a checkpoint, the rows that it trains on, and the rows that judge."""

    checkpoint: Path
    train: Path
    judge: Path


@dataclass(frozen=True)
class Sources:
    """Where things are: released checkpoints, their data, and a folder for what is made."""

    released: Path | None
    data: Path | None
    work: Path


def fold_of(content: bytes, folds: int = FOLDS) -> int:
    """Return the fold of a row. Equal rows are in the same fold."""
    return hashlib.sha256(b"efficacy" + content).digest()[0] % folds


def copy_pictures(folder: Path, given: Given, fold: int) -> None:
    """Copy the pictures of one fold to the rows that judge, and the others to those that train. Folders are classes."""
    for picture in sorted(folder.rglob("*.png")):
        part = given.judge if fold_of(picture.read_bytes()) == fold else given.train
        (part / picture.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, part / picture.parent.name)


def needed(path: Path | None, option: str) -> Path:
    """Return the path, or end with the option that gives it."""
    if path is None:
        raise SystemExit(f"this task needs {option} DIR")
    return path
