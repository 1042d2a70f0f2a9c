"""What a run took, for report.html: time, samples and energy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def cost_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row of optimizer steps, samples and seconds for each arm (all of its tries), then one for all arms together."""
    arms: dict[str, dict[str, Any]] = {}
    everything = _row("in all")
    for phase in report["phases"]:
        for row in (arms.setdefault(phase["arm"], _row(phase["arm"])), everything):
            row["steps"] += phase["optimizer_steps"]
            row["samples"] += phase["samples"]
            row["seconds"] += phase["seconds"]
    return [*arms.values(), everything] if arms else []


def _row(name: str) -> dict[str, Any]:
    return {"arm": name, "steps": 0, "samples": 0, "seconds": 0.0}


def duration(seconds: float) -> str:
    """7.5 s, 12 min 5 s, 3 h 20 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def energy(joules: float) -> str:
    """Joules below 3.6 kJ, else watt-hours or kilowatt-hours."""
    hours = joules / 3600
    return f"{joules:.0f} J" if hours < 1 else f"{hours:.1f} Wh" if hours < 1000 else f"{hours / 1000:.2f} kWh"
