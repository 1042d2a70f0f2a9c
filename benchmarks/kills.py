"""Kill runs at random moments until they are through, and compare: `python benchmarks/kills.py [N] [SEED]`.

Two runs of several phases and arms (SGD with BatchNorm, AdamW with dropout) are SIGKILLed N times: at random times, before a
random change to a file, or as by a power cut, where in addition what was not synced is lost. After each kill OUT must be
absent or the whole result; at the end it must hold the bytes of the run that nothing disturbed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/support")]

from forked import Child, alone, command, watched  # noqa: E402

LONGEST_CHAIN = 8  # kills after which a run may end in peace
PHASES = (
    "phases=[{kind: sparse, steps: 4, lr: 0.05, sparsity: 0.5, refresh: 2}, {kind: dense, steps: 3, lr: 0.01, average: ema},"
    " {kind: sparse, steps: 2, lr: 0.01, sparsity: 0.25}, {kind: dense, epochs: 2, lr: 0.005, average: swa}]"
)
OPTIONS = ("--gate", "none", "--device", "cpu", "--quiet", "--save-every", "0", "--control", "dense")
# below 50 kills: fewer phases, one control
SHORT = ("--set", "phases=[{kind: sparse, steps: 3, lr: 0.05, sparsity: 0.5, refresh: 2}, {kind: dense, epochs: 1, lr: 0.01}]")
RUNS = {
    "timm": ("pictures", "--batch-size", "8", "--save-phases", "--control", "random", "--set", PHASES),
    "bert": ("texts.csv", "--batch-size", "4", "--sparsity", "0.3,0.6", "--sparse-steps", "4", "--dense-steps", "4"),
}


@dataclass
class Campaign:
    """What is killed, and what came of it."""

    place: Path
    draw: random.Random
    short: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    kills: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)

    def arguments(self, model: str, out: Path) -> list[Any]:
        data, *options = RUNS[model]
        if self.short and model == "timm":
            options = [*options[:3], *SHORT]
        return [self.place / "made" / model, "--data", self.place / "made" / data, "-o", out, *OPTIONS, *options]

    def undisturbed(self, model: str) -> None:
        """The run to compare with, and how long it takes in seconds and in changes to files."""
        out, counter = self.place / f"whole-{model}", self.place / "changes"

        def count(number: int, event: str, path: Path) -> None:
            descriptor = os.open(counter, os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, b"%08d" % number)
            os.close(descriptor)

        started = time.monotonic()
        expect(Child(watched(command(*self.arguments(model, out)), out, count), self.place / "log"), 0)
        self.seconds[model], self.changes[model] = time.monotonic() - started, int(counter.read_bytes())

    def chain(self, model: str, left: int) -> int:
        """Kill one run until it is through; returns the number of kills, at most `left`."""
        out, kills = self.place / f"out-{model}", 0
        args = [*self.arguments(model, out), "--resume"]
        while kills < min(left, LONGEST_CHAIN):
            how = self.draw.choice([self.at_a_time, self.at_a_change, self.at_a_power_cut])
            code = how(model, args, out)
            if code != -signal.SIGKILL:
                ensure(code == 0, f"a resumed run ended with {code}", self.place / "log")
                break
            kills += 1
            self.kills[how.__name__.removeprefix("at_a_")] += 1
            self.found[self.look(model, out)] += 1
        expect(Child(command(*args), self.place / "log"), 0)
        self.compare(model, out)
        ensure(not out.with_name(out.name + ".partial").exists(), "OUT.partial is left", self.place / "log")
        shutil.rmtree(out)
        return kills

    def at_a_time(self, model: str, args: list[Any], out: Path) -> int:
        child = Child(command(*args), self.place / "log")
        code = child.ended_within(self.draw.uniform(0, self.seconds[model]))
        if code is None:
            child.kill(signal.SIGKILL)
            code = child.wait()
        return code

    def at_a_change(self, model: str, args: list[Any], out: Path) -> int:
        """Before the n-th change to a file; the last ones, which publish, as often as all others."""
        last, wanted = self.changes[model], self.draw.random() < 0.5
        at = self.draw.randint(last - 60, last) if wanted else self.draw.randint(1, last)
        return Child(watched(command(*args), out, die_at(at)), self.place / "log").wait()

    def at_a_power_cut(self, model: str, args: list[Any], out: Path) -> int:
        """The same, and each file that was not synced is cut to a random length above what was."""
        partial, real, draw = out.with_name(out.name + ".partial"), os.fsync, random.Random(self.draw.random())
        there = [path.stat() for path in [*partial.rglob("*"), *out.rglob("*")] if path.is_file()]
        synced = {found.st_ino: found.st_size for found in there}

        def fsync(descriptor: int) -> None:
            real(descriptor)
            synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

        def cut() -> None:
            for path in [path for path in [*partial.rglob("*"), *out.rglob("*")] if path.is_file()]:
                size, inode = path.stat().st_size, path.stat().st_ino
                os.truncate(path, draw.randint(min(size, synced.get(inode, 0)), size))

        def work() -> None:
            os.fsync = fsync
            command(*args)()

        at = self.draw.randint(1, self.changes[model])
        return Child(watched(work, out, die_at(at, cut)), self.place / "log").wait()

    def look(self, model: str, out: Path) -> str:
        """What a kill left. OUT is absent, or it is the whole result."""
        partial = out.with_name(out.name + ".partial")
        if out.exists():
            self.compare(model, out)
            return "OUT published" + (", OUT.partial left" if partial.exists() else "")
        if (partial / "out").exists():
            return "while publishing"
        if not (partial / "state.json").is_file():
            return "nothing saved"
        state = json.loads((partial / "state.json").read_text())
        if list(partial.glob("*.tmp")):
            return "while saving"
        return "within a phase" if state["tensors"] and state.get("progress") else "between phases"

    def compare(self, model: str, out: Path) -> None:
        """OUT holds what the undisturbed run's holds, but for times and its own path in the report and card."""
        one, two = contents(self.place / f"whole-{model}"), contents(out)
        different = sorted(name for name in {**one, **two} if one.get(name) != two.get(name))
        if "dsd/report.json" in different:
            reports = [found.get("dsd/report.json", {}) for found in (one, two)]
            different += [key for key in reports[0] if reports[0][key] != reports[1].get(key)]
        ensure(not different, f"{model}: these differ from the undisturbed run's: {different}", self.place / "log")


def die_at(number: int, before: Callable[[], None] = lambda: None) -> Callable[[int, str, Path], None]:
    """SIGKILL instead of the n-th change."""

    def at(count: int, event: str, path: Path) -> None:
        if count == number:
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    return at


def contents(out: Path) -> dict[str, Any]:
    """Relative name -> what must be equal."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = path.relative_to(out).as_posix()
        found[name] = stripped(json.loads(path.read_text())) if name == "dsd/report.json" else path.read_bytes()
    found.pop("dsd/report.html", None)  # shows the times too
    return found


def stripped(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what differs between two runs of one command."""
    del report["argv"], report["output"]["path"], report["cost"]
    for phase in report["phases"]:
        del phase["seconds"], phase["samples_per_second"]
    return report


def expect(child: Child, code: int) -> None:
    found = child.wait()
    ensure(found == code, f"ended with {found}, not {code}", child.log)


def ensure(right: bool, problem: str, log: Path) -> None:
    if not right:
        raise SystemExit(f"FAILED: {problem}\n{log.read_text(errors='replace')[-3000:]}")


def make(place: Path) -> None:
    import builders

    builders.timm_checkpoint(place / "timm")
    builders.bert_checkpoint(place / "bert")
    builders.image_folder(place / "pictures")
    builders.text_csv(place / "texts.csv", rows=48)


def hashes(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


def main() -> None:
    wanted, seed = (int(text) for text in [*sys.argv[1:3], *["200", "0"][len(sys.argv[1:3]) :]])
    with tempfile.TemporaryDirectory() as place:
        campaign = Campaign(Path(place), random.Random(seed), short=wanted < 50)
        alone(Path(place, "home"))
        expect(Child(lambda: make(Path(place, "made")), Path(place, "log")), 0)
        sources = hashes(Path(place, "made"))
        for model in RUNS:
            campaign.undisturbed(model)
            print(f"{model}: {campaign.seconds[model]:.1f} s, {campaign.changes[model]} changes to files", flush=True)
        done = runs = 0
        while done < wanted:
            done += campaign.chain(list(RUNS)[runs % len(RUNS)], wanted - done)
            runs += 1
        ensure(hashes(Path(place, "made")) == sources, "a source file changed", Path(place, "log"))
        ensure(not [p for p in Path(place).iterdir() if p.name.startswith("out")], "something is left", Path(place, "log"))
    print(f"{done} kills in {runs} runs (seed {seed}), each run ended in the bytes of the undisturbed one")
    for title, counts in (("how", campaign.kills), ("what the kill left", campaign.found)):
        print(f"{title}: " + ", ".join(f"{number} {name}" for name, number in counts.most_common()))


if __name__ == "__main__":
    main()
