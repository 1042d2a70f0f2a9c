"""All methods of recipes/methods on one checkpoint, same budget and seeds: `python benchmarks/methods.py CHECKPOINT DATA OUT`.

Names after OUT run these methods alone, beside the dense control.

One table: accuracy over the seeds, and differences from the source and from the dense control with 95 % intervals over seeds
and rows, from the predictions of each run. For benchmarks/results/methods.txt.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml

from dsd_refine.evidence.compare import over_seeds

ROOT = Path(__file__).parent.parent
SEEDS, EPOCHS, RATE = 5, 16.0, 15.0  # epochs in all, and the factor on the recipes' rates
PLAIN = (
    "--weight-decay", "0.0005", "--batch-size", "64", "--set", "augment={crop: none, flip: 0.0}", "--gate", "none",
    "--warmup-steps", "20", "--holdout", "0", "--control", "none", "--seeds", str(SEEDS), "--quiet", "--overwrite",
)  # fmt: skip


def scaled(recipe: Path) -> list[str]:
    """The recipe's phases with the common budget, as --set. Nothing is selected: each run's end counts."""
    found = yaml.safe_load(recipe.read_text())
    phases = found["phases"]
    share = EPOCHS / sum(phase["epochs"] for phase in phases)
    sets = [] if "keep" in found else ["--keep", "last"]
    for number, phase in enumerate(phases):
        sets += ["--set", f"phases.{number}.epochs={phase['epochs'] * share:g}"]
        sets += ["--set", f"phases.{number}.lr={phase['lr'] * RATE:g}"]
    return sets


def scores(out: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """Right or wrong per row: the source's, and each seed's."""
    table = pq.read_table(out / "dsd/predictions.parquet").to_pydict()
    return np.array(table["score_baseline"]), [np.array(table[f"score_refined_seed{n}"]) for n in range(1, SEEDS + 1)]


def line(name: str, base: np.ndarray, mine: list[np.ndarray], control: list[np.ndarray]) -> str:
    count = np.ones(len(base))
    cells = [f"{name:28}", f"{np.mean(mine):.4f} ± {np.std([one.mean() for one in mine], ddof=1):.4f}"]
    for other in ([base] * SEEDS, control):
        delta, (low, high), _ = over_seeds(mine, other, count, higher_is_better=True)
        cells.append(f"{100 * delta:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]")
    return "  ".join(cells)


def main() -> None:
    checkpoint, data, out = (Path(path) for path in sys.argv[1:4])
    wanted = {"dense-control", *sys.argv[4:]} if len(sys.argv) > 4 else None
    recipes = [path for path in (ROOT / "recipes/methods").glob("*.yaml") if wanted is None or path.stem in wanted]
    recipes.sort(key=lambda path: path.stem != "dense-control")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "transformers"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
    print(f"{checkpoint.name}, {EPOCHS:g} epochs in all, rates x {RATE:g}, {SEEDS} seeds; {' '.join(PLAIN)}\n")
    print(f"{'method':28}  {'accuracy':15}  {'points against the source':25}  against the dense control", flush=True)
    control: list[np.ndarray] = []
    for recipe in recipes:
        target = out / recipe.stem
        run = [str(checkpoint), "--data", str(data), "-o", str(target), "--recipe", recipe.stem, *scaled(recipe), *PLAIN]
        subprocess.run([sys.executable, str(ROOT / "cli.py"), *run], check=True, capture_output=True)
        base, mine = scores(target)
        control = control or mine
        print(line(recipe.stem, base, mine, control), flush=True)


if __name__ == "__main__":
    main()
