"""One checkpoint, all arms, several seeds: `python benchmarks/seeds.py CHECKPOINT DATA OUT`.

Prints the command's summary, with the spread over the seeds, for benchmarks/results/seeds.txt.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
OPTIONS = (
    "--control", "dense", "--control", "random", "--seeds", "5", "--sparsity", "0.3,0.5", "--sparse-epochs", "8",
    "--dense-epochs", "8", "--lr", "0.15", "--weight-decay", "0.0005", "--warmup-steps", "20", "--set",
    "augment={crop: none, flip: 0.0}", "--gate", "none",
)  # fmt: skip


def main() -> None:
    checkpoint, data, out = sys.argv[1:4]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "transformers"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}\n")
    print(f"$ dsd-refine {Path(checkpoint).name} {' '.join(OPTIONS)}\n", flush=True)
    command = [sys.executable, str(ROOT / "cli.py"), checkpoint, "--data", data, "-o", out, "--overwrite", "--quiet", *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(done.stdout.replace(f"{Path(out).parent}/", "").replace(f"{Path(checkpoint).parent}/", ""))


if __name__ == "__main__":
    main()
