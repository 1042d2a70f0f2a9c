"""What a report says, in words: the sentences that the page and the model card share. No gain is claimed but a shown one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALPHA = 0.05
WORDS = {
    "better": "better than the source",
    "worse": "worse than the source",
    "same": "the same as the source, within the margin",
    "inconclusive": "no clear difference from the source",
}
RAW = ("loss", "perplexity")  # metrics that are no fractions
NAMES = {"wer": "word error rate", "cer": "character error rate", **{f"bleu{n}": f"BLEU-{n}" for n in range(1, 5)}}

TESTS = {
    "mcnemar-exact": "exact McNemar test",
    "mcnemar-exact-grouped": "exact McNemar test, equal rows counted as one",
    "paired-bootstrap": "paired bootstrap",
}

CONTROLS = {
    "dense": "the dense control (same rows, steps and rates, no mask)",
    "random": "the random control (as many weights masked, drawn by chance)",
}

# how warnings of `dsd_refine.evidence` speak of what decides what to do next
AT_CHANCE, TOO_FAST, MILDER, LOWER_RATE = "cannot be told from", "The rate is too high", "less augmentation", "a lower --lr"
CREDITS = ("mask", "training", "unknown")
SHORT = {"dense": "more training alone", "random": "training with a random mask"}
GATES = {
    "none": "nothing is asked",
    "not-worse": "no worse than the source on these rows, be it by chance: the rows may not be able to tell",
    "non-inferior": "the 95 % interval ends less than the margin below the source",
    "better": "the verdict is better",
    "beats-control": "better than the source and than every control",
}


def name_of(metric: str) -> str:
    """A metric as a reader calls it."""
    return NAMES.get(metric, metric)


def times(metric: str) -> float:
    """What a metric is multiplied by where it is shown: fractions are shown as per cent or points."""
    return 1.0 if metric in RAW else 100.0


def value(metric: str, number: float) -> str:
    """A metric's value: 98.66 % of a fraction, 31.20 of BLEU, 0.1324 of a loss."""
    if metric in RAW:
        return f"{number:.4f}"
    return f"{100 * number:.2f}" if metric.startswith("bleu") else f"{100 * number:.2f} %"


def signed(number: float) -> str:
    """A difference with its sign: +0.0123; 0 has none."""
    text = f"{number:+.4f}"
    return text if float(text) else "0.0000"


def bare(metric: str, number: float) -> str:
    """A difference of a metric with its sign and without its unit: +1.51 (points), or +0.0151 of a loss."""
    if metric in RAW:
        return signed(number)
    text = f"{100 * number:+.2f}"
    return text if float(text) else "0.00"


def unit(metric: str) -> str:
    """What differences of the metric are counted in: points (of 100), or nothing."""
    return "" if metric in RAW else " points"


def difference(metric: str, number: float) -> str:
    """A difference with its sign and unit: +1.51 points of a fraction, +0.0123 of a loss."""
    return bare(metric, number) + unit(metric)


def p_words(p: float) -> str:
    """p = 0.031, or p < 0.0001."""
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}"


def interval(found: Mapping[str, Any], metric: str = "loss") -> str:
    """Both ends of a 95 % interval, in the metric's unit, which is not said."""
    low, high = found["ci95"]
    return f"{bare(metric, low)} to {bare(metric, high)}"


def said(report: Mapping[str, Any]) -> str:
    """The headline: the verdict against the source and what was found against each control, in one sentence."""
    verdict = report["verdict"]
    controls = {_short(name): found for name, found in controls_of(report).items()}
    if verdict == "better" and not controls:
        return f"{WORDS[verdict]}; without a control, it is not known whether the mask helped"
    groups: dict[str, list[str]] = {}
    for who, found in controls.items():
        groups.setdefault(_clause(verdict, _relation(found)), []).append(who)
    ordered = sorted(groups, key=lambda clause: " ,;".index(clause[0]))  # what stands behind a semicolon comes last
    return WORDS[verdict] + "".join(clause.format(" and ".join(groups[clause])) for clause in ordered)


def controls_of(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Control -> the result's comparison with it."""
    prefix = "refined_vs_"
    found = {name.removeprefix(prefix): one for name, one in report["comparison"].items()}
    return {name: one for name, one in found.items() if name != "baseline"}


def _relation(found: Mapping[str, Any]) -> str:
    """How the result stands to a control: better, worse; where the test shows neither, ahead or level as measured."""
    if found["p_adjusted"] < ALPHA:
        return "better" if found["delta"] > 0 else "worse"
    return "ahead" if found["delta"] > 0 else "level"


def _clause(verdict: str, relation: str) -> str:
    """What the headline says of a control, or of several, whose names stand for {}."""
    if verdict == "better":
        return {
            "better": ", and better than {}", "worse": "; {} did better", "level": "; {} did as well",
            "ahead": "; not shown to be better than {}",
        }[relation]  # fmt: skip
    if relation in ("better", "worse"):
        return f", {'and' if relation == verdict else 'but'} {relation} than {{}}"
    return " or from {}" if verdict == "inconclusive" else "; no clear difference from {}"


def _short(control: str) -> str:
    return SHORT.get(control, f"the {control} control")


def change(report: Mapping[str, Any]) -> str:
    """Before and after, as "accuracy 96.98 % → 98.66 %, 10 more of 597 right, none lost"."""
    metric, arms = report["metric"]["name"], report["arms"]
    before, after = (value(metric, arms[arm][metric]) for arm in ("baseline", "refined"))
    return f"{name_of(metric)} {before} → {after}, {amount(report)}"


def amount(report: Mapping[str, Any]) -> str:
    """How much changed: in rows where they are right or wrong; else by how much the metric is lower or higher."""
    metric, arms = report["metric"]["name"], report["arms"]
    before, after = arms["baseline"][metric], arms["refined"][metric]
    found = report["comparison"]["refined_vs_baseline"]
    if found["gained"] is not None:
        return _rows_changed(found, report["data"]["eval"]["rows"])
    if value(metric, before) == value(metric, after):
        return "no change"
    way = "lower" if after < before else "higher"
    if metric in RAW:
        return f"{100 * abs(after / before - 1):.2g} % {way}" if before else way
    return f"{bare(metric, abs(after - before)).lstrip('+')} points {way}"


def _rows_changed(found: Mapping[str, Any], rows: int) -> str:
    """ "10 more of 597 right, none lost"."""
    gained, lost = found["gained"], found["lost"]
    if gained == lost:
        return f"{gained:,} of {rows:,} rows gained and as many lost" if gained else f"the same {rows:,} rows right and wrong"
    net = f"{abs(gained - lost):,} {'more' if gained > lost else 'fewer'} of {rows:,} right"
    if gained and lost:
        return f"{net} ({gained:,} gained, {lost:,} lost)"
    return f"{net}, none {'lost' if gained else 'gained'}"


def what_next(report: Mapping[str, Any]) -> str:
    """One sentence: what a reader does with this result. It asks for nothing that the evidence does not."""
    if any(AT_CHANCE in warning for warning in report["warnings"]):
        return "Read the warning about the source first: it does no better than guessing here, so little follows from the rest."
    match report["verdict"]:
        case "better":
            return _use(report)
        case "worse":
            return f"Keep the source; {_mended(' '.join(report['warnings']))}."
        case "same":
            return "Keep the source, unless you want this result for another reason: they differ by less than the margin."
    rows, used = report.get("rows_to_decide"), report["data"]["eval"]["rows"]
    if rows and rows > used:
        return f"Keep the source for now, and gather about {rows - used:,} more evaluation rows ({rows:,} in all) to decide."
    return "Keep the source for now; more evaluation rows may decide, how many cannot be told from these."


def _mended(warnings: str) -> str:
    """What would be different in another try, as far as the warnings say."""
    if MILDER in warnings and TOO_FAST not in warnings:
        return "to try again, train with less augmentation or a lower rate (--lr): a warning gives the options"
    if LOWER_RATE in warnings:
        return "to try again, lower the rate (--lr): a warning says why"
    return "training has made it worse here"


def _use(report: Mapping[str, Any]) -> str:
    """What next, where the result is better than the source."""
    controls = controls_of(report).values()
    if any(_relation(found) == "worse" for found in controls):
        return "Train on without this mask instead: a control of the same budget did better."
    gate = report["gate"]
    use = "Use it" if gate["passed"] else f"Lower the gate (--gate {gate['rule']} was not met) if you want to use it"
    if not controls:
        return f"{use} for its gain over the source; --control dense would show whether the mask is needed."
    if report.get("credit") == "mask":
        return f"{use}: it is better than the source and than every control."
    return f"{use} for its gain over the source, which training without this mask may give as well."


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
    before, after = (value(metric, arms[arm][metric]) for arm in ("baseline", "refined"))
    return (
        f"On {report['data']['eval']['rows']:,} evaluation rows, which selected nothing, the source's {name_of(metric)} is "
        f"{before} and the refined checkpoint's {after}{better}: "
        f"a difference of {difference(metric, found['delta'])}, 95 % interval {interval(found, metric)}, "
        f"{p_words(found['p_adjusted'])} ({TESTS.get(found['test'], found['test'])}{adjusted})."
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
    gained, metric = report["verdict"] == "better", report["metric"]["name"]
    return [
        _against(name.removeprefix("refined_vs_"), found, metric, gained)
        for name, found in report["comparison"].items()
        if name != "refined_vs_baseline"
    ]


def _against(control: str, found: Mapping[str, Any], metric: str, gained: bool) -> str:
    who = CONTROLS.get(control, f"the {control} control")
    delta, ends = difference(metric, found["delta"]), interval(found, metric)
    numbers = f"a difference of {delta} ({ends}), {p_words(found['p_adjusted'])}"
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
