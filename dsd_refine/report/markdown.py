"""Markdown: text and names that cannot break it, and the tables that card, summary and pull request share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dsd_refine.report import words


def arms_table(report: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table with the metrics of each arm. `report` is the content of report.json."""
    arms, seeds, metric = report["arms"], report.get("seeds"), report["metric"]["name"]
    names = list(arms["baseline"])
    head = [*names, *([f"{metric} over {seeds['n']} seeds"] if seeds else [])]
    rows = []
    for arm, metrics in arms.items():
        cells = [f"{metrics[name]:.4f}" for name in names]
        if seeds:
            over_seeds = seeds["arms"].get(arm)
            cells.append(f"{over_seeds[metric]['mean']:.4f} ± {over_seeds[metric]['deviation']:.4f}" if over_seeds else "")
        rows.append([arm, *cells])
    return table(["arm", *head], rows)


def comparison_table(report: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table with each comparison: its interval, p, and the rows gained and lost."""
    rows = [
        [
            name.replace("_", " "), words.signed(result["delta"]), words.interval(result),
            f"{result['p_adjusted']:.3g}", *("" if result[key] is None else f"{result[key]:,}" for key in ("gained", "lost")),
        ]
        for name, result in report["comparison"].items()
    ]  # fmt: skip
    return table(["comparison", "difference", "95 % interval", "p, adjusted", "rows gained", "rows lost"], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table. All columns but the first are aligned to the right."""
    lines = [[plain(text) for text in row] for row in (head, *rows)]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:])]


def plain(text: str) -> str:
    """Escape text, so that Markdown shows it as it is, also in a table."""
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(sign, entity)
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """Return a name from outside as a code span.

    Markdown and HTML in it have no effect. The fence is longer than any run of backticks in it.
    """
    text = " ".join(text.split())
    fence = "`" * (max(map(len, re.findall(r"`+", text)), default=0) + 1)
    room = " " if text[:1] == "`" or text[-1:] == "`" or not text else ""
    return f"{fence}{room}{text}{room}{fence}"


def fenced(text: str, language: str) -> list[str]:
    """Return the lines of a code block. Its fence is longer than any run of backticks in the text."""
    fence = "`" * max(3, max(map(len, re.findall(r"`+", text)), default=0) + 1)
    return [f"{fence}{language}", text.rstrip("\n"), fence]
