"""What more rows cost: `python benchmarks/growth.py [--quick]`.

One epoch of a small model over 1x, 4x and 16x rows, as whole commands: pictures in class folders, a CSV of texts. Time: what
each further row adds, between 4x and 16x against between 1x and 4x. Memory: the most anonymous memory of the process.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median

from common import ROOT, _lines, arguments, machine, place, table, verdict
from made import bert_folder, pictures, text_table, timm_folder

TIMES = (1, 4, 16)
BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
OPTIONS = (
    "--sparse-epochs", "1", "--dense-steps", "0", "--holdout", "0", "--keep", "last", "--control", "none", "--gate", "none",
    "--device", "cpu", "--batch-size", "64", "--quiet", "--overwrite",
)  # fmt: skip


def run(model: Path, data: Path, out: Path) -> tuple[float, int]:
    """Seconds and most anonymous bytes of a whole command."""
    command = [sys.executable, str(ROOT / "cli.py"), str(model), "--data", str(data), "-o", str(out), *OPTIONS]
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    most = [0]

    def watch() -> None:
        while child.poll() is None:
            most.append(anonymous(child.pid))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, said = child.communicate()
    watcher.join()
    if child.returncode:
        sys.exit(f"a run failed: {said[-1000:]}")
    return time.perf_counter() - began, max(most)


def anonymous(process: int) -> int:
    try:
        lines = _lines(f"/proc/{process}/status")
    except OSError:  # it has just ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def image_sets(folder: Path, least: int) -> tuple[Path, dict[int, Path]]:
    model = timm_folder(folder / "model", "test_resnet", 10, 32)
    for times in TIMES:
        pictures(folder / f"{times}/train", least * times, 40)
        pictures(folder / f"{times}/test", least * times // 4, 40, seed=1)
    return model, {times: folder / str(times) for times in TIMES}


def text_sets(folder: Path, least: int) -> tuple[Path, dict[int, Path]]:
    model = bert_folder(folder / "model", 32, **BERT)
    return model, {times: text_table(folder / f"{times}.csv", least * times, 25) for times in TIMES}


def measure(title: str, model: Path, data: dict[int, Path], folder: Path, least: int, rounds: int) -> None:
    """Rounds of all sizes in turn; medians."""
    found: dict[int, list[tuple[float, int]]] = {times: [] for times in data}
    for number in range(rounds):
        order = list(data)[number % 3 :] + list(data)[: number % 3]
        for times in order:
            found[times].append(run(model, data[times], folder / "out"))
    seconds = {times: median(one for one, _ in runs) for times, runs in found.items()}
    memory = {times: median(one for _, one in runs) for times, runs in found.items()}
    rows = [
        [f"{x}x: {least * x:,} rows", f"{seconds[x]:.2f}", f"{memory[x] / 1e6:.0f} MB", f"{memory[x] / memory[1]:.3f}"]
        for x in data
    ]
    table(title, ["", "seconds", "most memory", "/ 1x"], rows)
    first, second = (seconds[4] - seconds[1]) / 3, (seconds[16] - seconds[4]) / 12
    print(f"  a further {least:,} rows: {first:.3f} s between 1x and 4x, {second:.3f} s between 4x and 16x")
    verdict("time of a further row, late / early", second / first, 1.05)
    verdict("memory, 16x / 1x", memory[16] / memory[1], 1.05)


def main() -> None:
    given = arguments(__doc__, 7)
    print(machine())
    for title, make, least in (("Pictures", image_sets, 2000), ("Texts", text_sets, 4000)):
        least = least // 10 if given.quick else least
        with place() as folder:
            model, data = make(folder, least)
            measure(f"{title}, one epoch of a small model", model, data, folder, least, given.rounds)


if __name__ == "__main__":
    sys.exit(main())
