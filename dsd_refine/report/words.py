"""What a report says, in words: the sentences that the page and the model card share. No gain is claimed but a shown one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsd_refine.report.report import WORDS

ALPHA = 0.05
TESTS = {"mcnemar-exact": "exact McNemar test", "paired-bootstrap": "paired bootstrap"}
CONTROLS = {
    "dense": "the dense control (same rows, steps and rates, no mask)",
    "random": "the random control (as many weights masked, drawn by chance)",
}


def signed(value: float) -> str:
    """A difference with its sign: +0.0123; 0 has none."""
    text = f"{value:+.4f}"
    return text if float(text) else "0.0000"


def p_words(p: float) -> str:
    """p = 0.031, or p < 0.0001."""
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}"


def interval(found: Mapping[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{signed(low)} to {signed(high)}"


def headline(report: Mapping[str, Any]) -> str:
    return f"{report['verdict'].capitalize()}: {WORDS[report['verdict']]}"


def measured(report: Mapping[str, Any]) -> str:
    """What was measured of the source and of the result, with the test."""
    metric, found, arms = report["metric"]["name"], report["comparison"]["refined_vs_baseline"], report["arms"]
    several = len(report["comparison"])
    adjusted = f", adjusted for {several} comparisons by Holm" if several > 1 else ""
    better = "" if report["metric"]["higher_is_better"] else " (less is better; the difference counts a decrease as positive)"
    return (
        f"On {report['data']['eval']['rows']:,} evaluation rows, which selected nothing, the source's {metric} is "
        f"{arms['baseline'][metric]:.4f} and the refined checkpoint's {arms['refined'][metric]:.4f}{better}: a difference of "
        f"{signed(found['delta'])}, 95 % interval {interval(found)}, {p_words(found['p_adjusted'])} "
        f"({TESTS.get(found['test'], found['test'])}{adjusted})."
    )


def rows_words(report: Mapping[str, Any]) -> str | None:
    """How many rows would decide an inconclusive comparison, where it is more than there were."""
    rows = report.get("rows_to_decide") or 0
    more = rows > report["data"]["eval"]["rows"]
    return f"About {rows:,} evaluation rows would decide it, if things are as found (power 0.8)." if more else None


def credit(report: Mapping[str, Any]) -> list[str]:
    """Was it the mask? A sentence for each control."""
    gained = report["verdict"] == "better"
    return [
        _against(name.removeprefix("refined_vs_"), found, gained)
        for name, found in report["comparison"].items()
        if name != "refined_vs_baseline"
    ]


def _against(control: str, found: Mapping[str, Any], gained: bool) -> str:
    who = CONTROLS.get(control, f"the {control} control")
    numbers = f"a difference of {signed(found['delta'])} ({interval(found)}), {p_words(found['p_adjusted'])}"
    if found["p_adjusted"] >= ALPHA:
        rest = " What was gained may come from training on, not from this mask." if gained else ""
        return f"The refined checkpoint cannot be told from {who}: {numbers}.{rest}"
    if found["delta"] < 0:
        return f"The refined checkpoint is worse than {who}: {numbers}."
    return f"The refined checkpoint is better than {who}: {numbers}."


def gate_words(report: Mapping[str, Any]) -> str:
    gate = report["gate"]
    return f"{gate['rule']}: {'met' if gate['passed'] else 'not met; the checkpoint lies under rejected/'}"
