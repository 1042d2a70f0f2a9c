"""What a source's card claims to have reached: the figures in its `model-index` and in `.eval_results/`, and on which data."""

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
class Claim:
    """A figure as it stands in a card. `data` is a Hub name (old ones have no owner), or `local:NAME` for data of one's own.

    `metric` is None where only `notes` may say it: an entry of `.eval_results/` has a value and no metric's name
    (https://huggingface.co/docs/hub/eval-results).
    """

    data: str
    config: str | None
    metric: str | None
    value: float
    notes: str = ""

    @property
    def shown(self) -> str:
        """What its data are called."""
        return self.data.removeprefix(LOCAL) + (f":{self.config}" if self.config else "")

    def is_of(self, data: DataName) -> bool:
        """Is it of these data? Owner and configuration count where both sides name one (`glue` may be `nyu-mll/glue:sst2`)."""
        name, own = self.data.removeprefix(LOCAL), data.hub or data.name
        if self.config and data.config and _plain(self.config) != _plain(data.config):
            return False
        if data.hub and self.data.startswith(LOCAL):
            return False
        if data.hub and "/" in name:
            return name.lower() == data.hub.lower()
        return _plain(name.rsplit("/", 1)[-1]) == _plain(own.rsplit("/", 1)[-1])


def claims(source: Path) -> list[Claim]:
    """All figures of a source folder's card; what is not readable is left out."""
    found = list(_walk(read_card(source).front))
    files = (source / ".eval_results").glob("*.yaml")
    for file in sorted(file for file in files if not leads_out(file, source)):
        try:
            found += _walk(read_plain(file.read_text(encoding="utf-8", errors="replace")))
        except (OSError, yaml.YAMLError, ValueError, RecursionError):
            continue
    return found


def _walk(value: Any, data: str = "", config: str | None = None) -> Iterator[Claim]:
    """Whatever a card holds: a mapping with `dataset` names it for what is below; a metric has `type` and `value`."""
    if isinstance(value, list):
        for item in value:
            yield from _walk(item, data, config)
    elif isinstance(value, dict):
        dataset = value.get("dataset")
        if isinstance(dataset, dict):
            data, config = _data(dataset)
        said, number = value.get("type") or value.get("metric"), value.get("value")
        metric = said.lower() if isinstance(said, str) else None
        named = data and (metric or isinstance(dataset, dict))
        if named and isinstance(number, int | float) and not isinstance(number, bool):
            yield Claim(data, config, metric, float(number), str(value.get("notes")))
        for item in value.values():
            yield from _walk(item, data, config)


def _data(dataset: dict[str, Any]) -> tuple[str, str | None]:
    """Name and configuration: `type` and `config` (`args` of old) in a model-index, `id` and `task_id` in `.eval_results/`."""
    name = dataset.get("type") or dataset.get("id") or dataset.get("name") or ""
    config = next((dataset[key] for key in ("config", "task_id", "args") if isinstance(dataset.get(key), str)), None)
    return str(name), None if config == "default" else config


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.casefold())
