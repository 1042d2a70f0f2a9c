"""The figures of the page as coordinates: every drawing is a box of SIZE x SIZE units that the page stretches to its width.

Stretched drawings keep their line widths (`vector-effect`), and all words stand beside them as HTML, so that they are as
readable on a phone as on a desk. Nothing here knows a name from outside but as a text that the template escapes.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsd_refine.report import words
from dsd_refine.report.rules import preference

SIZE = 1000
POINTS = 500  # at most that many points a curve
SMOOTH = 40  # the moving mean spans this part of a phase
LAYERS = 3  # whose histograms are shown at once
DECADES = 1.3  # a loss that spans more is drawn on a logarithmic scale

Point = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis, `at` units from its start."""

    at: float
    text: str


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high` (not equal), linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], pad: float = 0.0, log: bool = False) -> Scale:
        """An axis that holds all values, with a share of its length free at both ends."""
        found = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        if log:
            found = [math.log10(value) for value in found]
        low, high = min(found), max(found)
        room = (high - low) * pad or (0.0 if high > low else abs(low) * 0.1 or 1.0)
        low, high = low - room, high + room
        return cls(10**low, 10**high, True) if log else cls(low, high)

    def at(self, value: float) -> float:
        """Units from the start."""
        if self.log:
            return SIZE * math.log10(value / self.low) / math.log10(self.high / self.low)
        return SIZE * (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 5) -> list[Tick]:
        """Round numbers within the axis."""
        values = _decades(self.low, self.high, most) if self.log else _round_numbers(self.low, self.high, most)
        return [Tick(round(self.at(value), 1), f"{value:.10g}".replace("-", "−")) for value in values]


def _round_numbers(low: float, high: float, most: int) -> list[float]:
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(n for n in (1, 2, 5, 10) if n * power >= raw * (1 - 1e-9))
    digits = max(0, -math.floor(math.log10(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, digits) for n in range(first, last + 1)]


def _decades(low: float, high: float, most: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for inside in ((1, 2, 5), (1, 3), (1,)):
        found = [n * 10.0**p for p in powers for n in inside if low <= n * 10.0**p <= high]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def number(value: float) -> str:
    """A coordinate, as short as it can be."""
    return f"{value:.1f}".removesuffix(".0")


def line(points: Sequence[Point]) -> str:
    """A path through the points."""
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points) if points else ""


def dots(points: Sequence[Point]) -> str:
    """A path of no length at each point: with round ends, and drawn with a width that is not stretched, a dot."""
    return "".join(f"M{number(x)} {number(y)}h0" for x, y in points)


@dataclass(frozen=True)
class Interval:
    """A comparison as it is drawn: `low`, `point` and `high` in units, and its numbers for the words beside it."""

    name: str
    low: float
    point: float
    high: float
    found: Mapping[str, Any]


@dataclass(frozen=True)
class Forest:
    """Intervals over a common axis. `margin` are the two ends of what counts as the same."""

    rows: list[Interval]
    zero: float
    margin: tuple[float, float]
    ticks: list[Tick]


def forest(comparisons: Mapping[str, Mapping[str, Any]], margin: float, times: float = 1.0) -> Forest:
    """Delta and 95 % interval of each comparison, with 0 and +-margin on the axis. `times`: what its numbers count in."""
    ends = [value for found in comparisons.values() for value in (found["delta"], *found["ci95"])]
    scale = Scale.over([times * end for end in (*ends, -1.25 * margin, 1.25 * margin, 0.0)], pad=0.06)
    rows = []
    for name, found in comparisons.items():
        low, point, high = (scale.at(times * end) for end in (found["ci95"][0], found["delta"], found["ci95"][1]))
        rows.append(Interval(name.removeprefix("refined_vs_"), low, point, high, found))
    margins = (scale.at(-times * margin), scale.at(times * margin))
    return Forest(rows, scale.at(0), margins, scale.ticks(5))


@dataclass(frozen=True)
class Flips:
    """Evaluation rows by whether two arms are right: `kept` both, `gained` and `lost` one, `missed` none."""

    against: str
    kept: int
    gained: int
    lost: int
    missed: int


def flips(report: Mapping[str, Any]) -> list[Flips]:
    """A table for each comparison of right and wrong rows; none for a metric that is not right or wrong a row."""
    metric, rows = report["metric"]["name"], report["data"]["eval"]["rows"]
    found = []
    for name, one in report["comparison"].items():
        other = name.removeprefix("refined_vs_")
        if one["gained"] is None or other not in report["arms"]:
            continue
        right = round(report["arms"][other][metric] * rows)
        found.append(Flips(other, right - one["lost"], one["gained"], one["lost"], rows - right - one["gained"]))
    return found


@dataclass
class Track:
    """One phase of one try, as logged: a number a step; `looks` are the holdout's (step, metrics)."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    loss: array[float] = field(default_factory=lambda: array("d"))
    lr: array[float] = field(default_factory=lambda: array("d"))
    samples: array[float] = field(default_factory=lambda: array("d"))
    looks: list[tuple[float, Mapping[str, Any]]] = field(default_factory=list)

    @property
    def length(self) -> float:
        return max([0.0, *self.steps[-1:], *(step for step, _ in self.looks)])


Tries = dict[str, dict[str, Track]]  # "refined try 2" -> "1-sparse" -> its track


@dataclass(frozen=True)
class Curve:
    """What is drawn of one arm: `faint` single steps, `bold` their moving mean or the values, `dots` single looks.

    `ring`: the look at the weights that were chosen.
    """

    arm: str
    bold: str
    faint: str = ""
    dots: str = ""
    ring: str = ""


@dataclass(frozen=True)
class Panel:
    title: str
    curves: list[Curve]
    ticks: list[Tick]
    log: bool = False


@dataclass(frozen=True)
class Stretch:
    """A phase on the common axis of steps."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Curves:
    """Panels over the optimizer steps of all phases, one after the other. `shown` names the try drawn of each arm."""

    panels: list[Panel]
    phases: list[Stretch]
    ticks: list[Tick]
    shown: dict[str, str]
    tries: int


def read_log(lines: Iterable[Mapping[str, Any]]) -> Tries:
    """Steps and looks at the holdout of each try and phase, without what no figure needs (a log can be millions of lines)."""
    tries: Tries = {}
    for entry in lines:
        if entry.get("phase") is None:
            continue
        label = f"{entry['arm']} try {entry['try']}" if "try" in entry else str(entry["arm"])
        track = tries.setdefault(label, {}).setdefault(str(entry["phase"]), Track())
        if entry["event"] == "step":
            track.steps.append(entry["step"])
            track.loss.append(_real(entry["loss"]))
            track.lr.append(_real(entry["lr"]))
            track.samples.append(max(1.0, _real(entry.get("samples"))))  # of what is no number, 1
        elif entry.get("part") == "holdout":
            track.looks.append((float(entry["step"]), entry))
    return tries


def _real(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def curves(
    tries: Tries,
    metric: str,
    higher_is_better: bool,
    source: Mapping[str, float] | None = None,
    epoch: int | None = None,
) -> Curves | None:
    """Loss, holdout metric and rate over the steps; of several tries of an arm, the one that the holdout preferred.

    `source`: the source's metrics on the holdout, a level line that the arms' curves begin at. `epoch`: the one of the last
    phase that was chosen of the refined arm.
    """
    chosen = _preferred(tries, metric, higher_is_better)
    if not any(track.length for label in chosen.values() for track in tries[label].values()):
        return None
    arms = {arm: list(tries[label].items()) for arm, label in chosen.items()}
    first = max(arms.values(), key=len)  # arms have the same phases; dense ones are called otherwise in a control
    lengths = [max(tracks[i][1].length for tracks in arms.values() if i < len(tracks)) for i in range(len(first))]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    axis = Scale(0.0, starts[-1])
    named = [name.replace("-", " ", 1) for name, _ in first]
    phases = [Stretch(name, axis.at(a), axis.at(b)) for name, a, b in zip(named, starts, starts[1:], strict=False)]
    parts = {arm: [(at, track) for at, (_, track) in zip(starts, tracks, strict=False)] for arm, tracks in arms.items()}
    made = (_loss_panel(parts, axis), _looks_panel(parts, axis, metric, source or {}, epoch), _rate_panel(parts, axis))
    return Curves([p for p in made if p is not None], phases, axis.ticks(5), chosen, len(tries))


def _preferred(tries: Tries, metric: str, higher_is_better: bool) -> dict[str, str]:
    """Arm -> the label of the try whose last phase has the best look (metric, then loss, then the earlier)."""
    best: dict[str, tuple[tuple[float, float], str]] = {}
    for label, phases in tries.items():
        looks = [look for _, look in list(phases.values())[-1].looks]
        keys = (preference(look, metric, higher_is_better=higher_is_better) for look in looks)
        value = max(keys, default=(-math.inf, -math.inf))
        arm = label.split(" try ")[0]
        if arm not in best or value > best[arm][0]:
            best[arm] = (value, label)
    return {arm: label for arm, (_, label) in best.items()}


Parts = Mapping[str, list[tuple[float, Track]]]  # arm -> its phases, with the step at which each begins


def _loss_panel(parts: Parts, axis: Scale) -> Panel | None:
    losses = [v for tracks in parts.values() for _, track in tracks for v in track.loss if math.isfinite(v)]
    if not losses:
        return None
    log = min(losses) > 0 and math.log10(max(losses) / min(losses)) > DECADES
    scale = Scale.over(losses, pad=0.04, log=log)
    drawn = []
    for arm, tracks in parts.items():
        share = max(20, POINTS // max(1, len(tracks)))
        runs = [_finite(zip((at + step for step in track.steps), track.loss, strict=True)) for at, track in tracks]
        sizes = [[n for n, loss in zip(track.samples, track.loss, strict=True) if math.isfinite(loss)] for _, track in tracks]
        means = [smooth(points, weights) for points, weights in zip(runs, sizes, strict=True)]
        faint = "".join(line(_placed(thin(points, share), axis, scale)) for points in runs)
        bold = "".join(line(_placed(thin(points, share), axis, scale)) for points in means)
        drawn.append(Curve(arm, bold, faint))
    return Panel("training loss", drawn, _upward(scale, 4), log)


def _looks_panel(parts: Parts, axis: Scale, metric: str, source: Mapping[str, float], epoch: int | None) -> Panel | None:
    """Every evaluation on the holdout, in per cent where the metric is a fraction."""
    looks = {arm: [(at + step, look) for at, track in tracks for step, look in track.looks] for arm, tracks in parts.items()}
    every = [look for found in looks.values() for _, look in found]
    if not every:
        return None
    shown = metric if all(metric in look for look in every) else "loss"
    times, per_cent = words.times(shown), ", %" if "%" in words.value(shown, 0.0) else ""
    points = {arm: _finite((step, times * _real(look.get(shown))) for step, look in found) for arm, found in looks.items()}
    level = _finite((end, times * _real(source.get(shown))) for end in (axis.low, axis.high))
    points = {arm: [*level[:1], *found] for arm, found in points.items()}  # every arm begins as the source
    scale = Scale.over((value for found in (*points.values(), level) for _, value in found), pad=0.1)
    placed = {arm: _placed(thin(found), axis, scale) for arm, found in points.items()}
    chosen = _placed(_chosen(parts.get("refined", []), shown, times, epoch), axis, scale)
    rings = {"refined": dots(chosen)}
    drawn = [Curve(arm, line(found), dots=dots(found), ring=rings.get(arm, "")) for arm, found in placed.items()]
    drawn += [Curve("baseline", line(_placed(level, axis, scale)))] if level else []
    return Panel(f"holdout {words.name_of(shown)}{per_cent}", drawn, _upward(scale, 4))


def _chosen(tracks: list[tuple[float, Track]], shown: str, times: float, epoch: int | None) -> list[Point]:
    """The last phase's look at the end of the epoch that was chosen."""
    at, track = tracks[-1] if tracks else (0.0, Track())
    ends = [(step, look) for step, look in track.looks if math.ceil(look.get("epoch") or 0) == epoch]
    return _finite((at + step, times * _real(look.get(shown))) for step, look in ends[-1:])


def _rate_panel(parts: Parts, axis: Scale) -> Panel | None:
    """The rates are the same for all arms: those of the first are drawn."""
    tracks = next(iter(parts.values()))
    rates = [_finite(zip((at + step for step in track.steps), track.lr, strict=True)) for at, track in tracks]
    if not any(rates):
        return None
    scale = Scale.over([0.0, *(rate for found in rates for _, rate in found)], pad=0.04)
    share = max(20, POINTS // len(rates))
    path = "".join(line(_placed(thin(found, share), axis, scale)) for found in rates)
    return Panel("learning rate", [Curve("rate", path)], _upward(scale, 3))


def _upward(scale: Scale, most: int) -> list[Tick]:
    """Ticks of a vertical axis: a drawing counts from the top."""
    return [Tick(round(SIZE - tick.at, 1), tick.text) for tick in scale.ticks(most)]


def _placed(points: Sequence[Point], x: Scale, y: Scale) -> list[Point]:
    return [(x.at(a), SIZE - y.at(b)) for a, b in points]


def _finite(points: Iterable[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def smooth(points: Sequence[Point], samples: Sequence[float] | None = None) -> list[Point]:
    """The mean over as many points as a SMOOTHth of them, and at least three, around each, every sample weighing the same.

    At the ends the points are the first or the last ones, so that no single batch, least of all a short one, shows as a jump.
    """
    weights = samples or [1.0] * len(points)
    span = min(len(points), 2 * max(1, len(points) // (2 * SMOOTH)) + 1)
    sums, weighed = [0.0], [0.0]
    for (_, y), weight in zip(points, weights, strict=True):
        sums.append(sums[-1] + weight * y)
        weighed.append(weighed[-1] + weight)
    found = []
    for i, (x, _) in enumerate(points):
        first = max(0, min(i - span // 2, len(points) - span))
        found.append((x, (sums[first + span] - sums[first]) / (weighed[first + span] - weighed[first])))
    return found


def thin(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """At most `most` points that look the same: the lowest and the highest of each of equal parts, with both ends."""
    if len(points) <= most:
        return list(points)
    parts = max(1, (most - 2) // 2)
    inner = range(1, len(points) - 1)
    kept = {0, len(points) - 1}
    for i in range(parts):
        part = inner[i * len(inner) // parts : (i + 1) * len(inner) // parts]
        kept |= {min(part, key=lambda n: points[n][1]), max(part, key=lambda n: points[n][1])}
    return [points[n] for n in sorted(kept)]


@dataclass(frozen=True)
class Histogram:
    """One moment of a layer: `area` of the weights that are not 0, `spike` of those that are exactly 0.

    Where one of them is higher than the drawing, `above` is its share of all weights.
    """

    moment: str
    area: str
    spike: str
    above: float | None
    zero_share: float
    mean_abs: float


@dataclass(frozen=True)
class LayerFigure:
    name: str
    limit: str
    weights: int
    moments: list[Histogram]
    change: float  # of mean |w|, from the first moment to the last, as a share of the first


def histograms(pictures: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[list[LayerFigure], list[LayerFigure]]:
    """Each layer's moments side by side, in the order in which they came, over the same axes.

    First the LAYERS layers whose mean |w| changed most, then the rest; in both lists in the order of `pictures`.
    """
    found = [_layer_figure(name, moments) for name, moments in pictures.items() if moments]
    telling = sorted(found, key=lambda layer: -abs(layer.change))[:LAYERS]
    return [layer for layer in found if layer in telling], [layer for layer in found if layer not in telling]


def _layer_figure(name: str, pictures: Sequence[Mapping[str, Any]]) -> LayerFigure:
    """The first moment's highest bar has two thirds of the height: what towers above it would hide all else."""
    first = pictures[0]
    top = 1.5 * max(1, *first["counts"])
    weights = max(1, sum(first["counts"]) + first["zeros"])
    moments = [_histogram(one, top, weights) for one in pictures]
    change = pictures[-1]["mean_abs"] / first["mean_abs"] - 1 if first["mean_abs"] else 0.0
    return LayerFigure(name, f"{first['edges'][1]:.2g}", weights, moments, change)


def _histogram(one: Mapping[str, Any], top: float, weights: int) -> Histogram:
    counts, zeros = one["counts"], one["zeros"]
    width = SIZE / len(counts)
    area = f"M0 {SIZE}"
    for place, count in enumerate(counts):
        area += f"V{number(SIZE * max(0.0, 1 - count / top))}H{number((place + 1) * width)}"
    left, height = number((SIZE - width) / 2), number(SIZE * min(1.0, zeros / top))
    spike = f"M{left} {SIZE}v-{height}h{number(width)}V{SIZE}z" if zeros else ""
    tallest = max(zeros, *counts)
    above = tallest / weights if tallest > top else None
    return Histogram(one["moment"], f"{area}V{SIZE}z", spike, above, zeros / weights, one["mean_abs"])


def css_arm(arm: str) -> str:
    """The class that gives an arm its colour; a name that we do not know gets the common one."""
    return arm if arm in ("baseline", "refined", "dense", "random", "rate") else "other"
