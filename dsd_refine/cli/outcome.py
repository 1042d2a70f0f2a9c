"""The files that a CI job reads: --summary (Markdown) and --junit (XML), also of a run that failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsd_refine.errors import DsdError, UsageError

WriteOutcome = Callable[[Mapping[str, Any]], None]


@contextmanager
def outcome_files(summary: str | None, junit: str | None, *, writes: bool) -> Iterator[WriteOutcome]:
    """Yield a function that writes the files from the content of report.json.

    If the `with` block ends with an error of this package, the files say so.

    Args:
        summary: The file for Markdown, or None.
        junit: The file for JUnit XML, or None.
        writes: Whether this process writes. Only the main one does.

    Raises:
        UsageError: A file cannot be written where it shall be.
    """
    if writes:
        for option, file in (("--summary", summary), ("--junit", junit)):
            _check(option, file)

    def write(report: Mapping[str, Any]) -> None:
        if not writes or not (summary or junit):
            return
        from dsd_refine.report.junit import junit as as_junit
        from dsd_refine.report.notes import notes

        _write(summary, lambda: notes(report))
        _write(junit, lambda: as_junit(report))

    try:
        yield write
    except DsdError as error:
        if writes and (summary or junit):
            from dsd_refine.report.junit import failed_junit
            from dsd_refine.report.notes import failure_notes

            message = str(error)
            _write(summary, lambda: failure_notes(message))
            _write(junit, lambda: failed_junit(message))
        raise


def _check(option: str, file: str | None) -> None:
    """Check before hours of training that a file can be written."""
    if file is not None and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
        raise UsageError(f"{option} {file}: must be a file in a folder that exists")


def _write(file: str | None, text: Callable[[], str]) -> None:
    if file is not None:
        Path(file).write_text(text(), encoding="utf-8")
