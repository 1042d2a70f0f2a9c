"""Which data a run uses, in words: the same lines on stderr, in the plan, in the summary, on the page and in the card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PARTS = {"train": "train", "holdout": "holdout", "eval": "evaluation"}


def data_lines(data: Mapping[str, Any]) -> list[str]:
    """A line each for the parts, the rule, the columns, how what was read became rows, and what is left out.

    `data` is the report's entry; one of an older report, which says none of it, gives no lines.
    """
    lines = [_part(data, source) for source in data.get("sources", ())]
    if data.get("rule"):
        lines.append(f"rule: evaluation is {data['rule']}")
    if data.get("columns"):
        lines.append(
            "columns: " + "; ".join(f"{what} = {names.replace(',', ' + ')}" for what, names in data["columns"].items())
        )
    return [*lines, *data.get("notes", ()), *(f"left out: {line}" for line in data.get("unused", ()))]


def _part(data: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    skipped = len(data[source["part"]]["skipped"])
    split = (
        f", split {source['split']}" if "split" in source and not str(source["file"]).endswith(f"/{source['split']}") else ""
    )
    more = f", {skipped:,} skipped" if skipped else ""
    return f"{PARTS[source['part']]}: {source['rows']:,} rows of {source['file']}{split}{more}"
