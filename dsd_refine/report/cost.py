"""The cost of a run for report.html: time, samples and energy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def cost_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the optimizer steps, samples and seconds: one row for each arm, then the total.

    The row of an arm counts all of its tries. Without phases, there are no rows.
    """
    arms: dict[str, dict[str, Any]] = {}
    total = _row("in all")
    for phase in report["phases"]:
        for row in (arms.setdefault(phase["arm"], _row(phase["arm"])), total):
            row["steps"] += phase["optimizer_steps"]
            row["samples"] += phase["samples"]
            row["seconds"] += phase["seconds"]
    return [*arms.values(), total] if arms else []


def _row(name: str) -> dict[str, Any]:
    return {"arm": name, "steps": 0, "samples": 0, "seconds": 0.0}


def duration(seconds: float) -> str:
    """Return a duration as text: 7.5 s, 12 min 5 s, 3 h 20 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def energy(joules: float) -> str:
    """Return an energy as text: in joules below 3.6 kJ, else in watt-hours or kilowatt-hours."""
    watt_hours = joules / 3600
    if watt_hours < 1:
        return f"{joules:.0f} J"
    return f"{watt_hours:.1f} Wh" if watt_hours < 1000 else f"{watt_hours / 1000:.2f} kWh"
