"""The report and the plain-text summary of a run."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dsd_refine.report import words
from dsd_refine.report.data import data_lines

LIBRARIES = ("torch", "timm", "transformers", "accelerate", "datasets", "safetensors")


@dataclass(frozen=True)
class Report:
    """report.json as a mapping, and the output it is about."""

    data: Mapping[str, Any]
    output: Path

    @property
    def exit_code(self) -> int:
        return int(self.data["exit_code"])

    @property
    def credit(self) -> str:
        """Whose doing a better verdict is: mask | training | unknown (no control was run); none: it is not better."""
        return str(self.data["credit"])

    def to_json(self) -> str:
        return json.dumps(self.data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def environment(device: str, processes: int) -> dict[str, Any]:
    """Versions and machine, as the report lists them."""
    versions = {name: version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), **versions, "device": device, "processes": processes}


def summary(report: Report) -> str:
    """What the command prints at the end: arms, comparisons, verdict, gate, where the output is."""
    data = report.data
    metric = data["metric"]["name"]
    lines = [f"{data['source']['model']} · {data['task']} · {data['data']['eval']['rows']:,} evaluation rows", ""]
    names = list(next(iter(data["arms"].values())))
    lines.append("  " + "arm".ljust(10) + "".join(name.rjust(12) for name in names))
    lines += [
        "  " + arm.ljust(10) + "".join(f"{value:12.4f}" for value in found.values()) for arm, found in data["arms"].items()
    ]
    lines.append("")
    for name, found in data["comparison"].items():
        low, high = found["ci95"]
        rows = f", {found['gained']} gained, {found['lost']} lost" if found["gained"] is not None else ""
        lines.append(
            f"  {name.replace('_', ' ')}: {metric} {found['delta']:+.4f} [{low:+.4f}, {high:+.4f}]"
            f", p = {found['p_adjusted']:.3g}{rows}"
        )
    lines += _seed_lines(data, metric)
    selected = data["selected"]
    chosen = f"sparsity {selected['sparsity']:g}" if selected["sparsity"] is not None else "no sparse phase"
    lines += [
        "",
        f"  verdict   {data['verdict']}: {words.said(data)}",
        *(f"            {sentence}" for sentence in (words.edge(data), words.rows_words(data)) if sentence),
        f"  selected  {chosen}, epoch {selected['epoch']} of the last phase",
        f"  gate      {words.gate_words(data)}",
        f"  output    {report.output}",
        *(f"  data      {line}" for line in data_lines({**data["data"], "unused": ()})),
        *(f"  warning   {warning}" for warning in data["warnings"]),
    ]
    return "\n".join(lines)


def _seed_lines(data: Mapping[str, Any], metric: str) -> list[str]:
    if not data.get("seeds"):
        return []
    lines = ["", f"  over {data['seeds']['n']} seeds, mean and deviation:"]
    for arm, found in data["seeds"]["arms"].items():
        lines.append(f"  {arm.ljust(10)} {metric} {found[metric]['mean']:.4f} ± {found[metric]['deviation']:.4f}")
    for name, found in data["seeds"]["comparison"].items():
        low, high = found["ci95"]
        lines.append(f"  {name.replace('_', ' ')}: {found['delta']:+.4f} [{low:+.4f}, {high:+.4f}] over seeds and rows")
    return lines


def plan_text(plan: Mapping[str, Any]) -> str:
    """What `plan` prints: each layer with its count or reason, totals, steps, memory and disk."""
    width = max(len(layer["name"]) for layer in plan["layers"])
    lines = [f"{plan['model']} · {plan['task']} · recipe {plan['recipe']}", ""]
    for layer in plan["layers"]:
        what = layer["excluded"] or " ".join(f"{count:,}" for count in layer["masked"])
        lines.append(
            f"  {layer['name'].ljust(width)}  {'x'.join(map(str, layer['shape'])):>18}  {layer['weights']:>12,}  {what}"
        )
    lines += ["", *(f"  {name.ljust(18)} {text}" for name, text in plan["totals"].items())]
    lines += [f"  {'data'.ljust(18)} {line}" for line in data_lines({**(plan.get("data") or {}), "unused": ()})]
    lines += [f"  {'labels'.ljust(18)} {labels['rule']}"] if (labels := plan.get("labels")) else []
    lines += [f"  {'warning'.ljust(18)} {warning}" for warning in plan["warnings"]]
    return "\n".join(lines)
