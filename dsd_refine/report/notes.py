"""The result of a run in Markdown: the summary of a CI job, and the text of a pull request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsd_refine.report import words
from dsd_refine.report.figures import Flips, flips
from dsd_refine.report.markdown import arms_table, code, comparison_table, plain, table

SHOWN_WARNINGS = 20  # the rest is counted


def notes(report: Mapping[str, Any]) -> str:
    """Return the verdict, the credit, the tables of arms, comparisons and changed rows, the gate, and what to do next.

    Args:
        report: The content of report.json.
    """
    rows = report["data"]["eval"]["rows"]
    sentences = (words.measured(report), words.edge(report), words.rows_words(report), *words.credit(report))
    lines = [
        f"## dsd-refine: {report['verdict']}, credit: {report['credit']}",
        "",
        f"{code(report['source']['model'])} is refined: {plain(words.headline(report))}.",
        "",
        f"- **Change** {plain(words.change(report))}",
        f"- **Gate** {plain(words.gate_words(report))}",
        f"- **What next** {plain(words.what_next(report))}",
        "",
        *arms_table(report),
        "",
        f"Values on {rows:,} evaluation rows, which selected nothing. `baseline` is the source.",
        "",
        *comparison_table(report),
        "",
        *(line for changed in flips(report) for line in _flip_table(changed)),
        *(plain(sentence) for sentence in sentences if sentence),
        "",
        *_warning_lines(report["warnings"]),
    ]
    return _encodable("\n".join(lines))


def failure_notes(message: str) -> str:
    """Return the summary of a run that ended without a result. `message` is the error's text."""
    lines = [plain(line) for line in message.splitlines()]
    return _encodable("\n".join(["## dsd-refine: no result", "", *(f"> {line}" for line in lines), ""]))


def _encodable(text: str) -> str:
    """Replace what UTF-8 cannot express: halves of characters, from names of files that are not UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _flip_table(changed: Flips) -> list[str]:
    """The lines of the table of rows right and wrong, in the refined arm and in another one."""
    other = "the source" if changed.against == "baseline" else f"the {changed.against} control"
    head = ["rows", "refined right", "refined wrong"]
    right = [f"{other} right", f"{changed.both_right:,}", f"{changed.lost:,} lost"]
    wrong = [f"{other} wrong", f"{changed.gained:,} gained", f"{changed.both_wrong:,}"]
    return [*table(head, [right, wrong]), ""]


def _warning_lines(warnings: list[str]) -> list[str]:
    """The warnings as a list; the first SHOWN_WARNINGS, and the number of the others."""
    if not warnings:
        return []
    shown = [f"- {plain(warning)}" for warning in warnings[:SHOWN_WARNINGS]]
    more = len(warnings) - len(shown)
    return ["### Warnings", "", *shown, *([f"- and {more:,} more, in report.json"] if more else []), ""]


def proof(report: Mapping[str, Any], problems: Sequence[str]) -> str:
    """Return the same-shape proof: what `verify` found, and the SHA-256 of each weight file before and after.

    Args:
        report: The content of report.json.
        problems: What `verify` found wrong with the output; empty if all is right.
    """
    before, after = ({file["name"]: file["sha256"] for file in report[side]["files"]} for side in ("source", "output"))
    changed = [name for name, digest in after.items() if before.get(name) != digest]
    found = ["`verify` found problems, and the push was forced:", *(f"- {plain(problem)}" for problem in problems)]
    right = "`verify` found the same files, names, shapes, dtypes and metadata as in the source. The outputs are as evaluated."
    rows = [[name, before.get(name, "no such file"), after[name]] for name in changed]
    equal = len(after) - len(changed)
    lines = ["### Same shape", "", *(found if problems else [right]), ""]
    lines += [*table(["changed file", "SHA-256 before", "SHA-256 after"], rows), ""] if rows else []
    return "\n".join([*lines, f"{equal:,} other files are equal to the source's, byte for byte.", "", ""])
