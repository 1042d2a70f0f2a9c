"""A process whose standard streams somebody has closed: a daemon's, a shell's `2>&-`."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, SHORT, environment, hashes
from runs import fresh, run_command

CLOSED = {"stderr": "2>&-", "stdout": ">&-", "both": ">&- 2>&-", "all": "<&- >&- 2>&-"}
# what it opens gets the lowest free number; what a library says on descriptor 2 must not land in it
OPENS = """
import os, sys
from dsd_refine.cli.streams import fill_streams
fill_streams()
with open(sys.argv[1], "w") as file:
    for number in (1, 2):
        os.write(number, b"noise")
    print("noise")
    print("noise", file=sys.stderr)
    assert sys.stdin.read() == ""
    file.write("mine")
"""


def closed(streams, *args):
    shell = f'exec "$@" {CLOSED[streams]}'
    return subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, *map(str, args)],
        cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("streams", CLOSED)
def test_no_file_gets_the_number_of_a_closed_stream(tmp_path, streams):
    assert closed(streams, "-c", OPENS, tmp_path / "file").returncode == 0
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("streams", CLOSED)
def test_the_command_ends_with_its_own_exit_code(streams):
    for args, code in ((("--help",), 0), (("recipes",), 0), (("recipes", "show", "nosuch"), 2)):
        found = closed(streams, "-m", "dsd_refine", *args)
        assert found.returncode == code, (args, found.stderr)
        assert "Traceback" not in found.stderr


def without_stderr(*args):
    os.close(2)
    sys.stderr = None  # as Python has it then
    run_command(*args)


@pytest.mark.parametrize("streams", ["stderr", "all"])
def test_a_run_without_streams_is_as_any_other(command, made, tmp_path, streams):
    args = ("run", made / "bert", "--data", made / "texts.csv", *SHORT)
    here = (*args, "-o", tmp_path / "out")
    done = fresh(without_stderr, *here) if streams == "stderr" else closed(streams, "-m", "dsd_refine", *here)
    assert done.returncode == 0
    assert command(*args, "-o", tmp_path / "seen").code == 0
    ours, theirs = hashes(tmp_path / "out"), hashes(tmp_path / "seen")
    shown = {"README.md", "dsd/report.html", "dsd/report.json", "dsd/log.jsonl"}  # times, and the output's own name
    assert {n: d for n, d in ours.items() if n not in shown} == {n: d for n, d in theirs.items() if n not in shown}
    for line in (tmp_path / "out/dsd/log.jsonl").read_text().splitlines():
        json.loads(line)
