"""A stand-in for GitHub's runner: it runs the steps of a composite action in a folder, with the runner's files faked.

Steps that use another action are not run, but for the caches: what is saved is there for the next `Runner` on the same
`caches`. What stands on stdout is read as the runner does: lines `::error …::` are annotations, unless commands are stopped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from conftest import ROOT, environment

EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)
TOKEN = re.compile(r"'(?:[^']|'')*'|&&|\|\||==|!=|!|\(|\)|[\w.-]+")


@dataclass
class Ran:
    """What the steps left: exit code of the first that failed, outputs, summary, log, annotations, and what other actions got."""

    code: int = 0
    outputs: dict[str, str] = field(default_factory=dict)
    summary: str = ""
    log: str = ""
    annotations: list[tuple[str, str]] = field(default_factory=list)
    used: dict[str, dict[str, str]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


class Runner:
    """Runs action.yml in `place`. `caches` is a folder that outlives the runner."""

    def __init__(self, place: Path, caches: Path, **variables: str) -> None:
        self.place, self.caches = place, caches
        self.files = place / ".runner"
        (self.files / "bin").mkdir(parents=True, exist_ok=True)
        self.variables = environment(**variables)
        self.variables.pop("HF_TOKEN", None) if "HF_TOKEN" not in variables else None
        self.variables["PATH"] = f"{self.files / 'bin'}:{os.environ['PATH']}"
        self._program("dsd-refine", f'exec "{sys.executable}" -m dsd_refine "$@"')
        pip = f'case "$*" in "-m pip "*) echo "$@" >> "{self.files}/pip"; exit 0;; esac'
        self._program("python", f'{pip}\nexec "{sys.executable}" "$@"')

    def stand_in(self, code: int, output: Path | None = None, message: str = "") -> None:
        """Let dsd-refine be a program that starts at once: it leaves `output` as OUT, writes `message`, and ends with `code`.

        Its arguments are lines of `.runner/arguments`.
        """
        copied = f'cp -r "{output}" dsd-output; echo "## noted" > "$8"' if output else 'echo "## dsd-refine: no result" > "$8"'
        (self.files / "message").write_text(message)
        self._program(
            "dsd-refine",
            f'printf "%s\\n" "$@" > "{self.files}/arguments"\n{copied}\ncat "{self.files}/message" >&2\nexit {code}',
        )

    def _program(self, name: str, text: str) -> None:
        path = self.files / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def run(self, attempt: int = 1, **inputs: str) -> Ran:
        """Run all steps. Inputs are named with `_` for `-`."""
        action = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
        known = {"github": {"action_path": str(ROOT), "run_id": "7", "run_attempt": str(attempt)}, "runner": {"os": "Linux"}}
        given = {name.replace("_", "-"): value for name, value in inputs.items()}
        assert not given.keys() - action["inputs"].keys()
        defaults = {name: str(entry.get("default", "")) for name, entry in action["inputs"].items()}
        context: dict[str, Any] = {**known, "steps": {}}
        context["inputs"] = {name: given.get(name, filled(value, context, True)) for name, value in defaults.items()}
        ran = Ran()
        for step in action["runs"]["steps"]:
            self._step(step, context, ran)
        ran.outputs = {name: filled(entry["value"], context, True) for name, entry in action["outputs"].items()}
        return ran

    def _step(self, step: dict[str, Any], context: dict[str, Any], ran: Ran) -> None:
        condition, good = EXPRESSION.sub(r"\1", str(step.get("if", "success()"))), ran.code == 0
        if not (value_of(condition, context, good) and ("always()" in condition or good)):
            ran.skipped.append(step["name"])
            return
        if "uses" in step:
            with_ = {name: filled(str(value), context, good) for name, value in step.get("with", {}).items()}
            ran.used[step["name"]] = with_
            self._cache(step["uses"], with_)
            return
        variables = {name: filled(str(value), context, good) for name, value in step.get("env", {}).items()}
        code, outputs = self._shell(step["run"], variables, ran)
        context["steps"][step.get("id", step["name"])] = {"outputs": outputs}
        ran.code = ran.code or code

    def _shell(self, script: str, variables: dict[str, str], ran: Ran) -> tuple[int, dict[str, str]]:
        named = {name: self.files / name.lower() for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        for path in named.values():
            path.write_text("")
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script], cwd=self.place, capture_output=True, text=True,
            env={**self.variables, **variables, **{name: str(path) for name, path in named.items()}}, timeout=300,
        )  # fmt: skip
        ran.log += done.stdout + done.stderr
        ran.summary += named["GITHUB_STEP_SUMMARY"].read_text()
        ran.annotations += annotations(done.stdout)
        return done.returncode, dict(line.split("=", 1) for line in named["GITHUB_OUTPUT"].read_text().splitlines())

    def _cache(self, uses: str, with_: dict[str, str]) -> None:
        if uses.startswith("actions/cache/save") and (self.place / with_["path"]).is_dir():
            shutil.copytree(self.place / with_["path"], self.caches / with_["key"], dirs_exist_ok=True)
        if uses.startswith("actions/cache/restore"):
            for found in sorted(self.caches.glob(f"{with_['restore-keys']}*")):
                shutil.copytree(found, self.place / with_["path"], dirs_exist_ok=True)


def annotations(stdout: str) -> list[tuple[str, str]]:
    """The annotations in what a step wrote to stdout: (kind, message)."""
    found, stopped = [], None
    for line in stdout.splitlines():
        if stopped:
            stopped = None if line == f"::{stopped}::" else stopped
        elif match := re.fullmatch(r"::stop-commands::(\w+)", line):
            stopped = match[1]
        elif match := re.fullmatch(r"::(error|warning|notice) title=dsd-refine::(.*)", line):
            found.append((match[1], match[2].replace("%0A", "\n").replace("%0D", "\r").replace("%25", "%")))
    assert stopped is None, "commands stay stopped"
    return found


def filled(text: str, context: dict[str, Any], good: bool) -> str:
    """The text with its expressions replaced by their values."""
    return EXPRESSION.sub(lambda match: str(value_of(match[1], context, good)), text)


def value_of(expression: str, context: dict[str, Any], good: bool) -> Any:
    """The value of an expression. What is not there is the empty text."""
    translated = {"&&": "and", "||": "or", "!": "not", "always": "always", "success": "success"}
    parts = [
        part if part in ("==", "!=", "(", ")") else translated.get(part) or (part if part[0] == "'" else f"look({part!r})")
        for part in TOKEN.findall(expression)
    ]

    def look(name: str) -> str:
        found: Any = context
        for key in name.split("."):
            found = found.get(key, {}) if isinstance(found, dict) else {}
        return found if isinstance(found, str) else ""

    return eval(" ".join(parts), {"look": look, "always": lambda: True, "success": lambda: good})
