"""The model card of an output: what was done and measured, then the source's own card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsd_refine.report.report import WORDS


def card(report: Mapping[str, Any], source: Path) -> str:
    """README.md of the output. The source's front matter and text are kept as they are."""
    own = source / "README.md"
    text = own.read_text(encoding="utf-8", errors="replace") if own.is_file() else ""
    front, body = split_front_matter(text)
    return "\n".join([*([front] if front else []), _section(report), *(["", body.strip()] if body.strip() else []), ""])


def split_front_matter(text: str) -> tuple[str, str]:
    """(the YAML block with its fences, the rest) of a card; an empty first part if it has none."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return "", text
    for number, line in enumerate(lines[1:], 1):
        if line.strip() == "---":
            return "\n".join(lines[: number + 1]), "\n".join(lines[number + 1 :])
    return "", text


def _section(report: Mapping[str, Any]) -> str:
    source, arms = report["source"], report["arms"]
    at = f" at {source['revision']}" if source["revision"] else ""
    names = list(next(iter(arms.values())))
    rows = [f"| {arm} | " + " | ".join(f"{value:.4f}" for value in found.values()) + " |" for arm, found in arms.items()]
    return "\n".join(
        [
            "## Refined with dsd-refine",
            "",
            f"Refined from `{Path(source['resolved']).name if not source['revision'] else source['resolved']}`{at} by "
            "Dense-Sparse-Dense training (Han et al., ICLR 2017). "
            "Same files, names, shapes and dtypes: it loads as the source does.",
            "",
            f"Verdict on {report['data']['eval']['rows']:,} evaluation rows: **{report['verdict']}** "
            f"({WORDS[report['verdict']]}).",
            "",
            "| arm | " + " | ".join(names) + " |",
            "|---|" + "---|" * len(names),
            *rows,
            "",
            "`baseline` is the source; a control trained the same steps at the same rates. Details: `dsd/report.json`.",
        ]
    )
