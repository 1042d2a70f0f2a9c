"""Which arm a report publishes, its true name, and its comparison with the source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The source compared with itself: no row can differ.
UNCHANGED = {"delta": 0.0, "ci95": [0.0, 0.0], "p_value": 1.0, "p_adjusted": 1.0, "gained": None, "lost": None}


def arm_of(report: Mapping[str, Any]) -> str:
    """Return the arm whose weights are published. "baseline" is the source."""
    return str(report.get("published", "refined"))


def true_name(report: Mapping[str, Any]) -> str:
    """Return what the published arm did, such as "SWA, no mask"."""
    return str(report.get("published_name") or arm_of(report))


def comparison_of(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the comparison of the published arm with the source."""
    arm = arm_of(report)
    comparison: Mapping[str, Any] = report["comparison"][f"{arm}_vs_baseline"] if arm != "baseline" else UNCHANGED
    return comparison


def result_of(report: Mapping[str, Any]) -> str:
    """Return how a sentence calls the published checkpoint."""
    arm = arm_of(report)
    return {"refined": "the refined checkpoint", "baseline": "the source"}.get(arm, f"the {arm} arm ({true_name(report)})")
