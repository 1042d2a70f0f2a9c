"""What a report says, in words: the sentences that the page and the model card share. No gain is claimed but a shown one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALPHA = 0.05
WORDS = {
    "better": "better than the source",
    "worse": "worse than the source",
    "same": "the same as the source, within the margin",
    "inconclusive": "the evaluation rows cannot tell it from the source",
}

TESTS = {
    "mcnemar-exact": "exact McNemar test",
    "mcnemar-exact-grouped": "exact McNemar test, equal rows counted as one",
    "paired-bootstrap": "paired bootstrap",
}

CONTROLS = {
    "dense": "the dense control (same rows, steps and rates, no mask)",
    "random": "the random control (as many weights masked, drawn by chance)",
}

CREDITS = ("mask", "training", "unknown")
SHORT = {"dense": "training on without a mask", "random": "training on with a mask drawn by chance"}
GATES = {
    "none": "nothing is asked",
    "not-worse": "no worse than the source on these rows, be it by chance: the rows may not be able to tell",
    "non-inferior": "the 95 % interval ends less than the margin below the source",
    "better": "the verdict is better",
    "beats-control": "better than the source and than every control",
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


def said(report: Mapping[str, Any]) -> str:
    """The verdict in one sentence, with whose doing it is: no gain of training on passes for one of the mask."""
    verdict = report["verdict"]
    return f"{WORDS[verdict]}{_whose(report) if verdict == 'better' else ''}"


def _whose(report: Mapping[str, Any]) -> str:
    others = {name.removeprefix("refined_vs_"): found for name, found in report["comparison"].items()}
    beaten = {name: found["p_adjusted"] < ALPHA and found["delta"] > 0 for name, found in others.items() if name != "baseline"}
    match report.get("credit"):
        case "mask":
            return ", and better than " + " and than ".join(map(_short, beaten))
        case "training":
            return "; no better than " + " or than ".join(_short(name) for name, won in beaten.items() if not won)
        case "unknown":
            return "; no control was run that would show whether by the mask or by training on"
    return ""


def _short(control: str) -> str:
    return SHORT.get(control, f"the {control} control")


def tone(report: Mapping[str, Any]) -> str:
    """The class that gives the verdict its colour: a gain that is not the mask's has its own."""
    credit = report.get("credit")
    return f"better credit-{credit}" if report["verdict"] == "better" and credit in CREDITS else report["verdict"]


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


def edge(report: Mapping[str, Any]) -> str | None:
    """Which of p and interval decides, where the two do not say the same."""
    found = report["comparison"]["refined_vs_baseline"]
    low, high = found["ci95"]
    if found["p_adjusted"] < ALPHA and low <= 0 <= high:
        return "The interval reaches 0; the verdict goes by p."
    if found["p_adjusted"] >= ALPHA and not low <= 0 <= high:
        why = ", adjusted for all comparisons," if found["p_value"] < ALPHA else ""
        return f"The interval leaves 0 out, but the verdict goes by p, which{why} is not below {ALPHA}."
    return None


def rows_words(report: Mapping[str, Any]) -> str | None:
    """How many rows would decide an inconclusive comparison; that nobody knows, where no row changed."""
    rows, used = report.get("rows_to_decide"), report["data"]["eval"]["rows"]
    found = report["comparison"]["refined_vs_baseline"]
    if report["verdict"] != "inconclusive":
        return None
    if rows and rows > used:
        return f"About {rows:,} evaluation rows would decide it, if things are as found (power 0.8)."
    if found["gained"] == found["lost"] == 0:
        return f"No row changed sides: {used:,} rows are too few to show that none would; how many would decide is not known."
    return None if rows else "How many rows would decide cannot be told from these."


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
    asked = f" ({GATES[gate['rule']]})" if gate["rule"] in GATES else ""
    return f"{gate['rule']}{asked}: {'met' if gate['passed'] else 'NOT met; the checkpoint lies under rejected/'}"
