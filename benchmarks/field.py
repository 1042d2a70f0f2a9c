"""Cases from the field against this checkout: `python benchmarks/field.py OUT [--only A1,B3] [--before]`.

Each case is a small model and data set of a kind that users have, made in OUT/CASE without a network; the command runs on
it in a process of its own, and what it did is held against what is right. Ends with a count, and exit code 1 if any case
is not right.

--only: these cases alone; a letter is a whole section. --before: in a checkout of release 0.1.0 (1b0519c, with this
folder's field.py and field_cases/ copied into it), whether the table's column "before" is true.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/support")]

from common import machine  # noqa: E402
from field_cases import dropped, refusals, wording  # noqa: E402
from field_cases.common import Case, Checked, Result  # noqa: E402
from forked import Child, alone  # noqa: E402

SECTIONS = {
    "Something was dropped or taken without a word": dropped.CASES,
    "Refused, and should not be": refusals.CASES,
    "Refused rightly, with words that lead nowhere": wording.CASES,
}
TIMEOUT = 180  # seconds of a case
TIMED_OUT = 124  # stands for the exit code of one that took longer
WIDTH = 118


def ran(case: Case, place: Path) -> Result | None:
    """What the command did, or None where the case itself could not be made."""
    folder = place / case.id
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    told = folder / "stdout.txt"

    def work() -> None:
        from dsd_refine.cli.app import main

        arguments = [str(argument) for argument in case.make(folder)]
        told.touch()
        os.dup2(os.open(told, os.O_WRONLY), 1)
        os.chdir(folder)
        main(arguments)

    try:
        code = Child(work, folder / "stderr.txt").wait(TIMEOUT)
    except TimeoutError:
        code = TIMED_OUT
    if not told.is_file():
        return None
    return Result(code, told.read_text(errors="replace"), (folder / "stderr.txt").read_text(errors="replace"), folder)


def judged(case: Case, result: Result) -> Checked:
    """The decisive fact of what a case did, and whether it is right."""
    if result.code == TIMED_OUT:
        return f"did not end in {TIMEOUT} s: {result.message}", False
    if result.crashed:
        return f"traceback: {result.message}", False
    try:
        return case.check(result)
    except Exception as error:  # a report of another shape than the check knows
        return f"cannot be judged: {error!r}", False


def was_so(case: Case, result: Result, right: bool) -> bool:
    """Is what a case did what the column "before" says?"""
    code, pattern = case.was
    held = "\n".join([result.err, result.out, str(result.report)])
    return result.code == code and bool(re.search(pattern, held)) and right == case.already


def looked_at(case: Case, place: Path, before: bool) -> Checked:
    """What a case did, and whether that is right; with `before`, whether it is what the table says of it."""
    result = ran(case, place)
    if result is None:
        return f"the case could not be made, see {place / case.id / 'stderr.txt'}", False
    fact, right = judged(case, result)
    return f"exit {result.code}: {fact}", was_so(case, result, right) if before else right


def show(case: Case, now: str, question: str, good: bool) -> None:
    print(f"\n{case.id:<5}{case.name}")
    for title, text in (("before", case.before), ("now", now), (question, "yes" if good else "NO")):
        short = textwrap.shorten(text, 400, placeholder=" …")
        print(textwrap.fill(short, WIDTH, initial_indent=f"     {title:<8}", subsequent_indent=" " * 13), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="where the cases are made")
    parser.add_argument("--only", default="", help="cases or sections, by comma")
    parser.add_argument("--before", action="store_true", help="hold the column `before` against a checkout of 0.1.0")
    given = parser.parse_args()
    place = given.out.resolve()
    place.mkdir(parents=True, exist_ok=True)
    only = {name.strip() for name in given.only.split(",") if name.strip()}
    alone(place / "home")
    print(machine())
    started, right, count = time.monotonic(), 0, 0
    for title, cases in SECTIONS.items():
        chosen = [case for case in cases if not only or only & {case.id, case.id[0]}]
        if chosen:
            print(f"\n{title}\n{'=' * len(title)}")
        for case in chosen:
            now, good = looked_at(case, place, given.before)
            now = now.replace(str(place), given.out.name)  # the table is of cases, not of a machine
            show(case, now, "true?" if given.before else "right?", good)
            right, count = right + good, count + 1
    words = "as the table says" if given.before else "right"
    print(f"\n{right} of {count} {words}, in {(time.monotonic() - started) / 60:.1f} minutes")
    return int(right < count)


if __name__ == "__main__":
    sys.exit(main())
