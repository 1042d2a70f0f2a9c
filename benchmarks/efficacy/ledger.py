"""The ledger of a task: one JSON line for each trial, benchmarks/results/efficacy/TASK.jsonl. Lost trials stay in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "results/efficacy"

Trial = dict[str, Any]


def read(file: Path) -> list[Trial]:
    """Return the trials of a ledger, in the order in which they ran. There are none without a file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def append(file: Path, trial: Trial) -> None:
    """Add a trial as one line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(trial) + "\n")


def key(trial: Trial) -> tuple[str, int]:
    """Return what makes a trial the same as another: what is trained, and the seed."""
    return json.dumps(trial["recipe"], sort_keys=True), trial["seed"]
