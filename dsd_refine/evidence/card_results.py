"""Read the results that a source's model card reports, in its `model-index` and in
`.eval_results/`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsd_refine.files import leads_out
from dsd_refine.report.card import LOCAL, DataName, read_card, read_plain


@dataclass(frozen=True)
class CardResult:
    """One result of a model card.

    Attributes:
        data: A Hub name, in old cards without the owner, or `local:NAME` for data that are not on
            the Hub.
        config: The configuration of the data; None if the card names none.
        metric: The metric's name. None in `.eval_results/`, whose entries have no such field
            (https://huggingface.co/docs/hub/eval-results). `notes` may contain it.
        value: The number as the card has it, a fraction or in percent.
        notes: The entry's notes.
    """

    data: str
    config: str | None
    metric: str | None
    value: float
    notes: str = ""

    @property
    def shown(self) -> str:
        """The name of the data as a user writes it."""
        return self.data.removeprefix(LOCAL) + (f":{self.config}" if self.config else "")

    def is_of(self, data: DataName) -> bool:
        """Return whether the result is of these data.

        Owners and configurations are compared only if both sides name one: `glue` may be
        `nyu-mll/glue:sst2`.
        """
        name, own = self.data.removeprefix(LOCAL), data.hub or data.name
        if self.config and data.config and _letters(self.config) != _letters(data.config):
            return False
        if data.hub and self.data.startswith(LOCAL):
            return False
        if data.hub and "/" in name:
            return name.lower() == data.hub.lower()
        return _letters(name.rsplit("/", 1)[-1]) == _letters(own.rsplit("/", 1)[-1])


def read_card_results(source: Path) -> list[CardResult]:
    """Return all results of a source folder's model card.

    Entries that cannot be read are left out.
    """
    results = list(_walk(read_card(source).front))
    files = (source / ".eval_results").glob("*.yaml")
    for file in sorted(file for file in files if not leads_out(file, source)):
        try:
            results += _walk(read_plain(file.read_text(encoding="utf-8", errors="replace")))
        except (OSError, yaml.YAMLError, ValueError, RecursionError):
            continue
    return results


def _walk(value: Any, data: str = "", config: str | None = None) -> Iterator[CardResult]:
    """Search nested lists and mappings for results.

    A mapping with `dataset` names the data of everything in it. A result has `type` and `value`.
    """
    if isinstance(value, list):
        for item in value:
            yield from _walk(item, data, config)
    elif isinstance(value, dict):
        dataset = value.get("dataset")
        if isinstance(dataset, dict):
            data, config = _data(dataset)
        name, number = value.get("type") or value.get("metric"), value.get("value")
        metric = name.lower() if isinstance(name, str) else None
        complete = data and (metric or isinstance(dataset, dict))
        if complete and isinstance(number, int | float) and not isinstance(number, bool):
            yield CardResult(data, config, metric, float(number), str(value.get("notes")))
        for item in value.values():
            yield from _walk(item, data, config)


def _data(dataset: dict[str, Any]) -> tuple[str, str | None]:
    """Name and configuration of the data: `type` and `config` in a model-index (`args` in an old
    one), `id` and `task_id` in `.eval_results/`.
    """
    name = dataset.get("type") or dataset.get("id") or dataset.get("name") or ""
    config = next((dataset[key] for key in ("config", "task_id", "args") if isinstance(dataset.get(key), str)), None)
    return str(name), None if config == "default" else config


def _letters(name: str) -> str:
    """The letters and digits of a name in lower case, for comparing names."""
    return re.sub(r"[\W_]", "", name.casefold())
