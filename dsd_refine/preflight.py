"""Is the baseline what it should be? A wrong preprocessing or label map shows here, before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import binomtest

from dsd_refine.errors import UsageError
from dsd_refine.recipe import Recipe
from dsd_refine.tasks import Task

Figure = tuple[str, str, float]  # data set, metric, value
UNBOUNDED = ("loss", "perplexity")  # every other metric is a fraction


def preflight(task: Task, found: Mapping[str, float], recipe: Recipe, source: Path) -> list[str]:
    """Compare the baseline's metrics with what the user expects, what the source's card says, and chance; the warnings.

    Raises:
        UsageError: an expected figure is not reproduced within the margin, or is of a metric that the task does not have.
    """
    for metric, expected in recipe.expect.items():
        if metric not in found:
            raise UsageError(f"--expect {metric}: {task.name} measures {', '.join(found)}")
        if not near(found[metric], expected, task, metric, recipe.margin):
            raise UsageError(
                f"--expect {metric}={expected:g}: the source reaches {found[metric]:.4f} on these "
                f"{len(task.eval.rows):,} rows, not within the margin of {recipe.margin:g}. Probably the preprocessing or "
                "the labels differ from those that it was measured with, or the rows do; nothing was trained"
            )
    return [*_card_warnings(task, found, recipe, source), *_chance_warnings(task, found)]


def near(value: float, expected: float, task: Task, metric: str, margin: float) -> bool:
    """Within the margin: absolute for a fraction, relative for a loss."""
    fraction = metric not in UNBOUNDED
    return abs(value - expected) <= (margin if fraction else margin * abs(expected)) + 1e-12


def _card_warnings(task: Task, found: Mapping[str, float], recipe: Recipe, source: Path) -> list[str]:
    lines = []
    for data, metric, value in card_figures(source):
        if metric not in found or not _same_data(data, recipe):
            continue
        value = value / 100 if metric not in UNBOUNDED and value > 1 else value
        if not near(found[metric], value, task, metric, recipe.margin):
            lines.append(
                f"the source's card says {metric} {value:.4f} on {data}, measured here is {found[metric]:.4f}: "
                "do preprocessing, labels and rows agree?"
            )
    return lines


def _chance_warnings(task: Task, found: Mapping[str, float]) -> list[str]:
    chance = getattr(task, "chance", None)
    rows = len(task.eval.rows)
    if chance is None:
        return []
    value = found[task.metric]
    if task.higher_is_better:
        beaten = binomtest(round(value * rows), rows, chance, alternative="greater").pvalue < 0.05
    else:
        beaten = value < chance
    if beaten:
        return []
    return [
        f"the source's {task.metric} of {value:.4f} cannot be told from guessing ({chance:.4f}): "
        "are these the labels and the preprocessing that it was trained with?"
    ]


def card_figures(source: Path) -> list[Figure]:
    """The evaluation results in a card's `model-index` and in `.eval_results/`; what is not readable is left out."""
    texts = [_front_matter(source / "README.md"), *(_text(path) for path in sorted((source / ".eval_results").glob("*.yaml")))]
    figures: list[Figure] = []
    for text in texts:
        try:
            figures += list(_figures(yaml.safe_load(text)))
        except (yaml.YAMLError, ValueError, RecursionError):
            continue
    return figures


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")[:1_000_000] if path.is_file() else ""


def _front_matter(path: Path) -> str:
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", _text(path), re.DOTALL)
    return found[1] if found else ""


def _figures(value: Any, data: str = "") -> Iterator[Figure]:
    """Walk whatever a card holds: a mapping with `dataset` names it for the metrics below; a metric has `type` and `value`."""
    if isinstance(value, list):
        for item in value:
            yield from _figures(item, data)
    elif isinstance(value, dict):
        dataset = value.get("dataset")
        if isinstance(dataset, dict):
            data = str(dataset.get("type") or dataset.get("id") or dataset.get("name") or "")
        metric, number = value.get("type") or value.get("metric"), value.get("value")
        if data and isinstance(metric, str) and isinstance(number, int | float) and not isinstance(number, bool):
            yield data, metric.lower(), float(number)
        for item in value.values():
            yield from _figures(item, data)


def _same_data(data: str, recipe: Recipe) -> bool:
    own = [name for name in (recipe.eval_data, recipe.data) if name]
    return any(_plain(data) in (_plain(name.split(":")[0]), _plain(Path(name).stem), _plain(Path(name).name)) for name in own)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
