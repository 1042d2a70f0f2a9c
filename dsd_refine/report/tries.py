"""The tries of a search for report.html: a strip of dots for each rung and arm, and a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsd_refine.report import words
from dsd_refine.report.figures import Scale, Tick, dots
from dsd_refine.report.rules import preference

HEIGHT = 100  # units of the height of a strip


@dataclass(frozen=True)
class Strip:
    """The tries of one arm in one rung, along the axis of the holdout metric.

    Attributes:
        arm: The name of the arm.
        steps: The optimizer steps of each try.
        dots: An SVG path with a dot for each try that was measured.
        ring: An SVG path with the chosen try, if it is in this rung.
        tries: The number of tries.
        lost: The number of lost tries.
        best: The best value on the holdout as text; empty if none was measured.
    """

    arm: str
    steps: int
    dots: str
    ring: str
    tries: int
    lost: int
    best: str


@dataclass(frozen=True)
class Tries:
    """The drawing and the table of a search.

    Attributes:
        metric: The metric that is drawn.
        strips: The strips, the shortest tries first.
        source: The position of the source on the axis, in units; None if it is not known.
        ticks: The marks of the axis.
        rows: The rows of the table, one for each try.
    """

    metric: str
    strips: list[Strip]
    source: float | None
    ticks: list[Tick]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Drawn:
    """What is drawn: the metric and its axis, and the tries that the arms' results are from."""

    metric: str
    higher_is_better: bool
    scale: Scale
    chosen: Sequence[Mapping[str, Any]]


def tries_of(report: Mapping[str, Any]) -> Tries | None:
    """Return the tries of a search; None if there was no search."""
    search, holdout, metric = report.get("search"), report.get("holdout") or {}, report["metric"]["name"]
    if not search:
        return None
    tries = search["tries"]
    measured = [each["holdout"] for each in tries if each["holdout"]]
    if not all(metric in metrics for metrics in measured):
        metric = "loss"  # the holdout was not scored by the metric
    times, source = words.times(metric), holdout.get("baseline", {}).get(metric)
    level = [] if source is None else [times * source]
    scale = Scale.over([times * metrics[metric] for metrics in measured] + level, pad=0.06)
    better = report["metric"]["higher_is_better"] and metric == report["metric"]["name"]
    drawn = Drawn(metric, better, scale, _chosen(search, holdout))
    strips = [
        _strip(arm, rung["steps"], [each for each in tries if each["arm"] == arm and each["rung"] == number], drawn)
        for number, rung in enumerate(search["rungs"], 1)
        for arm in dict.fromkeys(each["arm"] for each in tries)
    ]
    rows = [_row(each, search["settings"][each["setting"]], drawn) for each in tries]
    return Tries(metric, strips, scale.position(level[0]) if level else None, scale.ticks(5), rows)


def _chosen(search: Mapping[str, Any], holdout: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of each arm, the first try with the chosen setting and the arm's result."""
    firsts = []
    for arm, setting in search["chosen"].items():
        of_setting = (each for each in search["tries"] if each["arm"] == arm and each["setting"] == setting)
        firsts += [each for each in of_setting if each["holdout"] == holdout.get(arm)][:1]
    return firsts


def _strip(arm: str, steps: int, tries: Sequence[Mapping[str, Any]], drawn: Drawn) -> Strip:
    def points(some: Iterable[Mapping[str, Any]]) -> str:
        values = (words.times(drawn.metric) * each["holdout"][drawn.metric] for each in some)
        return dots([(drawn.scale.position(value), HEIGHT / 2) for value in values])

    def key(metrics: Mapping[str, float]) -> tuple[float, float]:
        return preference(metrics, drawn.metric, higher_is_better=drawn.higher_is_better)

    measured = [each for each in tries if each["holdout"]]
    best = max((each["holdout"] for each in measured), key=key, default=None)
    return Strip(
        arm=arm,
        steps=steps,
        dots=points(measured),
        ring=points(each for each in measured if each in drawn.chosen),
        tries=len(tries),
        lost=sum(each["lost"] is not None for each in tries),
        best=words.value(drawn.metric, best[drawn.metric]) if best else "",
    )


def _row(each: Mapping[str, Any], changes: Mapping[str, Any], drawn: Drawn) -> dict[str, Any]:
    return {
        "arm": each["arm"],
        "number": each["try"],
        "steps": each["steps"],
        "chosen": each in drawn.chosen,
        "lost": each["lost"],
        "setting": ", ".join(f"{path} {value}" for path, value in changes.items()) or "the recipe itself",
        "value": words.value(drawn.metric, each["holdout"][drawn.metric]) if each["holdout"] else "–",
    }
