"""The sentences that the summary, report.html and the model card share.

They claim a gain only if the test shows one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsd_refine.report.published import arm_of, comparison_of, result_of, true_name

ALPHA = 0.05
WORDS = {
    "better": "better than the source",
    "worse": "worse than the source",
    "same": "the same as the source, within the margin",
    "inconclusive": "no clear difference from the source",
}
RAW = ("loss", "perplexity", "mse", "pearson", "spearman", "matthews")  # metrics that are not shares of anything
NAMES = {"wer": "word error rate", "cer": "character error rate", **{f"bleu{n}": f"BLEU-{n}" for n in range(1, 5)}}
NAMES |= {
    "f1": "F1", "f1_macro": "macro F1", "f1_micro": "micro F1", "balanced_accuracy": "balanced accuracy",
    "matthews": "Matthews correlation", "pearson": "Pearson correlation", "spearman": "Spearman correlation",
    "mse": "mean squared error", "map": "mean average precision", "bleu": "BLEU", "chrf": "chrF", "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "exact_match": "exact match",
}  # fmt: skip

TESTS = {
    "mcnemar-exact": "exact McNemar test",
    "mcnemar-exact-grouped": "exact McNemar test, equal rows counted as one",
    "paired-bootstrap": "paired bootstrap",
}

CONTROLS = {
    "dense": "the dense control (same rows, steps and rates, no mask)",
    "random": "the random control (as many weights masked, chosen at random)",
}

# parts of the warnings of `dsd_refine.evidence`; the advice to the user depends on them
AT_CHANCE, TOO_FAST = "is not clearly better than", "The rate is too high"
MILDER, LOWER_RATE = "less augmentation", "a lower --lr"
CREDITS = ("mask", "training", "unknown")
SHORT = {"dense": "more training alone", "random": "training with a random mask"}
GATES = {
    "none": "always met",
    "not-worse": "not worse than the source on these rows, even if only by chance",
    "non-inferior": "the 95 % interval ends less than the margin below the source",
    "better": "the verdict is better",
    "beats-control": "better than the source and than every control",
}


def name_of(metric: str) -> str:
    """Return the name of a metric for a reader."""
    return NAMES.get(metric, metric)


def times(metric: str) -> float:
    """Return the factor for showing a metric: 100 for fractions, which are shown in percent or points."""
    return 1.0 if metric in RAW else 100.0


def value(metric: str, number: float) -> str:
    """Return a metric's value as text: 98.66 % for a fraction, 31.20 for BLEU, 0.1324 for a loss."""
    if metric in RAW:
        return f"{number:.4f}"
    return f"{100 * number:.2f}" if metric.startswith(("bleu", "chrf", "rouge")) else f"{100 * number:.2f} %"


def signed(number: float) -> str:
    """Return a difference with its sign: +0.0123. Zero has no sign."""
    text = f"{number:+.4f}"
    return text if float(text) else "0.0000"


def bare(metric: str, number: float) -> str:
    """Return a difference of a metric with its sign, without its unit.

    Examples: +1.51 for a fraction (in points), +0.0151 for a loss.
    """
    if metric in RAW:
        return signed(number)
    text = f"{100 * number:+.2f}"
    return text if float(text) else "0.00"


def unit(metric: str) -> str:
    """Return the unit of a metric's differences: " points" (percentage points), or "" for a loss."""
    return "" if metric in RAW else " points"


def difference(metric: str, number: float) -> str:
    """Return a difference with its sign and unit: +1.51 points for a fraction, +0.0123 for a loss."""
    return bare(metric, number) + unit(metric)


def p_words(p: float) -> str:
    """Return a p value as text: p = 0.031, or p < 0.0001."""
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}"


def interval(comparison: Mapping[str, Any], metric: str = "loss") -> str:
    """Return both ends of the 95 % interval in the metric's unit, without the unit's name."""
    low, high = comparison["ci95"]
    return f"{bare(metric, low)} to {bare(metric, high)}"


def headline(report: Mapping[str, Any]) -> str:
    """Return the headline: the verdict against the source and against each control, in one sentence.

    If another arm than the refined one is published, the headline begins with its true name.
    """
    verdict, arm = report["verdict"], arm_of(report)
    if arm == "baseline":
        return "the source itself: the holdout prefers it to every trained arm"
    if arm != "refined":
        return f"{true_name(report)}: {WORDS[verdict]}"
    comparisons = {_short(name): comparison for name, comparison in controls_of(report).items()}
    if verdict == "better" and not comparisons:
        return f"{WORDS[verdict]}; without a control, it is not known whether the mask helped"
    groups: dict[str, list[str]] = {}  # clause -> the controls that it names
    for control, comparison in comparisons.items():
        groups.setdefault(_clause(verdict, _relation(comparison)), []).append(control)
    ordered = sorted(groups, key=lambda clause: " ,;".index(clause[0]))  # clauses after a semicolon come last
    return WORDS[verdict] + "".join(clause.format(" and ".join(groups[clause])) for clause in ordered)


def controls_of(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the comparisons of the refined arm with the controls, by the name of the control."""
    pairs = ((name.split("_vs_"), comparison) for name, comparison in report["comparison"].items())
    return {other: comparison for (arm, other), comparison in pairs if arm == "refined" and other != "baseline"}


def _relation(comparison: Mapping[str, Any]) -> str:
    """The relation of the refined arm to a control.

    "better" or "worse" if the test is significant. Otherwise "ahead" if the measured difference is
    above 0, else "level".
    """
    if comparison["p_adjusted"] < ALPHA:
        return "better" if comparison["delta"] > 0 else "worse"
    return "ahead" if comparison["delta"] > 0 else "level"


def _clause(verdict: str, relation: str) -> str:
    """The headline's clause on one or more controls. Their names replace {}."""
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
    """Return the values before and after, and the change.

    Example: "accuracy 96.98 % → 98.66 %, 10 more of 597 right, none lost".
    """
    metric, arms = report["metric"]["name"], report["arms"]
    before, after = (value(metric, arms[arm][metric]) for arm in ("baseline", arm_of(report)))
    return f"{name_of(metric)} {before} → {after}, {amount(report)}"


def amount(report: Mapping[str, Any]) -> str:
    """Return the size of the change.

    It is a number of rows if rows are right or wrong. Otherwise it says by how much the metric is
    lower or higher.
    """
    metric, arms = report["metric"]["name"], report["arms"]
    before, after = arms["baseline"][metric], arms[arm_of(report)][metric]
    comparison = comparison_of(report)
    if arm_of(report) == "baseline":
        return "the same weights"
    if comparison["gained"] is not None:
        return _rows_changed(comparison["gained"], comparison["lost"], report["data"]["eval"]["rows"])
    if value(metric, before) == value(metric, after):
        return "no change"
    direction = "lower" if after < before else "higher"
    if metric in RAW:
        return f"{100 * abs(after / before - 1):.2g} % {direction}" if before else direction
    return f"{bare(metric, abs(after - before)).lstrip('+')} points {direction}"


def _rows_changed(gained: int, lost: int, rows: int) -> str:
    """The change in rows, such as "10 more of 597 right, none lost"."""
    if gained == lost:
        return f"{gained:,} of {rows:,} rows gained and as many lost" if gained else f"the same {rows:,} rows right and wrong"
    net = f"{abs(gained - lost):,} {'more' if gained > lost else 'fewer'} of {rows:,} right"
    if gained and lost:
        return f"{net} ({gained:,} gained, {lost:,} lost)"
    return f"{net}, none {'lost' if gained else 'gained'}"


def what_next(report: Mapping[str, Any]) -> str:
    """Return one sentence of advice: what to do with this result."""
    if any(AT_CHANCE in warning for warning in report["warnings"]):
        return "Read the warning about the source first: it is no better than guessing here, so the other results mean little."
    if arm_of(report) == "baseline":
        return "Keep the source: the output has its weights, because no arm was better on the holdout."
    match report["verdict"]:
        case "better":
            return _use(report)
        case "worse":
            return f"Keep the source; {_mended(' '.join(report['warnings']))}."
        case "same":
            return "Keep the source, unless you want this result for another reason: the two differ by less than the margin."
    rows, used = report.get("rows_to_decide"), report["data"]["eval"]["rows"]
    if rows and rows > used:
        return f"Keep the source for now, and gather about {rows - used:,} more evaluation rows ({rows:,} in all) to decide."
    return "Keep the source for now; more evaluation rows may decide, but these do not show how many."


def _mended(warnings: str) -> str:
    """The advice for another try, if the warnings give any."""
    if MILDER in warnings and TOO_FAST not in warnings:
        return "to try again, train with less augmentation or a lower rate (--lr): a warning gives the options"
    if LOWER_RATE in warnings:
        return "to try again, lower the rate (--lr): a warning says why"
    return "training has made it worse here"


def _use(report: Mapping[str, Any]) -> str:
    """The advice for a result that is better than the source."""
    comparisons = controls_of(report).values()
    if arm_of(report) == "refined" and any(_relation(comparison) == "worse" for comparison in comparisons):
        return "Train without this mask instead: a control of the same budget did better."
    gate = report["gate"]
    use = "Use it" if gate["passed"] else f"Lower the gate (--gate {gate['rule']} was not met) if you want to use it"
    if arm_of(report) != "refined":
        return f"{use} for its gain over the source. The holdout chose it: {true_name(report)}."
    if not comparisons:
        return f"{use} for its gain over the source; --control dense would show whether the mask is needed."
    if report.get("credit") == "mask":
        return f"{use}: it is better than the source and than every control."
    return f"{use} for its gain over the source, which training without this mask may give as well."


def tone(report: Mapping[str, Any]) -> str:
    """Return the CSS classes that give the verdict its colour.

    A gain that does not come from the mask has a colour of its own.
    """
    credit = report.get("credit")
    return f"better credit-{credit}" if report["verdict"] == "better" and credit in CREDITS else report["verdict"]


def measured(report: Mapping[str, Any]) -> str:
    """Return the measured values of the source and of the result, with the difference and its test."""
    metric, comparison, arms = report["metric"]["name"], comparison_of(report), report["arms"]
    number = len(report["comparison"])
    adjusted = f", adjusted for {number} comparisons by Holm's method" if number > 1 else ""
    better = "" if report["metric"]["higher_is_better"] else " (lower is better; a decrease is a positive difference)"
    before, after = (value(metric, arms[arm][metric]) for arm in ("baseline", arm_of(report)))
    rows = f"On {report['data']['eval']['rows']:,} evaluation rows, which were not used to select anything"
    if arm_of(report) == "baseline":
        return f"{rows}, the source's {name_of(metric)} is {before}{better}. The output has the same weights."
    return (
        f"{rows}, the source's {name_of(metric)} is {before} and {_possessive(result_of(report))} {after}{better}: "
        f"a difference of {difference(metric, comparison['delta'])}, 95 % interval {interval(comparison, metric)}, "
        f"{p_words(comparison['p_adjusted'])} ({TESTS.get(comparison['test'], comparison['test'])}{adjusted})."
    )


def _possessive(noun: str) -> str:
    return f"that of {noun}" if noun.endswith(")") else f"{noun}'s"


def edge(report: Mapping[str, Any]) -> str | None:
    """Return a sentence that says that p decides, if p and the interval disagree; else None."""
    comparison = comparison_of(report)
    low, high = comparison["ci95"]
    if comparison["p_adjusted"] < ALPHA and low <= 0 <= high:
        return "The interval contains 0, but p decides the verdict."
    if comparison["p_adjusted"] >= ALPHA and not low <= 0 <= high:
        adjusted = ", adjusted for all comparisons," if comparison["p_value"] < ALPHA else ""
        return f"The interval does not contain 0, but p decides the verdict, and p{adjusted} is not below {ALPHA}."
    return None


def rows_words(report: Mapping[str, Any]) -> str | None:
    """Return how many rows would decide an inconclusive comparison, or that this is not known.

    None if the verdict is another one.
    """
    rows, used = report.get("rows_to_decide"), report["data"]["eval"]["rows"]
    comparison = comparison_of(report)
    if report["verdict"] != "inconclusive":
        return None
    if rows and rows > used:
        return f"About {rows:,} evaluation rows would decide it, if the true difference is the observed one (power 0.8)."
    if comparison["gained"] == comparison["lost"] == 0:
        return f"No row was gained or lost: {used:,} rows are too few to decide, and do not show how many would decide."
    return None if rows else "These rows do not show how many would decide."


def credit(report: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each control: did the mask bring the gain?"""
    metric, is_published = report["metric"]["name"], arm_of(report) == "refined"
    gained = report["verdict"] == "better" and is_published
    subject = "The refined checkpoint" if is_published else "The refined arm"
    return [_against(subject, name, comparison, metric, gained) for name, comparison in controls_of(report).items()]


def _against(subject: str, control: str, comparison: Mapping[str, Any], metric: str, gained: bool) -> str:
    name = CONTROLS.get(control, f"the {control} control")
    delta, ends = difference(metric, comparison["delta"]), interval(comparison, metric)
    numbers = f"a difference of {delta} ({ends}), {p_words(comparison['p_adjusted'])}"
    if comparison["p_adjusted"] >= ALPHA:
        doubt = " The gain may come from the training alone, not from this mask." if gained else ""
        return f"{subject} is not clearly different from {name}: {numbers}.{doubt}"
    if comparison["delta"] < 0:
        return f"{subject} is worse than {name}: {numbers}."
    return f"{subject} is better than {name}: {numbers}."


def gate_words(report: Mapping[str, Any]) -> str:
    """Return the gate, its meaning and whether it was met."""
    gate = report["gate"]
    meaning = f" ({GATES[gate['rule']]})" if gate["rule"] in GATES else ""
    return f"{gate['rule']}{meaning}: {'met' if gate['passed'] else 'NOT met; the checkpoint is under rejected/'}"
