"""Show a plan as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from dsd_refine.report.data import data_lines


def plan_text(plan: Mapping[str, Any], layers: bool = False) -> str:
    """Return what `plan` prints: weights, steps, memory, disk, time, data, labels, warnings, layers.

    Args:
        plan: The result of `make_plan`.
        layers: Show each layer with its number of masked weights, or with the reason why it has none.
            Else show only how many layers are masked, and how many are not for each reason.
    """
    totals = plan["totals"] | ({} if "whole run" in plan["totals"] else {"time": "not measured; --measure trains a few steps"})
    lines = [f"{plan['model']} · {plan['task']} · recipe {plan['recipe']}", ""]
    lines += [f"  {name.ljust(18)} {text}" for name, text in totals.items()]
    lines += [f"  {'data'.ljust(18)} {line}" for line in data_lines({**(plan.get("data") or {}), "unused": ()})]
    lines += [f"  {'labels'.ljust(18)} {labels['rule']}"] if (labels := plan.get("labels")) else []
    lines += [f"  {'layers'.ljust(18)} {line}" for line in _counts(plan["layers"])] if not layers else []
    lines += [f"  {'warning'.ljust(18)} {warning}" for warning in plan["warnings"]]
    return "\n".join([*lines, "", *_table(plan["layers"])] if layers else lines)


def _counts(layers: list[Mapping[str, Any]]) -> list[str]:
    """Return lines that say how many layers are masked, and how many are not for each reason."""
    reasons = Counter(layer["excluded"].partition(": ")[0] for layer in layers if layer["excluded"] is not None)
    masked = len(layers) - reasons.total()
    return [
        f"{masked} masked (--layers shows each)",
        *(f"{count} not masked: {reason}" for reason, count in reasons.most_common()),
    ]


def _table(layers: list[Mapping[str, Any]]) -> list[str]:
    width = max((len(layer["name"]) for layer in layers), default=0)
    lines = []
    for layer in layers:
        masked = layer["excluded"] or " ".join(f"{count:,}" for count in layer["masked"])
        shape = "x".join(map(str, layer["shape"]))
        lines.append(f"  {layer['name'].ljust(width)}  {shape:>18}  {layer['weights']:>12,}  {masked}")
    return lines
