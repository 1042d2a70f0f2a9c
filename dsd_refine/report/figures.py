"""The figures of report.html as coordinates.

Every drawing is a box of SIZE x SIZE units, which the page stretches to its width. The lines keep
their width (`vector-effect`). All text stands beside the drawings as HTML, so that it is readable on
a phone too. Names from outside are only passed on as text, which the template escapes.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsd_refine.report import words
from dsd_refine.report.rules import preference

SIZE = 1000
POINTS = 500  # the most points of a curve
SMOOTH = 40  # the moving mean spans 1 / SMOOTH of a phase
LAYERS = 3  # layers whose histograms are shown at once
DECADES = 1.3  # a loss that spans more powers of ten has a logarithmic axis

Point = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis, `position` units from its start."""

    position: float
    text: str


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`, linear or logarithmic. `low` and `high` must differ."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], pad: float = 0.0, log: bool = False) -> Scale:
        """Return an axis that contains all finite values.

        Args:
            values: The values; above 0 if `log` is True.
            pad: The room at both ends, as a share of the values' range.
            log: Whether the axis is logarithmic.
        """
        finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        if log:
            finite = [math.log10(value) for value in finite]
        low, high = min(finite), max(finite)
        room = (high - low) * pad or (0.0 if high > low else abs(low) * 0.1 or 1.0)
        low, high = low - room, high + room
        return cls(10**low, 10**high, True) if log else cls(low, high)

    def position(self, value: float) -> float:
        """Return where a value lies, in units from the start."""
        if self.log:
            return SIZE * math.log10(value / self.low) / math.log10(self.high / self.low)
        return SIZE * (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 5) -> list[Tick]:
        """Return marks at round numbers within the axis, about `most` of them."""
        values = _decades(self.low, self.high, most) if self.log else _round_numbers(self.low, self.high, most)
        return [Tick(round(self.position(value), 1), f"{value:.10g}".replace("-", "−")) for value in values]


def _round_numbers(low: float, high: float, most: int) -> list[float]:
    raw = (high - low) / most
    if raw < sys.float_info.min:  # below it numbers lose their digits, and 0 has no logarithm
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(n for n in (1, 2, 5, 10) if n * power >= raw * (1 - 1e-9))
    digits = max(0, -math.floor(math.log10(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, digits) for n in range(first, last + 1)]


def _decades(low: float, high: float, most: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    numbers: list[float] = []
    for digits in ((1, 2, 5), (1, 3), (1,)):
        numbers = [n * 10.0**p for p in powers for n in digits if low <= n * 10.0**p <= high]
        if len(numbers) <= most:
            return numbers
    return numbers[:: math.ceil(len(numbers) / most)]


def number(value: float) -> str:
    """Return a coordinate as short text, with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")


def line(points: Sequence[Point]) -> str:
    """Return an SVG path through the points; empty if there are none."""
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points) if points else ""


def dots(points: Sequence[Point]) -> str:
    """Return an SVG path of length 0 at each point.

    With round line ends it is drawn as a dot. The page stretches shapes, but not line widths.
    """
    return "".join(f"M{number(x)} {number(y)}h0" for x, y in points)


@dataclass(frozen=True)
class Interval:
    """A comparison as it is drawn.

    Attributes:
        name: The name of the other arm.
        low: The lower end of the interval, in units.
        point: The difference, in units.
        high: The upper end of the interval, in units.
        comparison: The entry of report.json, for the text beside the drawing.
        arm: The name of the arm that is compared with the other one.
    """

    name: str
    low: float
    point: float
    high: float
    comparison: Mapping[str, Any]
    arm: str = "refined"


@dataclass(frozen=True)
class Forest:
    """Intervals over a common axis.

    Attributes:
        rows: The intervals.
        zero: The position of 0, in units.
        margin: The ends of the range that counts as the same, in units.
        ticks: The marks of the axis.
    """

    rows: list[Interval]
    zero: float
    margin: tuple[float, float]
    ticks: list[Tick]


def forest(comparisons: Mapping[str, Mapping[str, Any]], margin: float, times: float = 1.0) -> Forest:
    """Place the difference and the 95 % interval of each comparison on an axis with 0 and +-margin.

    Args:
        comparisons: The entry `comparison` of report.json.
        margin: Absolute, in the metric's unit.
        times: The factor for the numbers of the axis, such as 100 for percentage points.
    """
    ends = [value for comparison in comparisons.values() for value in (comparison["delta"], *comparison["ci95"])]
    scale = Scale.over([times * end for end in (*ends, -1.25 * margin, 1.25 * margin, 0.0)], pad=0.06)
    rows = []
    for name, comparison in comparisons.items():
        values = (comparison["ci95"][0], comparison["delta"], comparison["ci95"][1])
        low, point, high = (scale.position(times * value) for value in values)
        arm, other = name.split("_vs_")
        rows.append(Interval(other, low, point, high, comparison, arm))
    margins = (scale.position(-times * margin), scale.position(times * margin))
    return Forest(rows, scale.position(0), margins, scale.ticks(5))


@dataclass(frozen=True)
class Flips:
    """The numbers of evaluation rows that the refined arm and another arm have right.

    Attributes:
        against: The name of the other arm.
        both_right: Rows that both arms have right.
        gained: Rows that only the refined arm has right.
        lost: Rows that only the other arm has right.
        both_wrong: Rows that neither arm has right.
        arm: The name of the arm that is compared with the other one.
    """

    against: str
    both_right: int
    gained: int
    lost: int
    both_wrong: int
    arm: str = "refined"


def flips(report: Mapping[str, Any]) -> list[Flips]:
    """Return the numbers of each comparison. There are none if the rows are not right or wrong."""
    metric, rows = report["metric"]["name"], report["data"]["eval"]["rows"]
    tables = []
    for name, comparison in report["comparison"].items():
        (arm, other), gained, lost = name.split("_vs_"), comparison["gained"], comparison["lost"]
        if gained is None or other not in report["arms"]:
            continue
        right = round(report["arms"][other][metric] * rows)
        tables.append(Flips(other, right - lost, gained, lost, rows - right - gained, arm))
    return tables


@dataclass
class Track:
    """The logged values of one phase of one try.

    Attributes:
        steps: The numbers of the optimizer steps.
        loss: The training loss of each step.
        lr: The learning rate of each step.
        samples: The number of samples of each step.
        evaluations: The evaluations on the holdout, as (step, metrics).
    """

    steps: array[float] = field(default_factory=lambda: array("d"))
    loss: array[float] = field(default_factory=lambda: array("d"))
    lr: array[float] = field(default_factory=lambda: array("d"))
    samples: array[float] = field(default_factory=lambda: array("d"))
    evaluations: list[tuple[float, Mapping[str, Any]]] = field(default_factory=list)

    @property
    def length(self) -> float:
        """The last step that was logged; 0 if there is none."""
        return max([0.0, *self.steps[-1:], *(step for step, _ in self.evaluations)])


Tries = dict[str, dict[str, Track]]  # "refined try 2" -> "1-sparse" -> its track


@dataclass(frozen=True)
class Curve:
    """The SVG paths of one arm.

    Attributes:
        arm: The name of the arm.
        bold: The moving mean, or a line through the values.
        faint: The values of the single steps.
        dots: The evaluations on the holdout.
        ring: The evaluation of the weights that were chosen.
    """

    arm: str
    bold: str
    faint: str = ""
    dots: str = ""
    ring: str = ""


@dataclass(frozen=True)
class Panel:
    """A drawing of one quantity, with the marks of its vertical axis."""

    title: str
    curves: list[Curve]
    ticks: list[Tick]
    log: bool = False


@dataclass(frozen=True)
class Stretch:
    """A phase on the common axis of optimizer steps. `start` and `end` are in units."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Curves:
    """Panels over the optimizer steps of all phases, one after the other.

    Attributes:
        panels: The panels that have values.
        phases: The phases on the horizontal axis.
        ticks: The marks of the horizontal axis.
        shown: The try that is drawn, by arm.
        tries: The number of all tries.
    """

    panels: list[Panel]
    phases: list[Stretch]
    ticks: list[Tick]
    shown: dict[str, str]
    tries: int


def read_log(lines: Iterable[Mapping[str, Any]]) -> Tries:
    """Read the values of each try and phase that the figures need.

    A log can have millions of lines, so everything else is dropped at once.
    """
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
            track.samples.append(max(1.0, _real(entry.get("samples"))))  # 1 if it is not a number
        elif entry.get("part") == "holdout":
            track.evaluations.append((float(entry["step"]), entry))
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
    """Draw the loss, the holdout metric and the learning rate over the optimizer steps.

    If an arm had several tries, the one with the best result on the holdout is drawn.

    Args:
        tries: What `read_log` returns.
        metric: The name of the task's metric.
        higher_is_better: False for losses and error rates.
        source: The source's metrics on the holdout. They are drawn as a level line, and the curves of
            the arms begin there.
        epoch: The epoch of the refined arm's last phase whose weights were chosen.

    Returns:
        None if no steps were logged.
    """
    chosen = _preferred(tries, metric, higher_is_better)
    if not any(track.length for label in chosen.values() for track in tries[label].values()):
        return None
    arms = {arm: list(tries[label].items()) for arm, label in chosen.items()}
    longest = max(arms.values(), key=len)  # arms have the same phases, but a control may name them differently
    lengths = [max(tracks[i][1].length for tracks in arms.values() if i < len(tracks)) for i in range(len(longest))]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    axis = Scale(0.0, starts[-1])
    names = [name.replace("-", " ", 1) for name, _ in longest]
    ends = [axis.position(start) for start in starts]
    phases = [Stretch(name, start, end) for name, start, end in zip(names, ends, ends[1:], strict=False)]
    parts = {arm: [(start, track) for start, (_, track) in zip(starts, tracks, strict=False)] for arm, tracks in arms.items()}
    panels = (_loss_panel(parts, axis), _holdout_panel(parts, axis, metric, source or {}, epoch), _rate_panel(parts, axis))
    return Curves([panel for panel in panels if panel is not None], phases, axis.ticks(5), chosen, len(tries))


def _preferred(tries: Tries, metric: str, higher_is_better: bool) -> dict[str, str]:
    """Arm -> the label of the try whose last phase has the best evaluation on the holdout.

    The metric decides first, then the loss. Among equals, the earlier try is preferred.
    """
    best: dict[str, tuple[tuple[float, float], str]] = {}
    for label, phases in tries.items():
        looks = [look for _, look in list(phases.values())[-1].evaluations]
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
        most = max(20, POINTS // max(1, len(tracks)))
        phases = [_finite(zip((start + step for step in track.steps), track.loss, strict=True)) for start, track in tracks]
        sizes = [[n for n, loss in zip(track.samples, track.loss, strict=True) if math.isfinite(loss)] for _, track in tracks]
        means = [smooth(points, weights) for points, weights in zip(phases, sizes, strict=True)]
        faint = "".join(line(_placed(thin(points, most), axis, scale)) for points in phases)
        bold = "".join(line(_placed(thin(points, most), axis, scale)) for points in means)
        drawn.append(Curve(arm, bold, faint))
    return Panel("training loss", drawn, _upward(scale, 4), log)


def _holdout_panel(parts: Parts, axis: Scale, metric: str, source: Mapping[str, float], epoch: int | None) -> Panel | None:
    """Every evaluation on the holdout, in percent if the metric is a fraction.

    If some evaluation has no value of the metric, the loss is drawn.
    """
    evaluations = {
        arm: [(start + step, metrics) for start, track in tracks for step, metrics in track.evaluations]
        for arm, tracks in parts.items()
    }
    every = [metrics for of_arm in evaluations.values() for _, metrics in of_arm]
    if not every:
        return None
    shown = metric if all(metric in metrics for metrics in every) else "loss"
    times, percent = words.times(shown), ", %" if "%" in words.value(shown, 0.0) else ""
    points = {
        arm: _finite((step, times * _real(metrics.get(shown))) for step, metrics in of_arm)
        for arm, of_arm in evaluations.items()
    }
    level = _finite((end, times * _real(source.get(shown))) for end in (axis.low, axis.high))
    points = {arm: [*level[:1], *of_arm] for arm, of_arm in points.items()}  # every arm begins as the source
    scale = Scale.over((value for of_arm in (*points.values(), level) for _, value in of_arm), pad=0.1)
    placed = {arm: _placed(thin(of_arm), axis, scale) for arm, of_arm in points.items()}
    chosen = _placed(_chosen(parts.get("refined", []), shown, times, epoch), axis, scale)
    rings = {"refined": dots(chosen)}
    drawn = [Curve(arm, line(of_arm), dots=dots(of_arm), ring=rings.get(arm, "")) for arm, of_arm in placed.items()]
    drawn += [Curve("baseline", line(_placed(level, axis, scale)))] if level else []
    return Panel(f"holdout {words.name_of(shown)}{percent}", drawn, _upward(scale, 4))


def _chosen(tracks: list[tuple[float, Track]], shown: str, times: float, epoch: int | None) -> list[Point]:
    """The evaluation at the end of the chosen epoch of the last phase."""
    start, track = tracks[-1] if tracks else (0.0, Track())
    of_epoch = [(step, metrics) for step, metrics in track.evaluations if math.ceil(metrics.get("epoch") or 0) == epoch]
    return _finite((start + step, times * _real(metrics.get(shown))) for step, metrics in of_epoch[-1:])


def _rate_panel(parts: Parts, axis: Scale) -> Panel | None:
    """The learning rates of the first arm. Those of the other arms are the same."""
    tracks = next(iter(parts.values()))
    rates = [_finite(zip((start + step for step in track.steps), track.lr, strict=True)) for start, track in tracks]
    if not any(rates):
        return None
    scale = Scale.over([0.0, *(rate for points in rates for _, rate in points)], pad=0.04)
    most = max(20, POINTS // len(rates))
    path = "".join(line(_placed(thin(points, most), axis, scale)) for points in rates)
    return Panel("learning rate", [Curve("rate", path)], _upward(scale, 3))


def _upward(scale: Scale, most: int) -> list[Tick]:
    """The marks of a vertical axis, in units from the top, where a drawing starts."""
    return [Tick(round(SIZE - tick.position, 1), tick.text) for tick in scale.ticks(most)]


def _placed(points: Sequence[Point], x: Scale, y: Scale) -> list[Point]:
    return [(x.position(a), SIZE - y.position(b)) for a, b in points]


def _finite(points: Iterable[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def smooth(points: Sequence[Point], samples: Sequence[float] | None = None) -> list[Point]:
    """Return the moving mean of the points, in which every sample has the same weight.

    The window has about 1 / SMOOTH of the points, and at least three. At the ends it is not shorter,
    but shifted inwards. So no single batch shows as a jump, not even a small last one.

    Args:
        points: The (step, value) of each step.
        samples: The number of samples of each step. None: all steps have the same weight.
    """
    weights = samples or [1.0] * len(points)
    window = min(len(points), 2 * max(1, len(points) // (2 * SMOOTH)) + 1)
    sums, totals = [0.0], [0.0]  # of the weighted values and of the weights, up to each point
    for (_, y), weight in zip(points, weights, strict=True):
        sums.append(sums[-1] + weight * y)
        totals.append(totals[-1] + weight)
    means = []
    for i, (x, _) in enumerate(points):
        first = max(0, min(i - window // 2, len(points) - window))
        means.append((x, (sums[first + window] - sums[first]) / (totals[first + window] - totals[first])))
    return means


def thin(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """Return at most `most` of the points, whose line looks the same.

    They are both ends, and the lowest and the highest point of each of many equal parts.
    """
    if len(points) <= most:
        return list(points)
    parts = max(1, (most - 2) // 2)
    inner = range(1, len(points) - 1)
    chosen = {0, len(points) - 1}
    for i in range(parts):
        part = inner[i * len(inner) // parts : (i + 1) * len(inner) // parts]
        chosen |= {min(part, key=lambda n: points[n][1]), max(part, key=lambda n: points[n][1])}
    return [points[n] for n in sorted(chosen)]


@dataclass(frozen=True)
class Histogram:
    """The weights of a layer at one moment of the training.

    Attributes:
        moment: The name of the moment.
        area: The SVG path of the weights that are not 0.
        spike: The SVG path of the weights that are exactly 0; empty if there are none.
        above: The share of the highest bar, if it is higher than the drawing; else None.
        zero_share: The share of the weights that are exactly 0.
        mean_abs: The mean of |w|.
    """

    moment: str
    area: str
    spike: str
    above: float | None
    zero_share: float
    mean_abs: float


@dataclass(frozen=True)
class LayerFigure:
    """The histograms of one layer.

    Attributes:
        name: The name of the weight.
        limit: The right end of the horizontal axis; the left end is its negative.
        weights: The number of weights.
        moments: One histogram for each moment, over the same axes.
        change: The relative change of mean |w| from the first moment to the last.
    """

    name: str
    limit: str
    weights: int
    moments: list[Histogram]
    change: float


def histograms(pictures: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[list[LayerFigure], list[LayerFigure]]:
    """Draw the histograms of each layer.

    Args:
        pictures: The histograms of each layer, in the order of the training.

    Returns:
        The LAYERS layers whose mean |w| changed most, and the other layers. Both lists have the order
        of `pictures`.
    """
    layers = [_layer_figure(name, moments) for name, moments in pictures.items() if moments]
    most_changed = sorted(layers, key=lambda layer: -abs(layer.change))[:LAYERS]
    return [layer for layer in layers if layer in most_changed], [layer for layer in layers if layer not in most_changed]


def _layer_figure(name: str, pictures: Sequence[Mapping[str, Any]]) -> LayerFigure:
    """Draw one layer.

    The highest bar of the first moment has two thirds of the height. If the axis had room for the
    highest bar of all moments, often the zeros, the others would be too small to see.
    """
    first = pictures[0]
    top = 1.5 * max(1, *first["counts"])
    weights = max(1, sum(first["counts"]) + first["zeros"])
    moments = [_histogram(picture, top, weights) for picture in pictures]
    change = pictures[-1]["mean_abs"] / first["mean_abs"] - 1 if first["mean_abs"] else 0.0
    return LayerFigure(name, f"{first['edges'][1]:.2g}", weights, moments, change)


def _histogram(picture: Mapping[str, Any], top: float, weights: int) -> Histogram:
    counts, zeros = picture["counts"], picture["zeros"]
    width = SIZE / len(counts)
    area = f"M0 {SIZE}"
    for i, count in enumerate(counts):
        area += f"V{number(SIZE * max(0.0, 1 - count / top))}H{number((i + 1) * width)}"
    left, height = number((SIZE - width) / 2), number(SIZE * min(1.0, zeros / top))
    spike = f"M{left} {SIZE}v-{height}h{number(width)}V{SIZE}z" if zeros else ""
    tallest = max(zeros, *counts)
    above = tallest / weights if tallest > top else None
    return Histogram(picture["moment"], f"{area}V{SIZE}z", spike, above, zeros / weights, picture["mean_abs"])


def css_arm(arm: str) -> str:
    """Return the CSS class that gives an arm its colour; "other" for an unknown name."""
    return arm if arm in ("baseline", "refined", "dense", "random", "rate") else "other"
