"""Feed the command broken and hostile files: `python benchmarks/fuzz.py [N] [SEED] [KIND … | NUMBER …]`.

KINDs: of these files alone. NUMBERs: of the N cases these alone, again.

Each case is a seeded mutation of good files, or a file made to harm (tests/support/hostile.py), in a process of its
own. Held against: exit code 0 or 2 (3 for `verify`, 5 where the weights themselves cannot be computed with), never a
traceback, 30 s of computing, 2 GiB, a file outside the output, a program or a connection started.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/support")]

from forked import Child, alone, command, limited  # noqa: E402
from hostile import CASES, FEW, make_good  # noqa: E402

SECONDS, MEMORY = 30, 2 << 30
ENDLESS = 99  # stands for the exit code of a run that was still training, as it was told
FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "webbrowser.open")
FINITE = ("finite", "the loss of step", "holds values that")


@dataclass
class Campaign:
    """Where cases are made, and what came of them."""

    place: Path
    seed: int
    codes: dict[str, Counter[int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    most: dict[str, float] = field(default_factory=lambda: {"seconds": 0.0, "memory": 0.0})

    @property
    def made(self) -> Path:
        return self.place / "made"

    def prepare(self) -> None:
        """The good files, a finished run and a stopped one."""
        self.expect(lambda: make_good(self.made), 0)
        bert = (self.made / "bert", "--data", self.made / "texts.csv", *FEW)
        self.expect(command(*bert, "-o", self.made / "finished"), 0)
        self.expect(lambda: stopped(*bert, "-o", self.made / "stopped"), 4)

    def expect(self, work: Any, code: int) -> None:
        child = Child(work, self.place / "log")
        if child.wait() != code:
            raise SystemExit(f"the good files cannot be made: {child.said()}")

    def one(self, number: int, kind: str) -> None:
        """Make a case, run it, judge it."""
        folder = self.place / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        args = CASES[kind](Random(f"{self.seed} {number}"), folder, self.made)
        before, started = listed(folder), time.monotonic()
        child = Child(limited(self.watched(args, folder), RLIMIT_CPU=SECONDS + 5, RLIMIT_AS=16 << 30), self.place / "log")
        _, status, used = os.wait4(child.pid, 0)
        code, seconds, memory = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss << 10
        if code < 0 and kind == "recipe" and (folder / "out.partial/log.jsonl").is_file():
            code, seconds = ENDLESS, 0  # it trains, for as long as its recipe says
        self.codes.setdefault(kind, Counter())[code] += 1
        self.most = {"seconds": max(self.most["seconds"], seconds), "memory": max(self.most["memory"], memory)}
        wrong = judged(code, child.said(), args)
        wrong += ["hang"] if max(seconds, (time.monotonic() - started) / 8) > SECONDS else []  # the machine may be busy
        wrong += ["memory"] if memory > MEMORY else []
        wrong += [f"wrote {name}" for name in sorted(listed(folder) - before)]
        if wrong:
            self.keep(number, kind, wrong, args, child.said(), folder)

    def watched(self, args: list[Any], folder: Path) -> Any:
        """The work of a child that says which forbidden thing it does."""
        allowed = (
            str(folder / "out"),
            str(self.place / "home"),
            str(folder / "tmp"),
            "/dev/",
            "/proc/",
            str(self.place / "log"),
        )

        def hook(event: str, given: tuple[Any, ...]) -> None:
            if event.startswith(FORBIDDEN):
                os.write(2, f"FORBIDDEN {event} {given!r:.300}\n".encode())
            if event == "open" and writes(given) and not os.path.abspath(given[0]).startswith(allowed):
                os.write(2, f"FORBIDDEN write {given[0]}\n".encode())

        def work() -> None:
            (folder / "tmp").mkdir()
            tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "tmp")
            os.chdir(folder / "tmp")
            sys.addaudithook(hook)
            command(*args)()

        return work

    def keep(self, number: int, kind: str, wrong: list[str], args: list[Any], said: str, folder: Path) -> None:
        """Keep a case that went wrong, to be looked at."""
        shown = " ".join(map(str, args)).replace(f"{self.place}/", "")
        self.problems.append(
            f"case {number} ({kind}): {', '.join(wrong)}\n  {shown}\n  "
            + "\n  ".join(line[:300] for line in said.splitlines()[-6:])
        )
        print(self.problems[-1], flush=True)
        if "KEEP" in os.environ:
            shutil.copytree(folder, Path(os.environ["KEEP"], f"{kind}-{number}"), symlinks=True, ignore=not_regular)


def writes(given: tuple[Any, ...]) -> bool:
    """Is this event the opening of a named file to write?"""
    return isinstance(given[0], str) and isinstance(given[2], int) and bool(given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def stopped(*args: Any) -> None:
    """A run that is told to stop in its first step."""
    from dsd_refine.training import loop as train

    step = train.train_step

    def asked(loop: Any, *given: Any) -> Any:
        loop.stopping = lambda: True
        return step(loop, *given)

    train.train_step = asked
    command(*args)()


def judged(code: int, said: str, args: list[Any]) -> list[str]:
    """What is wrong with how a case ended."""
    right = (0, 2, 3) if args[0] == "verify" else (0, 2, ENDLESS)
    wrong = [] if code in right or (code == 5 and any(word in said for word in FINITE)) else [f"exit code {code}"]
    wrong += ["traceback"] if "Traceback" in said else []
    wrong += ["forbidden"] if "FORBIDDEN" in said else []
    if code == 2 and (len(said.strip().splitlines()) > 10 or len(said) > 4000 or "Error: " not in said):
        wrong.append("message")
    return wrong


def listed(folder: Path) -> set[str]:
    """Everything in a case's folder but its output and what is temporary."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return {name for name in names if name.split("/")[0] not in ("out", "out.partial", "tmp")}


def not_regular(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not Path(folder, name).is_dir() and not Path(folder, name).is_file()]


def main() -> None:
    given = sys.argv[1:]
    wanted, seed = (int(text) for text in [*given[:2], *["5000", "0"][len(given[:2]) :]])
    again = [int(text) for text in given[2:] if text.isdigit()]
    kinds = [text for text in given[2:] if not text.isdigit()] or list(CASES)
    with tempfile.TemporaryDirectory() as place:
        campaign = Campaign(Path(place), seed)
        alone(Path(place, "home"))
        campaign.prepare()
        for number in again or range(wanted):
            campaign.one(number, kinds[number % len(kinds)])
    print(f"{len(again) or wanted} cases (seed {seed}), {len(campaign.problems)} gone wrong; the most that one took: "
          f"{campaign.most['seconds']:.1f} s of computing, {campaign.most['memory'] / 2**20:.0f} MiB")  # fmt: skip
    for kind, codes in sorted(campaign.codes.items()):
        print(f"  {kind}: " + ", ".join(f"{count} x exit {code}" for code, count in sorted(codes.items())))
    sys.exit(bool(campaign.problems))


if __name__ == "__main__":
    main()
