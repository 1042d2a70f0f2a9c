"""The result of a run as JUnit XML, which CI systems show beside the tests of a project."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from dsd_refine.report import words

SUITE = "dsd-refine"
# XML 1.0 cannot hold these characters, not even escaped.
FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: Mapping[str, Any]) -> str:
    """Return JUnit XML with two test cases: the gate, and the check of the written files.

    The gate's case fails if the gate is not met. The other one always passes: an output that does
    not pass the check has no report.

    Args:
        report: The content of report.json.
    """
    gate = report["gate"]
    suite = _suite(tests=2, failures=int(not gate["passed"]), errors=0)
    seconds = sum(phase["seconds"] for phase in report["phases"])
    case = _case(suite, f"gate {gate['rule']}", seconds)
    if not gate["passed"]:
        failure = ElementTree.SubElement(case, "failure", {"message": _clean(f"gate {words.gate_words(report)}")})
        failure.text = _clean(f"{words.measured(report)}\n{words.what_next(report)}")
    _case(suite, "the written checkpoint has the source's shape", 0.0)
    lines = [f"verdict {report['verdict']}: {words.headline(report)}", words.measured(report), *words.credit(report)]
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    ElementTree.SubElement(suite, "system-out").text = _clean("\n".join(lines))
    return _text(suite)


def failed_junit(message: str) -> str:
    """Return JUnit XML with one test case in error. `message` is the text of the error that ended the run."""
    suite = _suite(tests=1, failures=0, errors=1)
    error = ElementTree.SubElement(_case(suite, "run", 0.0), "error", {"message": _clean(message.partition("\n")[0])})
    error.text = _clean(message)
    return _text(suite)


def _suite(**counts: int) -> ElementTree.Element:
    return ElementTree.Element("testsuite", {"name": SUITE, **{name: str(count) for name, count in counts.items()}})


def _case(suite: ElementTree.Element, name: str, seconds: float) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", {"classname": SUITE, "name": _clean(name), "time": f"{seconds:.3f}"})


def _text(suite: ElementTree.Element) -> str:
    ElementTree.indent(suite)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(suite, encoding="unicode")}\n'


def _clean(text: str) -> str:
    return FORBIDDEN.sub("\ufffd", text)
