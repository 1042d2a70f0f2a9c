"""report.html: a single file without scripts and without requests. Its own policy forbids both.

`figures` makes the drawings and `words` the sentences; the template places them. Jinja escapes all
values, because names of models, classes, files and arguments come from outside.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from dsd_refine.report import cost, figures, published, words
from dsd_refine.report.card import public_recipe
from dsd_refine.report.data import data_lines
from dsd_refine.report.examples import Examples
from dsd_refine.report.places import last_part
from dsd_refine.report.rules import absolute_margin
from dsd_refine.report.tries import tries_of

SHOWN_ROWS = 20  # the most skipped rows, and class names, that are listed. The rest is counted
EXPLAINED = {
    "start": "the source",
    "pruned": "just masked",
    "after S": "end of sparse phase",
    "unmasked": "start of dense phase",
    "after re-D": "end of dense phase",
}

Means = Mapping[str, tuple[float, float]]


def page(
    report: Mapping[str, Any],
    log: Iterable[Mapping[str, Any]],
    pictures: Mapping[str, Sequence[Mapping[str, Any]]],
    recipe_yaml: str,
    means: Means | None = None,
    rows: Examples | None = None,
) -> str:
    """Return the text of report.html. Equal inputs give equal text.

    Args:
        report: The content of report.json.
        log: The entries of log.jsonl. They are read once, in order.
        pictures: The histograms of `dsd_refine.masking.histograms`, by layer name.
        recipe_yaml: The recipe of the run.
        means: The mean |w| of each layer in the source and in the result, by layer name.
        rows: The evaluation rows gained and lost.
    """
    recipe = _recipe(recipe_yaml)
    metric = report["metric"]
    margin = absolute_margin(float(recipe.get("margin") or 0.0), metric["name"], report["arms"]["baseline"][metric["name"]])
    source = (report.get("holdout") or {}).get("baseline")
    epoch = report["selected"]["epoch"]
    curves = figures.curves(figures.read_log(log), metric["name"], metric["higher_is_better"], source, epoch)
    top_layers, other_layers = figures.histograms(pictures)
    text = _template().render(
        report=report,
        name=_name(report),
        metric=metric["name"],
        main=published.comparison_of(report),
        published=published.arm_of(report),
        result=published.result_of(report),
        margin=margin,
        forest=figures.forest(report["comparison"], margin, words.times(metric["name"])),
        spread=_spread_forest(report, margin),
        flips=figures.flips(report),
        curves=curves,
        tries=tries_of(report),
        rows=rows,
        cost=cost.cost_rows(report),
        top_layers=top_layers,
        other_layers=other_layers,
        layers=_layers(report, means or {}),
        reasons=Counter(layer["excluded"] for layer in report["layers"] if layer["excluded"]),
        parts=_parts(report),
        data_lines=data_lines(report["data"]),
        labels=_labels(report),
        command=["dsd-refine", *(shlex.quote(last_part(str(arg))) for arg in report["argv"])],
        recipe_yaml=public_recipe(recipe) if recipe else recipe_yaml,
        environment=report["environment"],
    )
    return text.encode("utf-8", "replace").decode()  # a file name may contain bytes that are not valid Unicode


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a log.jsonl, one after the other."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "bare": lambda number, metric: _typeset(words.bare(metric, number)),
        "value": lambda number, metric: _typeset(words.value(metric, number)),
        "p": lambda value: _typeset(words.p_words(value)),
        "interval": lambda comparison, metric: _typeset(words.interval(comparison, metric)),
        "called": words.name_of,
        "duration": cost.duration,
        "joules": cost.energy,
        "typeset": _typeset,
        "sentence": lambda text: text[:1].upper() + text[1:],
        "arm": figures.css_arm,
        "place": last_part,
        "units": figures.number,
        "share": _share,
        "small": _small,
        "rate": lambda value: "–" if value is None else f"{value:.3g}".replace("-", "−"),
    }
    environment.globals |= {"words": words, "explained": EXPLAINED, "most": SHOWN_ROWS}
    return environment.get_template("page.html.j2")


def _recipe(text: str) -> Mapping[str, Any]:
    recipe = yaml.safe_load(text)
    return recipe if isinstance(recipe, dict) else {}


def _name(report: Mapping[str, Any]) -> str:
    """The title: the source's name on the Hub, or the last part of its directory."""
    source = report["source"]
    return str(source["resolved"]) if source["revision"] else Path(source["resolved"]).name or str(source["model"])


def _spread_forest(report: Mapping[str, Any], margin: float) -> figures.Forest | None:
    seeds = report.get("seeds")
    times = words.times(report["metric"]["name"])
    return figures.forest(seeds["comparison"], margin, times) if seeds else None


def _layers(report: Mapping[str, Any], means: Means) -> list[dict[str, Any]]:
    """The rows of the layer table: the entries of report.json, with the means and their change."""
    rows = []
    for layer in report["layers"]:
        before, after = means.get(layer["name"], (None, None))
        change = after / before - 1 if before and after is not None else None
        rows.append({**layer, "before": before, "after": after, "change": change})
    return rows


def _parts(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    names = {"train": "training", "holdout": "holdout", "eval": "evaluation"}
    return [(shown, report["data"][part]) for part, shown in names.items() if report["data"].get(part)]


def _labels(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first class names, their number, and the rule that matched them; None without names."""
    labels = report.get("labels")
    if not labels or not labels.get("model"):
        return None
    names = [str(name) for name in labels["model"]]
    return {"names": names[:SHOWN_ROWS], "more": max(0, len(names) - SHOWN_ROWS), "count": len(names), "rule": labels["rule"]}


def _typeset(text: str) -> str:
    """Replace hyphens by minus signs, and put no-break spaces into "p = 0.03" and "5 %"."""
    text = re.sub(r"(?<![\w-])-(?=\d)", "−", text)
    return re.sub(r"(?<=\bp) ([=<]) |(?<=\d) (?=%)", lambda match: f"\u00a0{match[1]}\u00a0" if match[1] else "\u00a0", text)


def _share(value: float) -> str:
    """A share in percent, with enough digits to show that it is not 0 % or 100 %."""
    text = f"{100 * value:.1f}"
    if value in (0, 1):
        return f"{value:.0%}".replace("%", " %")
    return f"{100 * value:.2g} %" if text in ("0.0", "100.0") else f"{text} %"


def _small(value: float | None) -> str:
    return "–" if value is None else f"{value:#.4g}".rstrip(".").replace("-", "−")


def shows_rows(page_text: str, *, has_classes: bool) -> bool:
    """Return whether a report.html shows content of evaluation rows.

    It does with `--report-images`, and also if its lists of rows name targets that are texts.

    Args:
        page_text: The text of report.html.
        has_classes: Whether the targets are classes.
    """
    lists = re.findall(r'<ul class="examples([^"]*)">', page_text)
    return any(kind or not has_classes for kind in lists)
