"""What a case is, what came of it, and the checks that many cases share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

Arguments = list[Any]
SHORT = ("--sparse-steps", "2", "--dense-steps", "2", "--batch-size", "8", "--gate", "none", "--device", "cpu")
STILL = ("--sparsity", "0", "--sparse-steps", "0", "--dense-steps", "0", "--gate", "none", "--device", "cpu")
ALONE = ("--control", "none")


@dataclass(frozen=True)
class Result:
    """What the command left: exit code, standard output and error, and whatever lies in the case's `folder`."""

    code: int
    out: str
    err: str
    folder: Path

    @cached_property
    def report(self) -> dict[str, Any]:
        """report.json, empty where nothing was published."""
        file = self.folder / "out/dsd/report.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    @property
    def warnings(self) -> str:
        """The report's warnings, and what the report says was not used."""
        data = self.report.get("data", {})
        return "\n".join([*self.report.get("warnings", []), json.dumps(data.get("unused", []), ensure_ascii=False)])

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """The rows that were skipped, of all parts."""
        parts = [self.report.get("data", {}).get(name) for name in ("train", "holdout", "eval")]
        return [row for part in parts if part for row in part["skipped"]]

    @property
    def crashed(self) -> bool:
        return self.code not in (0, 2, 3, 4, 5) or "Traceback" in self.err

    @property
    def message(self) -> str:
        """The error as one line, else the last line that was said."""
        if "Error: " in self.err:
            return " ".join(self.err.split("Error: ", 1)[1].split())
        lines = [line for line in self.err.splitlines() if line.strip()]
        return lines[-1].strip() if lines else "(nothing was said)"

    def rows(self, part: str) -> int:
        """How many rows a part uses; 0 where there is none."""
        return int(((self.report.get("data") or {}).get(part) or {}).get("rows", 0))

    def said(self, *words: str) -> bool:
        """Do the warnings, the error or the output hold each of these patterns, in whatever case?"""
        text = "\n".join([self.out, self.err, self.warnings])
        return all(re.search(word, text, re.IGNORECASE) for word in words)


Checked = tuple[str, bool]  # the decisive fact in words, and whether it is the right one
Check = Callable[[Result], Checked]


@dataclass(frozen=True)
class Case:
    """`make` fills a folder and returns the command's arguments; `check` says what came of it, and if that is right.

    `before` is what release 0.1.0 did, in words; `was` the exit code and a pattern in what it said or reported, which
    `--before` holds against a checkout of it. `already`: that was right.
    """

    id: str
    name: str
    before: str
    was: tuple[int, str]
    make: Callable[[Path], Arguments]
    check: Check
    already: bool = False


def run(model: Any, folder: Path, *options: Any, data: Any = None) -> Arguments:
    """A short run of one arm into `folder/out`."""
    return [model, *(["--data", data] if data else []), "-o", folder / "out", *SHORT, *ALONE, *options]


def baseline(model: Any, folder: Path, *options: Any, data: Any = None) -> Arguments:
    """A run that trains nothing and masks nothing: what it measures is the source."""
    return [model, "--data", data, "-o", folder / "out", *STILL, *ALONE, *options]


def of_a_finished_run(check: Check) -> Check:
    """The check, where the run finished; else the fact is what was said, and it is not right."""

    def finished(result: Result) -> Checked:
        return check(result) if result.code == 0 and result.report else (result.message, False)

    return finished


def refused(*words: str, never: str = "") -> Check:
    """Exit code 2 in a few lines that hold each pattern, and not `never`."""

    def check(result: Result) -> Checked:
        text = result.message
        good = result.code == 2 and not result.crashed and all(re.search(word, text, re.IGNORECASE) for word in words)
        good = good and not (never and re.search(never, text, re.IGNORECASE))
        return text if result.code else "not refused", good

    return check


def warned(*words: str) -> Check:
    """A finished run whose warnings hold each pattern."""

    @of_a_finished_run
    def check(result: Result) -> Checked:
        lines = result.report.get("warnings", []) + list(map(str, result.report.get("data", {}).get("unused", [])))
        told = [line for line in lines if any(re.search(word, line, re.IGNORECASE) for word in words)]
        text = "\n".join(lines)
        good = all(re.search(word, text, re.IGNORECASE) for word in words)
        return (f"warned: {told[0]}" if told else f"{len(lines)} warnings, none of it"), good

    return check


def counts(**wanted: int) -> Check:
    """A finished run whose parts have so many rows; `trained` counts training and holdout together, `all` everything."""

    @of_a_finished_run
    def check(result: Result) -> Checked:
        held = {name: result.rows(name) for name in ("train", "holdout", "eval")}
        held["trained"] = held["train"] + held["holdout"]
        held["all"] = held["trained"] + held["eval"]
        told = ", ".join(f"{held[name]} {name}" for name in wanted)
        return f"rows: {told}", all(held[name] == count for name, count in wanted.items())

    return check


def figure(arm: str, metric: str, value: Callable[[Result], float], tolerance: float = 1e-6) -> Check:
    """A finished run whose arm has this figure on the evaluation rows."""

    @of_a_finished_run
    def check(result: Result) -> Checked:
        found = result.report.get("arms", {}).get(arm, {}).get(metric)
        good = found is not None and abs(found - value(result)) <= tolerance
        return f"{arm} {metric} {found if found is None else round(found, 4)} (right: {value(result):.4f})", good

    return check


@of_a_finished_run
def done(result: Result) -> Checked:
    """A finished run."""
    return "done", True


def both(*checks: Check) -> Check:
    """Each of them; the fact is the first that fails, else all."""

    def check(result: Result) -> Checked:
        found = [each(result) for each in checks]
        wrong = [fact for fact, good in found if not good]
        return (wrong[0], False) if wrong else ("; ".join(fact for fact, _ in found), True)

    return check


def either(*checks: Check) -> Check:
    """One of several right ways; where none is right, the facts of all."""

    def check(result: Result) -> Checked:
        found = [each(result) for each in checks]
        right = [fact for fact, good in found if good]
        return (right[0], True) if right else ("; ".join(dict.fromkeys(fact for fact, _ in found)), False)

    return check
