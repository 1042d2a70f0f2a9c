"""Describe the data of a run in words.

stderr, the plan, the summary, report.html and the model card show the same lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PARTS = {"train": "train", "holdout": "holdout", "eval": "evaluation"}


def data_lines(data: Mapping[str, Any]) -> list[str]:
    """Return one line for each part of the data, the rule, the columns, each note, and the data left out.

    Args:
        data: The entry `data` of report.json. That of an older report may lack these fields; it gives
            no lines.
    """
    lines = [_part_line(data, source) for source in data.get("sources", ())]
    if data.get("rule"):
        lines.append(f"rule: evaluation is {data['rule']}")
    if data.get("columns"):
        lines.append("columns: " + "; ".join(f"{use} = {names.replace(',', ' + ')}" for use, names in data["columns"].items()))
    return [*lines, *data.get("notes", ()), *(f"left out: {line}" for line in data.get("unused", ()))]


def _part_line(data: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    skipped = len(data[source["part"]]["skipped"])
    split = (
        f", split {source['split']}" if "split" in source and not str(source["file"]).endswith(f"/{source['split']}") else ""
    )
    more = f", {skipped:,} skipped" if skipped else ""
    return f"{PARTS[source['part']]}: {source['rows']:,} rows of {source['file']}{split}{more}"
