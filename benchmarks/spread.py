"""Time of tries side by side: `python benchmarks/spread.py [--rounds N]`.

Four tries of a small Llama (two arms, two seeds) are trained by one process, and by two with `--spread tries`, each with one
thread, in turn. What counts is the time of the run: from its first check to the published output, without the start of
Python. With `--cpu` it is the processor's time of the process that takes longest, for a machine that others use.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from common import arguments, machine, place, table, verdict
from made import words
from sharded import LENGTH, TINY, refined, source

RUN = (
    "--lr", "0.01", "--optimizer", "sgd", "--batch-size", "8", "--max-length", str(LENGTH), "--control", "dense",
    "--seeds", "2", "--gate", "none", "--holdout", "0", "--keep", "last", "--set", "phases.1.average=none", "--device", "cpu",
    "--quiet",
)  # fmt: skip
GOAL = 1.8  # times as fast with two processes


def one_process(folder: Path, out: str, steps: str, *options: str) -> None:
    """Refine in one of the processes that torchrun started, and print the seconds. A tiny model first loads the libraries."""
    torch.set_num_threads(1)
    given = (*RUN, "--sparse-steps", steps, "--dense-steps", steps, *options)
    refined(folder / "tiny", folder / "texts.txt", folder / f"{out}-tiny", *given)
    wall, cpu = time.perf_counter(), time.process_time()
    code = refined(folder / "model", folder / "texts.txt", folder / out, *given)
    print(f"process: {time.perf_counter() - wall} {time.process_time() - cpu} {code}", flush=True)


def measured(folder: Path, processes: int, out: str, cpu: bool, *options: str) -> float:
    """Run so many processes, and return the seconds of the one that takes longest."""
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port", 29510 + processes)
    command = [sys.executable, *map(str, (*launch, __file__, folder, out, *options))]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("process: ")]
    if done.returncode or len(lines) != processes or any(code != "0" for _, _, code in lines):
        sys.exit(f"the run failed:\n{done.stdout}\n{done.stderr[-3000:]}")
    return max(float(line[cpu]) for line in lines)


def main() -> None:
    """Print the seconds of both, and their ratio."""
    given = arguments(__doc__, 3)
    steps = "5" if given.quick else "60"
    with place() as folder:
        source(folder / "tiny", "llama", *TINY)
        source(folder / "model", "llama", 384, 1024, 6)
        (folder / "texts.txt").write_text("\n\n".join(words(96, LENGTH)))
        print(machine())
        one, two = list[float](), list[float]()
        for number in range(given.rounds):
            one.append(measured(folder, 1, f"one-{number}", given.cpu, steps))
            two.append(measured(folder, 2, f"two-{number}", given.cpu, steps, "--spread", "tries"))
        rows = [["one process", f"{median(one):.1f}"], ["two processes, --spread tries", f"{median(two):.1f}"]]
        table("seconds of the run, " + ("of the processor" if given.cpu else "by the clock"), ["", "seconds"], rows)
        times = median(a / b for a, b in zip(one, two, strict=True))
        verdict("two processes, times as fast as one", times, GOAL, at_least=True)


if __name__ == "__main__":
    one_process(Path(sys.argv[1]), *sys.argv[2:]) if "RANK" in os.environ else main()
